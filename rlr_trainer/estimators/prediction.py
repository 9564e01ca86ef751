"""Estimators built on the reward of the one-step prediction: a control variate, and the pathwise term alone.

c(x) = R(x0_hat(x)) is the reward of the clean sample that the network predicts from a latent in one call; g = dc/dx is taken
through the network's input only. Differentiating c through the parameters as well would bias both estimators.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

from rlr_trainer.estimators.advantages import leave_one_out
from rlr_trainer.estimators.chain import DenoisingChain, Parameters, as_rows, map_tensors, predict_clean
from rlr_trainer.estimators.first_order import NonDifferentiableRewardError, pathwise, reward_and_gradient
from rlr_trainer.estimators.plan_draw import RunningMeans

# (step, x = latents[step]) -> (c [N], g [N, ...])
Critic = Callable[[int, Tensor], tuple[Tensor, Tensor]]


FP16_LOSS_SCALE = 2.0**10  # keeps small gradients of half precision from vanishing


def prediction_critic(
    chain: DenoisingChain, params: Parameters, reward: Callable[[Tensor], Tensor], loss_scale: float = 1.0
) -> Critic:
    """c and g of a chain and a differentiable reward, with the parameters held constant; `loss_scale` as in `reward_and_gradient`."""
    frozen = {name: p.detach() for name, p in params.items()}
    return lambda step, x: reward_and_gradient(lambda z: reward(predict_clean(chain, step, z, frozen)), x, loss_scale)


def prediction_pathwise(critic_gradient: Tensor, mean: Tensor, std: Tensor, noise: Tensor) -> Tensor:
    """Surrogate <g, mean_theta + std * noise>: pathwise, with c standing in for the rest of the chain.

    Approximates: grad_t E[R]; exactly grad_theta E[c(x_{t-1})], so the bias is that of c as a prediction of R.
    With: close to SQDF (arXiv:2512.04559) on every step and to ReFL (arXiv:2304.05977) on one random step.
    Requires: a differentiable reward and a chain that predicts its clean sample.
    Returns: the surrogate per sample, shape [N].
    """
    return pathwise(critic_gradient, mean, std, noise)


def control_variate(critic_value: Tensor, scale: Tensor | float, center: Tensor | float) -> Tensor:
    """The part of the reward that the prediction explains, to be taken off the advantage: scale * (c - center). Shape [N].

    Scored without it, and with `scale * prediction_pathwise` added, a step's likelihood-ratio estimate keeps its mean: the first
    part loses scale * E[c grad log p], the second adds it back. c must be a function of the latent alone, so with weights that are
    constant, and `scale` and `center` must not depend on the sample's own noise (fit them on earlier batches, or leave the sample
    out). RELAX (arXiv:1711.00123) uses the same construction.
    """
    return scale * (critic_value - center)


def leave_one_out_mean(values: Tensor, blocks: Tensor | None = None) -> Tensor:
    """Mean of the other samples, [N] -> [N]; zeros for a single sample. Samples of one block share noise and are left out together."""
    return values - leave_one_out(values, blocks=blocks).values


@dataclasses.dataclass(frozen=True)
class Predictions:
    """What the one-step prediction says of N samples at the outputs of some steps.

    Attributes:
        values: [N, T], c; NaN at steps that were not asked.
        gradients: step -> g [N, ...].
    """

    values: Tensor
    gradients: Mapping[int, Tensor]

    @classmethod
    def at(cls, critic: Critic, outputs: Mapping[int, Tensor], count: int, num_steps: int) -> Predictions:
        """Asks `critic` about the outputs step -> [N, ...] of `count` = N samples."""
        found = {step: critic(step + 1, x) for step, x in outputs.items()}
        like = next((value for value, _ in found.values()), torch.zeros(()))
        values = torch.full((count, num_steps), torch.nan, dtype=like.dtype, device=like.device)
        for step, (value, _) in found.items():
            values[:, step] = value
        return cls(values, {step: gradient for step, (_, gradient) in found.items()})

    def to(self, device: torch.device | str) -> Predictions:
        """The same on another device."""
        return map_tensors(self, lambda t: t.to(device))

    @staticmethod
    def concatenate(parts: Sequence[Predictions]) -> Predictions:
        """Joins predictions of the same steps."""
        gradients = {step: torch.cat([part.gradients[step] for part in parts]) for step in parts[0].gradients}
        return Predictions(torch.cat([part.values for part in parts]), gradients)


@dataclasses.dataclass(frozen=True)
class ControlVariate:
    """The terms of a control variate for N samples, in units of the reward.

    Attributes:
        baseline: [N, T], alpha (c - centre), to be taken off the advantage; 0 where there is none.
        gradients: step -> alpha g [N, ...], to be added pathwise; 0 for samples without a reward.
    """

    baseline: Tensor
    gradients: Mapping[int, Tensor]

    def select(self, rows: Tensor) -> ControlVariate:
        """The terms of some samples."""
        return map_tensors(self, lambda t: t[rows.to(t.device)])

    def to(self, device: torch.device | str) -> ControlVariate:
        """The same on another device."""
        return map_tensors(self, lambda t: t.to(device))

    @staticmethod
    def concatenate(parts: Sequence[ControlVariate]) -> ControlVariate:
        """Joins the terms of batches, which may have been asked at other steps."""

        def of(part: ControlVariate, step: int, like: Tensor) -> Tensor:
            return part.gradients[step] if step in part.gradients else like.new_zeros(len(part.baseline), *like.shape[1:])

        found = {step: gradient for part in parts for step, gradient in part.gradients.items()}
        gradients = {step: torch.cat([of(part, step, like) for part in parts]) for step, like in sorted(found.items())}
        return ControlVariate(torch.cat([part.baseline for part in parts]), gradients)


def control_terms(
    parts: Sequence[Predictions],
    positions: Sequence[Tensor],
    values: Tensor,
    rewards: Tensor,
    scale: ControlVariateScale,
    blocks: Tensor | None = None,
) -> list[ControlVariate]:
    """The control variate of the batches of a rollout: centred over all of its S samples, with the factors of earlier rollouts.

    Args:
        parts: the predictions of each batch.
        positions: int [N] of each batch, the place of its samples among the S.
        values: [S, T], c of all samples (those of other processes too); NaN where it was not asked.
        rewards: [S]; NaN for a sample without one, whose terms are 0, and which enters no centre.
        scale: alpha per step; not changed.
        blocks: int [S]; samples of one number share their noise (antithetic pairs), and a centre leaves them out together.

    Raises:
        FloatingPointError: a prediction or its gradient is not finite; names the step.
        NonDifferentiableRewardError: predictions differ, but the gradient of every one is exactly 0.
    """
    there = ~torch.isnan(rewards)
    _check_slope(parts)
    values = torch.where(there[:, None], values, torch.nan)
    centers = torch.stack([leave_one_out_mean(column, blocks) for column in values.unbind(1)], 1)
    return [_terms_of(part, there[place], centers[place], scale) for part, place in zip(parts, positions, strict=True)]


def _check_slope(parts: Sequence[Predictions]) -> None:
    """A reward that jumps may carry a graph, but what is added back would be 0, and what was taken off not."""
    steps = {step for part in parts for step in part.gradients}
    columns = [torch.cat([part.values[:, step] for part in parts]) for step in steps]
    differ = any(len(column[~torch.isnan(column)].unique()) > 1 for column in columns)
    if differ and not any(bool(gradient.any()) for part in parts for gradient in part.gradients.values()):
        raise NonDifferentiableRewardError(
            "control_variate=True: the rewards of the predictions differ, but the gradient of every one is exactly 0, as with a reward that "
            "rounds, counts or compares; it must be continuous and differentiable in the picture, or the estimate is biased. Use such a "
            "reward, or set control_variate=False"
        )


def _terms_of(part: Predictions, there: Tensor, centers: Tensor, scale: ControlVariateScale) -> ControlVariate:
    there, centers = there.to(part.values.device), centers.to(part.values)
    baseline, gradients = torch.zeros_like(part.values), {}
    for step, gradient in part.gradients.items():
        gradient = torch.where(as_rows(there, gradient) > 0, gradient, 0.0)  # without a reward it may be NaN
        value = torch.where(there, part.values[:, step], 0.0)
        check_prediction(step, value, gradient)
        alpha = scale.scale(step)
        baseline[:, step] = torch.where(there, control_variate(value, alpha, centers[:, step]), 0.0)
        gradients[step] = alpha * gradient
    return ControlVariate(baseline, gradients)


def check_prediction(step: int, value: Tensor, gradient: Tensor) -> None:
    """Refuses c [N] and g [N, ...] that are not finite.

    Raises:
        FloatingPointError: names the step.
    """
    for name, finite in (("", torch.isfinite(value)), ("gradient of the ", torch.isfinite(gradient).flatten(1).all(1))):
        if not finite.all():
            raise FloatingPointError(
                f"step {step}: the {name}predicted reward is not finite for {int((~finite).sum())} of {len(finite)} samples; look for sqrt, "
                "log or a norm at 0 in the reward, or use a wider precision"
            )


class ControlVariateScale(RunningMeans):
    """Per-step factor on c, fitted on earlier rollouts: cov(R, c) / var(c), running, 1 until two rollouts were seen."""

    def __init__(self, num_steps: int, decay: float = 0.9) -> None:
        super().__init__(num_steps, 2, decay)  # cov(R, c), var(c)

    def scale(self, step: int) -> float:
        covariance, variance = self.means[step].tolist()
        return covariance / variance if self.counts[step] > 1 and variance > 0 else 1.0

    def update(self, rewards: Tensor, values: Tensor) -> None:
        """Takes in a rollout, R [S] and c [S, T]; NaN where there is none. After its terms were made, or they would see their own noise."""
        for step, critic_values in enumerate(values.cpu().unbind(1)):
            there = ~(torch.isnan(rewards.cpu()) | torch.isnan(critic_values))
            if int(there.sum()) > 1:
                r, c = (column.double() - column.double().mean() for column in (rewards.cpu()[there], critic_values[there]))
                self.add(step, [float((r * c).mean()), float((c * c).mean())])
