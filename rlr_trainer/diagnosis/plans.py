"""The plans that a diagnosis compares, as options that a user can put into the config."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from rlr_trainer.estimators.plan import PLAN_OPTIONS, EstimatorPlan, PlanError
from rlr_trainer.estimators.presets import PRESETS
from rlr_trainer.schedules import Schedule

YOURS = "yours"
LONG_FO_SHARE = 0.5  # first-order steps on more than this share of the chain count as long; docs/diagnostics.md says why


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A plan under a short, unique name, with the options of `RLRConfig` that make it.

    `schedule` is None where it is sampled as the run is; else the steps of a sampler that its options change.
    """

    name: str
    plan: EstimatorPlan
    options: dict[str, Any]
    schedule: Schedule | None = None

    @property
    def only_smoothed(self) -> bool:
        """Whether the only bias is zeroth order's smoothing of the objective."""
        return self.plan.uses_zeroth_order and len(self.plan.biases()) == 1


def zeroth_order_options(given: Mapping[str, Any], batch_size: int, group_size: int) -> dict[str, Any]:
    """The given options of zeroth order where they fit the batch, else fewer perturbations (and no pairs, if odd)."""
    options = {"zo_num_perturbations": 4, "zo_antithetic": True} | {k: v for k, v in given.items() if k.startswith("zo_")}
    options["zo_antithetic"] &= batch_size % 2 == 0 and (group_size == 1 or group_size % 2 == 0)
    directions = batch_size // 2 if options["zo_antithetic"] else batch_size
    largest = min(options["zo_num_perturbations"], directions)
    options["zo_num_perturbations"] = max(n for n in range(1, largest + 1) if directions % n == 0)
    return options


def sampling_candidates(
    own: Candidate, make_schedule: Callable[[Mapping[str, Any]], Schedule], differentiable: bool
) -> list[Candidate]:
    """Plans that need other noise than the run's: in a window, and at another level.

    `make_schedule` takes `noise_steps` and `sample_eta`, and raises ValueError where the sampler cannot have them.
    """
    num_steps, found = own.plan.num_steps, []
    half = math.ceil(0.5 * num_steps)
    tail = {"estimator": "rlr", "fo_steps": num_steps - half, "ho_length": 1}
    kinds: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {}
    if differentiable:
        kinds[f"rlr K={num_steps - half}, noise in {half} steps"] = tail, {"noise_steps": half}
    kinds["rlr_black_box"] = {"estimator": "rlr_black_box"}, PRESETS["rlr_black_box"].sampling(num_steps)
    eta = 0.25 if own.options.get("sample_eta") == 0.5 else 0.5
    kinds[f"{YOURS}, sample_eta={eta}"] = own.options, {"sample_eta": eta}
    for name, (options, sampling) in kinds.items():
        with contextlib.suppress(ValueError):  # a sampler without such a window or level
            schedule = make_schedule(sampling)
            of_plan = {key: value for key, value in options.items() if key in PLAN_OPTIONS}
            plan = EstimatorPlan.from_preset(options["estimator"], num_steps, **of_plan).on_noise(schedule.stds)
            found.append(Candidate(name, plan, options | sampling, schedule))
    return found


def default_candidates(
    own: Candidate, stds: Sequence[float], batch_size: int, group_size: int, differentiable: bool
) -> tuple[list[Candidate], list[str]]:
    """The configured plan and the usual alternatives, the most informative first (what is left when time is short), and why some were left out.

    `stds` are of the T transitions: a plan that would score a step without noise is left out. `batch_size` and `group_size` are the
    samples of one sampling batch, and of one prompt.
    """
    num_steps = own.plan.num_steps
    zeroth = zeroth_order_options(own.options, batch_size, group_size)
    usual = _usual(num_steps, zeroth, differentiable)
    chosen: list[Candidate] = []
    notes: list[str] = []
    for name, options in [(YOURS, own.options), *usual.items()]:
        of_plan = {key: value for key, value in options.items() if key not in ("estimator", "advantage")}
        try:
            plan = own.plan if name == YOURS else EstimatorPlan.from_preset(options["estimator"], num_steps, **of_plan)
            plan = plan.on_noise(stds)
        except PlanError as error:
            notes.append(f"{name} was left out: {error}")
            continue
        if plan.needs_differentiable_reward and not differentiable:
            notes.append(f"{name} was left out: it needs a differentiable reward, and this one is a black box")
        elif plan not in [other.plan for other in chosen]:
            chosen.append(Candidate(name, plan, options))
        elif plan == own.plan and chosen[0].name == YOURS:
            chosen[0] = Candidate(f"{name} ({YOURS})", plan, own.options)
    if not differentiable:
        notes.append("plans with first-order steps, predictions or a control variate were left out: the reward is a black box")
    return chosen, notes


def _usual(num_steps: int, zeroth: dict[str, Any], differentiable: bool) -> dict[str, dict[str, Any]]:
    third, half = math.ceil(0.3 * num_steps), math.ceil(0.5 * num_steps)
    ddpo, es = {"estimator": "ddpo", "advantage": "leave_one_out"}, {"estimator": "es"} | zeroth
    if not differentiable:
        scored = max(1, num_steps // 2)
        paper = {"estimator": "rlr_paper", "fo_steps": 0, "ho_length": 2} | zeroth
        partial = ddpo | {"rest_num_steps": scored}
        return {"ddpo": ddpo, f"ddpo on {scored} steps": partial, "rlr K=0 h=2": _rlr(0, 2), "rlr_paper K=0": paper, "es": es}
    return {
        "full_bp": {"estimator": "full_bp"},
        "ddpo": ddpo,
        f"rlr K={third}": _rlr(third, 1),
        "sqdf": {"estimator": "sqdf"},
        "rlr K=1": _rlr(1, 1),
        f"rlr K={half}": _rlr(half, 1),
        f"rlr K={third} control variate": _rlr(third, 1) | {"control_variate": True},
        "draft K=1": {"estimator": "draft", "fo_steps": 1},
        f"rlr K={third} h=2": _rlr(third, 2),
        "rlr K=1 h=2": _rlr(1, 2),
        f"rlr K={half} h=2": _rlr(half, 2),
        "rlr_paper": {"estimator": "rlr_paper"} | zeroth,
        "es": es,
    }


def _rlr(fo_steps: int, ho_length: int) -> dict[str, Any]:
    return {"estimator": "rlr", "fo_steps": fo_steps, "ho_length": ho_length}
