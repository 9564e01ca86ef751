"""How the rewards of a rollout become advantages: groups of a prompt, antithetic pairs, several rewards, limits."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import torch
from torch import Tensor

from rlr_trainer.estimators.advantages import ADVANTAGES, Advantages, PerPromptStatistics
from rlr_trainer.rewards.aggregation import normalize_in_groups, normalize_then_sum


@dataclasses.dataclass(frozen=True)
class AdvantageRule:
    """The rule, applied to all samples of a rollout in the order of their numbers.

    Attributes:
        name: a key of `estimators.advantages.ADVANTAGES`; not asked where there are `statistics`.
        limit: of the magnitude, or None.
        group_size: consecutive samples of one prompt, which are compared with each other.
        statistics: running statistics of every prompt, for "per_prompt"; None otherwise.
        separately: every reward is normalized by itself, then summed with `weights`.
        names, weights: of the K reward functions.
    """

    name: str
    limit: float | None = None
    group_size: int = 1
    statistics: PerPromptStatistics | None = None
    separately: bool = False
    names: Sequence[str] = ("reward",)
    weights: Sequence[float] = (1.0,)

    def of_rollout(
        self, rewards: Tensor, parts: Tensor, prompts: Sequence[str], paired: bool = False
    ) -> tuple[Advantages, Tensor | None]:
        """Advantages of a rollout, and the factors [S, K] of the rewards' own gradients where each is normalized by itself.

        Args:
            rewards: [S], the weighted sum; NaN without a reward.
            parts: [S, K], each reward.
            prompts: S.
            paired: samples 2k and 2k + 1 share their noise.
        """
        if not self.separately:
            if self.statistics is not None:
                return self._limited(self.statistics.update(list(prompts), rewards)), None
            return self._plain(rewards, torch.arange(len(rewards)) // 2 if paired else None), None

        def advantage(k: int, values: Tensor) -> Advantages:
            """Of reward `k`, compared within its group, or with the statistics of its prompt."""
            if self.statistics is None:
                return normalize_in_groups(values, self._groups(len(values)))
            return self.statistics.update([f"{self.names[k]}\n{prompt}" for prompt in prompts], values)

        there = torch.where(torch.isnan(rewards)[:, None], torch.nan, parts)
        advantages, factors = normalize_then_sum(there, self.weights, advantage)
        return self._limited(advantages), factors

    def of_directions(self, rewards: Tensor, direction: Tensor, usual: Tensor) -> Tensor:
        """Advantages [S] of samples with perturbed steps: baselines leave out all that share a direction.

        Where every reward is normalized by itself, or every prompt's are, they are the usual ones [S]: only they know the factors.
        """
        if self.separately or self.statistics is not None:
            return usual
        return self._plain(rewards, direction).values

    def _plain(self, rewards: Tensor, blocks: Tensor | None) -> Advantages:
        return self._limited(ADVANTAGES[self.name](rewards, self._groups(len(rewards)), blocks))

    def _groups(self, count: int) -> Tensor | None:
        return torch.arange(count) // self.group_size if self.group_size > 1 else None

    def _limited(self, advantages: Advantages) -> Advantages:
        return advantages if self.limit is None else advantages.clip(self.limit)
