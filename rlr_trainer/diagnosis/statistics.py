"""Unbiased statistics of noisy gradients: tensors in, numbers out.

Every quantity of interest is a function of mean gradients, and the squared norm of a sample mean is not the squared norm of the
mean: it is larger by variance / n, which for gradient estimates is often a thousand times the signal. So squares and products of
means are taken over pairs of different batches only (U-statistics), which makes them unbiased, and possibly negative.

Notation: c_b is the candidate's update on batch b = 0..n-1; r_b the reference's on batch b = 0..N-1, of which the first n are the
same batches (same rollouts: common random numbers) and the other m = N - n are extra. Batches are independent of each other. P is the
number of entries of a gradient. "Total variance" is the trace of the covariance matrix of one update.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

RESOLVED = 3.0  # standard errors from 0 at which a quantity counts as seen
MINIMUM_BATCHES = 5  # with fewer, a standard error is a guess


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A number and its standard error; either is None where it cannot be had."""

    value: float | None
    error: float | None

    def exceeds(self, errors: float) -> bool:
        """Whether the value is above 0 by so many standard errors."""
        return self.value is not None and self.error is not None and self.value > errors * self.error

    @property
    def resolved(self) -> bool:
        """Whether the value is above 0 by `RESOLVED` standard errors."""
        return self.exceeds(RESOLVED)

    @classmethod
    def of(cls, value: float, error: float) -> Estimate:
        """None for what is not finite."""
        return cls(value if math.isfinite(value) else None, error if math.isfinite(error) else None)

    def over(self, seconds: float | None) -> Estimate:
        """The estimate per second; unknown without a time."""
        if self.value is None or not seconds:
            return UNKNOWN
        return Estimate(self.value / seconds, None if self.error is None else self.error / seconds)


UNKNOWN = Estimate(None, None)
EXACTLY_ONE = Estimate(1.0, 0.0)


def product_of_powers(*factors: tuple[Estimate, float]) -> Estimate:
    """The product of value ** power, with the error of independent factors; unknown unless all values are above 0."""
    value, square = 1.0, 0.0
    for estimate, power in factors:
        if estimate.value is None or not estimate.value > 0:
            return UNKNOWN
        value *= estimate.value**power
        square += (power * (math.nan if estimate.error is None else estimate.error) / estimate.value) ** 2
    return Estimate.of(value, value * math.sqrt(square))


class Sum(NamedTuple):
    """A sum of inner products over pairs of batches, [1 + N]: over all batches, then without each of them.

    Attributes:
        all: over all pairs.
        same: over those of a batch with itself.
    """

    all: Tensor
    same: Tensor

    @property
    def different(self) -> Tensor:
        """Over the pairs of two different batches."""
        return self.all - self.same


@dataclasses.dataclass(frozen=True)
class Products:
    """Sums of inner products of updates: all that the statistics need of them.

    A statistic is a function of these and gets its leave-one-out values along with it.

    Attributes:
        n, total: [1 + N], numbers n and N of batches.
        cc, cr, ur, rr: of <c_a, c_b>, <c_a, r_b>, <c_a / |c_a|, r_b> and <r_a, r_b>.
        cr_paired, rr_paired: the part with a, b < n.
        rr_extra: the part with a, b >= n.
    """

    n: Tensor
    total: Tensor
    cc: Sum
    cr: Sum
    ur: Sum
    rr: Sum
    cr_paired: Sum
    rr_paired: Sum
    rr_extra: Sum

    @classmethod
    def of(cls, candidate: Tensor, reference: Tensor) -> Products:
        """From the candidate's updates [n, P] and the reference's [N, P], those of the same batches first.

        Raises:
            ValueError: fewer reference than candidate batches, or different P.
        """
        n, total = len(candidate), len(reference)
        if candidate.shape[1] != reference.shape[1] or n > total:
            raise ValueError(
                f"candidate {tuple(candidate.shape)} and reference {tuple(reference.shape)}: must have the same number of entries, "
                "and at least as many reference batches as candidate batches"
            )
        c, r = candidate.double(), reference.double()
        with_reference, of_reference = c @ r.mT, r @ r.mT
        unit = c / c.norm(dim=1, keepdim=True).clamp_min(1e-300)
        each = torch.ones(total, dtype=torch.float64)
        return cls(
            n=_whole_and_without(torch.cat([each[:n], torch.zeros(total - n)])),
            total=_whole_and_without(each),
            cc=_sum(c @ c.mT, total),
            cr=_sum(with_reference, total),
            ur=_sum(unit @ r.mT, total),
            rr=_sum(of_reference, total),
            cr_paired=_sum(with_reference[:, :n], total),
            rr_paired=_sum(of_reference[:n, :n], total),
            rr_extra=_sum(of_reference[n:, n:], total, first=n),
        )

    @property
    def num_paired(self) -> int:
        return int(self.n[0])


