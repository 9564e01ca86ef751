"""Sampling for the trainer: prompts -> chains -> pictures -> rewards -> advantages, ready for the sweep.

All randomness is a function of (run seed, rollout number, sample number), never of the batch size or the number of processes.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rlr_trainer.estimators.advantages import ADVANTAGES, Advantages, PerPromptStatistics
from rlr_trainer.estimators.chain import DenoisingChain, mix_seed, sample_chain, seeded_generator
from rlr_trainer.estimators.divergence import ReferenceStep, leave_one_out_to_go, step_divergences
from rlr_trainer.estimators.plan import EstimatorPlan
from rlr_trainer.estimators.plan_draw import StartDistribution
from rlr_trainer.estimators.zeroth_order import Perturbations, perturbed_steps
from rlr_trainer.pipelines import Conditioning, PipelineAdapter, ScaledConditioning
from rlr_trainer.rewards.aggregation import normalize_in_groups, normalize_then_sum
from rlr_trainer.rewards.interface import RewardError, Rewards
from rlr_trainer.rollouts.batches import CHOICES, NOISE, PERTURBATIONS, Experience, RolloutSummary, condition_rows
from rlr_trainer.rollouts.processes import of_main_process
from rlr_trainer.rollouts.prompts import DatasetPrompts, FunctionPrompts, PromptRow
from rlr_trainer.rollouts.scorer import RolloutScorer, check_some_reward, raise_everywhere, reward_metrics
from rlr_trainer.schedules.ddim import DDIMSchedule
from rlr_trainer.training.config import RLRConfig


@dataclasses.dataclass
class Collector:
    """Collects rollouts.

    Attributes:
        config, plan, adapter, schedule, rewards, prompts: what and how to sample.
        make_chain: conditioning -> chain, with the policy as Trainer wrapped it.
        accelerator: for gathering over processes.
        statistics: per-prompt reward statistics, for advantage="per_prompt".
        starts: start distribution, for ho_start="grad_norm".
        on_step: called after each sampling step (a progress bar).
        reference: chain -> transitions of the reference policy, or None without one.
    """

    config: RLRConfig
    plan: EstimatorPlan
    adapter: PipelineAdapter
    schedule: DDIMSchedule
    rewards: Rewards
    prompts: FunctionPrompts | DatasetPrompts
    make_chain: Callable[[Conditioning | ScaledConditioning], DenoisingChain]
    accelerator: Any
    statistics: PerPromptStatistics | None = None
    starts: StartDistribution | None = None
    on_step: Callable[[int], None] | None = None
    reference: Callable[[Any], ReferenceStep] | None = None

    @property
    def paired(self) -> bool:
        """Whether samples 2k and 2k + 1 share noise and prompt, for antithetic perturbations."""
        return self.plan.uses_zeroth_order and self.plan.zo_antithetic

    def collect(self, rollout_number: int) -> tuple[list[Experience], RolloutSummary]:
        """Samples and scores one rollout: `sample_num_batches_per_epoch` batches, with their advantages.

        Raises:
            RewardError: every reward is NaN, or a reward's gradient is not finite.
        """
        config = self.config
        rows = self._take_prompts()
        sampled, seconds = [], 0.0
        with self._scorer(defer=self.accelerator.num_processes > 1) as scorer:
            for number in range(config.sample_num_batches_per_epoch):
                started = time.perf_counter()
                batch = self._sample_batch(rollout_number, number, rows)
                seconds += time.perf_counter() - started
                where = f"sampling batch {number} of rollout {rollout_number}"
                scorer.add(batch.rollout.sample, batch.prompts, batch.metadata, where)
                sampled.append(batch.to("cpu") if config.offload_rollouts else batch)
            scored = scorer.finish()
        raise_everywhere(scorer.failure, self.accelerator, f"rollout {rollout_number}")
        results = [part.result for part in scored]
        order, rewards = self._gather([b.index for b in sampled], [result.total for result in results])
        _, parts = self._gather([b.index for b in sampled], [result.values.T for result in results])
        errors = self._sum_over_processes(sum(result.errors for result in results))
        check_some_reward(rewards, self.rewards, errors, f"rollout {rollout_number}")
        advantages, factors = self._combined_advantages(rewards, parts, rows)
        completed = []
        for batch, part in zip(sampled, scored, strict=True):
            position = torch.searchsorted(order, batch.index)
            device = batch.rollout.sample.device
            gradient = part.gradient
            if gradient is not None and factors is not None:
                gradient = torch.einsum("bk,bk...->b...", factors[position].to(gradient), gradient)
            completed.append(
                dataclasses.replace(
                    batch,
                    rewards=part.result.total.cpu(),
                    reward_gradient=None if gradient is None else gradient.to(device),
                    advantage=advantages.values[position].to(device),
                    scale=advantages.scale[position].to(device),
                )
            )
        to_go, kl = self._divergence_to_go(sampled)
        completed = [dataclasses.replace(b, divergence_to_go=g) for b, g in zip(completed, to_go, strict=True)]
        metrics = reward_metrics(self.rewards.names, rewards, parts) | kl | {"time/sample": seconds, "time/reward": scorer.seconds}
        if self.rewards.on_error == "skip":
            metrics["reward_errors"] = float(errors)
        pictures = [[p.images, b.prompts, b.metadata, b.rewards, p.result.metadata] for p, b in zip(scored, completed, strict=True)]
        valid = float((~torch.isnan(rewards)).float().mean())
        return completed, RolloutSummary(metrics, pictures, valid, rewards, tuple(row.prompt for row in rows))

    def _divergence_to_go(self, sampled: Sequence[Experience]) -> tuple[list[Tensor | None], dict[str, float]]:
        """Of every batch, and the metric kl: the divergence of the whole chain from the reference policy, in nats."""
        own = [b.divergences for b in sampled if b.divergences is not None]
        if not own:
            return [None] * len(sampled), {}
        order, divergences = self._gather([b.index for b in sampled], own)
        to_go = leave_one_out_to_go(divergences)
        parts: list[Tensor | None] = [to_go[torch.searchsorted(order, b.index)].to(b.rollout.sample.device) for b in sampled]
        return parts, {"kl": float(divergences.sum(1).mean())}

    def zeroth_order_advantages(self, batches: Sequence[Experience]) -> list[Tensor]:
        """Advantages of perturbed samples, one tensor [B] per batch: baselines leave out all that share a direction.

        Where every reward is normalized by itself, or every prompt's are, they are those of the other steps: only they know the factors.
        """
        if self.config.normalizes_each_reward or self.statistics is not None:
            return [b.advantage.cpu() for b in batches if b.advantage is not None]
        groups = self.plan.zo_num_perturbations
        number = [b.index // (len(b) * self.accelerator.num_processes) for b in batches]
        directions = [b.perturbations.direction + n * groups for b, n in zip(batches, number, strict=True) if b.perturbations]
        order, rewards = self._gather([b.index for b in batches], [b.rewards for b in batches])
        _, direction = self._gather([b.index for b in batches], directions)
        advantages = self._advantages(rewards, None, blocks=direction)
        return [advantages.values[torch.searchsorted(order, b.index)] for b in batches]

    def probe(self) -> None:
        """Calls the reward once on decoded noise with the first prompts, so that a wrong reward fails before the sampling.

        Raises:
            RewardError, NonDifferentiableRewardError: as a rollout would.
        """
        rows, size = self.prompts.peek(self.prompts_per_rollout), self.config.sample_batch_size
        if self.rewards.needs_groups:  # in whole groups
            group = self.config.num_images_per_prompt
            rows, size = [row for row in rows for _ in range(group)], -(-size // group) * group
        batch = self._local_rows(rows, 0, size)
        latents = self.make_chain(self._condition(batch)).initial(len(batch), None)
        where = "the check of the reward before the first rollout (check_reward)"
        with self._scorer(defer=self.accelerator.num_processes > 1, on_error="raise") as scorer:
            scorer.add(latents, tuple(row.prompt for row in batch), tuple(row.metadata for row in batch), where)
            scored = scorer.finish()
        failure = scorer.failure
        if scored and torch.isnan(scored[0].result.total).all():
            failure = RewardError(
                f"reward {', '.join(self.rewards.names)}: all {len(batch)} values for a batch of noise pictures are NaN or None; if that "
                "is right for noise, set check_reward=False"
            )
        raise_everywhere(failure, self.accelerator, where)

    def _scorer(self, *, defer: bool, on_error: str | None = None) -> RolloutScorer:
        separately = self.config.normalizes_each_reward
        return RolloutScorer(self.adapter, self.rewards, self.plan, separately=separately, defer=defer, on_error=on_error)

    def _sample_batch(self, rollout_number: int, number: int, rows: Sequence[PromptRow]) -> Experience:
        """One sampling batch, not yet scored: its rewards are NaN."""
        config, seed = self.config, self.config.seed
        size = config.sample_batch_size
        total = size * self.accelerator.num_processes
        local = torch.arange(size) + self.accelerator.process_index * size  # row in the batch of all processes
        index = local + number * total
        batch = self._local_rows(rows, number, size)
        conditioning = self._condition(batch)
        chain = self.make_chain(conditioning)
        draw = self.plan.draw(
            total,
            seeded_generator(seed, CHOICES, rollout_number, number),
            shared=True,
            start_probabilities=self.starts.probabilities() if self.starts else None,
        )
        perturbations, step_function = None, None
        if self.plan.uses_zeroth_order:
            perturbations = Perturbations.assign(
                total,
                mix_seed(seed, PERTURBATIONS, rollout_number, number),
                self.plan.zo_scale,
                self.plan.zo_num_perturbations,
                self.plan.zo_antithetic,
            ).select(local)
            step_function = perturbed_steps(chain, chain.parameters(), draw.zeroth, perturbations)
        noise_index = index // 2 if self.paired else index
        generators = [seeded_generator(seed, NOISE, rollout_number, i) for i in noise_index.tolist()]
        rollout = sample_chain(chain, size, generators, step_function=step_function, on_step=self.on_step)
        divergences = step_divergences(rollout, self.reference(chain)) if self.reference is not None else None
        return Experience(
            rollout=rollout,
            draw=draw.expand(size),
            conditioning=conditioning,
            prompts=tuple(row.prompt for row in batch),
            metadata=tuple(row.metadata for row in batch),
            rewards=torch.full((size,), torch.nan),
            reward_gradient=None,
            index=index,
            perturbations=perturbations,
            divergences=divergences,
        )

    @property
    def prompts_per_rollout(self) -> int:
        """Prompts that a rollout takes, over all processes."""
        config = self.config
        samples = config.rollout_size * self.accelerator.num_processes
        return samples // self.samples_per_prompt

    @property
    def samples_per_prompt(self) -> int:
        """Consecutive samples that share a prompt."""
        return 2 if self.paired and self.config.num_images_per_prompt == 1 else self.config.num_images_per_prompt

    def _take_prompts(self) -> list[PromptRow]:
        """One row per sample of the rollout, over all processes."""
        rows = self.prompts.take(self.prompts_per_rollout)
        if isinstance(self.prompts, FunctionPrompts):
            # Every process called the function; should it not be the same everywhere (a generator of its own, say), the first one's count.
            rows = of_main_process(rows, self.accelerator)
        return [row for row in rows for _ in range(self.samples_per_prompt)]

    def _local_rows(self, rows: Sequence[PromptRow], number: int, size: int) -> list[PromptRow]:
        """This process's share of one sampling batch of `size` per process; a shorter list of rows (a probe's) is repeated."""
        first = (number * self.accelerator.num_processes + self.accelerator.process_index) * size
        return [rows[i % len(rows)] for i in range(first, first + size)]

    def _condition(self, batch: Sequence[PromptRow]) -> Conditioning | ScaledConditioning:
        return condition_rows(self.adapter, self.config, batch)

    def _gather(self, index: Sequence[Tensor], values: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Values of all processes in the order of their sample numbers, on the CPU: (numbers [S], values [S])."""
        device = self.accelerator.device
        numbers = self.accelerator.gather(torch.cat(list(index)).to(device)).cpu()
        gathered = self.accelerator.gather(torch.cat(list(values)).to(device)).cpu()
        order = numbers.argsort()
        return numbers[order], gathered[order]

    def _sum_over_processes(self, count: int) -> int:
        return int(self.accelerator.gather(torch.tensor([count], device=self.accelerator.device)).sum())

    def _combined_advantages(self, rewards: Tensor, parts: Tensor, rows: Sequence[PromptRow]) -> tuple[Advantages, Tensor | None]:
        """Advantages of a rollout, and the factors [S, K] of the rewards' own gradients where each is normalized by itself.

        Args:
            rewards: [S], the weighted sum.
            parts: [S, K], each reward.
        """
        config = self.config
        if not config.normalizes_each_reward:
            return self._advantages(rewards, rows), None
        groups = torch.arange(len(rewards)) // config.num_images_per_prompt if config.num_images_per_prompt > 1 else None

        def advantage(k: int, values: Tensor) -> Advantages:
            if self.statistics is None:
                return normalize_in_groups(values, groups)
            return self.statistics.update([f"{self.rewards.names[k]}\n{row.prompt}" for row in rows], values)

        there = torch.where(torch.isnan(rewards)[:, None], torch.nan, parts)
        advantages, factors = normalize_then_sum(there, self.rewards.weights, advantage)
        return advantages if config.advantage_limit is None else advantages.clip(config.advantage_limit), factors

    def _advantages(self, rewards: Tensor, rows: Sequence[PromptRow] | None, blocks: Tensor | None = None) -> Advantages:
        """Advantages of a whole rollout, rewards [S] in the order of the sample numbers."""
        config = self.config
        number = torch.arange(len(rewards))
        groups = number // config.num_images_per_prompt if config.num_images_per_prompt > 1 else None
        if blocks is None and self.paired:
            blocks = number // 2
        if self.statistics is not None and rows is not None:
            advantages = self.statistics.update([row.prompt for row in rows], rewards)
        else:
            advantages = ADVANTAGES[config.advantage_name](rewards, groups, blocks)
        return advantages if config.advantage_limit is None else advantages.clip(config.advantage_limit)
