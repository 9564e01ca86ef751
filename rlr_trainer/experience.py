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

from rlr_trainer.chain import DenoisingChain, Rollout, mix_seed, sample_chain, seeded_generator
from rlr_trainer.chains.ddim import DDIMSchedule
from rlr_trainer.config import RLRConfig
from rlr_trainer.estimators.advantages import ADVANTAGES, Advantages, PerPromptStatistics
from rlr_trainer.estimators.first_order import reward_and_gradient
from rlr_trainer.estimators.zeroth_order import Perturbations, perturbed_steps
from rlr_trainer.pipelines import Conditioning, PipelineAdapter, ScaledConditioning
from rlr_trainer.plan import EstimatorPlan, PlanDraw, StartDistribution
from rlr_trainer.prompts import DatasetPrompts, FunctionPrompts, PromptRow
from rlr_trainer.rewards.interface import RewardError, Rewards

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

    def __len__(self) -> int:
        return len(self.prompts)

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
    """

    metrics: dict[str, float]
    pictures: list[list[Any]]
    valid_fraction: float


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

    @property
    def paired(self) -> bool:
        """Whether samples 2k and 2k + 1 share noise and prompt, for antithetic perturbations."""
        return self.plan.uses_zeroth_order and self.plan.zo_antithetic

    def collect(self, rollout_number: int) -> tuple[list[Experience], RolloutSummary]:
        """Samples and scores one rollout: `sample_num_batches_per_epoch` batches, with their advantages.

        Raises:
            RewardError: every reward is NaN, or a reward's gradient is not finite.
        """
        batches, pictures, parts = [], [], []
        rows = self._take_prompts()
        spent = {"time/sample": 0.0, "time/reward": 0.0}
        for number in range(self.config.sample_num_batches_per_epoch):
            batch, picture, part = self._collect_batch(rollout_number, number, rows, spent)
            batches.append(batch)
            pictures.append(picture)
            parts.append(part)
        merged = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        order, rewards = self._gather([batch.index for batch in batches], [batch.rewards for batch in batches])
        if torch.isnan(rewards).all():
            raise RewardError(
                f"rollout {rollout_number}: all {len(rewards)} rewards are NaN or None, so there is nothing to learn from; check the "
                f"reward function{'s' if len(self.rewards.names) > 1 else ''} {', '.join(self.rewards.names)}"
            )
        advantages = self._advantages(rewards, rows)
        completed = []
        for batch in batches:
            position = torch.searchsorted(order, batch.index)
            device = batch.rollout.sample.device
            completed.append(
                dataclasses.replace(
                    batch,
                    advantage=advantages.values[position].to(device),
                    scale=advantages.scale[position].to(device),
                )
            )
        metrics = self._metrics(rewards, merged) | spent
        valid = float((~torch.isnan(rewards)).float().mean())
        return completed, RolloutSummary(metrics, pictures, valid)

    def zeroth_order_advantages(self, batches: Sequence[Experience]) -> list[Tensor]:
        """Advantages of perturbed samples, one tensor [B] per batch: baselines leave out all that share a direction."""
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
        rows = self.prompts.peek(self._prompts_per_rollout())
        batch = self._local_rows(rows, 0)
        conditioning = self._condition(batch)
        latents = self.make_chain(conditioning).initial(len(batch), None)
        _, result, _ = self._score(latents, batch)
        if torch.isnan(result.total).all():
            raise RewardError(
                f"reward {', '.join(self.rewards.names)}: all {len(batch)} values for a batch of noise pictures are NaN or None; if that "
                "is right for noise, set check_reward=False"
            )

    def _collect_batch(
        self, rollout_number: int, number: int, rows: Sequence[PromptRow], spent: dict[str, float]
    ) -> tuple[Experience, list[Any], dict[str, Tensor]]:
        config, seed = self.config, self.config.seed
        size = config.sample_batch_size
        total = size * self.accelerator.num_processes
        local = torch.arange(size) + self.accelerator.process_index * size  # row in the batch of all processes
        index = local + number * total
        batch = self._local_rows(rows, number)
        started = time.perf_counter()
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
        sampled = time.perf_counter()
        images, result, gradient = self._score(rollout.sample, batch)
        spent["time/sample"] += sampled - started
        spent["time/reward"] += time.perf_counter() - sampled
        rewards = result.total.detach().cpu()
        experience = Experience(
            rollout=rollout,
            draw=draw.expand(size),
            conditioning=conditioning,
            prompts=tuple(row.prompt for row in batch),
            metadata=tuple(row.metadata for row in batch),
            rewards=rewards,
            reward_gradient=gradient,
            index=index,
            perturbations=perturbations,
        )
        picture = [images, experience.prompts, experience.metadata, rewards, result.metadata]
        return experience, picture, {name: part.cpu() for name, part in result.parts.items()}

    def _score(self, latents: Tensor, batch: Sequence[PromptRow]) -> tuple[Tensor, Any, Tensor | None]:
        """Pictures (detached), rewards and dR/dx_0 (where the plan needs it; 0 for samples without a reward)."""
        prompts, metadata = tuple(row.prompt for row in batch), tuple(row.metadata for row in batch)
        kept: list[Any] = []

        def reward(x0: Tensor) -> Tensor:
            images = self.adapter.decode(x0)
            result = self.rewards(images, prompts, metadata, differentiable=self.plan.needs_differentiable_reward)
            kept.extend([images.detach(), result])
            return result.total

        if not self.plan.needs_differentiable_reward:
            with torch.no_grad():
                reward(latents)
            return kept[0], kept[1], None
        _, gradient = reward_and_gradient(reward, latents)
        images, result = kept
        valid = ~torch.isnan(result.total.detach())
        gradient = torch.where(valid.reshape(-1, *[1] * (gradient.dim() - 1)), gradient, 0.0)
        if not torch.isfinite(gradient).all():
            bad = [prompts[i] for i in torch.nonzero(~torch.isfinite(gradient.flatten(1)).all(1))[:, 0].tolist()]
            raise RewardError(
                f"reward {', '.join(self.rewards.names)}: its gradient with respect to the picture is not finite for {len(bad)} of "
                f"{len(prompts)} samples (prompts {bad[:3]}); look for sqrt, log or a norm at 0 in the reward"
            )
        return images, result, gradient

    def _prompts_per_rollout(self) -> int:
        config = self.config
        samples = config.rollout_size * self.accelerator.num_processes
        return samples // self.samples_per_prompt

    @property
    def samples_per_prompt(self) -> int:
        """Consecutive samples that share a prompt."""
        return 2 if self.paired and self.config.num_images_per_prompt == 1 else self.config.num_images_per_prompt

    def _take_prompts(self) -> list[PromptRow]:
        """One row per sample of the rollout, over all processes."""
        rows = self.prompts.take(self._prompts_per_rollout())
        return [row for row in rows for _ in range(self.samples_per_prompt)]

    def _local_rows(self, rows: Sequence[PromptRow], number: int) -> list[PromptRow]:
        """This process's share of one sampling batch; a shorter list of rows (a probe's) is repeated."""
        size = self.config.sample_batch_size
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
            name = "leave_one_out" if self.statistics is not None else config.advantage_name
            advantages = ADVANTAGES[name](rewards, groups, blocks)
        return advantages if config.advantage_limit is None else advantages.clip(config.advantage_limit)

    def _metrics(self, rewards: Tensor, parts: dict[str, Tensor]) -> dict[str, float]:
        valid = rewards[~torch.isnan(rewards)]
        metrics = {
            "reward": float(valid.mean()),
            "reward_std": float(valid.std(correction=0)),
            "samples_dropped": float(len(rewards) - len(valid)),
        }
        for name, part in parts.items():
            values = self.accelerator.gather(part.to(self.accelerator.device)).cpu()
            values = values[~torch.isnan(values)]
            metrics[f"rewards/{name}/mean"] = float(values.mean()) if len(values) else float("nan")
            metrics[f"rewards/{name}/std"] = float(values.std(correction=0)) if len(values) else float("nan")
        return metrics