def _sum(block: Tensor, count: int, first: int = 0) -> Sum:
    """Sums over inner products [rows, columns], whose rows and columns begin at batch `first` of `count`."""
    rows, columns = block.shape
    products = block.new_zeros(count, count)
    products[first : first + rows, first : first + columns] = block
    same = products.diagonal()
    whole = products.sum()
    without = whole - (products.sum(0) + products.sum(1) - same)
    return Sum(torch.cat([whole[None], without]), _whole_and_without(same))


def _whole_and_without(parts: Tensor) -> Tensor:
    """The sum of N parts, and without each of them, [1 + N]."""
    return torch.cat([parts.sum()[None], parts.sum() - parts])


Statistic = Callable[[Products], Tensor]  # [1 + N], NaN or infinite where the batches do not suffice


def mean_square(p: Products) -> Tensor:
    """|E c|^2."""
    return p.cc.different / (p.n * (p.n - 1))


def total_variance(p: Products) -> Tensor:
    """Trace of the covariance of one update c."""
    return (p.cc.same - p.cc.all / p.n) / (p.n - 1)


def largest_share(p: Products) -> float | None:
    """Largest share of the sum of squared deviations |c_b - mean|^2 that goes when one batch is left out; None for fewer than three.

    About 1 / n without heavy tails. Near 1 the variance is that of one batch, and its jackknife error says little.
    """
    if p.num_paired < 3:
        return None
    deviations = p.cc.same - p.cc.all / p.n
    return float(1 - deviations[1 : p.num_paired + 1].min() / deviations[0]) if deviations[0] > 0 else None


def reference_square(p: Products) -> Tensor:
    """|E r|^2."""
    return p.rr.different / (p.total * (p.total - 1))


def mean_product(p: Products) -> Tensor:
    """<E c, E r>."""
    return p.cr.different / (p.n * (p.total - 1))


def bias_square(p: Products) -> Tensor:
    """|E c - E r|^2, unbiased.

    E c - E r is estimated by mean(c_b - beta r_b) - (1 - beta) mean of the extra r_e: for any beta the same expectation. beta = 1 is
    the paired difference, whose shared noise cancels; beta = n / N ignores the pairing. Used is the one with the least variance, from
    the total variances of the data themselves (one number fitted to n * P: the dependence is negligible).
    """
    extra = p.total - p.n
    covariance = (p.cr_paired.same - p.cr_paired.all / p.n) / (p.n - 1)  # of c_b and r_b on the same batch
    reference_variance = (p.rr.same - p.rr.all / p.total) / (p.total - 1)
    best = (extra * covariance / reference_variance + p.n) / p.total
    beta = torch.where((extra > 1) & torch.isfinite(best), best.clamp(0, 1), 1.0)
    paired = p.cc.different - 2 * beta * p.cr_paired.different + beta**2 * p.rr_paired.different
    candidate_extra = p.cr.all - p.cr_paired.all
    reference_extra = (p.rr.all - p.rr_paired.all - p.rr_extra.all) / 2
    crossed = (candidate_extra - beta * reference_extra) / (p.n * extra)
    rest = (1 - beta) ** 2 * p.rr_extra.different / (extra * (extra - 1)) - 2 * (1 - beta) * crossed
    return paired / (p.n * (p.n - 1)) + torch.where(beta < 1, rest, 0.0)


def relative_bias_square(p: Products) -> Tensor:
    """|E c - E r|^2 / |E r|^2."""
    return _over(bias_square(p), reference_square(p))


def captured(p: Products) -> Tensor:
    """<E c, E r> / |E r|^2: how much of the reference gradient the mean update contains; 1 for an unbiased candidate."""
    return _over(mean_product(p), reference_square(p))


def relative_std(p: Products) -> Tensor:
    """Square root of the total variance of one update, over |E r|."""
    return _over(total_variance(p), reference_square(p)).sqrt()


def cosine_of_mean(p: Products) -> Tensor:
    """Cosine between E c and E r."""
    return _over(mean_product(p), (mean_square(p) * reference_square(p)).sqrt())


def cosine_of_one(p: Products) -> Tensor:
    """Mean cosine between one update c_b and E r; the products with r leave out the batch's own."""
    return _over(p.ur.different / (p.n * (p.total - 1)), reference_square(p).sqrt())


def precision(p: Products) -> Tensor:
    """(captured |E r|)^2 / total variance: the squared signal-to-noise ratio of one update; negative if captured is."""
    share = mean_product(p)
    return _over(share * share.abs(), total_variance(p) * reference_square(p))


def unbiased_precision(p: Products) -> Tensor:
    """The same for a candidate known to be unbiased: |E r|^2 / total variance. Free of the noise in the captured share."""
    return _over(reference_square(p), total_variance(p))


