"""Bias, variance, time and memory of gradient estimators on the user's own model, reward, prompts and batch size.

`diagnose(trainer)` compares plans and recommends one; `auto_noise_steps(trainer)`, `auto_fo_steps(trainer)` and `auto_ho_length(trainer, ...)`
choose a noise window, K and h. What the columns mean and what is not measured is in docs/diagnostics.md.
"""

from __future__ import annotations

import importlib.metadata
import platform
from typing import Any

from rlr_trainer.diagnosis.choice import auto_fo_steps, auto_ho_length, auto_noise_steps, measuring
from rlr_trainer.diagnosis.comparison import Comparison
from rlr_trainer.diagnosis.plans import YOURS, Candidate, default_candidates, sampling_candidates
from rlr_trainer.diagnosis.result import Diagnosis, PlanRow, Recommendation
from rlr_trainer.diagnosis.rows import about_reference, evaluate, notes_on_power, recommend
from rlr_trainer.diagnosis.step_profile import VarianceProfile, measure_step_costs, start_profile
from rlr_trainer.diagnosis.windows import Window, measured_windows

__all__ = [
    "Diagnosis",
    "PlanRow",
    "Recommendation",
    "VarianceProfile",
    "Window",
    "auto_fo_steps",
    "auto_ho_length",
    "auto_noise_steps",
    "diagnose",
]

MAX_ROUNDS = 200
PACKAGES = ("torch", "transformers", "diffusers", "trl", "peft")


def diagnose(
    trainer: Any,
    *,
    time_limit: float = 300.0,
    num_batches: int | None = None,
    candidates: list[Candidate] | None = None,
) -> Diagnosis:
    """Measures what plans would do with a run's model, reward, prompts and batch size at its present weights.

    Nothing of the run is changed (see `workbench.untouched`); the reward is queried, as `Diagnosis.settings["reward_queries"]` says.

    Args:
        trainer: an `RLRTrainer`, before or after training; in one process.
        time_limit: seconds; with little time there are fewer batches and plans, and the result says so. The first batch and
            the costs of the steps are measured whatever it is.
        num_batches: at most so many rounds of one update per plan; None: as many as the time allows (up to 200).
        candidates: plans to compare; None: the configured plan and the usual alternatives.

    Raises:
        ValueError: a loss on the forward process; more than one process; a limit that is not positive; a black-box reward on a chain
            without noise.
    """
    from rlr_trainer import __version__

    if not time_limit > 0:
        raise ValueError(f"time_limit={time_limit}: must be a positive number of seconds")
    if num_batches is not None and num_batches < 1:
        raise ValueError(f"num_batches={num_batches}: must be at least 1, or None for as many as the time allows")
    if trainer.plan.forward is not None:
        raise ValueError(
            f"diagnose with estimator={trainer.args.estimator!r}: it measures estimates of the reward's gradient, step by step, and a loss on "
            "the forward process is none; choose another estimator for the diagnosis"
        )
    with measuring(trainer, time_limit) as (bench, deadline):
        deadline.report("first batch")
        builder, batch, black_box = start_profile(bench)
        costs = measure_step_costs(bench, batch, builder.differentiable)
        notes = [f"{black_box}: the reference is the likelihood ratio's own mean, not the pathwise gradient"] if black_box else []
        if candidates is None:
            own = Candidate(YOURS, bench.plan, bench.configured_options)
            group_size = bench.options.group_size
            candidates, left_out = default_candidates(own, bench.stds, bench.batch_size, group_size, builder.differentiable)
            candidates += sampling_candidates(own, bench.schedule, builder.differentiable)
            notes += left_out
        comparison = Comparison(builder, candidates)
        notes += comparison.run(batch, deadline, num_batches or MAX_ROUNDS)
        settings = bench.settings() | about_reference(comparison)
        settings |= {
            "time_limit": time_limit,
            "num_batches": num_batches,
            "black_box": black_box,
            "seconds": round(time_limit - deadline.left, 1),
        }
    rows = evaluate(comparison, costs)
    windows = measured_windows(builder, costs["reward"].seconds * bench.num_batches)
    versions = {"python": platform.python_version(), "rlr_trainer": __version__} | {
        name: importlib.metadata.version(name) for name in PACKAGES
    }
    notes += notes_on_power(rows, settings)
    return Diagnosis(rows, builder.build(), windows, costs, recommend(rows), settings, notes, versions)
