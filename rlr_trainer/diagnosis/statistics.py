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


class Products(NamedTuple):
    """Inner products <c_a, c_b>, <c_a, r_b> and <r_a, r_b>, [n, n] each: all that the statistics need of the updates."""

    cc: Tensor
    cr: Tensor
    rr: Tensor

    @classmethod
    def of(cls, candidate: Tensor, reference: Tensor) -> Products:
        """Of updates on the same batches, [n, P] each."""
        c, r = candidate.double(), reference.double()
        return cls(c @ c.mT, c @ r.mT, r @ r.mT)

    @property
    def num_batches(self) -> int:
        return len(self.cc)

    def without(self, batch: int) -> Products:
        """Of the other batches."""
        kept = torch.arange(self.num_batches) != batch
        return Products(*(products[kept][:, kept] for products in self))


Statistic = Callable[[Products], Tensor]  # a number, NaN or infinite where the batches do not suffice


def _over_pairs(products: Tensor) -> Tensor:
    """Mean over the pairs of different batches."""
    count = len(products)
    return (products.sum() - products.trace()) / (count * (count - 1))


def mean_square(p: Products) -> Tensor:
    """|E c|^2."""
    return _over_pairs(p.cc)


def reference_square(p: Products) -> Tensor:
    """|E r|^2."""
    return _over_pairs(p.rr)


def mean_product(p: Products) -> Tensor:
    """<E c, E r>."""
    return _over_pairs(p.cr)


def bias_square(p: Products) -> Tensor:
    """|E c - E r|^2, of the paired differences, in which shared noise cancels."""
    return mean_square(p) - 2 * mean_product(p) + reference_square(p)


def total_variance(p: Products) -> Tensor:
    """Trace of the covariance of one update c."""
    return p.cc.trace() / p.num_batches - mean_square(p)


def largest_share(p: Products) -> float | None:
    """Largest share of the sum of squared deviations that goes when one batch is left out; None for fewer than three.

    About 1 / n without heavy tails. Near 1 the variance is that of one batch, and its jackknife error says little.
    """
    # float64 leaves a variance of about 1e-16 of the squares where all updates are equal
    if p.num_batches < 3 or not total_variance(p) > 1e-12 * p.cc.trace():
        return None
    left = min(float(total_variance(p.without(batch))) for batch in range(p.num_batches))
    return 1 - left * (p.num_batches - 2) / (float(total_variance(p)) * (p.num_batches - 1))


def relative_bias_square(p: Products) -> Tensor:
    """|E c - E r|^2 / |E r|^2."""
    return _over(bias_square(p), reference_square(p))


def captured(p: Products) -> Tensor:
    """<E c, E r> / |E r|^2: how much of the reference gradient the mean update contains; 1 for an unbiased candidate."""
    return _over(mean_product(p), reference_square(p))


def _over(numerator: Tensor, denominator: Tensor) -> Tensor:
    """The quotient; NaN where the denominator, a square, is not above 0."""
    return torch.where(denominator > 0, numerator / denominator, math.nan)


def jackknife(statistic: Statistic, products: Products) -> Estimate:
    """A statistic with its standard error, by leaving out one batch at a time; from three batches on.

    For a square whose true value is 0 the error comes out too large by about sqrt(2): on the safe side.
    """
    n, error = products.num_batches, math.nan
    if n > 2:
        values = torch.stack([statistic(products.without(batch)) for batch in range(n)])
        error = math.sqrt((n - 1) * float(values.var(correction=0)))
    return Estimate.of(float(statistic(products)), error)


@dataclasses.dataclass(frozen=True)
class RelativeBias:
    """A measured bias, relative to the reference gradient's norm: sqrt(|E c - E r|^2 / |E r|^2)."""

    value: float | None  # None where no bias was seen
    error: float | None  # its standard error
    upper: float | None  # two standard errors above the measured square; None where nothing can be said
    verdict: (
        str  # "biased", "none seen" (one above `detectable` would have been), "underpowered", or "reference" (is the reference)
    )


def judge_bias(products: Products, detectable: float, limit: float = RESOLVED) -> RelativeBias:
    """Whether a bias was seen, by `limit` standard errors; "none seen" is said only where one of `detectable` would have been."""
    square = jackknife(relative_bias_square, products)
    reference = jackknife(reference_square, products)
    if square.value is None or square.error is None or products.num_batches < MINIMUM_BATCHES or not reference.resolved:
        return RelativeBias(None, None, None, "underpowered")
    upper = math.sqrt(max(square.value, 0.0) + 2 * square.error)
    if square.exceeds(limit):
        root = math.sqrt(square.value)
        return RelativeBias(root, square.error / (2 * root), upper, "biased")
    return RelativeBias(None, None, upper, "none seen" if upper <= detectable else "underpowered")


class RunningVariance:
    """Total variances of F vectors (say one per denoising step) over batches, without keeping the batches."""

    def __init__(self) -> None:
        self.count = 0
        self._total: Tensor | float = 0.0  # [F, P], sum over the batches
        self._deviations: list[Tensor] = []  # [F] each, b / (b + 1) |g_b - mean of the earlier batches|^2

    def add(self, vectors: Tensor) -> None:
        """Takes in one batch, [F, P]."""
        vectors = vectors.double()
        deviation = ((vectors - self._total / max(self.count, 1)) ** 2).sum(1)
        self._deviations.append(deviation * self.count / (self.count + 1))
        self._total = self._total + vectors
        self.count += 1

    def value(self) -> Tensor:
        """Total variance of one batch's vectors, [F], unbiased; NaN for fewer than two batches."""
        return torch.stack(self._deviations)[1:].mean(0)

    def error(self) -> Tensor:
        """Its standard errors, [F], from the spread of the deviations; NaN for fewer than four batches."""
        deviations = torch.stack(self._deviations)[1:]
        return deviations.std(0) / math.sqrt(len(deviations)) if self.count >= 4 else torch.full_like(self._deviations[0], math.nan)
