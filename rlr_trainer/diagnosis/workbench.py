"""Computes updates of any plan on a run's own model, reward and prompts, and leaves the run as it was.

The only file of the diagnosis that knows how a run is put together; the others see `Workbench` and `Batch`.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import platform
import time
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rlr_trainer.diagnosis.gradients import GradientReader
from rlr_trainer.diagnosis.memory import storages
from rlr_trainer.estimators.advantages import Advantages
from rlr_trainer.estimators.chain import DenoisingChain, Rollout, mix_seed, seeded_generator
from rlr_trainer.estimators.plan import PLAN_OPTIONS, EstimatorPlan
from rlr_trainer.estimators.plan_draw import PlanDraw
from rlr_trainer.estimators.plan_state import PlanState
from rlr_trainer.estimators.prediction import FP16_LOSS_SCALE, ControlVariate, ControlVariateScale, control_terms
from rlr_trainer.estimators.sweep import Feedback, Sweep
from rlr_trainer.estimators.zeroth_order import zeroth_order
from rlr_trainer.rollouts.advantage_rule import AdvantageRule
from rlr_trainer.rollouts.batches import CHOICES, ScoredBatch
from rlr_trainer.rollouts.collector import Collector, RolloutOptions
from rlr_trainer.rollouts.graph_keeping import GraphKeeping
from rlr_trainer.rollouts.predictions import predict
from rlr_trainer.rollouts.prompts import PromptRow
from rlr_trainer.schedules import Schedule

DIAGNOSIS = 1_000  # names the diagnosis's stream of randomness: its batches are none that the training will see


@contextlib.contextmanager
def untouched(trainer: Any) -> Iterator[Workbench]:
    """A workbench on an `RLRTrainer`. On leaving, everything is as it was, but for the number of reward queries.

    Restored: `.grad`, train/eval modes, torch's, numpy's and Python's random number generators, activation checkpointing, the position
    in the prompts (see `FunctionPrompts.borrowed`). Weights, start distribution, reward statistics and control variate are never touched.

    Raises:
        ValueError: more than one process.
    """
    run: Collector = trainer.parts.collector
    model = trainer.model_wrapped if trainer.is_in_train else trainer.model
    if run.processes.count > 1:
        raise ValueError(f"a diagnosis runs in one process, but there are {run.processes.count}: call it without accelerate launch")
    params = run.sampler.policy.trainable_parameters()
    gradients = [(p, p.grad) for p in params.values()]
    modes = [(module, module.training) for module in model.modules()]
    denoiser: Any = run.sampler.policy.denoiser
    devices = list(range(torch.cuda.device_count())) if run.processes.device.type == "cuda" else []
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=devices))
        prompts: Any = stack.enter_context(run.prompts.borrowed())
        # the training switches this on when it starts; memory and time should be those of the training
        if trainer.args.gradient_checkpointing and not getattr(denoiser, "is_gradient_checkpointing", True):
            denoiser.enable_gradient_checkpointing()
            stack.callback(denoiser.disable_gradient_checkpointing)
        stack.enter_context(run.processes.accelerator.autocast())
        model.eval()
        try:
            yield Workbench(trainer.args, model, run, prompts, params)
        finally:
            for p, gradient in gradients:
                p.grad = gradient
            for module, training in modes:
                module.training = training


@dataclasses.dataclass(frozen=True)
class Batch:
    """The rollouts of one update."""

    number: int  # fixes its prompts and its noise, for any plan
    plan: EstimatorPlan  # that sampled; perturbations and reward gradients are there only if it needed them
    parts: list[ScoredBatch]
    share: float  # 1 / the number of samples that have a reward, the weight of a sample
    sample_seconds: float
    reward_seconds: float

    @property
    def num_bytes(self) -> int:
        """Bytes of the stored rollouts and reward gradients."""
        rollouts = [(part.rollout, part.reward_gradient) for part in self.parts]
        return sum(s.nbytes() for r, g in rollouts for s in storages((r.latents, r.noises, r.means, r.stds, g)))

    @property
    def has_dead_gradient(self) -> bool:
        """Whether the rewards differ although the reward's gradient is exactly 0 for every picture."""
        gradients = [part.reward_gradient for part in self.parts]
        rewards = torch.cat([part.rewards for part in self.parts])
        return all(g is not None and not g.any() for g in gradients) and len(rewards[~torch.isnan(rewards)].unique()) > 1


