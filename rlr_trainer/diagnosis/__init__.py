"""Bias, variance, time and memory of gradient estimators on the user's own model, reward, prompts and batch size.

`diagnose(trainer)` compares plans and recommends one; `auto_fo_steps(trainer)` and `auto_ho_length(trainer, ...)` choose K and h. What
the columns mean and what is not measured is in docs/diagnostics.md.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from tqdm.auto import tqdm

from rlr_trainer.diagnosis.candidates import LONG_FO_SHARE, Candidate, default_candidates
from rlr_trainer.diagnosis.choice import choose_fo_steps, choose_ho_length
from rlr_trainer.diagnosis.comparison import Comparison
from rlr_trainer.diagnosis.evaluation import describe, evaluate, package_versions, power_notes
from rlr_trainer.diagnosis.profile import Deadline, VarianceProfile, build_profile, measure_step_costs, start_profile
from rlr_trainer.diagnosis.recommend import recommend
from rlr_trainer.diagnosis.report import Diagnosis, PlanRow, Recommendation
from rlr_trainer.diagnosis.workbench import untouched

if TYPE_CHECKING:
    from rlr_trainer.training.trainer import RLRTrainer

__all__ = [
    "Diagnosis",
    "PlanRow",
    "Recommendation",
    "VarianceProfile",
    "auto_fo_steps",
    "auto_ho_length",
    "diagnose",
    "measure_variance_profile",
]

MAX_ROUNDS = 200
AUTO_BATCHES = 16
AUTO_SECONDS = 60.0
GIGABYTE = 10**9


def diagnose(
    trainer: RLRTrainer,
    *,
    time_limit: float = 300.0,
    num_batches: int | None = None,
    candidates: list[Candidate] | None = None,
) -> Diagnosis:
    """Measures what plans would do with the trainer's model, reward, prompts and batch size at its present weights.

    Nothing of the trainer is changed (see `untouched`); the reward is queried, as `Diagnosis.settings["reward_queries"]` says.

    Args:
        trainer: an `RLRTrainer`, before or after training; in one process.
        time_limit: seconds; with little time there are fewer batches and plans, and the result says so. The first batch and
            the costs of the steps are measured whatever it is.
        num_batches: at most so many rounds of one update per plan; None: as many as the time allows (up to 200).
        candidates: plans to compare; None: the configured plan and the usual alternatives.

    Raises:
        ValueError: more than one process; a limit that is not positive; a black-box reward on a chain with a step without noise.
    """
    if not time_limit > 0:
        raise ValueError(f"time_limit={time_limit}: must be a positive number of seconds")
    if num_batches is not None and num_batches < 1:
        raise ValueError(f"num_batches={num_batches}: must be at least 1, or None for as many as the time allows")
    queries = trainer.rewards.queries
    with _progress(trainer, time_limit) as deadline, untouched(trainer) as bench:
        deadline.report("first batch")
        builder, batch, black_box = start_profile(bench)
        costs = measure_step_costs(bench, batch, builder.differentiable)
        notes: list[str] = []
        if candidates is None:
            size = bench.config.sample_batch_size
            candidates, notes = default_candidates(trainer.plan, bench.stds, trainer.args, size, builder.differentiable)
        comparison = Comparison(builder, candidates, trainer.control_scale)
        notes += comparison.run(batch, deadline, num_batches or MAX_ROUNDS)
        seconds = deadline.elapsed
    rows = evaluate(comparison, costs, trainer.plan)
    if black_box:
        notes.insert(0, f"{black_box}: the reference is the likelihood ratio's own mean, not the pathwise gradient")
    settings = describe(comparison) | {
        "time_limit": time_limit,
        "num_batches": num_batches,
        "seconds": round(seconds, 1),
        "reward_queries": trainer.rewards.queries - queries,
        "black_box": black_box,
    }
    notes += power_notes(rows, settings)
    return Diagnosis(rows, builder.build(), costs, recommend(rows), settings, notes, package_versions())


def measure_variance_profile(
    trainer: RLRTrainer, *, num_batches: int = AUTO_BATCHES, time_limit: float = AUTO_SECONDS, zeroth: bool = True
) -> VarianceProfile:
    """Size and noise of every step's share of the gradient, on the trainer's own model; changes nothing of it.

    Args:
        num_batches, time_limit: stops at the first; two batches at least are needed for a variance.
        zeroth: also the noise of zeroth-order steps (V_z).
    """
    with _progress(trainer, time_limit) as deadline, untouched(trainer) as bench:
        return build_profile(bench, deadline, num_batches, zeroth=zeroth).build()


def auto_fo_steps(trainer: RLRTrainer, *, num_batches: int = AUTO_BATCHES, time_limit: float = AUTO_SECONDS) -> int:
    """K for FO(K) + LR on the rest: the least measured variance among K up to half of the chain (`choose_fo_steps`).

    Longer first order is not considered, however little its variance: its risk (reward hacking) does not show in it. A K above half
    is returned only where the chain's last steps add no noise and leave no other choice. All plans of this family take one backward
    pass per step, so time does not enter. 0 for a black-box reward.

    Raises:
        ValueError: too little time for the two batches that a variance needs; more than one process.
    """
    profile = measure_variance_profile(trainer, num_batches=num_batches, time_limit=time_limit, zeroth=False)
    variances = profile.choices()
    possible = [k for k, variance in enumerate(variances) if variance < float("inf")]
    if not possible:
        raise ValueError(
            f"fo_steps='auto': only {profile.num_batches} batch fitted into {time_limit:g} s, and a variance needs two; give a number for "
            "fo_steps, or more time"
        )
    num_steps = len(variances) - 1
    return choose_fo_steps(variances, max_fo_steps=max(possible[0], int(LONG_FO_SHARE * num_steps)))


def auto_ho_length(
    trainer: RLRTrainer,
    memory_budget_gb: float,
    *,
    fo_steps: int = 1,
    num_batches: int = 4,
    time_limit: float = AUTO_SECONDS,
) -> int:
    """h of formula (8) with the memory and noise of this model's steps (`choose_ho_length`), at most T - fo_steps.

    Args:
        memory_budget_gb: memory for the steps of one sampling batch, in GB (10^9 bytes), beyond weights, optimizer and latents.
        fo_steps: K of the plan.
        num_batches, time_limit: for the noise.

    Raises:
        ValueError: too little time for the two batches that a variance needs; a step without noise; more than one process.
    """
    with _progress(trainer, time_limit) as deadline, untouched(trainer) as bench:
        builder = build_profile(bench, deadline, num_batches)
        while builder.moments["zo"].count < 2:
            builder.add_zeroth(builder.moments["zo"].count)
        costs = measure_step_costs(bench, bench.collect(0, builder.plan), builder.differentiable)
        profile = builder.build()
    if profile.std_ho is None or profile.std_zo is None:
        raise ValueError(
            f"ho_length='auto': the noise of half-order steps could not be measured ({profile.num_batches} batches in {time_limit:g} s; it "
            "takes two, and steps with noise); give a number for ho_length, or more time"
        )
    length = choose_ho_length(
        bench.num_steps,
        memory_budget_gb * GIGABYTE,
        max(1, costs["ho"].held_bytes),
        max(1, costs["zo"].peak_bytes),
        profile.std_ho,
        profile.std_zo,
    )
    return min(length, bench.num_steps - fo_steps)


@contextlib.contextmanager
def _progress(trainer: Any, time_limit: float) -> Iterator[Deadline]:
    """A deadline with a progress bar of the seconds; quiet when bars are disabled or the output is not a terminal."""
    disable = trainer.args.disable_tqdm or not sys.stderr.isatty()
    bar_format = "{desc} |{bar}| {n:.0f} of {total:.0f} s"
    with tqdm(total=time_limit, disable=disable, desc="diagnosing", bar_format=bar_format, leave=False) as bar:

        def show(elapsed: float, what: str) -> None:
            bar.set_description(f"diagnosing: {what}", refresh=False)
            bar.n = min(elapsed, time_limit)
            bar.refresh()

        yield Deadline(time_limit, show)
