"""Chooses a noise window, K and h ("auto" in noise_steps, fo_steps and ho_length) from measurements: the rules, and what measures for them."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

from rlr_trainer.diagnosis.plans import LONG_FO_SHARE
from rlr_trainer.diagnosis.step_profile import (
    Deadline,
    VarianceProfile,
    add_batches,
    build_profile,
    measure_step_costs,
    start_profile,
)
from rlr_trainer.diagnosis.windows import Window, choose_window, measured_windows
from rlr_trainer.diagnosis.workbench import Workbench, untouched

# variances this close (relative) count as equal: measured from few batches they differ by as much by chance
TOLERANCE = 0.1
GIGABYTE = 10**9
AUTO_SECONDS = 60.0


def auto_fo_steps(trainer: Any, *, num_batches: int = 16, time_limit: float = AUTO_SECONDS) -> int:
    """K for FO(K) + LR on the rest: the least measured variance among K up to half of the chain (`choose_fo_steps`).

    Longer first order has a risk (reward hacking) that does not show in its variance; it is returned only where the chain's last steps
    add no noise. 0 for a black-box reward.

    Args:
        trainer: the `RLRTrainer`.
        num_batches, time_limit: stops at the first; seconds.

    Raises:
        ValueError: too little time for the two batches that a variance needs; more than one process.
    """
    with measuring(trainer, time_limit) as (bench, deadline):
        profile = build_profile(bench, deadline, num_batches).build()
    variances = [math.inf if v is None else v for v in profile.total_variance]
    possible = [k for k, variance in enumerate(variances) if variance < math.inf]
    if not possible:
        raise ValueError(_too_few("fo_steps", profile, time_limit))
    return choose_fo_steps(variances, max(possible[0], int(LONG_FO_SHARE * (len(variances) - 1))))


def auto_noise_steps(trainer: Any, *, time_limit: float = AUTO_SECONDS) -> tuple[Window, list[Window]]:
    """Which of the first steps should add noise, and with them K (`choose_window`); and the windows that it was chosen from.

    K is that of the plan; where `fo_steps` is "auto" it is T - n, so that every step is covered, and at most half of the chain. A plan
    without `silent_estimator` leaves no step out either. The measurement costs about five updates: a batch of a differentiable reward, on
    which both kinds of share are measured, counts as two.

    Args:
        trainer: the `RLRTrainer`. Black-box rewards are welcome.
        time_limit: seconds after which it ends, but not before two batches.

    Raises:
        ValueError: the first step adds no noise; no window fits the plan; more than one process.
    """
    with measuring(trainer, time_limit) as (bench, deadline):
        builder, batch, _ = start_profile(bench)
        add_batches(builder, batch, deadline, 2 if builder.differentiable else 4, least=2)
    chosen_k, plan = trainer.args.fo_steps == "auto", bench.plan
    covers_all = chosen_k and builder.differentiable
    limit = LONG_FO_SHARE * plan.num_steps if covers_all else plan.num_steps
    windows = [
        window
        for window in measured_windows(builder, batch.reward_seconds)
        if window.fo_steps <= limit and (window.covered == plan.num_steps or not (covers_all or plan.silent_estimator is None))
    ]
    if not windows:
        raise ValueError(
            f"noise_steps='auto': no window of the first steps fits the plan ({plan}) on a chain whose steps add noise of {bench.stds}; set "
            "silent_estimator='none' to allow steps that are left out, or give noise_steps"
        )
    return choose_window(windows), windows


def auto_ho_length(
    trainer: Any, memory_budget_gb: float, *, fo_steps: int = 1, num_batches: int = 4, time_limit: float = AUTO_SECONDS
) -> int:
    """h of formula (8) with the memory and noise of this model's steps (`choose_ho_length`), at most T - fo_steps.

    Args:
        trainer: the `RLRTrainer`.
        memory_budget_gb: memory for the steps of one sampling batch, in GB (10^9 bytes), beyond weights, optimizer and latents.
        fo_steps: K of the plan.
        num_batches, time_limit: for the noise; stops at the first; seconds.

    Raises:
        ValueError: too little time for the two batches that a variance needs; a step without noise; more than one process.
    """
    with measuring(trainer, time_limit) as (bench, deadline):
        builder = build_profile(bench, deadline, num_batches)
        builder.add_zeroth(2)  # a variance needs two, whatever the time
        builder.add_zeroth(num_batches, lambda: deadline.left > 0)
        costs = measure_step_costs(bench, bench.collect(0, builder.reference), differentiable=False)
    profile = builder.build()
    if profile.std_ho is None or profile.std_zo is None:
        raise ValueError(_too_few("ho_length", profile, time_limit))
    budget, memory_ho, memory_zo = memory_budget_gb * GIGABYTE, max(1, costs["ho"].held_bytes), max(1, costs["zo"].peak_bytes)
    length = choose_ho_length(bench.num_steps, budget, memory_ho, memory_zo, profile.std_ho, profile.std_zo)
    return min(length, bench.num_steps - fo_steps)


def _too_few(option: str, profile: VarianceProfile, time_limit: float) -> str:
    found = f"{profile.num_batches} batch(es) fitted into {time_limit:g} s, and a variance needs two"
    return f"{option}='auto': {found}; give a number for {option}, or more time"


@contextlib.contextmanager
def measuring(trainer: Any, time_limit: float) -> Iterator[tuple[Workbench, Deadline]]:
    """A workbench, and the time for it with its progress bar."""
    with untouched(trainer) as bench, contextlib.closing(Deadline(time_limit, bench.config.disable_tqdm)) as deadline:
        yield bench, deadline


def choose_fo_steps(total_variance: Sequence[float], max_fo_steps: int) -> int:
    """Number K of first-order steps for a plan that covers the remaining steps by the likelihood ratio.

    Rule: the K with the smallest measured variance; among the K within `TOLERANCE` of it, the smallest.

    Args:
        total_variance: index K = 0..T: total variance (trace of the covariance) of FO(K) + LR(rest), covariances between steps
            included. Infinite where the plan cannot be (a step without noise that K leaves to the likelihood ratio).
        max_fo_steps: largest K to consider.
    """
    considered = total_variance[: max_fo_steps + 1]
    return next(k for k, variance in enumerate(considered) if variance <= min(considered) * (1 + TOLERANCE))


def choose_ho_length(num_steps: int, memory_budget: float, memory_ho: float, memory_zo: float, std_ho: float, std_zo: float) -> int:
    """Length h* of the half-order sub-chain, formula (8) of arXiv:2502.00639:

        h* = min( floor( (B - B_z (T - 1)) / (B_h - B_z) ), floor( T V_z / (2 (V_z - V_h)) - 1 ) )

    The first term is what fits in memory when the graph of the whole sub-chain is held (`recompute="graph"`). The second balances the
    noise of HO against that of the ZO steps which it replaces: it has a meaning only for `rest_estimator="zo"`.

    with T = num_steps, B = memory_budget (beyond weights and optimizer), B_h and B_z = memory_ho and memory_zo (per step, same unit), V_h
    and V_z = std_ho and std_zo (of one step's share of the gradient).

    Returns:
        h from 1 to T. If B_h <= B_z, memory is no limit; if V_h >= V_z, or not even h = 1 fits, it is 1.

    Raises:
        ValueError: a number that is not positive and finite; names it.
    """
    numbers = {"memory_budget": memory_budget, "memory_ho": memory_ho, "memory_zo": memory_zo, "std_ho": std_ho, "std_zo": std_zo}
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
