"""Baselines and normalization: what multiplies the likelihood-ratio and zeroth-order terms in place of the reward.

Every function takes rewards [N] in which NaN marks a sample without a reward; such a sample gets advantage 0 and enters no
baseline. Besides the advantages A = (R - b) * scale each returns `scale`, because a first-order term dR/dx_0 that is added to
them must be multiplied by the same factor, or the sum is the gradient of nothing.
"""

from __future__ import annotations

import dataclasses
import logging
import math
from collections import deque
from collections.abc import Callable, Hashable, Sequence

import torch
from torch import Tensor

logger = logging.getLogger(__name__)

MINIMUM_STD = 1e-8  # below this all rewards count as equal: there is nothing to normalize


@dataclasses.dataclass(frozen=True)
class Advantages:
    """values: [N], (R - b) * scale; scale: [N], the factor for the reward's gradient. Both 0 for samples without a reward."""

    values: Tensor
    scale: Tensor

    def clip(self, limit: float) -> Advantages:
        """Limits the values to [-limit, limit] (DDPO's adv_clip_max; biased)."""
        return Advantages(self.values.clamp(-limit, limit), self.scale)


def _advantages(rewards: Tensor, baseline: Tensor, std: Tensor | None = None) -> Advantages:
    """(R - baseline) / std for the rewards that are there; None is a std of 1."""
    rewards = rewards if rewards.is_floating_point() else rewards.float()
    scale = torch.ones_like(rewards)
    if std is not None:
        std = std.to(rewards)
        scale = torch.where(std > MINIMUM_STD, 1 / (std + MINIMUM_STD), scale)
    there = ~torch.isnan(rewards)
    return Advantages(torch.where(there, (rewards - baseline.to(rewards)) * scale, 0.0), torch.where(there, scale, 0.0))


def no_baseline(rewards: Tensor) -> Advantages:
    """A = R: no baseline, scale 1. Unbiased, with the variance of the reward's mean on top."""
    return _advantages(rewards, torch.zeros(()))


def leave_one_out(rewards: Tensor, groups: Tensor | None = None, blocks: Tensor | None = None) -> Advantages:
    """A_i = R_i - mean of the others' rewards: unbiased, because b_i does not see the noise of sample i.

    Args:
        rewards: [N].
        groups: int [N]; the baseline is taken among samples with the same number (same prompt). None: the whole batch.
        blocks: int [N]; samples with the same number share randomness (a parameter perturbation, say) and are left out
            together. None: every sample is its own block.

    Returns:
        Advantages with scale 1. A sample with nobody to compare with in its group (the others were dropped, or share its
        randomness) is compared with the other groups; with nobody there either it keeps its reward (baseline 0).
    """
    missing = torch.isnan(rewards)
    counted = torch.stack([torch.where(missing, 0.0, rewards), ~missing]).double().cpu()  # [2, N]: rewards, and their number
    group = torch.zeros(len(rewards), dtype=torch.long) if groups is None else groups.cpu()
    block = torch.arange(len(rewards)) if blocks is None else blocks.cpu()
    others = _of_others(counted, group, block)
    alone = others[1] == 0
    if alone.any():
        others = torch.where(alone, _of_others(counted, torch.zeros_like(group), block), others)
    return _advantages(rewards, others[0] / others[1].clamp_min(1))


def _of_others(values: Tensor, group: Tensor, block: Tensor) -> Tensor:
    """Sums over the samples of the same group but of other blocks, for each sample. [2, N] -> [2, N]."""

    def total(index: Tensor) -> Tensor:
        present, index = index.unique(return_inverse=True)
        return torch.zeros(len(values), len(present), dtype=values.dtype).index_add_(1, index, values)[:, index]

    block = block.unique(return_inverse=True)[1]
    return total(group) - total(group.unique(return_inverse=True)[1] * len(block) + block)


def _mean_and_std(rewards: Tensor) -> Tensor:
    """[2], of the rewards that are there; in float64, where the spread of equal float32 rewards is exactly 0."""
    values = rewards[~torch.isnan(rewards)].double().cpu()
    return torch.stack([values.mean(), values.std(correction=0)]) if len(values) else torch.zeros(2, dtype=torch.float64)


def normalize(rewards: Tensor) -> Advantages:
    """A = (R - mean) / std over the batch (DDPO's global z-score). Biased by 1/N through the sample's own reward."""
    mean, std = _mean_and_std(rewards)
    return _advantages(rewards, mean, std)


MOST_PROMPTS = 2**16  # whose statistics are kept: some 20 MB in a checkpoint


class PerPromptStatistics:
    """Running mean and std of each prompt's rewards (DDPO); a prompt seen fewer than `min_count` times takes the batch's.

    Of more than `MOST_PROMPTS` prompts, those that were not seen for the longest time are forgotten.
    """

    def __init__(self, buffer_size: int, min_count: int) -> None:
        if min_count > buffer_size:
            text = "per_prompt_min_count=%d is more than per_prompt_buffer_size=%d keeps: no prompt ever gets its own statistics; raise the size"
            logger.warning(text, min_count, buffer_size)
        self.buffer_size = buffer_size
        self.min_count = min_count
        self.buffers: dict[Hashable, deque[float]] = {}

    def update(self, prompts: Sequence[Hashable], rewards: Tensor) -> Advantages:
        """Adds the rewards to the buffers, then normalizes each by its prompt's statistics."""
        for prompt, reward in zip(prompts, rewards.tolist(), strict=True):
            if not math.isnan(reward):
                seen = self.buffers.pop(prompt, deque(maxlen=self.buffer_size))
                seen.append(reward)
                self.buffers[prompt] = seen  # the one seen last stands last
        batch = _mean_and_std(rewards)
        statistics = {}
        for prompt in set(prompts):
            history = torch.tensor(list(self.buffers.get(prompt, ())), dtype=torch.float64)
            statistics[prompt] = _mean_and_std(history) if len(history) >= self.min_count else batch
        for prompt in list(self.buffers)[: max(0, len(self.buffers) - MOST_PROMPTS)]:
            del self.buffers[prompt]
        mean, std = torch.stack([statistics[prompt] for prompt in prompts]).unbind(1)
        return _advantages(rewards, mean, std)

    def state_dict(self) -> dict[str, list[float]]:
        return {str(prompt): list(buffer) for prompt, buffer in self.buffers.items()}

    def load_state_dict(self, state: dict[str, list[float]]) -> None:
        self.buffers = {prompt: deque(values, maxlen=self.buffer_size) for prompt, values in state.items()}


# Advantages that need no memory of earlier batches: name -> (rewards, groups, blocks) -> Advantages.
ADVANTAGES: dict[str, Callable[[Tensor, Tensor | None, Tensor | None], Advantages]] = {
    "none": lambda rewards, groups, blocks: no_baseline(rewards),
    "leave_one_out": leave_one_out,
    "normalize": lambda rewards, groups, blocks: normalize(rewards),
}
