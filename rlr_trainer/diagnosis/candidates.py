"""The plans that a diagnosis compares, as options that a user can put into the config."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from rlr_trainer.estimators.plan import EstimatorPlan, PlanError
from rlr_trainer.training.config import PLAN_OPTIONS, RLRConfig

YOURS = "yours"
LONG_FO_SHARE = 0.5  # first-order steps on more than this share of the chain count as long; docs/diagnostics.md says why


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A plan under a name.

    Attributes:
        name: short, unique.
        plan: the plan.
        options: the options of `RLRConfig` that make it.
    """

    name: str
    plan: EstimatorPlan
    options: dict[str, Any]

    @property
    def fo_share(self) -> float:
        """Largest share of the chain that first order may cover."""
        return self.plan.fo_range[1] / self.plan.num_steps

    @property
    def only_smoothed(self) -> bool:
        """Whether the only bias is zeroth order's smoothing of the objective."""
        return self.plan.uses_zeroth_order and len(self.plan.biases()) == 1


def zeroth_order_options(config: RLRConfig, batch_size: int) -> dict[str, Any]:
    """Options of zeroth order that fit the batch: the config's where they do, else fewer perturbations (and no pairs, if odd).

    Args:
        batch_size: samples of one sampling batch.
    """
    defaults = EstimatorPlan(1)
    group = config.num_images_per_prompt
    wanted = config.zo_num_perturbations or defaults.zo_num_perturbations
    antithetic = defaults.zo_antithetic if config.zo_antithetic is None else config.zo_antithetic
    antithetic = antithetic and batch_size % 2 == 0 and (group == 1 or group % 2 == 0)
    groups = batch_size // 2 if antithetic else batch_size
    count = max(n for n in range(1, min(wanted, groups) + 1) if groups % n == 0)
    options: dict[str, Any] = {"zo_num_perturbations": count, "zo_antithetic": antithetic}
    if config.zo_scale is not None:
        options["zo_scale"] = config.zo_scale
    return options


def default_candidates(
    own_plan: EstimatorPlan, stds: Sequence[float], config: RLRConfig, batch_size: int, differentiable: bool
) -> tuple[list[Candidate], list[str]]:
    """The configured plan and the usual alternatives, the most informative first (what is left when time is short).

    Args:
        own_plan: the configured plan.
        stds: T standard deviations of the transitions; a plan that would score a step without noise is left out.
        config: the run's config.
        batch_size: samples of one sampling batch.
        differentiable: whether the reward has a gradient; plans that need one are left out without.

    Returns:
        Candidates with different plans, and a note for each plan left out.
    """
    num_steps = own_plan.num_steps
    zeroth = zeroth_order_options(config, batch_size)
    wanted = [(YOURS, configured_options(config, own_plan))]
    wanted += _differentiable_wishes(num_steps, zeroth) if differentiable else _black_box_wishes(num_steps, zeroth)
    chosen: list[Candidate] = []
    notes: list[str] = []
    for name, options in wanted:
        try:
            plan = own_plan if name == YOURS else make_plan(options, num_steps)
            plan.check_noise(stds)
        except PlanError as error:
            notes.append(f"{name} was left out: {error}")
            continue
        if plan.needs_differentiable_reward and not differentiable:
            notes.append(f"{name} was left out: it needs a differentiable reward, and this one is a black box")
            continue
        twin = next((i for i, other in enumerate(chosen) if other.plan == plan), None)
        if twin is None:
            chosen.append(Candidate(name, plan, options))
        elif chosen[twin].name == YOURS:
            chosen[twin] = Candidate(f"{name} ({YOURS})", plan, chosen[twin].options)
    if not differentiable:
        notes.append("plans with first-order steps, predictions or a control variate were left out: the reward is a black box")
    return chosen, notes


def make_plan(options: dict[str, Any], num_steps: int) -> EstimatorPlan:
    """The plan of a candidate's options."""
    own = {name: value for name, value in options.items() if name in PLAN_OPTIONS}
    return EstimatorPlan.from_preset(options["estimator"], num_steps, **own)


def configured_options(config: RLRConfig, plan: EstimatorPlan) -> dict[str, Any]:
    """The estimator options that the config sets; what it leaves to a choice ("auto") as the plan has it."""
    given = {name: getattr(config, name) for name in PLAN_OPTIONS if getattr(config, name) is not None}
    chosen = {name: getattr(plan, name) if value == "auto" else value for name, value in given.items()}
    return {"estimator": config.estimator} | chosen


def _differentiable_wishes(num_steps: int, zeroth: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    shares = [k for k in sorted({1, math.ceil(0.3 * num_steps), math.ceil(0.5 * num_steps)}) if k < num_steps]
    default = min(shares, key=lambda k: abs(k - 0.3 * num_steps)) if shares else 1

    def rlr(fo_steps: int, ho_length: int) -> tuple[str, dict[str, Any]]:
        name = f"rlr K={fo_steps}" if ho_length == 1 else f"rlr K={fo_steps} h={ho_length}"
        return name, {"estimator": "rlr", "fo_steps": fo_steps, "ho_length": ho_length}

    controlled = {"estimator": "rlr", "fo_steps": default, "ho_length": 1, "control_variate": True}
    wishes: list[tuple[str, dict[str, Any]]] = [
        ("full_bp", {"estimator": "full_bp"}),
        ("ddpo", {"estimator": "ddpo", "advantage": "leave_one_out"}),
    ]
    if shares:
        wishes.append(rlr(default, 1))
    wishes.append(("sqdf", {"estimator": "sqdf"}))
    wishes += [rlr(k, 1) for k in shares if k != default]
    if shares:
        wishes.append((f"rlr K={default} control variate", controlled))
    wishes.append(("draft K=1", {"estimator": "draft", "fo_steps": 1}))
    wishes += [rlr(k, 2) for k in sorted(shares, key=lambda k: k != default) if k + 2 <= num_steps]
    if num_steps >= 3:
        wishes.append(("rlr_paper", {"estimator": "rlr_paper"} | zeroth))
    wishes.append(("es", {"estimator": "es"} | zeroth))
    return wishes


def _black_box_wishes(num_steps: int, zeroth: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    wishes: list[tuple[str, dict[str, Any]]] = [("ddpo", {"estimator": "ddpo", "advantage": "leave_one_out"})]
    if num_steps >= 2:
        half = max(1, num_steps // 2)
        wishes.append((f"ddpo on {half} steps", {"estimator": "ddpo", "rest_num_steps": half, "advantage": "leave_one_out"}))
        wishes.append(("rlr K=0 h=2", {"estimator": "rlr", "fo_steps": 0, "ho_length": 2}))
    if num_steps >= 3:
        paper = {"estimator": "rlr_paper", "fo_steps": 0, "ho_length": 2}
        wishes.append(("rlr_paper K=0", paper | zeroth))
    wishes.append(("es", {"estimator": "es"} | zeroth))
    return wishes
