"""What a rollout leaves behind: its samples with all that an update needs of them, and what it is logged with."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rlr_trainer.estimators.chain import Rollout
from rlr_trainer.estimators.plan import EstimatorPlan
from rlr_trainer.estimators.plan_draw import PlanDraw
from rlr_trainer.estimators.zeroth_order import Perturbations
from rlr_trainer.pipelines import Conditioning, PipelineAdapter, ScaledConditioning
from rlr_trainer.rollouts.prompts import PromptRow
from rlr_trainer.training.config import RLRConfig

logger = logging.getLogger(__name__)

_LARGE = ("rollout", "conditioning", "reward_gradient", "advantage", "scale", "divergence_to_go")
# What a stream of randomness is for; part of its seed.
NOISE, CHOICES, PERTURBATIONS, EVALUATION, SHUFFLE = range(5)


@dataclasses.dataclass(frozen=True)
class Experience:
    """A batch of samples with everything that an update needs of them. B samples of this process.

    Attributes:
        rollout: the sampled chains.
        draw: the plan's random choices, one row per sample.
        conditioning: what the network was conditioned on.
        prompts, metadata: B of each.
        rewards: [B], NaN for a sample without a reward.
        reward_gradient: [B, ...], dR/dx_0, or None.
        index: int [B], number of the sample in the rollout, over all processes.
        advantage, scale: [B]; filled in when all rewards of the rollout are known.
        perturbations: of the zeroth-order steps, or None.
        divergences: [B, T], of every step from the reference policy, or None without one.
        divergence_to_go: [B, T], see `leave_one_out_to_go`; over the whole rollout.
    """

    rollout: Rollout
    draw: PlanDraw
    conditioning: Conditioning | ScaledConditioning
    prompts: tuple[str, ...]
    metadata: tuple[Any, ...]
    rewards: Tensor
    reward_gradient: Tensor | None
    index: Tensor
    advantage: Tensor | None = None
    scale: Tensor | None = None
    perturbations: Perturbations | None = None
    divergences: Tensor | None = None
    divergence_to_go: Tensor | None = None

    def __len__(self) -> int:
        return len(self.prompts)

    def to(self, device: torch.device | str) -> Experience:
        """The same samples with everything large on another device."""
        moved = {name: getattr(self, name) for name in _LARGE}
        return dataclasses.replace(self, **{name: value.to(device) for name, value in moved.items() if value is not None})

    def select(self, rows: Tensor) -> Experience:
        """Some of the samples."""
        picked: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                picked[field.name] = value[rows.to(value.device)]
            elif isinstance(value, tuple):
                picked[field.name] = tuple(value[row] for row in rows.tolist())
            else:
                picked[field.name] = None if value is None else value.select(rows)
        return Experience(**picked)

    @staticmethod
    def concatenate(parts: Sequence[Experience]) -> Experience:
        """Joins batches of one rollout. Perturbations are of one batch and do not survive."""
        joined: dict[str, Any] = {"perturbations": None}
        for field in dataclasses.fields(Experience):
            values = [getattr(part, field.name) for part in parts]
            if isinstance(values[0], Tensor):
                joined[field.name] = torch.cat(values)
            elif isinstance(values[0], tuple):
                joined[field.name] = tuple(item for value in values for item in value)
            elif field.name != "perturbations":
                joined[field.name] = None if values[0] is None else type(values[0]).concatenate(values)
        return Experience(**joined)


def condition_rows(adapter: PipelineAdapter, config: RLRConfig, batch: Sequence[PromptRow]) -> Conditioning | ScaledConditioning:
    """Conditioning of a batch of prompts; one per scale when `config.prompt_scales` divides the chain.

    Raises:
        ValueError: a row brings another number of prompts than there are scales.
    """
    negatives = [config.negative_prompt if row.negative_prompt is None else row.negative_prompt for row in batch]
    if config.sample_guidance_scale <= 1 and any(negatives):
        _warn_of_unused_negative_prompts()
    first_steps = tuple(config.prompt_scales or ())
    for row in batch:
        if row.scale_prompts is not None and len(row.scale_prompts) != len(first_steps) + 1:
            raise ValueError(
                f"prompt {row.prompt!r:.60} brings {len(row.scale_prompts)} prompts, one per scale, but prompt_scales={list(first_steps)} makes "
                f"{len(first_steps) + 1} scales; give as many prompts as scales, coarse to fine"
            )
    if not first_steps:
        return adapter.condition([row.prompt for row in batch], negatives, config.sample_guidance_scale)
    texts = [row.scale_prompts or (row.prompt,) * (len(first_steps) + 1) for row in batch]
    return ScaledConditioning(
        tuple(adapter.condition(scale, negatives, config.sample_guidance_scale) for scale in zip(*texts, strict=True)),
        first_steps,
    )


@functools.cache  # once per process
def _warn_of_unused_negative_prompts() -> None:
    logger.warning("negative prompts act through guidance alone: with sample_guidance_scale of 1 or less they are not used")


def check_batches(config: RLRConfig, plan: EstimatorPlan, processes: int) -> None:
    """Refuses batch sizes that groups of a prompt, or pairs of perturbations, do not divide.

    Raises:
        ValueError: names the options.
    """
    group = config.num_images_per_prompt
    if config.rollout_size * processes % group:
        raise ValueError(
            f"num_images_per_prompt={group}: must divide the samples of a rollout over all processes, "
            f"{config.rollout_size * processes}; change it or the batch size"
        )
    if not plan.uses_zeroth_order:
        return
    batch = config.sample_batch_size * processes
    needed = plan.zo_num_perturbations * (2 if plan.zo_antithetic else 1)
    if batch % needed:
        raise ValueError(
            f"zo_num_perturbations={plan.zo_num_perturbations} with zo_antithetic={plan.zo_antithetic} needs a sampling batch "
            f"(sample_batch_size * processes = {batch}) that is a multiple of {needed}; change one of them"
        )
    if plan.zo_antithetic and (config.sample_batch_size % 2 or (group > 1 and group % 2)):
        raise ValueError(
            f"zo_antithetic=True pairs samples of one prompt: sample_batch_size={config.sample_batch_size} and "
            f"num_images_per_prompt={group} must be even (num_images_per_prompt may be 1)"
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
