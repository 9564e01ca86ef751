"""Windows of noisy steps that change from rollout to rollout."""

from __future__ import annotations

import dataclasses

import torch

from rlr_trainer.schedules.protocol import Schedule

NOISE_WINDOWS = ("fixed", "random", "progressive")


def window_positions(length: int, first: int, last: int, stride: int = 1) -> list[tuple[int, int]]:
    """(first step, last step) of every window of `length` steps between steps `first` and `last`, each `stride` after the one before."""
    return [(start, start + length - 1) for start in range(first, last - length + 2, stride)]


@dataclasses.dataclass(frozen=True)
class NoiseWindows:
    """The schedule of every rollout, by the window in which it adds noise.

    Attributes:
        kind: "random": drawn uniformly for every rollout (Flow-GRPO-Fast, github.com/yifan123/flow_grpo); "progressive": the next
            window after `rollouts` rollouts, and after the last window the first again (MixGRPO, arXiv:2507.21802).
        schedules: one per window, in the order of generation.
        rollouts: rollouts per window, at least 1; "random" does not ask.
    """

    kind: str
    schedules: tuple[Schedule, ...]
    rollouts: int = 1

    def of_rollout(self, number: int, generator: torch.Generator) -> Schedule:
        """The schedule of rollout `number`; `generator`, on the CPU, is a function of that number too."""
        if self.kind == "random":
            return self.schedules[int(torch.randint(len(self.schedules), (), generator=generator))]
        return self.schedules[number // self.rollouts % len(self.schedules)]
