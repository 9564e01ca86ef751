"""Choosing h and K from measurements. Pure functions of numbers; `rlr_trainer.diagnosis` measures what they need."""

from __future__ import annotations

import math
from collections.abc import Sequence

DEFAULT_TOLERANCE = (
    0.1  # variances this close (relative) count as equal: measured from few batches they differ by as much by chance
)


def choose_ho_length(
    num_steps: int,
    memory_budget: float,
    memory_ho: float,
    memory_zo: float,
    std_ho: float,
    std_zo: float,
) -> int:
    """Length h* of the half-order sub-chain, formula (8) of arXiv:2502.00639:

        h* = min( floor( (B - B_z (T - 1)) / (B_h - B_z) ), floor( T V_z / (2 (V_z - V_h)) - 1 ) )

    The first term is what fits in memory when the graph of the whole sub-chain is held (`recompute="graph"`); the recursive mode
    holds one step's whatever h is. The second balances the noise of HO against that of the ZO steps which it replaces: it has a
    meaning only for `rest_estimator="zo"`. Against single likelihood-ratio steps ("lr") a longer sub-chain is noisier, not quieter.

    Args:
        num_steps: T.
        memory_budget: B, memory for the steps, beyond weights and optimizer; in the unit of the next two.
        memory_ho, memory_zo: B_h and B_z, memory per half-order and zeroth-order step.
        std_ho, std_zo: V_h and V_z, standard deviation of one step's share of the gradient.

    Returns:
        h from 1 to T. Where a half-order step takes no more memory than a zeroth-order one the first term is no limit; where it is
        no quieter (V_h >= V_z) the second allows only 1; where not even h = 1 fits the budget, 1 is still the least there is.

    Raises:
        ValueError: a number that is not positive and finite; names it.
    """
    if isinstance(num_steps, bool) or not isinstance(num_steps, int) or num_steps < 1:
        raise ValueError(f"num_steps={num_steps!r}: must be a whole number of at least 1")
    numbers = {
        "memory_budget": memory_budget,
        "memory_ho": memory_ho,
        "memory_zo": memory_zo,
        "std_ho": std_ho,
        "std_zo": std_zo,
    }
    for name, value in numbers.items():
        if not 0 < value < math.inf:
            raise ValueError(f"{name}={value}: must be a positive finite number")
    limits = [num_steps]
    if memory_ho > memory_zo:
        limits.append(_floor((memory_budget - memory_zo * (num_steps - 1)) / (memory_ho - memory_zo)))
    limits.append(_floor(num_steps * std_zo / (2 * (std_zo - std_ho)) - 1) if std_zo > std_ho else 1)
    return max(1, min(limits))


def _floor(value: float) -> int:
    # 1e-9: a budget of exactly h steps must allow h, whatever the rounding of the subtraction
    return math.floor(value + 1e-9 * max(1.0, abs(value)))


def choose_fo_steps(
    total_variance: Sequence[float],
    seconds: Sequence[float] | None = None,
    *,
    max_fo_steps: int | None = None,
    tolerance: float = DEFAULT_TOLERANCE,
) -> int:
    """Number K of first-order steps for a plan that covers the remaining steps by the likelihood ratio.

    Rule: the K with the smallest measured variance (with `seconds`: the smallest product of variance and time, that is, the
    least time to a given precision); among the K within `tolerance` of it, the smallest. K = T is returned only when it measured
    best, and never above `max_fo_steps`.

    Args:
        total_variance: T + 1 numbers, index K = 0..T: total variance (trace of the covariance) of FO(K) + LR(rest), covariances
            between steps included. Infinite where the plan cannot be (a step without noise that K leaves to the likelihood ratio).
        seconds: T + 1 times of one update, or None where they do not differ.
        max_fo_steps: largest K to consider; None is T.
        tolerance: relative difference that counts as none.

    Raises:
        ValueError: no K can be chosen, or a number that cannot be; names it.
    """
    num_steps = len(total_variance) - 1
    if num_steps < 1:
        raise ValueError(f"total_variance has {len(total_variance)} entries: needs T + 1, one for each K from 0 to T")
    if seconds is not None and len(seconds) != len(total_variance):
        raise ValueError(f"seconds has {len(seconds)} entries for {len(total_variance)} values of K: give one each, or None")
    if seconds is not None and not all(0 < s < math.inf for s in seconds):
        raise ValueError(f"seconds={list(seconds)}: must be positive and finite")
    if any(math.isnan(v) or v < 0 for v in total_variance):
        raise ValueError(f"total_variance={list(total_variance)}: variances are 0 or more (infinite for a K that cannot be)")
    if not 0 <= tolerance < math.inf:
        raise ValueError(f"tolerance={tolerance}: must be 0 or more")
    largest = num_steps if max_fo_steps is None else max_fo_steps
    if not 0 <= largest <= num_steps:
        raise ValueError(f"max_fo_steps={max_fo_steps}: must lie between 0 and T = {num_steps}")
    costs = [v * (1.0 if seconds is None else seconds[k]) for k, v in enumerate(total_variance[: largest + 1])]
    least = min(costs)
    if math.isinf(least):
        raise ValueError(
            f"no K up to {largest} leaves only steps with noise to the likelihood ratio; raise max_fo_steps, or set sample_eta above 0"
        )
    return next(k for k, cost in enumerate(costs) if cost <= least * (1 + tolerance))
