"""What it takes to believe a claim about bias or variance.

A claim of unbiasedness is held against the exact gradient in units of the estimate's own standard error, and it only counts when a
bias that matters would have been seen (`detectable`). A claim about variance is a ratio with its standard error over blocks.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

LIMIT = 5.0  # standard errors; 4,000 comparisons of a right estimator exceed it once in 400 runs of the suite
DETECTABLE = 0.10  # largest relative bias of the whole gradient that may go unseen
DETECTABLE_IN_ONE_TENSOR = 0.50  # and of a single parameter: the share of a step that is left out must show
ROUNDING = 1e-10  # of the gradient's norm: differences below it are float64 rounding


class Biased(AssertionError):
    """The estimate differs from the exact gradient by more standard errors than chance allows."""


class Underpowered(AssertionError):
    """No bias was seen, but one of a size that matters could have gone unseen."""


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Mean of N gradients, flattened to [P], and the covariance [P, P] of that mean; zero for an exact gradient."""

    mean: Tensor
    covariance: Tensor
    slices: dict[str, slice]
    num_samples: int = 0

    @classmethod
    def of(cls, per_sample: Mapping[str, Tensor], group: int = 1) -> Estimate:
        """From per-sample gradients name -> [N, ...].

        Consecutive samples that depend on each other (antithetic pairs, a batch with a common baseline) are averaged first, `group`
        at a time: the averages are independent, which the standard error takes for granted.
        """
        rows = flatten(per_sample, group)
        mean = rows.mean(0)
        centered = rows - mean
        covariance = centered.mT @ centered / (len(rows) * (len(rows) - 1))
        return cls(mean, covariance, _slices(per_sample, first_dim=1), len(next(iter(per_sample.values()))))

    @classmethod
    def exact(cls, gradient: Mapping[str, Tensor]) -> Estimate:
        """From a known gradient name -> tensor."""
        mean = torch.cat([g.detach().double().flatten() for g in gradient.values()])
        return cls(mean, torch.zeros(len(mean), len(mean), dtype=torch.float64), _slices(gradient, first_dim=0))

    @classmethod
    def pool(cls, parts: Sequence[Estimate]) -> Estimate:
        """Joins independent estimates from equally many samples each."""
        mean = torch.stack([part.mean for part in parts]).mean(0)
        covariance = torch.stack([part.covariance for part in parts]).mean(0) / len(parts)
        return cls(mean, covariance, parts[0].slices, sum(part.num_samples for part in parts))

    def times(self, factor: float) -> Estimate:
        """The estimate multiplied by a known factor."""
        return dataclasses.replace(self, mean=factor * self.mean, covariance=factor**2 * self.covariance)

    @property
    def standard_error(self) -> Tensor:
        return self.covariance.diagonal().clamp_min(0).sqrt()


def flatten(per_sample: Mapping[str, Tensor], group: int = 1) -> Tensor:
    """name -> [N, ...] to float64 [N / group, P], averages over consecutive samples."""
    rows = torch.cat([g.detach().double().flatten(1) for g in per_sample.values()], 1)
    return rows.reshape(-1, group, rows.shape[1]).mean(1)


def _slices(gradient: Mapping[str, Tensor], first_dim: int) -> dict[str, slice]:
    slices, start = {}, 0
    for name, g in gradient.items():
        size = math.prod(g.shape[first_dim:])
        slices[name] = slice(start, start + size)
        start += size
    return slices


def z_scores(estimate: Estimate, exact: Estimate) -> dict[str, float]:
    """How many standard errors apart: per parameter entry, and along the gradient (per parameter and over all).

    Along the gradient is where an error of scale shows best. An entry without variance and without error counts as equal (0).
    """
    assert estimate.slices == exact.slices
    error = estimate.mean - exact.mean
    covariance = estimate.covariance + exact.covariance
    rounding = ROUNDING * float(exact.mean.norm())
    scores = {}
    for name, part in estimate.slices.items():
        spread = covariance[part, part].diagonal().clamp_min(0).sqrt().clamp_min(rounding)
        for index, z in enumerate((error[part] / spread).tolist()):
            scores[f"{name}[{index}]"] = z
    for name, part in {**estimate.slices, "gradient": slice(None)}.items():
        direction = exact.mean[part]
        if float(direction.norm()) <= rounding:
            continue
        direction = direction / direction.norm()
        spread = float((direction @ covariance[part, part] @ direction).clamp_min(0).sqrt())
        scores[f"along {name}"] = float(error[part] @ direction) / max(spread, rounding)
    return scores


def detectable(estimate: Estimate, exact: Estimate, part: slice = slice(None), limit: float = LIMIT) -> float:
    """Smallest relative error of this part of the gradient that cannot hide: limit * |standard errors| / |gradient|.

    An error vector longer than limit * |standard errors| has, however it is spread, an entry beyond `limit` standard errors:
    if every entry e_k were below limit * s_k, |e|^2 would be below limit^2 * sum s_k^2.
    """
    spread = (estimate.covariance + exact.covariance)[part, part].diagonal().clamp_min(0).sum().sqrt()
    return limit * float(spread / exact.mean[part].norm())


