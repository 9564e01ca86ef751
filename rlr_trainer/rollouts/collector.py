"""One rollout: prompts -> chains -> pictures -> rewards -> advantages, ready for the sweep.

All randomness is a function of (run seed, rollout number, sample number), never of the batch size or the number of processes.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from rlr_trainer.estimators.advantages import Advantages
from rlr_trainer.estimators.chain import mix_seed, sample_chain, seeded_generator
from rlr_trainer.estimators.divergence import leave_one_out_to_go, step_divergences
from rlr_trainer.estimators.first_order import NonDifferentiableRewardError
from rlr_trainer.estimators.kept_steps import KeptSteps
from rlr_trainer.estimators.plan import EstimatorPlan
from rlr_trainer.estimators.plan_draw import PlanDraw
from rlr_trainer.estimators.plan_state import PlanState
from rlr_trainer.estimators.prediction import Predictions, control_terms
from rlr_trainer.estimators.zeroth_order import Perturbations, perturbed_steps
from rlr_trainer.pipelines import PipelineChain
from rlr_trainer.pipelines.old_policy import OldPolicy
from rlr_trainer.pipelines.reference import ReferencePolicy
from rlr_trainer.rewards.interface import RewardError
from rlr_trainer.rollouts.advantage_rule import AdvantageRule
from rlr_trainer.rollouts.batches import CHOICES, FORWARD, NOISE, PERTURBATIONS, WINDOW, RolloutSummary, SampledBatch, ScoredBatch
from rlr_trainer.rollouts.graph_keeping import GraphKeeping
from rlr_trainer.rollouts.predictions import predict
from rlr_trainer.rollouts.processes import Processes
from rlr_trainer.rollouts.prompts import DatasetPrompts, FunctionPrompts, PromptRow
from rlr_trainer.rollouts.sampler import Sampler
from rlr_trainer.rollouts.scorer import RolloutScoring, Scored, Scorer, check_rollout, reward_metrics
from rlr_trainer.schedules import NoiseWindows, Schedule


@dataclasses.dataclass(frozen=True)
class RolloutOptions:
    """The size of a rollout, and its randomness.

    Attributes:
        seed: of the run.
        batch_size: samples per process and sampling batch.
        num_batches: sampling batches per process.
        group_size: samples per prompt.
        offload: keep sampled chains in CPU memory until their update.
        prediction_size: samples that the one-step prediction of the control variate is asked about at a time; None is a sampling batch.
        prediction_loss_scale: of its rewards, in fp16.
    """

    seed: int
    batch_size: int
    num_batches: int
    group_size: int = 1
    offload: bool = False
    prediction_size: int | None = None
    prediction_loss_scale: float = 1.0


@dataclasses.dataclass(frozen=True)
class Collector:
    """Collects rollouts.

    Attributes:
        sampler, scorer: what samples and what scores.
        plan_state: the plan in force.
        prompts: where prompts come from.
        processes: of the run, which share the rollout.
        options, advantages: how much, and how rewards become advantages.
        reference: the reference policy, or None.
        old_policy: the one that samples, where it is not the present one.
        windows: the schedules of the rollouts where each has noise in a window of its own; None where all have the sampler's.
        keeping: whether graphs are kept for the update.
        penalized: whether the update has a penalty on every step with noise.
    """

    sampler: Sampler
    scorer: Scorer
    plan_state: PlanState
    prompts: FunctionPrompts | DatasetPrompts
    processes: Processes
    options: RolloutOptions
    advantages: AdvantageRule
    reference: ReferencePolicy | None = None
    old_policy: OldPolicy | None = None
    windows: NoiseWindows | None = None
    keeping: GraphKeeping = dataclasses.field(default_factory=GraphKeeping)
    penalized: bool = False

    @property
    def plan(self) -> EstimatorPlan:
        return self.plan_state.plan

    @property
    def paired(self) -> bool:
        """Whether samples 2k and 2k + 1 share noise and prompt, for antithetic perturbations."""
        return self.plan.uses_zeroth_order and self.plan.zo_antithetic

    @property
    def samples_per_prompt(self) -> int:
        """Consecutive samples that share a prompt."""
        return 2 if self.paired and self.options.group_size == 1 else self.options.group_size

    @property
    def prompts_per_rollout(self) -> int:
        """Prompts that a rollout takes, over all processes."""
        samples = self.options.batch_size * self.options.num_batches * self.processes.count
        return samples // self.samples_per_prompt

    def collect(
        self, model: nn.Module, number: int, on_step: Callable[[int], None] | None = None
    ) -> tuple[list[ScoredBatch], RolloutSummary]:
        """Samples and scores rollout `number` with the policy `model`, as Trainer wrapped it; `on_step` is called after each step.

        Raises:
            RewardError: every reward is NaN, or a reward's gradient is not finite.
            FloatingPointError, NonDifferentiableRewardError: predictions of the control variate, see `control_terms`.
        """
        rows, seconds, schedule = self._take_prompts(), 0.0, self.schedule_of(number)
        sampled: list[SampledBatch] = []
        predictions: list[Predictions] = []
        with self._scoring() as scoring:
            for batch_number in range(self.options.num_batches):
                started = time.perf_counter()
                batch = self._sample_batch(model, schedule, number, batch_number, rows, on_step)
                seconds += time.perf_counter() - started
                where = f"sampling batch {batch_number} of rollout {number}"
                scoring.add(batch.rollout.sample, batch.prompts, batch.metadata, where)
                if self.plan_state.control_scale is not None and scoring.failure is None:
                    with scoring.at_work():
                        predictions.append(self._predict(model, batch))
                sampled.append(batch.to("cpu") if self.options.offload else batch)
            scored = scoring.finish()
        self.processes.raise_everywhere(scoring.failure, f"rollout {number}")
        index, results = [batch.index for batch in sampled], [part.result for part in scored]
        order, rewards = self.processes.gather_in_order(index, [result.total for result in results])
        _, parts = self.processes.gather_in_order(index, [result.values.T for result in results])
        errors = self.processes.sum(sum(result.errors for result in results))
        check_rollout(rewards, self.scorer.rewards, errors, f"rollout {number}")
        prompts = tuple(row.prompt for row in rows)
        advantages, factors = self.advantages.of_rollout(rewards, parts, prompts, self.paired)
        batches = [_complete(b, s, order, advantages, factors) for b, s in zip(sampled, scored, strict=True)]
        batches = self._with_control_variate(batches, predictions, order, rewards)
        batches, kl = self._with_divergence_to_go(self._with_zeroth_advantages(batches, order, rewards, advantages))
        metrics = reward_metrics(self.scorer.rewards.names, rewards, parts) | kl
        metrics |= {"time/sample": seconds, "time/reward": scoring.seconds}
        if self.windows is not None:
            metrics["noise_window"] = float(next(step for step, std in enumerate(schedule.stds) if std > 0))
        if self.scorer.rewards.on_error == "skip":
            metrics["reward_errors"] = float(errors)
        pictures = [[s.images, b.prompts, b.metadata, b.rewards, s.result.metadata] for s, b in zip(scored, batches, strict=True)]
        valid = float((~torch.isnan(rewards)).float().mean())
        return batches, RolloutSummary(metrics, pictures, valid, rewards, prompts)

    def schedule_of(self, number: int) -> Schedule:
        """The steps of rollout `number`, the same in all processes."""
        if self.windows is None:
            return self.sampler.schedule
        return self.windows.of_rollout(number, seeded_generator(self.options.seed, WINDOW, number))

    def probe(self, model: nn.Module) -> None:
        """Calls the reward once on decoded noise with the first prompts, so that a wrong reward fails before the sampling.

        Raises:
            RewardError, NonDifferentiableRewardError: as a rollout would.
        """
        rows, size = self.prompts.peek(self.prompts_per_rollout), self.options.batch_size
        if self.scorer.rewards.needs_groups:  # in whole groups
            group = self.options.group_size
            rows, size = [row for row in rows for _ in range(group)], -(-size // group) * group
        batch = self._local_rows(rows, 0, size)
        latents = self.sampler.chain(model, self.sampler.condition(batch)).initial(len(batch), None)
        where = "the check of the reward before the first rollout (check_reward)"
        with self._scoring(on_error="raise") as scoring:
            scoring.add(latents, tuple(row.prompt for row in batch), tuple(row.metadata for row in batch), where)
            scored = scoring.finish()
        failure = scoring.failure
        if scored and torch.isnan(scored[0].result.total).all():
            failure = RewardError(
                f"reward {', '.join(self.scorer.rewards.names)}: all {len(batch)} values for a batch of noise pictures are NaN or None; if "
                "that is right for noise, set check_reward=False"
            )
        self.processes.raise_everywhere(failure, where)

    def _scoring(self, on_error: str | None = None) -> RolloutScoring:
        return RolloutScoring(
            self.scorer,
            with_gradient=self.plan.needs_differentiable_reward,
            separately=self.advantages.separately,
            defer=self.processes.count > 1,
            on_error=on_error,
        )

    def _sample_batch(
        self,
        model: nn.Module,
        schedule: Schedule,
        rollout_number: int,
        number: int,
        rows: Sequence[PromptRow],
        on_step: Callable[[int], None] | None,
    ) -> SampledBatch:
        seed, size, processes = self.options.seed, self.options.batch_size, self.processes
        plan = self.plan.on_noise(schedule.stds)
        total = size * processes.count
        local = torch.arange(size) + processes.index * size  # row in the batch of all processes
        index = local + number * total
        batch = self._local_rows(rows, number, size)
        conditioning = self.sampler.condition(batch)
        chain = self.sampler.chain(model, conditioning, schedule)
        choices = seeded_generator(seed, CHOICES, rollout_number, number)
        draw = plan.draw(total, choices, shared=True, start_probabilities=self.plan_state.start_probabilities())
        perturbations, step_function = None, None if self.old_policy is None else self.old_policy.steps_of(chain)
        if plan.uses_zeroth_order:
            of_batch = mix_seed(seed, PERTURBATIONS, rollout_number, number)
            everyone = Perturbations.assign(total, of_batch, plan.zo_scale, plan.zo_num_perturbations, plan.zo_antithetic)
            perturbations = everyone.select(local)
            step_function = perturbed_steps(chain, chain.parameters(), draw.zeroth, perturbations)
        noise_index = index // 2 if self.paired else index
        generators = [seeded_generator(seed, NOISE, rollout_number, i) for i in noise_index.tolist()]
        kept, seeds = self._kept_steps(chain, draw, size), None
        if kept is not None:
            params = chain.parameters()
            step_function = kept.recording(lambda step, x: chain.transition(step, x, params))
        rollout = sample_chain(chain, size, generators, step_function=step_function, on_step=on_step)
        if plan.forward is not None:
            rollout = rollout.sample_alone()
            seeds = torch.tensor([mix_seed(seed, FORWARD, rollout_number, i) for i in index.tolist()])
        return SampledBatch(
            rollout=rollout,
            schedule=schedule,
            draw=draw.expand(size),
            conditioning=conditioning,
            prompts=tuple(row.prompt for row in batch),
            metadata=tuple(row.metadata for row in batch),
            index=index,
            perturbations=perturbations,
            divergences=None if self.reference is None else step_divergences(rollout, self.reference.steps_of(chain)),
            noise_seeds=seeds,
            kept=kept,
        )

    def _kept_steps(self, chain: PipelineChain, draw: PlanDraw, size: int) -> KeptSteps | None:
        if self.keeping.keep is False:
            return None
        params, stds = chain.parameters(), chain.schedule.stds if self.penalized else ()
        return self.keeping.steps_of(
            draw,
            stds,
            lambda step, x: chain.transition(step, x, params),
            lambda: chain.initial(size, seeded_generator(self.options.seed)),
        )

    def _take_prompts(self) -> list[PromptRow]:
        """One row per sample of the rollout, over all processes."""
        rows = self.prompts.take(self.prompts_per_rollout)
        if isinstance(self.prompts, FunctionPrompts):
            # Every process called the function; should it not be the same everywhere (a generator of its own, say), the first one's count.
            rows = self.processes.of_main(rows)
        return [row for row in rows for _ in range(self.samples_per_prompt)]

    def _local_rows(self, rows: Sequence[PromptRow], number: int, size: int) -> list[PromptRow]:
        """This process's share of one sampling batch of `size` per process; a shorter list of rows (a probe's) is repeated."""
        first = (number * self.processes.count + self.processes.index) * size
        return [rows[i % len(rows)] for i in range(first, first + size)]

    def _predict(self, model: nn.Module, batch: SampledBatch) -> Predictions:
        size, loss_scale = self.options.prediction_size or len(batch), self.options.prediction_loss_scale
        found = predict(self.sampler, self.scorer, model, batch, batch.draw, size, loss_scale)
        return found.to("cpu") if self.options.offload else found

    def _with_control_variate(
        self, batches: list[ScoredBatch], predictions: list[Predictions], order: Tensor, rewards: Tensor
    ) -> list[ScoredBatch]:
        """The batches with its terms, centred over the whole rollout; its factors take in the rollout afterwards."""
        scale = self.plan_state.control_scale
        if scale is None:
            return batches
        _, values = self.processes.gather_in_order([b.index for b in batches], [p.values for p in predictions])
        positions = [torch.searchsorted(order, batch.index) for batch in batches]
        blocks = order // 2 if self.paired else None
        terms, failure = [], None
        try:
            terms = control_terms(predictions, positions, values, rewards, scale, blocks)
        except (FloatingPointError, NonDifferentiableRewardError) as error:  # of this process's samples
            failure = error
        self.processes.raise_everywhere(failure, "the predictions of the control variate")
        scale.update(rewards, values)
        return [dataclasses.replace(batch, control=control) for batch, control in zip(batches, terms, strict=True)]

    def _with_zeroth_advantages(
        self, batches: list[ScoredBatch], order: Tensor, rewards: Tensor, advantages: Advantages
    ) -> list[ScoredBatch]:
        perturbed = [(b, b.perturbations) for b in batches if b.perturbations is not None]
        if not perturbed:
            return batches
        per_batch = self.options.batch_size * self.processes.count
        directions = [p.direction + b.index // per_batch * self.plan.zo_num_perturbations for b, p in perturbed]
        _, direction = self.processes.gather_in_order([b.index for b in batches], directions)
        values = self.advantages.of_directions(rewards, direction, advantages.values)
        return [dataclasses.replace(b, zeroth_advantage=values[torch.searchsorted(order, b.index)]) for b in batches]

    def _with_divergence_to_go(self, batches: list[ScoredBatch]) -> tuple[list[ScoredBatch], dict[str, float]]:
        """The batches, and the metric kl: the divergence of the whole chain from the reference policy, in nats."""
        own = [b.divergences for b in batches if b.divergences is not None]
        if not own:
            return batches, {}
        order, divergences = self.processes.gather_in_order([b.index for b in batches], own)
        to_go = leave_one_out_to_go(divergences)
        kl = {"kl": float(divergences.sum(1).mean())}
        return [
            dataclasses.replace(b, divergence_to_go=to_go[torch.searchsorted(order, b.index)].to(b.rollout.sample.device))
            for b in batches
        ], kl


def _complete(batch: SampledBatch, scored: Scored, order: Tensor, advantages: Advantages, factors: Tensor | None) -> ScoredBatch:
    """A sampled batch with its share of the rollout's rewards and advantages, which are in the order of the sample numbers."""
    position, device = torch.searchsorted(order, batch.index), batch.rollout.sample.device
    gradient = scored.gradient
    if gradient is not None and factors is not None:
        gradient = torch.einsum("bk,bk...->b...", factors[position].to(gradient), gradient)
    return ScoredBatch(
        **{field.name: getattr(batch, field.name) for field in dataclasses.fields(SampledBatch)},
        rewards=scored.result.total.cpu(),
        advantage=advantages.values[position].to(device),
        scale=advantages.scale[position].to(device),
        reward_gradient=None if gradient is None else gradient.to(device),
    )
