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
from rlr_trainer.estimators.chain import DenoisingChain, Rollout, mix_seed, seeded_generator
from rlr_trainer.estimators.plan import EstimatorPlan
from rlr_trainer.estimators.plan_draw import StartDistribution
from rlr_trainer.estimators.prediction import FP16_LOSS_SCALE, ControlVariateScale, prediction_critic
from rlr_trainer.estimators.sweep import Feedback, Sweep
from rlr_trainer.estimators.zeroth_order import zeroth_order
from rlr_trainer.rollouts.batches import CHOICES, Experience
from rlr_trainer.rollouts.collector import Collector
from rlr_trainer.rollouts.prompts import DatasetPrompts, FunctionPrompts, PromptRow

DIAGNOSIS = 1_000  # names the diagnosis's stream of randomness: its batches are none that the training will see
PLAN_OPTIONS = tuple(field.name for field in dataclasses.fields(EstimatorPlan) if field.name != "num_steps")


@dataclasses.dataclass(frozen=True)
class Subject:
    """What is diagnosed: a policy, its reward and its prompts, as a run uses them.

    Attributes:
        config: the run's options, under the names of `RLRConfig`.
        plan, control_scale, starts: the configured plan, and what the run has learned for it (or None).
        model: the policy as the run calls it, wrapped or not.
        denoiser: its network, for activation checkpointing.
        parameters: name -> trained parameter.
        make_chain: (model, conditioning) -> chain.
        adapter, schedule, rewards, prompts, accelerator: the run's own.
        updates: updates done so far.
    """

    config: Any
    plan: EstimatorPlan
    control_scale: ControlVariateScale | None
    starts: StartDistribution | None
    model: nn.Module
    denoiser: nn.Module
    parameters: dict[str, Tensor]
    make_chain: Callable[[nn.Module, Any], Any]
    adapter: Any
    schedule: Any
    rewards: Any
    prompts: FunctionPrompts | DatasetPrompts
    accelerator: Any
    updates: int

    @classmethod
    def of(cls, trainer: Any) -> Subject:
        """That of an `RLRTrainer`, before, during or after training."""
        same = ("plan", "control_scale", "starts", "adapter", "schedule", "rewards", "prompts", "accelerator")
        return cls(
            **{name: getattr(trainer, name) for name in same},
            config=trainer.args,
            model=trainer.model_wrapped if trainer.is_in_train else trainer.model,
            denoiser=trainer.policy.denoiser,
            parameters=trainer.policy.trainable_parameters(),
            make_chain=trainer._make_chain,
            updates=trainer.state.global_step,
        )


@contextlib.contextmanager
def untouched(subject: Any) -> Iterator[Workbench]:
    """A workbench on a `Subject` or an `RLRTrainer`. On leaving, everything is as it was, but for the number of reward queries.

    Restored: `.grad`, train/eval modes, torch's, numpy's and Python's random number generators, activation checkpointing, the position
    in the prompts (see `FunctionPrompts.borrowed`). Weights, start distribution, reward statistics and control variate are never touched.

    Raises:
        ValueError: more than one process.
    """
    if not isinstance(subject, Subject):
        subject = Subject.of(subject)
    accelerator = subject.accelerator
    if accelerator.num_processes > 1:
        raise ValueError(
            f"a diagnosis runs in one process, but there are {accelerator.num_processes}: call it without accelerate launch"
        )
    gradients = [(p, p.grad) for p in subject.parameters.values()]
    modes = [(module, module.training) for module in subject.model.modules()]
    denoiser: Any = subject.denoiser
    devices = list(range(torch.cuda.device_count())) if accelerator.device.type == "cuda" else []
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=devices))
        prompts = stack.enter_context(subject.prompts.borrowed())
        # the training switches this on when it starts; memory and time should be those of the training
        if subject.config.gradient_checkpointing and not getattr(denoiser, "is_gradient_checkpointing", True):
            denoiser.enable_gradient_checkpointing()
            stack.callback(denoiser.disable_gradient_checkpointing)
        stack.enter_context(accelerator.autocast())
        subject.model.eval()
        try:
            yield Workbench(subject, prompts)
        finally:
            for p, gradient in gradients:
                p.grad = gradient
            for module, training in modes:
                module.training = training