def assert_unbiased(
    estimate: Estimate,
    exact: Estimate | Mapping[str, Tensor],
    limit: float = LIMIT,
    allowed: float = DETECTABLE,
    allowed_in_one_tensor: float = DETECTABLE_IN_ONE_TENSOR,
) -> None:
    """The mean is the exact gradient, within `limit` standard errors per entry, and the test could tell if it were not.

    Raises:
        Biased: an entry, or the length along the gradient, is off.
        Underpowered: a relative error of more than `allowed`, or of a single parameter's `allowed_in_one_tensor`, could hide.
    """
    exact = exact if isinstance(exact, Estimate) else Estimate.exact(exact)
    scores = z_scores(estimate, exact)
    if not all(math.isfinite(z) for z in scores.values()):
        raise Biased("not finite: " + ", ".join(name for name, z in scores.items() if not math.isfinite(z)))
    off = {name: z for name, z in scores.items() if abs(z) > limit}
    if off:
        worst = sorted(off, key=lambda name: -abs(off[name]))[:5]
        raise Biased("off by standard errors: " + ", ".join(f"{name} {off[name]:+.1f}" for name in worst))
    unseen = detectable(estimate, exact, limit=limit)
    if not unseen <= allowed:
        raise Underpowered(f"a relative bias of {unseen:.1%} could hide; more samples or less noise")
    rounding = ROUNDING * float(exact.mean.norm())
    for name, part in exact.slices.items():
        if float(exact.mean[part].norm()) > rounding and not detectable(estimate, exact, part, limit) <= allowed_in_one_tensor:
            raise Underpowered(f"{name}: a relative bias of {detectable(estimate, exact, part, limit):.0%} could hide")


def assert_biased(estimate: Estimate, exact: Estimate | Mapping[str, Tensor], **limits: float) -> None:
    """The checker rejects it: not for want of samples, but for a bias. `limits` are those of `assert_unbiased`."""
    try:
        assert_unbiased(estimate, exact, **limits)
    except Biased:
        return
    except Underpowered as error:
        raise AssertionError(f"the bias was not seen: {error}") from None
    raise AssertionError("accepted as unbiased")


@dataclasses.dataclass(frozen=True)
class Ratio:
    """A ratio of variances and its standard error."""

    value: float
    error: float

    def assert_above(self, bound: float) -> None:
        assert self.value - LIMIT * self.error > bound, f"{self} is not above {bound} by {LIMIT:g} standard errors"

    def assert_below(self, bound: float) -> None:
        assert self.value + LIMIT * self.error < bound, f"{self} is not below {bound} by {LIMIT:g} standard errors"

    def __str__(self) -> str:
        return f"{self.value:.3f} +- {self.error:.3f}"


def variance_ratio(
    numerator: Mapping[str, Tensor] | Tensor,
    denominator: Mapping[str, Tensor] | Tensor,
    groups: tuple[int, int] = (1, 1),
    num_blocks: int = 64,
) -> Ratio:
    """Total variance of one estimator's gradient over another's, with the jackknife's standard error over blocks.

    An average of a group counts for all its samples: its variance is multiplied by their number, so that both sides are per
    sample drawn.
    """
    totals = []
    for per_sample, group in zip((numerator, denominator), groups, strict=True):
        rows = per_sample if isinstance(per_sample, Tensor) else flatten(per_sample, group)
        totals.append(_leave_one_block_out_variances(rows, num_blocks) * group)
    ratios = totals[0] / totals[1]
    left_out = ratios[:-1]
    error = ((num_blocks - 1) / num_blocks * ((left_out - left_out.mean()) ** 2).sum()).sqrt()
    return Ratio(float(ratios[-1]), float(error))


def _leave_one_block_out_variances(rows: Tensor, num_blocks: int) -> Tensor:
    """Total variance without block 0, 1, ..., and at the end of all rows. [num_blocks + 1]."""
    usable = len(rows) // num_blocks * num_blocks
    blocks = rows[:usable].reshape(num_blocks, -1, rows.shape[1])
    count = torch.tensor([usable - blocks.shape[1]] * num_blocks + [usable], dtype=torch.float64)[:, None]
    kept = []
    for sums in (blocks.sum(1), (blocks**2).sum(1)):
        total = sums.sum(0)
        kept.append(torch.cat([total - sums, total[None]]))
    first, second = kept
    return ((second - first**2 / count) / (count - 1)).sum(1)


def calibration(scores: Sequence[Mapping[str, float]]) -> tuple[float, float]:
    """Mean and standard deviation of z-scores pooled over runs, entries only."""
    values = torch.tensor([z for run in scores for name, z in run.items() if not name.startswith("along ")])
    return float(values.mean()), float(values.std())
