"""Half-order (HO) estimator: the likelihood ratio of one step, carried back pathwise through the sub-chain before it."""

from __future__ import annotations

import torch
from torch import Tensor

from rlr_trainer.estimators.chain import gaussian_log_ratio


def likelihood_ratio(
    advantage: Tensor,
    x_next: Tensor,
    mean: Tensor,
    std: Tensor,
    old_mean: Tensor,
    old_std: Tensor,
    *,
    clip_range: float | None = None,
    mean_density: bool = False,
) -> tuple[Tensor, Tensor]:
    """Surrogate of one scored step: advantage * ratio, with PPO's clipping on request.

    Approximates: grad_t E[R]; for a sub-chain of length h, the sum of the shares of its h steps.
    With: A . D_theta^T mean . (x_{t-1} - mean) / std^2, the HO term of eq. 6, arXiv:2502.00639 (there with a negative sign,
        from grad_z ln f(z)). For h = 1 it is the policy-gradient estimator of DDPO, arXiv:2305.13301, eq. 8.
    Requires: std > 0, and an advantage that does not depend on the sample's own noise except through its reward.
    Returns: (surrogate [N], log-ratio [N]). The ratio is 1 while the parameters are those that sampled; the gradient is then
        the estimate. Later it weights the sample by importance, for this step.

    Args:
        advantage: [N], constant.
        x_next: [N, ...], the stored output of the step, constant.
        mean, std: the step's Gaussian under the present parameters, with a graph.
        old_mean, old_std: the same when the chain was sampled, constant.
        clip_range: PPO's epsilon; None leaves the ratio unclipped.
        mean_density: form the ratio from the per-entry mean of the log-density, as DDPO does, so that its clip ranges (1e-4)
            keep their meaning. The surrogate is multiplied by the number of entries, so that the gradient at ratio 1 is
            the same.
    """
    log_ratio = gaussian_log_ratio(x_next, mean, std, old_mean, old_std)
    entries = mean[0].numel() if mean_density else 1
    log_ratio = log_ratio / entries
    return entries * clipped_surrogate(advantage, log_ratio.exp(), clip_range), log_ratio.detach()


def clipped_surrogate(advantage: Tensor, ratio: Tensor, clip_range: float | None) -> Tensor:
    """advantage * ratio [N]; with a range, PPO's (arXiv:1707.06347, eq. 7): no gain from a ratio that is already out of it."""
    surrogate = advantage * ratio
    if clip_range is None:
        return surrogate
    return torch.minimum(surrogate, advantage * ratio.clamp(1 - clip_range, 1 + clip_range))


def is_clipped(advantage: Tensor, ratio: Tensor, clip_range: float | None) -> Tensor:
    """Whether `likelihood_ratio` leaves a sample out, because its ratio [N] is already out of range in the direction of its advantage [N]."""
    if clip_range is None:
        return torch.zeros_like(ratio, dtype=torch.bool)
    return torch.where(advantage > 0, ratio > 1 + clip_range, (advantage < 0) & (ratio < 1 - clip_range))
