"""The plans that a diagnosis compares, as options that a user can put into the config."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

from rlr_trainer.estimators.plan import EstimatorPlan, PlanError

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
    def only_smoothed(self) -> bool:
        """Whether the only bias is zeroth order's smoothing of the objective."""
        return self.plan.uses_zeroth_order and len(self.plan.biases()) == 1


def zeroth_order_options(given: Mapping[str, Any], batch_size: int, group_size: int) -> dict[str, Any]:
    """Options of zeroth order that fit the batch: the given ones where they do, else fewer perturbations (and no pairs, if odd).

    Args:
        given: the configured options.
        batch_size, group_size: samples of one sampling batch, and of one prompt.
    """
    defaults = EstimatorPlan(1)
    antithetic = given.get("zo_antithetic", defaults.zo_antithetic) and batch_size % 2 == 0
    antithetic = antithetic and (group_size == 1 or group_size % 2 == 0)
    directions = batch_size // 2 if antithetic else batch_size
    wanted = given.get("zo_num_perturbations", defaults.zo_num_perturbations)
    count = max(n for n in range(1, min(wanted, directions) + 1) if directions % n == 0)
    scale = {"zo_scale": given["zo_scale"]} if "zo_scale" in given else {}
    return {"zo_num_perturbations": count, "zo_antithetic": antithetic} | scale


def default_candidates(
    own: Candidate, stds: Sequence[float], batch_size: int, group_size: int, differentiable: bool
) -> tuple[list[Candidate], list[str]]:
    """The configured plan and the usual alternatives, the most informative first (what is left when time is short).

    Args:
        own: the configured plan.
        stds: T standard deviations of the transitions; a plan that would score a step without noise is left out.
        batch_size, group_size: samples of one sampling batch, and of one prompt.
        differentiable: whether the reward has a gradient; plans that need one are left out without.

    Returns:
        Candidates with different plans, and a note for each plan left out.
    """
    num_steps = own.plan.num_steps
    zeroth = zeroth_order_options(own.options, batch_size, group_size)
    wanted = _differentiable_wishes(num_steps, zeroth) if differentiable else _black_box_wishes(num_steps, zeroth)
    chosen: list[Candidate] = []
    notes: list[str] = []
    for name, options in [(YOURS, own.options), *wanted]:
        try:
            plan = own.plan if name == YOURS else _plan_of(options, num_steps)
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


def _plan_of(options: Mapping[str, Any], num_steps: int) -> EstimatorPlan:
    of_plan = {name: value for name, value in options.items() if name not in ("estimator", "advantage")}
    return EstimatorPlan.from_preset(options["estimator"], num_steps, **of_plan)


def _differentiable_wishes(num_steps: int, zeroth: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    lengths = [k for k in sorted({1, math.ceil(0.3 * num_steps), math.ceil(0.5 * num_steps)}) if k < num_steps]
    lengths.sort(key=lambda k: abs(k - 0.3 * num_steps))  # the preset's own first; the order of the others is that of their size
    lengths[1:] = sorted(lengths[1:])

    def rlr(fo_steps: int, ho_length: int, suffix: str = "", **more: Any) -> tuple[str, dict[str, Any]]:
        return f"rlr K={fo_steps}{suffix}", {"estimator": "rlr", "fo_steps": fo_steps, "ho_length": ho_length} | more

    return [
        ("full_bp", {"estimator": "full_bp"}),
        ("ddpo", {"estimator": "ddpo", "advantage": "leave_one_out"}),
        *(rlr(k, 1) for k in lengths[:1]),
        ("sqdf", {"estimator": "sqdf"}),
        *(rlr(k, 1) for k in lengths[1:]),
        *(rlr(k, 1, " control variate", control_variate=True) for k in lengths[:1]),
        ("draft K=1", {"estimator": "draft", "fo_steps": 1}),
        *(rlr(k, 2, " h=2") for k in lengths if k + 2 <= num_steps),
        *([("rlr_paper", {"estimator": "rlr_paper"} | zeroth)] if num_steps >= 3 else []),
        ("es", {"estimator": "es"} | zeroth),
    ]


def _black_box_wishes(num_steps: int, zeroth: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    wishes: list[tuple[str, dict[str, Any]]] = [("ddpo", {"estimator": "ddpo", "advantage": "leave_one_out"})]
    if num_steps >= 2:
        half = max(1, num_steps // 2)
        wishes.append((f"ddpo on {half} steps", {"estimator": "ddpo", "rest_num_steps": half, "advantage": "leave_one_out"}))
        wishes.append(("rlr K=0 h=2", {"estimator": "rlr", "fo_steps": 0, "ho_length": 2}))
    if num_steps >= 3:
        wishes.append(("rlr_paper K=0", {"estimator": "rlr_paper", "fo_steps": 0, "ho_length": 2} | zeroth))
    wishes.append(("es", {"estimator": "es"} | zeroth))
    return wishes
