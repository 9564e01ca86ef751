"""What a rollout leaves behind: batches of samples, before and after scoring, and what it is logged with."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Self

import torch
from torch import Tensor

from rlr_trainer.estimators.chain import Rollout
from rlr_trainer.estimators.kept_steps import KeptSteps
from rlr_trainer.estimators.plan_draw import PlanDraw
from rlr_trainer.estimators.prediction import ControlVariate
from rlr_trainer.estimators.zeroth_order import Perturbations
from rlr_trainer.pipelines import AnyConditioning
from rlr_trainer.schedules import Schedule

# What a stream of randomness is for; part of its seed.
NOISE, CHOICES, PERTURBATIONS, EVALUATION, SHUFFLE, WINDOW, FORWARD = range(7)
# What stays on the CPU, because only numbers of it are asked for.
_SMALL = ("index", "rewards", "zeroth_advantage", "divergences", "draw", "perturbations", "noise_seeds")
# What all samples of a rollout share.
_SHARED = ("schedule",)


@dataclasses.dataclass(frozen=True)
class SampledBatch:
    """A sampling batch before it is scored. B samples of this process.

    Attributes:
        rollout: the sampled chains.
        schedule: the steps and noise levels with which they were sampled.
        draw: the plan's random choices, one row per sample.
        conditioning: what the network was conditioned on.
        prompts, metadata: B of each.
        index: int [B], number of the sample in the rollout, over all processes.
        perturbations: of the zeroth-order steps; None if the plan has none.
        divergences: [B, T], of every step from the reference policy; None without one.
        noise_seeds: int [B], of the noises of a loss on the forward process; None if the plan has none.
        kept: the graphs of the visited steps, of the whole batch; None where they are not kept.
    """

    rollout: Rollout
    schedule: Schedule
    draw: PlanDraw
    conditioning: AnyConditioning
    prompts: tuple[str, ...]
    metadata: tuple[Any, ...]
    index: Tensor
    perturbations: Perturbations | None = None
    divergences: Tensor | None = None
    noise_seeds: Tensor | None = None
    kept: KeptSteps | None = None

    def __len__(self) -> int:
        return len(self.prompts)

    def to(self, device: torch.device | str) -> Self:
        """The same samples with everything large on another device."""
        moved = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name not in _SMALL}
        return dataclasses.replace(self, **{name: value.to(device) for name, value in moved.items() if hasattr(value, "to")})


@dataclasses.dataclass(frozen=True)
class ScoredBatch(SampledBatch):
    """Samples with everything that an update needs of them.

    Attributes:
        rewards: [B], NaN for a sample without a reward.
        advantage, scale: [B], see `estimators.Advantages`.
        reward_gradient: [B, ...], dR/dx_0; None if the plan needs none.
        zeroth_advantage: [B], for the zeroth-order part; None if the plan has none.
        divergence_to_go: [B, T], see `leave_one_out_to_go`; None without a reference policy.
        control: the terms of the control variate; None if the plan has none.
    """

    rewards: Tensor = dataclasses.field(kw_only=True)
    advantage: Tensor = dataclasses.field(kw_only=True)
    scale: Tensor = dataclasses.field(kw_only=True)
    reward_gradient: Tensor | None = None
    zeroth_advantage: Tensor | None = None
    divergence_to_go: Tensor | None = None
    control: ControlVariate | None = None

    def select(self, rows: Tensor) -> ScoredBatch:
        """Some of the samples; ValueError if graphs are kept, which are of all samples."""
        self._check_whole()
        picked: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if field.name in _SHARED:
                picked[field.name] = value
            elif isinstance(value, Tensor):
                picked[field.name] = value[rows.to(value.device)]
            elif isinstance(value, tuple):
                picked[field.name] = tuple(value[row] for row in rows.tolist())
            else:
                picked[field.name] = None if value is None else value.select(rows)
        return ScoredBatch(**picked)

    @staticmethod
    def concatenate(parts: Sequence[ScoredBatch]) -> ScoredBatch:
        """Joins batches of one rollout. Perturbations are of one batch and do not survive; ValueError if graphs are kept."""
        joined: dict[str, Any] = {"perturbations": None}
        for part in parts:
            part._check_whole()
        for field in dataclasses.fields(ScoredBatch):
            values = [getattr(part, field.name) for part in parts]
            if field.name in _SHARED:
                joined[field.name] = values[0]
            elif isinstance(values[0], Tensor):
                joined[field.name] = torch.cat(values)
            elif isinstance(values[0], tuple):
                joined[field.name] = tuple(item for value in values for item in value)
            elif field.name != "perturbations":
                joined[field.name] = None if values[0] is None else type(values[0]).concatenate(values)
        return ScoredBatch(**joined)

    def _check_whole(self) -> None:
        if self.kept is not None:
            raise ValueError(
                "a sampling batch whose graphs are kept (recompute='keep') is differentiated whole; use recompute='recursive'"
            )


@dataclasses.dataclass
class RolloutSummary:
    """What one rollout is logged with.

    Attributes:
        metrics: name -> value, over all processes.
        pictures: per sampling batch of this process: [images, prompts, metadata, rewards, reward_metadata] (DDPO's hook format).
        valid_fraction: share of the samples that have a reward, over all processes.
        rewards: [S], of all samples of all processes in the order of their numbers, on the CPU; NaN where a sample was dropped.
        prompts: S of them, in the same order.
    """

    metrics: dict[str, float]
    pictures: list[list[Any]]
    valid_fraction: float
    rewards: Tensor
    prompts: tuple[str, ...]
