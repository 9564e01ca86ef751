"""Unbiased statistics of noisy gradients: tensors in, numbers out.

Every quantity of interest is a function of mean gradients, and the squared norm of a sample mean is not the squared norm of the
mean: it is larger by variance / n, which for gradient estimates is often a thousand times the signal. So squares and products of
means are taken over pairs of different batches only (U-statistics), which makes them unbiased, and possibly negative.

Notation: c_b is the candidate's update on batch b = 0..n-1, r_b the reference's on the same batch (same rollouts: common random
numbers), x_e the reference's on m extra batches of their own. Batches are independent of each other. P is the number of entries of a
gradient. "Total variance" is the trace of the covariance matrix of one update.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import torch
from torch import Tensor

RESOLVED = 3.0  # standard errors from 0 at which a quantity counts as seen
MINIMUM_BATCHES = 5  # with fewer, a standard error is a guess


@dataclasses.dataclass(frozen=True)
class Estimate:
    """A number and its standard error; either is None where it cannot be had."""

    value: float | None
    error: float | None

    @property
    def resolved(self) -> bool:
        """Whether the value is above 0 by `RESOLVED` standard errors."""
        return self.exceeds(RESOLVED)

    def exceeds(self, errors: float) -> bool:
        """Whether the value is above 0 by so many standard errors."""
        return self.value is not None and self.error is not None and self.value > errors * self.error

    @classmethod
    def of(cls, value: float, error: float) -> Estimate:
        """None for what is not finite."""
        return cls(value if math.isfinite(value) else None, error if math.isfinite(error) else None)


@dataclasses.dataclass(frozen=True)
class Products:
    """Sums of inner products of updates: all that the statistics need of them.

    Every field is float64 [1 + n + m]: of all batches, then without paired batch 0..n-1, then without extra batch 0..m-1. A statistic
    is a function of these and gets its leave-one-out values along with it.

    Attributes:
        n, m: number of paired and of extra batches.
        cc, cr, rr, ur: sums over a, b of <c_a, c_b>, <c_a, r_b>, <r_a, r_b> and <c_a / |c_a|, r_b>.
        cc_same, cr_same, rr_same, ur_same: the part of them with a = b.
        cx, rx, ux: sums over b, e of <c_b, x_e>, <r_b, x_e> and <c_b / |c_b|, x_e>.
        xx, xx_same: sum over d, e of <x_d, x_e>, and the part with d = e.
    """

    n: Tensor
    m: Tensor
    cc: Tensor
    cc_same: Tensor
    cr: Tensor
    cr_same: Tensor
    rr: Tensor
    rr_same: Tensor
    ur: Tensor
    ur_same: Tensor
    cx: Tensor
    rx: Tensor
    ux: Tensor
    xx: Tensor
    xx_same: Tensor

    @classmethod
    def of(cls, candidate: Tensor, reference: Tensor) -> Products:
        """From the candidate's updates [n, P] and the reference's [n + m, P], those of the same batches first.

        Raises:
            ValueError: fewer reference than candidate batches, or different P.
        """
        if candidate.shape[1] != reference.shape[1] or len(candidate) > len(reference):
            raise ValueError(
                f"candidate {tuple(candidate.shape)} and reference {tuple(reference.shape)}: must have the same number of entries, "
                "and at least as many reference batches as candidate batches"
            )
        n, m = len(candidate), len(reference) - len(candidate)
        c, r, x = candidate.double(), reference[:n].double(), reference[n:].double()
        unit = c / c.norm(dim=1, keepdim=True).clamp_min(1e-300)
        sums: dict[str, Tensor] = {}
        for name, left, right in (("cc", c, c), ("cr", c, r), ("rr", r, r), ("ur", unit, r)):
            sums |= _square_sums(name, left @ right.mT, m, first=True)
        sums |= _square_sums("xx", x @ x.mT, n, first=False)
        for name, left in (("cx", c), ("rx", r), ("ux", unit)):
            block = left @ x.mT
            sums[name] = block.sum() - torch.cat([block.new_zeros(1), block.sum(1), block.sum(0)])
        counts = torch.ones(1 + n + m, 2, dtype=torch.float64) * torch.tensor([n, m])
        counts[1 : n + 1, 0] -= 1
        counts[n + 1 :, 1] -= 1
        return cls(n=counts[:, 0], m=counts[:, 1], **sums)

    @property
    def num_paired(self) -> int:
        return int(self.n[0])

    @property
    def num_reference(self) -> int:
        return int(self.n[0] + self.m[0])


def _square_sums(name: str, block: Tensor, others: int, first: bool) -> dict[str, Tensor]:
    """Sum and trace of a square block [k, k] of inner products, whole and without each of its batches, [1 + k + others].

    Args:
        others: number of batches that are not in the block: leaving one out changes nothing.
        first: whether the block's batches come before the others.
    """
    diagonal, none = block.diagonal(), block.new_zeros(others)

    def whole_and_without(total: Tensor, parts: Tensor) -> Tensor:
        return total - torch.cat([block.new_zeros(1), *((parts, none) if first else (none, parts))])

    return {
        name: whole_and_without(block.sum(), block.sum(0) + block.sum(1) - diagonal),
        f"{name}_same": whole_and_without(diagonal.sum(), diagonal),
    }


Statistic = Callable[[Products], Tensor]  # [1 + n + m], NaN or infinite where the batches do not suffice


def mean_square(p: Products) -> Tensor:
    """|E c|^2."""
    return (p.cc - p.cc_same) / (p.n * (p.n - 1))


def total_variance(p: Products) -> Tensor:
    """Trace of the covariance of one update c."""
    return (p.cc_same - p.cc / p.n) / (p.n - 1)


def largest_share(p: Products) -> float | None:
    """Largest share of the sum of squared deviations |c_b - mean|^2 that goes when one batch is left out; None for fewer than three.

    About 1 / n without heavy tails. Near 1 the variance is that of one batch, and its jackknife error says little.
    """
    if p.num_paired < 3:
        return None
    deviations = p.cc_same - p.cc / p.n
    return float(1 - deviations[1 : p.num_paired + 1].min() / deviations[0]) if deviations[0] > 0 else None


def reference_square(p: Products) -> Tensor:
    """|E r|^2, from paired and extra batches."""
    count = p.n + p.m
    return (p.rr - p.rr_same + 2 * p.rx + p.xx - p.xx_same) / (count * (count - 1))


def reference_variance(p: Products) -> Tensor:
    """Trace of the covariance of one update r."""
    count = p.n + p.m
    return (p.rr_same + p.xx_same - (p.rr + 2 * p.rx + p.xx) / count) / (count - 1)


def mean_product(p: Products) -> Tensor:
    """<E c, E r>, from pairs of different batches."""
    return (p.cr - p.cr_same + p.cx) / (p.n * (p.n + p.m - 1))


def total_covariance(p: Products) -> Tensor:
    """Trace of the covariance between c_b and r_b of the same batch."""
    return (p.cr_same - p.cr / p.n) / (p.n - 1)


def bias_square(p: Products) -> Tensor:
    """|E c - E r|^2, unbiased.

    E c - E r is estimated by mean(c_b - beta r_b) - (1 - beta) mean(x_e): for any beta the same expectation. beta = 1 is the
    paired difference, whose shared noise cancels; beta = n / (n + m) ignores the pairing. Used is the one with the least variance,
    from the total variances of the data themselves (one number fitted to n * P: the dependence is negligible).
    """
    best = (p.m * total_covariance(p) / reference_variance(p) + p.n) / (p.n + p.m)
    beta = torch.where((p.m > 1) & torch.isfinite(best), best.clamp(0, 1), 1.0)
    same = p.cc_same - 2 * beta * p.cr_same + beta**2 * p.rr_same
    difference = (p.cc - 2 * beta * p.cr + beta**2 * p.rr - same) / (p.n * (p.n - 1))
    against_extra = (p.cx - beta * p.rx) / (p.n * p.m)
    extra = (p.xx - p.xx_same) / (p.m * (p.m - 1))
    rest = (1 - beta) ** 2 * extra - 2 * (1 - beta) * against_extra
    return difference + torch.where(beta < 1, rest, 0.0)


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
    along = (p.ur - p.ur_same + p.ux) / (p.n * (p.n + p.m - 1))
    return _over(along, reference_square(p).sqrt())


def precision(p: Products) -> Tensor:
    """(captured |E r|)^2 / total variance: the squared signal-to-noise ratio of one update; negative if captured is."""
    share = mean_product(p)
    return _over(share * share.abs(), total_variance(p) * reference_square(p))


def unbiased_precision(p: Products) -> Tensor:
    """The same for a candidate known to be unbiased: |E r|^2 / total variance. Free of the noise in the captured share."""
    return _over(reference_square(p), total_variance(p))


def jackknife(statistic: Statistic, products: Products) -> Estimate:
    """A statistic with its standard error, by leaving out one batch at a time (two-sample jackknife: paired and extra batches).

    For a square whose true value is 0 the error comes out too large by about sqrt(2): on the safe side.
    """
    values = statistic(products)
    n = products.num_paired
    if n < 3:
        return Estimate.of(float(values[0]), math.nan)
    variance = 0.0
    for part in (values[1 : n + 1], values[n + 1 :]):
        if len(part) > 1:
            variance += (len(part) - 1) / len(part) * float(((part - part.mean()) ** 2).sum())
    return Estimate.of(float(values[0]), math.sqrt(variance) if variance >= 0 else math.nan)


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

    Takes one tensor [F, P] per batch (F vectors, say one per denoising step) and keeps its sum and a few numbers per batch.
    """

    def __init__(self) -> None:
        self.count = 0
        self.total: Tensor | None = None  # [F, P]
        self.squares: list[Tensor] = []  # [F] each, |g_b|^2
        self.with_earlier: list[Tensor] = []  # [F] each, inner product of g_b with the sum of the earlier batches
        self.deviations: list[Tensor] = []  # [F] each, b / (b + 1) |g_b - mean of the earlier batches|^2, from b = 1 on

    def add(self, vectors: Tensor) -> None:
        """Takes in one batch, [F, P]."""
        vectors = vectors.double()
        total = torch.zeros_like(vectors) if self.total is None else self.total
        self.with_earlier.append((vectors * total).sum(1))
        self.squares.append((vectors**2).sum(1))
        if self.count:
            deviation = ((vectors - total / self.count) ** 2).sum(1)
            self.deviations.append(deviation * self.count / (self.count + 1))
        self.total = total + vectors
        self.count += 1

    def mean_squares(self) -> Tensor:
        """|E g_f|^2, [F]; unbiased, NaN for fewer than two batches."""
        return 2 * self._sum(self.with_earlier) / (self.count * (self.count - 1))

    def mean_square_errors(self) -> Tensor:
        """Standard errors of `mean_squares`, [F]; NaN for fewer than `MINIMUM_BATCHES`.

        The mean square is 2 / (n (n - 1)) times the sum of q_b = <g_b, g_0 + ... + g_(b-1)>. Without a signal the q_b have mean 0
        whatever came before, so the sum of their squares is the variance of their sum; a signal's own part of q_b is subtracted.
        """
        if self.count < MINIMUM_BATCHES:
            return torch.full_like(self.mean_squares(), math.nan)
        signal = torch.arange(self.count).double()[:, None] * self.mean_squares()
        noise = ((torch.stack(self.with_earlier) - signal) ** 2).sum(0).sqrt()
        return 2 * noise / (self.count * (self.count - 1))

    def variances(self) -> Tensor:
        """Total variance of one batch's vector, [F]; unbiased, NaN for fewer than two batches."""
        if self.count < 2:
            return torch.full_like(self._sum(self.squares), math.nan)
        return torch.stack(self.deviations).mean(0)

    def variance_errors(self) -> Tensor:
        """Standard errors of `variances`, [F], from the spread of the deviations; NaN for fewer than four batches."""
        if self.count < 4:
            return torch.full_like(self._sum(self.squares), math.nan)
        return torch.stack(self.deviations).std(0) / math.sqrt(len(self.deviations))

    def root_mean_squares(self) -> Tensor:
        """sqrt(E |g_f|^2), [F]: the typical norm of one batch's vector, noise included."""
        return (self._sum(self.squares) / self.count).sqrt()

    def _sum(self, numbers: list[Tensor]) -> Tensor:
        if not numbers:
            raise ValueError("no batch was added")
        return torch.stack(numbers).sum(0)


def _over(numerator: Tensor, denominator: Tensor) -> Tensor:
    """The quotient; NaN where the denominator, a square or a root of one, is not above 0."""
    return torch.where(denominator > 0, numerator / denominator, math.nan)
