"""Gradient estimators as functions of tensors; needs nothing but torch."""

from rlr_trainer.estimators.advantages import Advantages, PerPromptStatistics, leave_one_out, no_baseline, normalize
from rlr_trainer.estimators.first_order import NonDifferentiableRewardError, pathwise, reward_and_gradient
from rlr_trainer.estimators.gradient import GradientEstimate, estimate_gradient
from rlr_trainer.estimators.half_order import likelihood_ratio
from rlr_trainer.estimators.prediction import (
    ControlVariate,
    ControlVariateScale,
    Predictions,
    control_terms,
    control_variate,
    prediction_critic,
    prediction_pathwise,
)
from rlr_trainer.estimators.sweep import Feedback, Sweep, SweepResult
from rlr_trainer.estimators.zeroth_order import Perturbations, perturbed_steps, zeroth_order

__all__ = [
    "Advantages", "ControlVariate", "ControlVariateScale", "Feedback", "GradientEstimate", "NonDifferentiableRewardError",
    "PerPromptStatistics", "Perturbations", "Predictions", "Sweep", "SweepResult", "control_terms", "control_variate",
    "estimate_gradient", "leave_one_out", "likelihood_ratio", "no_baseline", "normalize", "pathwise", "perturbed_steps",
    "prediction_critic", "prediction_pathwise", "reward_and_gradient", "zeroth_order",
]  # fmt: skip