class Workbench:
    """Computes updates as the training would, for any plan. Made by `untouched`.

    Advantages are leave-one-out for all plans (or none, where the config says none): then each estimates the same gradient, which
    normalized advantages would divide by the standard deviation of the rewards.
    """

    def __init__(self, config: Any, model: nn.Module, run: Collector, prompts: Any, params: dict[str, nn.Parameter]) -> None:
        self.config, self.model, self.run, self.plan, self.params = config, model, run, run.plan, params
        self.device: torch.device = run.processes.device
        self.num_steps: int = run.sampler.schedule.num_steps
        self.stds: tuple[float, ...] = run.sampler.schedule.stds
        self.options, self.advantages = measuring_options(config, run.options), measuring_advantages(run.advantages)
        self.batch_size: int = self.options.batch_size
        self.num_batches: int = self.options.num_batches  # sampling batches per update
        self.samples_per_update = self.batch_size * self.num_batches
        # a batch is differentiated under many plans here, so that no graph is kept from its sampling
        self.recompute: str = "graph" if config.recompute == "graph" else "recursive"
        self.reader = GradientReader(params)
        self.factor = FP16_LOSS_SCALE if config.fp16 else 1.0  # by which gradients are multiplied
        self._queries = run.scorer.rewards.queries
        self._prompts = prompts
        self._rows: tuple[int, list[PromptRow]] = (-1, [])

    @property
    def configured_options(self) -> dict[str, Any]:
        """The estimator options that the config sets; what it leaves to a choice ("auto") as the plan has it."""
        given = {name: getattr(self.config, name) for name in PLAN_OPTIONS if getattr(self.config, name) is not None}
        chosen = {name: getattr(self.plan, name) if value == "auto" else value for name, value in given.items()}
        return {"estimator": self.config.estimator} | chosen

    def settings(self) -> dict[str, Any]:
        """What is measured, on what, and how many pictures the reward was asked about for it."""
        return {
            "num_steps": self.num_steps,
            "samples_per_update": self.samples_per_update,
            "sample_batch_size": self.batch_size,
            "advantage": self.advantages.name,
            "configured_advantage": self.config.advantage_name,
            "recompute": self.recompute,
            "num_parameters": self.reader.num_entries,
            "sketched_to": self.reader.size if self.reader.sketched else None,
            "seed": self.config.seed,
            "reward_queries": self.run.scorer.rewards.queries - self._queries,
            "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else f"{platform.machine()} CPU",
        }

    def clock(self) -> float:
        """Seconds, after the device has done what it was told."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def control_scale(self, plan: EstimatorPlan) -> ControlVariateScale | None:
        """What a plan's control variate starts from: a copy of the run's own for the configured plan; None without one."""
        if not plan.uses_control_variate:
            return None
        own = self.run.plan_state.control_scale
        return copy.deepcopy(own) if own is not None and plan == self.plan else ControlVariateScale(self.num_steps)

    def schedule(self, sampling: Mapping[str, Any]) -> Schedule:
        """The run's sampler, with other `noise_steps`, `sample_eta` or `sampler`.

        Raises:
            ValueError: the pipeline cannot be sampled so.
        """
        sampler, names = self.run.sampler, {"sample_eta": "eta"}
        changes = {names.get(name, name): value for name, value in sampling.items()}
        return sampler.adapter.schedule(sampler.layout, dataclasses.replace(self.config.sampler_options, **changes))

    def collect(self, number: int, plan: EstimatorPlan, schedule: Schedule | None = None) -> Batch:
        """Samples and scores batch `number`, as `plan` needs it; with `schedule` in place of the run's."""
        if self._rows[0] != number:
            self._rows = (number, self._prompts.take(self.samples_per_update // self.options.group_size))
        rows = self._rows[1]
        same_rows: Any = types.SimpleNamespace(take=lambda count: rows[:count])  # however often the batch is sampled
        sampler = self.run.sampler if schedule is None else dataclasses.replace(self.run.sampler, schedule=schedule)
        collector = dataclasses.replace(
            self.run,
            sampler=sampler,
            plan_state=self._state_of(plan),
            prompts=same_rows,
            options=self.options,
            advantages=self.advantages,
            reference=None,
            keeping=GraphKeeping(False),
            windows=None,
        )
        parts, summary = collector.collect(self.model, number)
        share = 1.0 / (self.samples_per_update * summary.valid_fraction)
        return Batch(number, plan, parts, share, summary.metrics["time/sample"], summary.metrics["time/reward"])

    def _state_of(self, plan: EstimatorPlan) -> PlanState:
        """Without a control variate: its terms belong to an update, whose plan need not be the one that samples."""
        state = copy.copy(self.run.plan_state) if plan == self.plan else PlanState(plan)
        state.control_scale = None
        return state

    def update(self, plan: EstimatorPlan, batch: Batch, control_scale: ControlVariateScale | None = None) -> tuple[Tensor, float]:
        """The gradient [P] of the mean reward (ascending), on the CPU, and the seconds of the backward sweep.

        `plan` may differ from the plan that sampled, unless it perturbs parameters. `control_scale` takes in the batch afterwards.
        """
        self.reader.clear()
        started = self.clock()
        draws = [self._draw(plan, batch, index) for index in range(self.num_batches)]
        scale = control_scale or ControlVariateScale(self.num_steps)
        controls = self._control(plan, batch, draws, scale) if plan.uses_control_variate else [None] * len(draws)
        for part, draw, control in zip(batch.parts, draws, controls, strict=True):
            self._sweep(plan, batch, part, draw, self.recompute, control)
        perturbed = self._zeroth_order(batch, plan.rest_weight) if plan.uses_zeroth_order else 0.0
        seconds = self.clock() - started
        return perturbed + self.reader.read() / self.factor, seconds

    def step_shares(self, plan: EstimatorPlan, batch: Batch) -> tuple[Tensor, float]:
        """The share [T, P] of every step in the update of a plan without zeroth order, and the seconds of the sweep."""
        shares = torch.zeros(self.num_steps, self.reader.size)

        @contextlib.contextmanager
        def scope(steps: list[int], is_last: bool) -> Iterator[None]:
            yield
            shares[steps[0]] += self.reader.read() / self.factor
            self.reader.clear()

        self.reader.clear()
        started = self.clock()
        for index, part in enumerate(batch.parts):
            self._sweep(plan, batch, part, self._draw(plan, batch, index), "recursive", scope=scope)
        return shares, self.clock() - started

    def zeroth_order_shares(self, batch: Batch) -> Tensor:
        """The share [T, P] of every step in the zeroth-order part of a batch that was sampled with perturbations."""
        steps = torch.eye(self.num_steps, dtype=torch.bool)
        return torch.stack([self._zeroth_order(batch, 1.0, step) for step in steps])

    def first(self, batch: Batch) -> tuple[DenoisingChain, Rollout, Callable[[Tensor, bool], Tensor]]:
        """Chain, rollout and reward of the first sampling batch; the reward takes latents, and whether to differentiate it."""
        part, scorer = batch.parts[0], self.run.scorer

        def reward(latents: Tensor, graph: bool) -> Tensor:
            """As an update scores latents; without a graph as a rollout does."""
            if graph:
                return scorer.differentiable(part.prompts, part.metadata)(latents)
            return scorer.score(latents, part.prompts, part.metadata, "the diagnosis").result.total.nan_to_num()

        return self.run.sampler.chain(self.model, part.conditioning, part.schedule), part.rollout, reward

    def _draw(self, plan: EstimatorPlan, batch: Batch, index: int) -> PlanDraw:
        """The choices of `plan` for sampling batch `index`, from the stream that the collector uses."""
        part = batch.parts[index]
        if plan is batch.plan:
            return part.draw
        generator = seeded_generator(self.options.seed, CHOICES, batch.number, index)
        starts = self._state_of(plan).start_probabilities()
        return plan.draw(self.batch_size, generator, shared=True, start_probabilities=starts).expand(len(part))

    def _control(
        self, plan: EstimatorPlan, batch: Batch, draws: list[PlanDraw], scale: ControlVariateScale
    ) -> list[ControlVariate]:
        """The control variate's terms of all sampling batches; `scale` takes them in afterwards."""
        size = self.options.prediction_size or self.batch_size
        shared = self.run.sampler, self.run.scorer, self.model
        found = [predict(*shared, part, draw, size, self.factor) for part, draw in zip(batch.parts, draws, strict=True)]
        numbers = torch.cat([part.index for part in batch.parts])
        values, rewards = torch.cat([part.values for part in found]).cpu(), torch.cat([part.rewards for part in batch.parts])
        blocks = numbers // 2 if plan.uses_zeroth_order and plan.zo_antithetic else None
        positions = torch.arange(len(numbers)).split([len(part) for part in batch.parts])
        terms = control_terms(found, positions, values, rewards, scale, blocks)
        scale.update(rewards, values)
        return terms

    def _sweep(
        self,
        plan: EstimatorPlan,
        batch: Batch,
        part: ScoredBatch,
        draw: PlanDraw,
        recompute: str,
        control: ControlVariate | None = None,
        **options: Any,
    ) -> None:
        """Goes back along a sampling batch."""
        chain = self.run.sampler.chain(self.model, part.conditioning, part.schedule)

        def backward(surrogate: Tensor) -> float:
            (surrogate * self.factor).backward()
            return self.factor

        sweep = Sweep.of_plan(
            plan,
            chain,
            chain.parameters(),
            backward,
            self.run.scorer.differentiable(part.prompts, part.metadata),
            reward_loss_scale=self.factor,
            recompute=recompute,
            mean_density=True,
            **options,
        )
        feedback = Feedback.of(
            plan,
            Advantages(part.advantage, part.scale),
            batch.share,
            reward_gradient=part.reward_gradient,
            control=control,
        )
        sweep.run(part.rollout, draw, feedback)

    def _zeroth_order(self, batch: Batch, weight: float, steps: Tensor | None = None) -> Tensor:
        """Zeroth-order part of a batch, or the share of some steps (bool [T]) in it."""
        total = torch.zeros(self.reader.size)
        for part in batch.parts:
            if part.perturbations is None or part.zeroth_advantage is None:
                continue
            mask = part.draw.zeroth if steps is None else part.draw.zeroth & steps
            advantage = part.zeroth_advantage * (weight * batch.share)
            total += self.reader.flatten(zeroth_order(advantage, mask, part.perturbations, self.params))
        return total


def measuring_options(config: Any, options: RolloutOptions) -> RolloutOptions:
    """The samples of one update per rollout, and randomness of its own."""
    micro, size = config.per_device_train_batch_size, options.batch_size
    update = micro * config.gradient_accumulation_steps
    seed = mix_seed(options.seed, DIAGNOSIS)
    if update % options.group_size:
        return dataclasses.replace(options, seed=seed, offload=False)
    size = min(size, update) if update % min(size, update) == 0 else micro
    return dataclasses.replace(options, seed=seed, batch_size=size, num_batches=update // size, offload=False)


def measuring_advantages(rule: AdvantageRule) -> AdvantageRule:
    """Plain advantages, without a limit or a memory of earlier rewards."""
    name = "none" if rule.name == "none" and rule.statistics is None else "leave_one_out"
    return AdvantageRule(name, group_size=rule.group_size, names=rule.names, weights=rule.weights)
