"""First-order (FO, pathwise) estimator: the reward's own gradient, followed back through the chain with the noise held fixed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rlr_trainer.estimators.chain import next_latent, sum_over_latent


def pathwise(adjoint: Tensor, mean: Tensor, std: Tensor, noise: Tensor) -> Tensor:
    """Surrogate of one pathwise step: <adjoint, mean_theta + std * noise>.

    Approximates: grad_t E[R], the share of the gradient that comes through the use of theta in this step.
    With: D_theta^T phi_t . a, where a = dR/dx_{t-1} is the adjoint of the step's output.
    Requires: a differentiable reward (for dR/dx_0, where the adjoint starts). No noise is needed: std may be 0.
    Returns: the surrogate per sample, shape [N]; its gradient with respect to theta is the estimate, and its gradient with
        respect to the step's input is the adjoint of the step before. FO term of eq. 6, arXiv:2502.00639.

    Args:
        adjoint: [N, ...], constant.
        mean: [N, ...], with a graph.
        std: broadcasts to [N, ...].
        noise: [N, ...], the noise drawn when the chain was sampled.
    """
    return sum_over_latent(adjoint * next_latent(mean, std, noise))


def reward_and_gradient(reward: Callable[[Tensor], Tensor], x0: Tensor, loss_scale: float = 1.0) -> tuple[Tensor, Tensor]:
    """R(x_0) [N] and dR/dx_0 [N, ...]; the graph of the reward (and decoder) is freed on return.

    Args:
        reward: [N, ...] -> [N].
        x0: [N, ...].
        loss_scale: multiplies the reward during the backward pass, so that small gradients survive a part in half precision.

    Raises:
        NonDifferentiableRewardError: the reward returned values without a graph.
    """
    x0 = x0.detach().requires_grad_(True)
    with torch.enable_grad():
        values = reward(x0)
        if not values.requires_grad:
            raise NonDifferentiableRewardError(NON_DIFFERENTIABLE)
        (gradient,) = torch.autograd.grad(loss_scale * values.sum(), x0, allow_unused=True)
        if gradient is None:  # a graph, but not one that reaches the images (that of the reward model's own parameters)
            raise NonDifferentiableRewardError(NON_DIFFERENTIABLE)
    return values.detach(), gradient / loss_scale


class NonDifferentiableRewardError(TypeError):
    """A plan with first-order steps met a reward without a graph."""


NON_DIFFERENTIABLE = (
    "it has no gradient, and the plan needs one (first-order steps, predictions or a control variate). It is a black box, or it detaches "
    "its input (.detach(), .item(), numpy, PIL, torch.no_grad). Choose a plan that needs no reward gradient, estimator='rlr_black_box' or "
    "fo_steps=0 with rest_estimator='lr', or make the reward differentiable in its images"
)
