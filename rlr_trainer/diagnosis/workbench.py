"""Computes updates of any plan on a trainer's own model, reward and prompts, and leaves the trainer as it was."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import random
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlr_trainer.estimators.chain import mix_seed, seeded_generator
from rlr_trainer.estimators.plan import EstimatorPlan
from rlr_trainer.estimators.prediction import FP16_LOSS_SCALE, ControlVariateScale, prediction_critic
from rlr_trainer.estimators.sweep import Feedback, Sweep
from rlr_trainer.estimators.zeroth_order import zeroth_order
from rlr_trainer.rollouts.batches import CHOICES, Experience
from rlr_trainer.rollouts.collector import Collector
from rlr_trainer.rollouts.prompts import FunctionPrompts, PromptRow
from rlr_trainer.training.config import RLRConfig

DIAGNOSIS = 1_000  # names the diagnosis's stream of randomness: its batches are none that the training will see
MAX_ENTRIES = 2**16  # gradients with more entries are sketched to this many (a power of two)


@contextlib.contextmanager
def untouched(trainer: Any) -> Iterator[Workbench]:
    """A workbench on the trainer. On leaving, everything is as it was, but for the number of reward queries and the cache of prompts.

    Restored: `.grad`, train/eval modes, the position in the prompts, torch's, numpy's and Python's random number generators, gradient
    checkpointing. Weights, start distribution, reward statistics and control variate are never touched. A prompt function that keeps
    its own position (one that draws without the global generators) is not called again for the prompts it gave: they wait for the
    training.

    Raises:
        ValueError: more than one process.
    """
    if trainer.accelerator.num_processes > 1:
        raise ValueError(
            f"a diagnosis runs in one process, but there are {trainer.accelerator.num_processes}: call it without accelerate launch"
        )
    model = trainer.model_wrapped if trainer.is_in_train else trainer.model
    params = trainer.policy.trainable_parameters()
    gradients = {name: p.grad for name, p in params.items()}
    modes = [(module, module.training) for module in model.modules()]
    prompts = _BorrowedPrompts(trainer.prompts)
    python_state, numpy_state = random.getstate(), _numpy_state()
    devices = list(range(torch.cuda.device_count())) if trainer.accelerator.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices=devices), _checkpointing(trainer), trainer.accelerator.autocast():
            model.eval()
            yield Workbench(trainer, model, prompts)
    finally:
        prompts.give_back()
        random.setstate(python_state)
        np.random.set_state(numpy_state)  # noqa: NPY002
        for name, p in params.items():
            p.grad = gradients[name]
        for module, training in modes:
            module.training = training


@contextlib.contextmanager
def _checkpointing(trainer: Any) -> Iterator[None]:
    """Trainer switches activation checkpointing on when training starts; memory and time should be those of the training."""
    denoiser = trainer.policy.denoiser
    switches = trainer.args.gradient_checkpointing and not getattr(denoiser, "is_gradient_checkpointing", True)
    if switches:
        denoiser.enable_gradient_checkpointing()
    try:
        yield
    finally:
        if switches:
            denoiser.disable_gradient_checkpointing()


class _BorrowedPrompts:
    """Prompts as the training would get them next, without moving its position."""

    def __init__(self, prompts: Any) -> None:
        self.prompts = prompts
        self.own = copy.copy(prompts)
        self.drawn: list[PromptRow] = []
        self.used_global_randomness = False
        if isinstance(prompts, FunctionPrompts):
            self.own._ahead = list(prompts._ahead)
            self.own._call = self._call  # an instance attribute: the copy's alone

    def _call(self) -> PromptRow:
        before = _random_states()
        row = self.prompts._call()
        self.used_global_randomness |= before != _random_states()
        self.drawn.append(row)
        return row

    def give_back(self) -> None:
        """A function that draws from the global generators will draw the same again, when these are restored; others would not."""
        if self.drawn and not self.used_global_randomness:
            self.prompts._ahead = [*self.prompts._ahead, *self.drawn]


def _random_states() -> tuple[Any, ...]:
    numpy_state = _numpy_state()
    words = numpy_state["state"]
    others = words["key"].tobytes(), words["pos"], numpy_state["has_gauss"], numpy_state["gauss"]
    return random.getstate(), others, torch.get_rng_state().numpy().tobytes()


def _numpy_state() -> Any:
    return np.random.get_state(legacy=False)  # noqa: NPY002  # users' prompt functions draw from it


class _TheseRows:
    """Prompts of one batch, as often as it is sampled."""

    def __init__(self, rows: list[PromptRow]) -> None:
        self.rows = rows

    def take(self, count: int) -> list[PromptRow]:
        return self.rows[:count]


@dataclasses.dataclass(frozen=True)
class Batch:
    """The rollouts of one update.

    Attributes:
        number: of the batch; fixes its prompts and its noise, for any plan.
        plan: that sampled; perturbations and reward gradients are there only if it needed them.
        experiences: one per sampling batch.
        zeroth_advantages: one [B] per experience, for the zeroth-order part; empty without one.
        valid: share of the samples that have a reward.
        sample_seconds, reward_seconds: wall time.
    """

    number: int
    plan: EstimatorPlan
    experiences: list[Experience]
    zeroth_advantages: list[Tensor]
    valid: float
    sample_seconds: float
    reward_seconds: float

    @property
    def num_samples(self) -> int:
        return sum(len(e) for e in self.experiences)

    @property
    def num_bytes(self) -> int:
        """Bytes of the stored rollouts and reward gradients."""
        total = 0
        for experience in self.experiences:
            rollout, gradient = experience.rollout, experience.reward_gradient
            stored = [*rollout.latents, *rollout.noises, *rollout.means, *rollout.stds, *([] if gradient is None else [gradient])]
            total += sum(tensor.untyped_storage().nbytes() for tensor in stored)
        return total


class Workbench:
    """Computes updates as the trainer would, for any plan. Made by `untouched`.

    Advantages are leave-one-out for all plans (or none, where the config says none): then each estimates the same gradient, which
    normalized advantages would divide by the standard deviation of the rewards.

    Args:
        trainer: an `RLRTrainer`.
        model: its policy, wrapped or not.
        prompts: see `_BorrowedPrompts`.
    """

    def __init__(self, trainer: Any, model: torch.nn.Module, prompts: _BorrowedPrompts) -> None:
        self.trainer, self.model = trainer, model
        self.device: torch.device = trainer.accelerator.device
        self.params: dict[str, Tensor] = trainer.policy.trainable_parameters()
        self.config = measuring_config(trainer.args)
        self.num_steps: int = trainer.schedule.num_steps
        self.stds: tuple[float, ...] = trainer.schedule.stds
        self.reader = GradientReader(self.params)
        self.factor = FP16_LOSS_SCALE if trainer.args.fp16 else 1.0
        self._prompts = prompts
        self._rows: tuple[int, list[PromptRow]] = (-1, [])

    @property
    def samples_per_update(self) -> int:
        return self.config.rollout_size

    def collect(self, number: int, plan: EstimatorPlan) -> Batch:
        """Samples and scores batch `number`, as `plan` needs it."""
        if self._rows[0] != number:
            self._rows = (number, self._prompts.own.take(self.samples_per_update // self.config.num_images_per_prompt))
        rows: Any = _TheseRows(self._rows[1])
        collector = Collector(
            config=self.config,
            plan=plan,
            adapter=self.trainer.adapter,
            schedule=self.trainer.schedule,
            rewards=self.trainer.rewards,
            prompts=rows,
            make_chain=lambda conditioning: self.trainer._make_chain(self.model, conditioning),
            accelerator=self.trainer.accelerator,
        )
        experiences, summary = collector.collect(number)
        advantages = collector.zeroth_order_advantages(experiences) if plan.uses_zeroth_order else []
        return Batch(
            number=number,
            plan=plan,
            experiences=experiences,
            zeroth_advantages=advantages,
            valid=summary.valid_fraction,
            sample_seconds=summary.metrics["time/sample"],
            reward_seconds=summary.metrics["time/reward"],
        )

    def update(
        self, plan: EstimatorPlan, batch: Batch, control_scale: ControlVariateScale | None = None, *, per_step: bool = False
    ) -> tuple[Tensor, float]:
        """The update of `plan` on a batch: the gradient of the mean reward (ascending), and the seconds it took.

        Args:
            plan: may differ from the plan that sampled, unless it perturbs parameters.
            control_scale: fitted factors of the control variate, for plans with one; takes in the batch afterwards.
            per_step: the share of every step instead of their sum (recursive mode, no zeroth order).

        Returns:
            Gradient [P] (per step: [T, P]) on the CPU, and the wall time of the backward sweep alone.
        """
        shares = torch.zeros(self.num_steps, self.reader.size) if per_step else None
        self.reader.clear()
        total = torch.zeros(self.reader.size)
        started = self.clock()
        for index, experience in enumerate(batch.experiences):
            draw = experience.draw
            if plan is not batch.plan:
                draw = self._draw(plan, batch.number, index).expand(len(experience))
            sweep = self._sweep(plan, experience, control_scale, shares)
            result = sweep.run(experience.rollout, draw, self._feedback(plan, batch, experience))
            for step, values in result.critic_values.items():
                if control_scale is not None:
                    control_scale.update(step, experience.rewards, values)
        seconds = self.clock() - started
        if plan.uses_zeroth_order:
            total += self.reader.flatten(self.zeroth_order_term(batch, 1.0 * plan.rest_weight))
            seconds = self.clock() - started
        if shares is not None:
            return shares, seconds
        return total + self.reader.read() / self.factor, seconds

    def zeroth_order_term(self, batch: Batch, weight: float = 1.0, step: int | None = None) -> dict[str, Tensor]:
        """Zeroth-order part of a batch that was sampled with perturbations, or one step's share of it."""
        total: dict[str, Tensor] = {}
        for experience, advantage in zip(batch.experiences, batch.zeroth_advantages, strict=True):
            assert experience.perturbations is not None
            mask = experience.draw.zeroth
            if step is not None:
                mask = mask & (torch.arange(self.num_steps) == step)
            share = weight / (batch.num_samples * batch.valid)
            for name, term in zeroth_order(advantage * share, mask, experience.perturbations, self.params).items():
                total[name] = total[name] + term if name in total else term.detach()
        return total

    def reward(self, latents: Tensor, experience: Experience, *, differentiable: bool) -> Tensor:
        """Rewards [B] of latents [B, ...], 0 where none applies."""
        images = self.trainer.adapter.decode(latents)
        values = self.trainer.rewards(images, experience.prompts, experience.metadata, differentiable=differentiable).total
        return torch.where(torch.isnan(values), torch.zeros_like(values), values)

    def chain(self, experience: Experience) -> Any:
        """The chain of a sampling batch."""
        return self.trainer._make_chain(self.model, experience.conditioning)

    def clock(self) -> float:
        """Seconds, after the device has done what it was told."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def _draw(self, plan: EstimatorPlan, number: int, index: int) -> Any:
        """The plan's choices for a sampling batch, from the stream that the collector uses."""
        generator = seeded_generator(self.config.seed, CHOICES, number, index)
        starts = None
        if plan.ho_start == "grad_norm" and plan == self.trainer.plan and self.trainer.starts is not None:
            starts = self.trainer.starts.probabilities()
        return plan.draw(self.config.sample_batch_size, generator, shared=True, start_probabilities=starts)

    def _feedback(self, plan: EstimatorPlan, batch: Batch, experience: Experience) -> Feedback:
        assert experience.advantage is not None and experience.scale is not None
        share = 1.0 / (batch.num_samples * batch.valid)
        scale = experience.scale * share
        gradient = experience.reward_gradient
        if gradient is not None:
            gradient = plan.fo_weight * gradient * scale.reshape(-1, *[1] * (gradient.dim() - 1))
        blocks = experience.index // 2 if plan.uses_zeroth_order and plan.zo_antithetic else None
        return Feedback(advantage=experience.advantage * share, reward_gradient=gradient, scale=scale, blocks=blocks)

    def _sweep(
        self,
        plan: EstimatorPlan,
        experience: Experience,
        control_scale: ControlVariateScale | None,
        shares: Tensor | None,
    ) -> Sweep:
        chain = self.chain(experience)
        params = chain.parameters()

        @contextlib.contextmanager
        def scope(steps: list[int], is_last: bool) -> Iterator[None]:
            yield
            if shares is not None:
                shares[steps[0]] += self.reader.read() / self.factor
                self.reader.clear()

        def backward(surrogate: Tensor) -> float:
            (surrogate * self.factor).backward()
            return self.factor

        critic: Callable[..., Any] | None = None
        if plan.uses_prediction:
            critic = prediction_critic(chain, params, lambda x: self.reward(x, experience, differentiable=True), self.factor)
        return Sweep(
            chain,
            params,
            backward=backward,
            scope=scope,
            recompute="recursive" if shares is not None else self.trainer.args.recompute,
            critic=critic,
            control_scale=control_scale if plan.uses_control_variate else None,
            mean_density=True,
        )


