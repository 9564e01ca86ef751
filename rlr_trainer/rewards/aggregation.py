"""Several rewards in one objective: summed and then normalized (the trainer's usual way), or each normalized before the sum."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rlr_trainer.estimators.advantages import Advantages, normalize


def normalize_in_groups(rewards: Tensor, groups: Tensor | None) -> Advantages:
    """(R - mean) / std over the samples of the same number in `groups` (int [N]; None: over all), of rewards [N], NaN where there is none."""
    if groups is None:
        return normalize(rewards)
    values, scale = torch.zeros_like(rewards), torch.zeros_like(rewards)
    for group in groups.unique():
        members = groups == group
        one = normalize(rewards[members])
        values[members], scale[members] = one.values, one.scale
    return Advantages(values, scale)


def normalize_then_sum(
    rewards: Tensor, weights: Sequence[float], advantage: Callable[[int, Tensor], Advantages]
) -> tuple[Advantages, Tensor]:
    """Advantages of sum_k w_k A_k, with A_k the normalized advantage of reward k alone; the sum is normalized over the batch again.

    GDPO, arXiv:2601.05242, and TRL's `multi_objective_aggregation`: no reward outweighs another because its numbers are spread wider.

    Args:
        rewards: [N, K], NaN where a reward does not apply; a row of NaN is a sample without any.
        weights: K of them.
        advantage: (k, rewards [N]) -> advantages of reward k alone.

    Returns:
        The advantages, and the factor [N, K] of every reward's own gradient: dA_i = sum_k factor_ik dR_ik, with means and standard
        deviations held constant. The `scale` of the advantages is 1: it is in the factors. 0 for samples without a reward.
    """
    each = [advantage(k, column) for k, column in enumerate(rewards.unbind(1))]
    total = sum(weight * one.values for weight, one in zip(weights, each, strict=True))
    dropped = torch.isnan(rewards).all(1)
    whole = normalize(torch.where(dropped, torch.nan, total))
    factors = torch.stack([weight * one.scale * whole.scale for weight, one in zip(weights, each, strict=True)], 1)
    return Advantages(whole.values, (~dropped).to(whole.values)), factors