def _over(numerator: Tensor, denominator: Tensor) -> Tensor:
    """The quotient; NaN where the denominator, a square or a root of one, is not above 0."""
    return torch.where(denominator > 0, numerator / denominator, math.nan)


def jackknife(statistic: Statistic, products: Products) -> Estimate:
    """A statistic with its standard error, by leaving out one batch at a time (two-sample jackknife: paired and extra batches).

    For a square whose true value is 0 the error comes out too large by about sqrt(2): on the safe side.
    """
    values, n = statistic(products), products.num_paired
    if n < 3:
        return Estimate.of(float(values[0]), math.nan)
    parts = [part for part in (values[1 : n + 1], values[n + 1 :]) if len(part) > 1]
    variance = sum((len(part) - 1) * float(part.var(correction=0)) for part in parts)
    return Estimate.of(float(values[0]), math.sqrt(variance))


@dataclasses.dataclass(frozen=True)
class RelativeBias:
    """A measured bias, relative to the reference gradient's norm.

    Attributes:
        value: sqrt(|E c - E r|^2 / |E r|^2) where that was seen, else None.
        error: its standard error, None where no bias was seen.
        upper: the bias is below this (two standard errors above the measured square); None where nothing can be said.
        verdict: "biased", "none seen" (a bias above `detectable` would have been), "underpowered", or "reference" (is the reference).
    """

    value: float | None
    error: float | None
    upper: float | None
    verdict: str


def judge_bias(products: Products, detectable: float, limit: float = RESOLVED) -> RelativeBias:
    """Decides whether a bias was seen, from the U-statistic and its jackknife error.

    Args:
        detectable: relative bias that must not go unseen for "none seen" to be said.
        limit: standard errors from which a bias counts as seen.
    """
    square = jackknife(relative_bias_square, products)
    reference = jackknife(reference_square, products)
    if square.value is None or square.error is None or products.num_paired < MINIMUM_BATCHES or not reference.resolved:
        return RelativeBias(None, None, None, "underpowered")
    upper = math.sqrt(max(square.value, 0.0) + 2 * square.error)
    if square.exceeds(limit):
        root = math.sqrt(square.value)
        return RelativeBias(root, square.error / (2 * root), upper, "biased")
    return RelativeBias(None, None, upper, "none seen" if upper <= detectable else "underpowered")


class RunningMoments:
    """Mean squares and total variances of a family of vectors over batches, without keeping the batches.

    Takes one tensor [F, P] per batch (F vectors, say one per denoising step) and keeps its sum and a few numbers per batch. The results
    are pairs of [F]: values and their standard errors, NaN for too few batches.
    """

    def __init__(self) -> None:
        self.count = 0
        self.total: Tensor | None = None  # [F, P]
        self.with_earlier: list[Tensor] = []  # [F] each, inner product of g_b with the sum of the earlier batches
        self.deviations: list[Tensor] = []  # [F] each, b / (b + 1) |g_b - mean of the earlier batches|^2

    def add(self, vectors: Tensor) -> None:
        """Takes in one batch, [F, P]."""
        vectors = vectors.double()
        total = torch.zeros_like(vectors) if self.total is None else self.total
        self.with_earlier.append((vectors * total).sum(1))
        deviation = ((vectors - total / max(self.count, 1)) ** 2).sum(1)
        self.deviations.append(deviation * self.count / (self.count + 1))
        self.total = total + vectors
        self.count += 1

    def mean_squares(self) -> tuple[Tensor, Tensor]:
        """|E g_f|^2, unbiased; errors from `MINIMUM_BATCHES` on.

        The mean square is 2 / (n (n - 1)) times the sum of q_b = <g_b, g_0 + ... + g_(b-1)>. Without a signal the q_b have mean 0
        whatever came before, so the sum of their squares is the variance of their sum; a signal's own part of q_b is subtracted.
        """
        products, pairs = torch.stack(self.with_earlier), self.count * (self.count - 1) / 2
        squares = products.sum(0) / pairs if pairs else torch.full_like(products[0], math.nan)
        if self.count < MINIMUM_BATCHES:
            return squares, torch.full_like(squares, math.nan)
        signal = torch.arange(self.count).double()[:, None] * squares
        return squares, ((products - signal) ** 2).sum(0).sqrt() / pairs

    def variances(self) -> tuple[Tensor, Tensor]:
        """Total variance of one batch's vector, unbiased; errors, from the spread of the deviations, from four batches on."""
        deviations = torch.stack(self.deviations)[1:]
        if self.count < 4:
            return deviations.mean(0), torch.full_like(self.deviations[0], math.nan)
        return deviations.mean(0), deviations.std(0) / math.sqrt(len(deviations))
