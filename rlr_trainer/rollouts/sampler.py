"""From prompts to latents: conditioning, the chain of a batch, and its samples."""

from __future__ import annotations

import dataclasses
import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from rlr_trainer.estimators.chain import Generators, Rollout, sample_chain
from rlr_trainer.pipelines import AnyConditioning, Layout, PipelineAdapter, PipelineChain, Policy, PromptCache, ScaledConditioning
from rlr_trainer.rollouts.prompts import PromptRow
from rlr_trainer.schedules import Schedule

logger = logging.getLogger(__name__)


@dataclasses.dataclass
class Sampler:
    """Samples batches of prompts under a pipeline.

    Attributes:
        adapter, policy, schedule, layout: what is sampled, and how.
        guidance_scale: 1 or less is no guidance.
        negative_prompt: of rows that bring none of their own.
        first_steps: steps at which the next, finer scale of prompts begins (Diffusive Chain-of-Thought); none for one prompt.
        device: where latents live.
        guidance_rescale: share of the rescaled output in the guided one; 0 for none.
        cache: encoded prompts.
    """

    adapter: PipelineAdapter
    policy: Policy
    schedule: Schedule
    layout: Layout
    guidance_scale: float
    device: torch.device
    negative_prompt: str = ""
    first_steps: tuple[int, ...] = ()
    guidance_rescale: float = 0.0
    cache: PromptCache = dataclasses.field(default_factory=PromptCache)

    def apart(self) -> Sampler:
        """The same with a cache of its own: what it samples leaves no trace here."""
        return dataclasses.replace(self, cache=PromptCache(self.cache.max_bytes))

    def condition(self, rows: Sequence[PromptRow]) -> AnyConditioning:
        """Conditioning of a batch of prompts; one per scale where there are scales.

        Raises:
            ValueError: a row brings another number of prompts than there are scales, or lacks what the pipeline is conditioned on.
        """
        negatives = [self.negative_prompt if row.negative_prompt is None else row.negative_prompt for row in rows]
        if any(negatives) and not self.adapter.is_guided(self.guidance_scale):
            _warn_of_unused_negative_prompts()
        conditions = [conditions_of(row, self.adapter.conditions) for row in rows]
        scales = len(self.first_steps) + 1
        for row in rows:
            if row.scale_prompts is not None and len(row.scale_prompts) != scales:
                raise ValueError(
                    f"prompt {row.prompt!r:.60} brings {len(row.scale_prompts)} prompts, one per scale, but "
                    f"prompt_scales={list(self.first_steps)} makes {scales} scales; give as many prompts as scales, coarse to fine"
                )

        shared = negatives, self.guidance_scale, self.layout, self.cache
        rest: dict[str, Any] = {"guidance_rescale": self.guidance_rescale, "metadata": conditions}
        if not self.first_steps:
            return self.adapter.encode([row.prompt for row in rows], *shared, **rest)
        texts = zip(*(row.scale_prompts or (row.prompt,) * scales for row in rows), strict=True)
        return ScaledConditioning(tuple(self.adapter.encode(scale, *shared, **rest) for scale in texts), self.first_steps)

    def chain(self, model: nn.Module, conditioning: AnyConditioning, schedule: Schedule | None = None) -> PipelineChain:
        """The chain of a batch under `model`, the policy as Trainer wrapped it; `schedule` replaces the sampler's own."""
        live = self.policy.trainable_parameters()
        steps = self.schedule if schedule is None else schedule
        return PipelineChain(self.adapter, model, self.policy, steps, conditioning, self.layout, self.device, live)

    def sample(
        self,
        model: nn.Module,
        rows: Sequence[PromptRow],
        generators: Generators,
        *,
        on_step: Callable[[int], None] | None = None,
    ) -> Rollout:
        """One sample per row, with the present weights."""
        return sample_chain(self.chain(model, self.condition(rows)), len(rows), generators, on_step=on_step)


def conditions_of(row: PromptRow, names: Sequence[str]) -> dict[str, Any]:
    """What a pipeline is conditioned on beside the prompt, of the row's metadata; ValueError if it brings not all of it."""
    if not names:
        return {}
    metadata = row.metadata if isinstance(row.metadata, Mapping) else {}
    missing = [name for name in names if metadata.get(name) is None]
    if missing:
        raise ValueError(
            f"prompt {row.prompt!r:.60} comes without {', '.join(missing)}, which this pipeline is conditioned on; give it as a column of the "
            "dataset, or in the metadata that the prompt function returns"
        )
    return {name: metadata[name] for name in names}


@functools.cache  # once per process
def _warn_of_unused_negative_prompts() -> None:
    logger.warning(
        "negative prompts act through guidance with two branches alone: with sample_guidance_scale of 1 or less, or where the network takes "
        "the scale as an input, they are not used"
    )
