"""Unbiased statistics of noisy gradients: tensors in, numbers out.

The squared norm of a sample mean is larger than that of the mean by variance / n, for gradient estimates often a thousand times the
signal. So squares and products of means are taken over pairs of different batches only (U-statistics): unbiased, possibly negative.

Notation: c_b is a candidate's update on batch b = 0..n-1 and r_b the reference's on the same batch (same rollouts: common random
numbers cancel in the difference). P is the number of entries of a gradient. "Total variance" is the trace of the covariance of one
update.
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
        return self.exceeds(RESOLVED)

    @classmethod
    def of(cls, value: float, error: float) -> Estimate:
        """None for what is not finite."""
        return cls(value if math.isfinite(value) else None, error if math.isfinite(error) else None)


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
    """A sum of inner products over pairs of batches, [1 + n]: over all batches, then without each of them.

    Attributes:
        same: over the pairs of a batch with itself.
        different: over those of two different batches.
    """

    same: Tensor
    different: Tensor

    @classmethod
    def of(cls, a: Tensor, b: Tensor) -> Sum:
        """Of <a_i, b_j>, from [n, P] each."""
        products = a @ b.mT
        same = products.diagonal()
        different = products.sum() - same.sum()
        without = different - products.sum(0) - products.sum(1) + 2 * same
        return cls(torch.cat([same.sum()[None], same.sum() - same]), torch.cat([different[None], without]))


class Products:
    """Sums of inner products of the updates: all that the statistics need of them, with leave-one-out values along.

    Args:
        candidate, reference: updates on the same batches, [n, P].

    Attributes:
        count: n.
        n: [1 + n], the number of batches, whole and without each.
        cc, cr, rr: of <c_a, c_b>, <c_a, r_b> and <r_a, r_b>.

    Raises:
        ValueError: tensors of different shapes.
    """

    def __init__(self, candidate: Tensor, reference: Tensor) -> None:
        if candidate.shape != reference.shape:
            raise ValueError(
                f"candidate {tuple(candidate.shape)} and reference {tuple(reference.shape)}: must be updates on the same batches"
            )
        c, r = candidate.double(), reference.double()
        self.count = len(c)
        self.n = torch.tensor([self.count, *[self.count - 1] * self.count], dtype=torch.float64)
        self.cc, self.cr, self.rr = Sum.of(c, c), Sum.of(c, r), Sum.of(r, r)


Statistic = Callable[[Products], Tensor]  # [1 + n], NaN or infinite where the batches do not suffice


def mean_square(p: Products) -> Tensor:
    """|E c|^2."""
    return p.cc.different / (p.n * (p.n - 1))


def reference_square(p: Products) -> Tensor:
    """|E r|^2."""
    return p.rr.different / (p.n * (p.n - 1))


def mean_product(p: Products) -> Tensor:
    """<E c, E r>."""
    return p.cr.different / (p.n * (p.n - 1))


def bias_square(p: Products) -> Tensor:
    """|E c - E r|^2, of the paired differences, in which shared noise cancels."""
    return mean_square(p) - 2 * mean_product(p) + reference_square(p)


def _deviations(p: Products) -> Tensor:
    """Sum of |c_b - mean|^2."""
    return p.cc.same - (p.cc.same + p.cc.different) / p.n


def total_variance(p: Products) -> Tensor:
    """Trace of the covariance of one update c."""
    return _deviations(p) / (p.n - 1)


def largest_share(p: Products) -> float | None:
    """Largest share of the sum of squared deviations that goes when one batch is left out; None for fewer than three.

    About 1 / n without heavy tails. Near 1 the variance is that of one batch, and its jackknife error says little.
    """
    deviations = _deviations(p)
    if p.count < 3 or not deviations[0] > 0:
        return None
    return float(1 - deviations[1:].min() / deviations[0])


def relative_bias_square(p: Products) -> Tensor:
    """|E c - E r|^2 / |E r|^2."""
    return _over(bias_square(p), reference_square(p))


def captured(p: Products) -> Tensor:
    """<E c, E r> / |E r|^2: how much of the reference gradient the mean update contains; 1 for an unbiased candidate."""
    return _over(mean_product(p), reference_square(p))


def cosine_of_mean(p: Products) -> Tensor:
    """Cosine between E c and E r."""
    return _over(mean_product(p), (mean_square(p) * reference_square(p)).sqrt())


def _over(numerator: Tensor, denominator: Tensor) -> Tensor:
    """The quotient; NaN where the denominator, a square or a root of one, is not above 0."""
    return torch.where(denominator > 0, numerator / denominator, math.nan)


def jackknife(statistic: Statistic, products: Products) -> Estimate:
    """A statistic with its standard error, by leaving out one batch at a time; from three batches on.

    For a square whose true value is 0 the error comes out too large by about sqrt(2): on the safe side.
    """
    values, n = statistic(products), products.count
    variance = (n - 1) * float(values[1:].var(correction=0)) if n > 2 else math.nan
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
    if square.value is None or square.error is None or products.count < MINIMUM_BATCHES or not reference.resolved:
        return RelativeBias(None, None, None, "underpowered")
    upper = math.sqrt(max(square.value, 0.0) + 2 * square.error)
    if square.exceeds(limit):
        root = math.sqrt(square.value)
        return RelativeBias(root, square.error / (2 * root), upper, "biased")
    return RelativeBias(None, None, upper, "none seen" if upper <= detectable else "underpowered")


class RunningMoments:
    """Mean squares and total variances of a family of vectors over batches, without keeping the batches.

    Takes one tensor [F, P] per batch (F vectors, say one per denoising step). The results are pairs of [F]: values and their standard
    errors, NaN for too few batches.
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