@dataclasses.dataclass(frozen=True)
class Batch:
    """The rollouts of one update.

    Attributes:
        number: of the batch; fixes its prompts and its noise, for any plan.
        plan: that sampled; perturbations and reward gradients are there only if it needed them.
        experiences: one per sampling batch.
        zeroth_advantages: one [B] per experience, for the zeroth-order part; empty without one.
        share: 1 / the number of samples that have a reward, the weight of a sample.
        sample_seconds, reward_seconds: wall time.
    """

    number: int
    plan: EstimatorPlan
    experiences: list[Experience]
    zeroth_advantages: list[Tensor]
    share: float
    sample_seconds: float
    reward_seconds: float

    @property
    def num_bytes(self) -> int:
        """Bytes of the stored rollouts and reward gradients."""
        total = 0
        for experience in self.experiences:
            rollout, gradient = experience.rollout, experience.reward_gradient
            stored = [*rollout.latents, *rollout.noises, *rollout.means, *rollout.stds, *([] if gradient is None else [gradient])]
            total += sum(tensor.untyped_storage().nbytes() for tensor in stored)
        return total

    @property
    def has_dead_gradient(self) -> bool:
        """Whether the rewards differ although the reward's gradient is exactly 0 for every picture."""
        gradients = [e.reward_gradient for e in self.experiences]
        rewards = torch.cat([e.rewards for e in self.experiences])
        return all(g is not None and not g.any() for g in gradients) and len(rewards[~torch.isnan(rewards)].unique()) > 1