def measuring_config(config: RLRConfig) -> RLRConfig:
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


class GradientReader:
    """Reads the gradients of all parameters as one vector, float32 on the CPU.

    Above `max_entries` entries the vector is a count sketch: entry i is added with a random sign to a random one of `max_entries` places.
    Inner products keep their expectation; that of two gradients a, b gets a relative error of about |a||b| / sqrt(max_entries), and
    since the sketch is the same for all gradients, squared norms of means are right within sqrt(2 / max_entries), 0.6 %.
    Source: Charikar, Chen, Farach-Colton, "Finding frequent items in data streams", 2002.

    Args:
        params: name -> parameter.
        max_entries: a power of two.
    """

    def __init__(self, params: Mapping[str, Tensor], max_entries: int = MAX_ENTRIES) -> None:
        self.params = params
        self.num_entries = sum(p.numel() for p in params.values())
        self.sketched = self.num_entries > max_entries
        self.size = max_entries if self.sketched else self.num_entries

    def clear(self) -> None:
        """Removes the gradients."""
        for p in self.params.values():
            p.grad = None

    def read(self) -> Tensor:
        """The accumulated gradients, [size]; zeros where there are none."""
        return self.flatten({name: p.grad for name, p in self.params.items() if p.grad is not None})

    def flatten(self, gradients: Mapping[str, Tensor]) -> Tensor:
        """Tensors by parameter name as one vector, [size]; zeros for names that are missing."""
        if not self.sketched:
            parts = [gradients.get(name, torch.zeros_like(p)).detach().float().flatten() for name, p in self.params.items()]
            return torch.cat(parts).cpu()
        device = next(iter(self.params.values())).device
        sketch, first = torch.zeros(self.size, device=device), 0
        for name, p in self.params.items():
            if name in gradients:
                place, sign = _hash(torch.arange(first, first + p.numel(), device=device), self.size)
                sketch.index_add_(0, place, sign * gradients[name].detach().float().flatten())
            first += p.numel()
        return sketch.cpu()


def _hash(index: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """A pseudo-random place below `size` (a power of two) and a sign for every index, by two rounds of multiply and shift."""
    value = (index + 1) * 0x1E3779B97F4A7C15
    for multiplier in (0x3F58476D1CE4E5B9, 0x14D049BB133111EB):
        value = (value ^ ((value >> 31) & 0x1FFFFFFFF)) * multiplier
    value = value ^ ((value >> 29) & 0x7FFFFFFFF)
    return value & (size - 1), 1.0 - 2.0 * ((value >> 40) & 1).float()
