"""Estimators built on the reward of the one-step prediction: a control variate, and the pathwise term alone.

c(x) = R(x0_hat(x)) is the reward of the clean sample that the network predicts from a latent in one call; g = dc/dx is taken
through the network's input only. Differentiating c through the parameters as well would bias both estimators.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rlr_trainer.estimators.advantages import leave_one_out
from rlr_trainer.estimators.chain import DenoisingChain, Parameters, predict_clean
from rlr_trainer.estimators.first_order import pathwise, reward_and_gradient
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


def control_variate(advantage: Tensor, critic_value: Tensor, scale: Tensor | float, center: Tensor | float) -> Tensor:
    """The advantage left after the part that the prediction explains: A - scale * (c - center). Shape [N].

    Scored with it, and with `scale * prediction_pathwise` added, a step's likelihood-ratio estimate keeps its mean: the first
    part loses scale * E[c grad log p], the second adds it back. `scale` and `center` must not depend on the sample's own
    noise (fit them on earlier batches, or leave the sample out). RELAX (arXiv:1711.00123) uses the same construction.
    """
    return advantage - scale * (critic_value - center)


def leave_one_out_mean(values: Tensor, blocks: Tensor | None = None) -> Tensor:
    """Mean of the other samples, [N] -> [N]; zeros for a single sample. Samples of one block share noise and are left out together."""
    return values - leave_one_out(values, blocks=blocks).values


class ControlVariateScale(RunningMeans):
    """Per-step factor on c, fitted on earlier batches: cov(R, c) / var(c), running, 1 until two batches were seen."""

    def __init__(self, num_steps: int, decay: float = 0.9) -> None:
        super().__init__(num_steps, 2, decay)  # cov(R, c), var(c)

    def scale(self, step: int) -> float:
        covariance, variance = self.means[step].tolist()
        return covariance / variance if self.counts[step] > 1 and variance > 0 else 1.0

    def update(self, step: int, rewards: Tensor, critic_values: Tensor) -> None:
        """Takes in one batch, [N] each. To be called after the batch's gradient, or the scale would depend on its noise."""
        there = ~(torch.isnan(rewards).cpu() | torch.isnan(critic_values).cpu())
        rewards, critic_values = rewards.cpu()[there], critic_values.cpu()[there]
        if len(rewards) > 1:
            r, c = (values.double() - values.double().mean() for values in (rewards, critic_values))
            self.add(step, [float((r * c).mean()), float((c * c).mean())])
