"""A plan in force, with what its draws and factors learn while training goes on."""

from __future__ import annotations

import logging
from typing import Any

from rlr_trainer.estimators.plan import EstimatorPlan
from rlr_trainer.estimators.plan_draw import StartDistribution
from rlr_trainer.estimators.prediction import ControlVariateScale

logger = logging.getLogger(__name__)


class PlanState:
    """The plan in force; `starts`, by which `ho_start="grad_norm"` draws; `control_scale`, of the control variate. None where unused."""

    def __init__(self, plan: EstimatorPlan) -> None:
        self.take(plan)

    def take(self, plan: EstimatorPlan) -> None:
        """Takes up another plan; what was learnt for the one before is forgotten."""
        self.plan = plan
        self.starts = StartDistribution(plan.num_starts) if plan.ho_start == "grad_norm" else None
        self.control_scale = ControlVariateScale(plan.num_steps) if plan.uses_control_variate else None

    def start_probabilities(self) -> list[float] | None:
        """Probability per start of the sub-chain; None where the plan itself says it."""
        return self.starts.probabilities() if self.starts else None

    def state_dict(self) -> dict[str, Any]:
        parts = {"starts": self.starts, "control_scale": self.control_scale}
        return {name: part.state_dict() for name, part in parts.items() if part is not None}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Takes up what was learnt on a chain and a sub-chain of the same lengths."""
        for name, option, part in (
            ("starts", "ho_start='grad_norm'", self.starts),
            ("control_scale", "control_variate", self.control_scale),
        ):
            if part is None or name not in state:
                continue
            own, stored = ({key: len(values) for key, values in each.items()} for each in (part.state_dict(), state[name]))
            if own == stored:
                part.load_state_dict(state[name])
            else:
                logger.warning("%s: what the checkpoint learned is of another chain or sub-chain, so it is learned anew", option)