class Workbench:
    """Computes updates as the training would, for any plan. Made by `untouched`.

    Advantages are leave-one-out for all plans (or none, where the config says none): then each estimates the same gradient, which
    normalized advantages would divide by the standard deviation of the rewards.

    Attributes:
        plan: the configured one.
        num_steps, stds: of the chain; T standard deviations.
        batch_size, num_batches: samples of one sampling batch, and sampling batches per update.
        group_size: samples per prompt.
        recompute: "recursive" or "graph", see `Sweep`.
        reader: of gradients.
        factor: by which `backward` multiplies gradients.
        quiet: whether progress bars are switched off.
    """

    def __init__(self, subject: Subject, prompts: FunctionPrompts | DatasetPrompts) -> None:
        given, self.config = subject.config, measuring_config(subject.config)
        self.subject, self.plan = subject, subject.plan
        self.device: torch.device = subject.accelerator.device
        self.num_steps: int = subject.schedule.num_steps
        self.stds: tuple[float, ...] = subject.schedule.stds
        self.batch_size: int = self.config.sample_batch_size
        self.num_batches: int = self.config.sample_num_batches_per_epoch
        self.group_size: int = given.num_images_per_prompt
        self.recompute: str = given.recompute
        self.quiet: bool = given.disable_tqdm
        self.reader = GradientReader(subject.parameters)
        self.factor = FP16_LOSS_SCALE if given.fp16 else 1.0
        self._prompts = prompts
        self._rows: tuple[int, list[PromptRow]] = (-1, [])

    @property
    def samples_per_update(self) -> int:
        return self.batch_size * self.num_batches

    @property
    def queries(self) -> int:
        """Pictures that the reward has been asked about so far."""
        return self.subject.rewards.queries

    @property
    def configured_options(self) -> dict[str, Any]:
        """The estimator options that the config sets; what it leaves to a choice ("auto") as the plan has it."""
        config = self.subject.config
        given = {name: getattr(config, name) for name in PLAN_OPTIONS if getattr(config, name) is not None}
        chosen = {name: getattr(self.plan, name) if value == "auto" else value for name, value in given.items()}
        return {"estimator": config.estimator} | chosen

    def settings(self) -> dict[str, Any]:
        """What is measured, on what."""
        given = self.subject.config
        return {
            "num_steps": self.num_steps,
            "samples_per_update": self.samples_per_update,
            "sample_batch_size": self.batch_size,
            "guidance_scale": given.sample_guidance_scale,
            "eta": given.sample_eta,
            "advantage": self.config.advantage,
            "configured_advantage": given.advantage_name,
            "recompute": self.recompute,
            "num_parameters": self.reader.num_entries,
            "sketched_to": self.reader.size if self.reader.sketched else None,
            "weights": f"at update {self.subject.updates}",
            "seed": given.seed,
            "device": torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else f"{platform.machine()} CPU",
            "threads": torch.get_num_threads(),
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
        own = self.subject.control_scale
        return copy.deepcopy(own) if own is not None and plan == self.plan else ControlVariateScale(self.num_steps)

    def collect(self, number: int, plan: EstimatorPlan) -> Batch:
        """Samples and scores batch `number`, as `plan` needs it."""
        if self._rows[0] != number:
            self._rows = (number, self._prompts.take(self.samples_per_update // self.group_size))
        subject, rows = self.subject, self._rows[1]
        same_rows: Any = types.SimpleNamespace(take=lambda count: rows[:count])  # however often the batch is sampled
        collector = Collector(
            config=self.config,
            plan=plan,
            adapter=subject.adapter,
            schedule=subject.schedule,
            rewards=subject.rewards,
            prompts=same_rows,
            make_chain=lambda conditioning: subject.make_chain(subject.model, conditioning),
            accelerator=subject.accelerator,
        )
        experiences, summary = collector.collect(number)
        return Batch(
            number=number,
            plan=plan,
            experiences=experiences,
            zeroth_advantages=collector.zeroth_order_advantages(experiences) if plan.uses_zeroth_order else [],
            share=1.0 / (self.samples_per_update * summary.valid_fraction),
            sample_seconds=summary.metrics["time/sample"],
            reward_seconds=summary.metrics["time/reward"],
        )

    def update(self, plan: EstimatorPlan, batch: Batch, control_scale: ControlVariateScale | None = None) -> tuple[Tensor, float]:
        """The update of `plan` on a batch: the gradient of the mean reward (ascending), and the seconds it took.

        Args:
            plan: may differ from the plan that sampled, unless it perturbs parameters.
            control_scale: fitted factors of the control variate, for plans with one; takes in the batch afterwards.

        Returns:
            Gradient [P] on the CPU, and the wall time of the backward sweep alone.
        """
        self.reader.clear()
        started = self.clock()
        for index in range(self.num_batches):
            self._sweep(plan, batch, index, self.recompute, control_scale)
        perturbed = self.reader.flatten(self._zeroth_order(batch, plan.rest_weight)) if plan.uses_zeroth_order else 0.0
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
        for index in range(self.num_batches):
            self._sweep(plan, batch, index, "recursive", scope=scope)
        return shares, self.clock() - started

    def zeroth_order_shares(self, batch: Batch) -> Tensor:
        """The share [T, P] of every step in the zeroth-order part of a batch that was sampled with perturbations."""
        steps = torch.eye(self.num_steps, dtype=torch.bool)
        return torch.stack([self.reader.flatten(self._zeroth_order(batch, 1.0, step)) for step in steps])

    def first(self, batch: Batch) -> tuple[DenoisingChain, Rollout, Callable[[Tensor, bool], Tensor]]:
        """Chain, rollout and reward of the first sampling batch; the reward takes latents, and whether to differentiate it."""
        experience = batch.experiences[0]
        return self._chain(experience), experience.rollout, lambda latents, graph: self._reward(latents, experience, graph)

    def _chain(self, experience: Experience) -> DenoisingChain:
        return self.subject.make_chain(self.subject.model, experience.conditioning)

    def _reward(self, latents: Tensor, experience: Experience, differentiable: bool) -> Tensor:
        """Rewards [B] of latents [B, ...], 0 where none applies."""
        images, rewards = self.subject.adapter.decode(latents), self.subject.rewards
        values = rewards(images, experience.prompts, experience.metadata, differentiable=differentiable).total
        return torch.where(torch.isnan(values), torch.zeros_like(values), values)

    def _sweep(
        self,
        plan: EstimatorPlan,
        batch: Batch,
        index: int,
        recompute: str,
        control_scale: ControlVariateScale | None = None,
        **options: Any,
    ) -> None:
        """Goes back along sampling batch `index`, and fits the control variate to it."""
        experience = batch.experiences[index]
        chain = self._chain(experience)
        params = chain.parameters()

        def backward(surrogate: Tensor) -> float:
            (surrogate * self.factor).backward()
            return self.factor

        critic = None
        if plan.uses_prediction:
            critic = prediction_critic(chain, params, lambda x: self._reward(x, experience, True), self.factor)
        draw = experience.draw if plan is batch.plan else self._draw(plan, batch.number, index).expand(len(experience))
        sweep = Sweep(
            chain,
            params,
            backward=backward,
            recompute=recompute,
            critic=critic,
            control_scale=control_scale if plan.uses_control_variate else None,
            mean_density=True,
            **options,
        )
        result = sweep.run(experience.rollout, draw, self._feedback(plan, batch.share, experience))
        if control_scale is not None:
            for step, values in result.critic_values.items():
                control_scale.update(step, experience.rewards, values)

    def _draw(self, plan: EstimatorPlan, number: int, index: int) -> Any:
        """The plan's choices for a sampling batch, from the stream that the collector uses."""
        starts, probabilities = self.subject.starts, None
        if plan.ho_start == "grad_norm" and plan == self.plan and starts is not None:
            probabilities = starts.probabilities()
        generator = seeded_generator(self.config.seed, CHOICES, number, index)
        return plan.draw(self.batch_size, generator, shared=True, start_probabilities=probabilities)

    def _feedback(self, plan: EstimatorPlan, share: float, experience: Experience) -> Feedback:
        assert experience.advantage is not None and experience.scale is not None
        scale, gradient = experience.scale * share, experience.reward_gradient
        if gradient is not None:
            gradient = plan.fo_weight * gradient * scale.reshape(-1, *[1] * (gradient.dim() - 1))
        blocks = experience.index // 2 if plan.uses_zeroth_order and plan.zo_antithetic else None
        return Feedback(advantage=experience.advantage * share, reward_gradient=gradient, scale=scale, blocks=blocks)

    def _zeroth_order(self, batch: Batch, weight: float, steps: Tensor | None = None) -> Mapping[str, Tensor]:
        """Zeroth-order part of a batch, or the share of some steps (bool [T]) in it."""
        total: dict[str, Tensor] = {}
        for experience, advantage in zip(batch.experiences, batch.zeroth_advantages, strict=True):
            assert experience.perturbations is not None
            mask = experience.draw.zeroth if steps is None else experience.draw.zeroth & steps
            advantage = advantage * (weight * batch.share)
            for name, term in zeroth_order(advantage, mask, experience.perturbations, self.subject.parameters).items():
                total[name] = total[name] + term if name in total else term.detach()
        return total


def measuring_config(config: Any) -> Any:
    """The config with the samples of one update per rollout, plain advantages, and randomness of its own."""
    measuring = copy.copy(config)
    micro, accumulated = config.per_device_train_batch_size, config.gradient_accumulation_steps
    update = micro * accumulated
    if update % config.num_images_per_prompt == 0:
        size = config.sample_batch_size
        size = min(size, update) if update % min(size, update) == 0 else micro
        measuring.sample_batch_size, measuring.sample_num_batches_per_epoch = size, update // size
    measuring.advantage = "none" if config.advantage_name == "none" else "leave_one_out"
    measuring.estimator, measuring.adv_clip_max = "rlr", None  # the ddpo preset brings a limit of its own
    measuring.seed = mix_seed(config.seed, DIAGNOSIS)
    return measuring
