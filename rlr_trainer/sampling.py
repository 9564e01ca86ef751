"""Sampling pictures of a policy outside training, and scoring them: `generate` and `evaluate` of the trainer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rlr_trainer.chain import sample_chain, seeded_generator
from rlr_trainer.chains.ddim import DDIMSchedule
from rlr_trainer.experience import EVALUATION, condition_rows
from rlr_trainer.pipelines import Conditioning, PipelineChain, ScaledConditioning
from rlr_trainer.prompts import DatasetPrompts, PromptRow
from rlr_trainer.saving import SavingTrainer


class SamplingTrainer(SavingTrainer):
    """The part of `RLRTrainer` that samples and evaluates."""

    eval_prompts: DatasetPrompts | None
    schedule: DDIMSchedule
    latent_shape: tuple[int, ...]

    def _make_chain(self, model: nn.Module, conditioning: Conditioning | ScaledConditioning) -> PipelineChain:
        """The chain of a batch under `model`, the policy as Trainer wrapped it."""
        device = self.accelerator.device
        return PipelineChain(self.adapter, model, self.policy, self.schedule, conditioning, self.latent_shape, device)

    def generate(
        self, prompts: Sequence[str | Sequence[str]], negative_prompts: Sequence[str] | None = None, *, seed: int = 0
    ) -> Tensor:
        """Pictures of the present policy, [N, 3, H, W] in [0, 1] on the CPU, sampled as in training.

        Picture i depends on the weights, its prompt, `seed` and i, not on the batch size or the number of processes.

        Args:
            prompts: N strings, or N sequences of strings, one per scale of `prompt_scales`.
            negative_prompts: N strings; None takes the run's.
            seed: of the noise.
        """
        negatives: Sequence[str | None] = negative_prompts or [None] * len(prompts)
        rows = [
            PromptRow(text, {}, negative) if isinstance(text, str) else PromptRow(text[-1], {}, negative, tuple(text))
            for text, negative in zip(prompts, negatives, strict=True)
        ]
        return self._generate(rows, seed)

    @torch.no_grad()
    def _generate(self, rows: Sequence[PromptRow], seed: int) -> Tensor:
        model = self.model_wrapped if self.is_in_train else self.model
        size = self.args.sample_batch_size
        images = []
        model.eval()
        for first in range(0, len(rows), size):
            numbers = range(first, min(first + size, len(rows)))
            conditioning = condition_rows(self.adapter, self.args, [rows[i] for i in numbers])
            generators = [seeded_generator(seed, EVALUATION, i) for i in numbers]
            with self.accelerator.autocast():
                rollout = sample_chain(self._make_chain(model, conditioning), len(numbers), generators)
            images.append(self.adapter.decode(rollout.sample).cpu())
        return torch.cat(images)

    def evaluate(
        self, eval_dataset: Any = None, ignore_keys: list[str] | None = None, metric_key_prefix: str = "eval"
    ) -> dict[str, float]:
        """Mean and standard deviation of the reward on the prompts of `eval_dataset`, one picture each with fixed seeds."""
        source = self.eval_prompts if eval_dataset is None else DatasetPrompts(eval_dataset, 0, False, "eval_dataset")
        if source is None:
            raise ValueError("evaluate() needs prompts: pass eval_dataset to it or to the trainer")
        rows = source.peek(len(source))
        size = self.args.sample_batch_size
        images = self._generate(rows, self.args.seed)
        totals = []
        for first in range(0, len(rows), size):
            part = rows[first : first + size]
            batch = images[first : first + size].to(self.accelerator.device)
            result = self.rewards(batch, tuple(r.prompt for r in part), tuple(r.metadata for r in part), differentiable=False)
            totals.append(result.total.cpu())
        rewards = torch.cat(totals)
        valid = rewards[~torch.isnan(rewards)]
        metrics = {
            f"{metric_key_prefix}_reward": float(valid.mean()),
            f"{metric_key_prefix}_reward_std": float(valid.std(correction=0)),
        }
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics
