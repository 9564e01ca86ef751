"""Sampling pictures of a policy outside training, and scoring them: `generate` and `evaluate` of the trainer."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rlr_trainer.chain import sample_chain, seeded_generator
from rlr_trainer.chains.ddim import DDIMSchedule
from rlr_trainer.experience import EVALUATION
from rlr_trainer.pipelines import Conditioning, PipelineChain
from rlr_trainer.prompts import DatasetPrompts
from rlr_trainer.saving import SavingTrainer


class SamplingTrainer(SavingTrainer):
    """The part of `RLRTrainer` that samples and evaluates."""

    eval_prompts: DatasetPrompts | None
    schedule: DDIMSchedule
    latent_shape: tuple[int, ...]

    def _make_chain(self, model: nn.Module, conditioning: Conditioning) -> PipelineChain:
        """The chain of a batch under `model`, the policy as Trainer wrapped it."""
        device = self.accelerator.device
        return PipelineChain(self.adapter, model, self.policy, self.schedule, conditioning, self.latent_shape, device)

    @torch.no_grad()
    def generate(self, prompts: Sequence[str], negative_prompts: Sequence[str] | None = None, *, seed: int = 0) -> Tensor:
        """Pictures of the present policy, [N, 3, H, W] in [0, 1] on the CPU, sampled as in training.

        Picture i depends on the weights, its prompt, `seed` and i, not on the batch size or the number of processes.
        """
        model = self.model_wrapped if self.is_in_train else self.model
        size = self.args.sample_batch_size
        negatives = list(negative_prompts or [self.args.negative_prompt] * len(prompts))
        images = []
        model.eval()
        for first in range(0, len(prompts), size):
            rows = range(first, min(first + size, len(prompts)))
            conditioning = self.adapter.condition(
                [prompts[i] for i in rows], [negatives[i] for i in rows], self.args.sample_guidance_scale
            )
            generators = [seeded_generator(seed, EVALUATION, i) for i in rows]
            with self.accelerator.autocast():
                rollout = sample_chain(self._make_chain(model, conditioning), len(rows), generators)
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
        images = self.generate(
            [row.prompt for row in rows],
            [self.args.negative_prompt if row.negative_prompt is None else row.negative_prompt for row in rows],
            seed=self.args.seed,
        )
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
