"""What an update of a run will take: memory by part, calls of its network, floating-point operations; and settings that fit a memory.

Nothing is sampled, trained or timed. Networks are followed as shapes (`Twin`), the plan says how often (`network_calls`), and the peak is that
of the phase that needs most: encoding prompts, sampling, reward, backward pass, optimizer. What is not in it: most workspace inside operations,
fragmentation, and on CUDA the context, about half a gigabyte.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rlr_trainer.diagnosis.memory import measuring_memory
from rlr_trainer.diagnosis.network_calls import NetworkCalls, network_calls, stored_latents
from rlr_trainer.diagnosis.shapes import META, counting, weight_bytes
from rlr_trainer.diagnosis.sizes import BATCHES, Sizes, candidates
from rlr_trainer.diagnosis.twin import Cost, Twin, shortened, typical_draw
from rlr_trainer.estimators.plan_state import PlanState
from rlr_trainer.pipelines.conditioning import CACHE_BYTES
from rlr_trainer.pipelines.reference import ReferencePolicy
from rlr_trainer.pipelines.skeleton import returns_zeros

FLOAT = 4  # bytes
SHARE = 0.9  # of a memory that the estimate may fill; the rest is for what it does not see


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes of one process.

    Attributes:
        parts: name -> bytes, of what is there throughout an update.
        phases: name -> bytes at the peak of a phase, beyond the parts.
    """

    parts: dict[str, int]
    phases: dict[str, int]

    @property
    def peak(self) -> int:
        """The most that is there at any time."""
        return sum(self.parts.values()) + max(self.phases.values())

    @property
    def largest(self) -> str:
        """The phase of the peak."""
        return max(self.phases, key=lambda name: self.phases[name])


@dataclasses.dataclass(frozen=True)
class Estimate:
    """See the module's docstring.

    Attributes:
        memory: of the settings as they are.
        calls: of network and decoder, per sample and update.
        flops: of an update of one process, without the reward's network: name -> operations.
        samples: of an update, per process.
        notes: what is not in the figures.
        proposal: option -> value, where the settings as they are do not fit; empty where they do, None where nothing was found.
        proposed: the memory with the proposal.
    """

    memory: Memory
    calls: NetworkCalls
    flops: dict[str, float]
    samples: int
    notes: list[str]
    proposal: dict[str, Any] | None = None
    proposed: Memory | None = None


def estimate(trainer: Any, *, memory_gb: float | None = None, on_cpu: bool | None = None, half_precision: bool = False) -> Estimate:
    """Estimates what an update of an `RLRTrainer` takes, of one process without sharding. The reward is called once, on noise.

    Args:
        memory_gb: of the device, in GB (10^9 bytes); asks for settings that fit it.
        on_cpu: whether the run is on a CPU; None: as the trainer is.
        half_precision: whether the run is in fp16, estimated from a trainer in bf16: the decoder stays in float32.

    Raises:
        ValueError: a network that cannot be followed without its values.
    """
    return estimates(trainer, [memory_gb], on_cpu=on_cpu, half_precision=half_precision)[0]


def estimates(
    trainer: Any, memories_gb: Sequence[float | None], *, on_cpu: bool | None = None, half_precision: bool = False
) -> list[Estimate]:
    """`estimate` for several memories. What they have in common is followed once."""
    for memory_gb in memories_gb:
        if memory_gb is not None and not memory_gb > 0:
            raise ValueError(f"memory={memory_gb}: must be a positive number of GB")
    config = trainer.args
    precision = torch.bfloat16 if config.bf16 else torch.float16 if config.fp16 else None
    on_cpu = trainer.accelerator.device.type == "cpu" if on_cpu is None else on_cpu
    try:
        work = _Work(trainer, Twin(trainer, precision, on_cpu, half_precision), on_cpu)
        sizes = Sizes.of(config)
        memory, flops = work.memory(sizes), work.flops(sizes)
        found: list[tuple[dict[str, Any] | None, Memory | None]]
        found = [({}, memory) if gb is None else _proposal(work, sizes, memory, SHARE * gb * 1e9) for gb in memories_gb]
    except (NotImplementedError, RuntimeError) as error:  # a network that looks at values: meta tensors have none
        raise ValueError(
            f"{type(trainer.parts.adapter.pipeline).__name__} cannot be followed on shapes alone ({' '.join(str(error).split())[:200]}); "
            "measure a run of one update instead: max_steps=1"
        ) from error
    return [Estimate(memory, work.calls, flops, work.samples, work.notes, *proposal) for proposal in found]


class _Work:
    """Measures pieces of an update, each once, and adds them up for any settings."""

    def __init__(self, trainer: Any, twin: Twin, on_cpu: bool) -> None:
        self.trainer, self.twin, self.config, self.on_cpu = trainer, twin, trainer.args, on_cpu
        self.plan, self.stds = twin.plan, twin.sampler.schedule.stds
        config = self.config
        self.samples = config.per_device_train_batch_size * config.gradient_accumulation_steps
        self.calls = network_calls(self.plan, self.stds, kl_coef=config.kl_coef, passes=config.num_inner_epochs)
        self.notes: list[str] = []
        if any(map(returns_zeros, trainer.parts.adapter.frozen_modules)):
            self.notes.append("what text encoders take beside their weights while they work: it is known of a loaded model alone")
        self.penalized = bool(config.kl_coef)
        self.trained = sum(p.nbytes for p in twin.trained)
        self._costs: dict[Any, Cost] = {}
        self.reward_weights, self.reward_bytes = self._reward()
        self.state_bytes, self.step_bytes = _optimizer_bytes(trainer, twin.trained, on_cpu)
        self.updater, self.reference_bytes = self._updater()

    def memory(self, sizes: Sizes) -> Memory:
        """By part and phase."""
        parts, trained = self._parts(sizes), self.trained
        picture = FLOAT * self._picture_numbers()
        latent = FLOAT * self.twin.latents(1).numel()
        pictures = sizes.samples * picture
        held = self._held(sizes)
        copies = latent * stored_latents(self.plan) * sizes.per_device_train_batch_size
        copies = 0 if sizes.per_device_train_batch_size == sizes.sample_batch_size and not sizes.offload_rollouts else copies
        reward = self._reward_phase(sizes.reward_batch_size)
        zeroth = trained if self.plan.uses_zeroth_order else 0
        phases = {
            "encoding prompts": self._encoding(sizes),
            "sampling": self._sampling(sizes.sample_batch_size) + zeroth + held + pictures - sizes.sample_batch_size * picture,
            "decoder and reward": reward + held + pictures + sizes.sample_batch_size * picture,
            "backward pass": self._backward(sizes, held) + copies,
            "optimizer": trained + self.step_bytes,
        }
        if self.plan.uses_control_variate:
            size = sizes.per_device_train_batch_size
            phases["predictions"] = held + pictures + self._step(sizes, size).held + self._reward_phase(size)
        if sizes.offload_rollouts:  # the chain of the batch that is being sampled
            for name in ("sampling", "decoder and reward"):
                phases[name] += sizes.sample_batch_size * latent * stored_latents(self.plan)
        return Memory(parts, phases)

    def bound(self, sizes: Sizes, above: Sizes, needed: Memory) -> int:
        """Bytes that these settings need at least, without following them: half the batch needs half as much beyond the parts, or more."""
        alike = dataclasses.replace(above, **{name: getattr(sizes, name) for name in BATCHES}) == sizes
        shrinks = sizes.per_device_train_batch_size / above.per_device_train_batch_size
        if not alike or shrinks > 1:
            return 0
        return int(sum(self._parts(sizes).values()) + shrinks * max(needed.phases.values()))

    def flops(self, sizes: Sizes) -> dict[str, float]:
        """Of an update of one process."""
        size, calls = sizes.per_device_train_batch_size, self.calls
        step, decoding = self._step(sizes, size), self._decoding(sizes.reward_batch_size)
        forward, backward = step.flops_forward / size, (step.flops - step.flops_forward) / size
        network = (calls.plain + calls.graph) * forward + calls.backward * backward
        once, back = (n / sizes.reward_batch_size for n in (decoding.flops_forward, decoding.flops - decoding.flops_forward))
        return {
            "network": network * self.samples,
            "decoder": (calls.decodings * once + calls.decoder_backward * back) * self.samples,
        }

    def _parts(self, sizes: Sizes) -> dict[str, int]:
        parts, config, trained = self.trainer.parts, self.config, self.trained
        network = weight_bytes(self.twin.policy)
        copies = (config.ema_decay is not None) + (parts.old_policy is not None)
        encoders = 0 if sizes.offload_text_encoders else weight_bytes(*parts.adapter.frozen_modules)
        latent = FLOAT * self.twin.latents(1).numel()
        chains = 0 if sizes.offload_rollouts else sizes.samples * latent * stored_latents(self.plan)
        prompts = sizes.samples * self.twin.conditioning_bytes
        found = {
            "network": network - trained,
            "trained weights": trained,
            "copies of the network": copies * trained + self.reference_bytes,
            "text encoders": encoders,
            "decoder": weight_bytes(self.twin.adapter.decoder),
            "reward": self.reward_weights,
            "optimizer": self.state_bytes,
            "stored chains": chains,
            "encoded prompts": prompts + min(prompts, CACHE_BYTES),
        }
        return {name: value for name, value in found.items() if value}

    def _picture_numbers(self) -> int:
        layout = self.twin.layout
        return 3 * layout.height * layout.width * (layout.num_frames or 1)

    def _encoding(self, sizes: Sizes) -> int:
        """Of the prompts of a sampling batch, by encoders that come to the device for it where they wait on the CPU."""
        count = -(-sizes.sample_batch_size // (self.config.num_images_per_prompt or 1))
        waiting = weight_bytes(*self.trainer.parts.adapter.frozen_modules) if sizes.offload_text_encoders else 0
        return waiting + self._once(("encoding", count), lambda: Cost(self.twin.encoding_bytes(count))).peak

    def _sampling(self, size: int) -> int:
        return self._once(("sampling", size), lambda: self.twin.sampling_step(size)).peak

    def _step(self, sizes: Sizes, size: int) -> Cost:
        def measure() -> Cost:
            self.twin.checkpoint(sizes.gradient_checkpointing)
            return self.twin.differentiated_step(size, through_input=self.plan.fo_range[1] > 1 or self.plan.ho_length > 1)

        return self._once(("step", size, sizes.gradient_checkpointing), measure)

    def _decoding(self, size: int) -> Cost:
        differentiable = self.plan.needs_differentiable_reward
        return self._once(("decoding", size), lambda: self.twin.decoding(size, differentiable))

    def _reward_phase(self, size: int) -> int:
        decoding = self._decoding(size)
        return max(decoding.peak, decoding.held + size * self.reward_bytes)

    def _held(self, sizes: Sizes) -> int:
        """Graphs that stay from sampling."""
        if sizes.recompute != "keep":
            return 0
        visited = self.calls.backward
        return int(visited * sizes.sample_num_batches_per_epoch * self._step(sizes, sizes.sample_batch_size).held)

    def _backward(self, sizes: Sizes, held: int) -> int:
        size, graph = sizes.per_device_train_batch_size, sizes.recompute == "graph"
        draw, longest, cut = typical_draw(self.plan, graph)

        def measure(one: Any) -> Cost:
            self.twin.checkpoint(sizes.gradient_checkpointing)
            self.updater.options = dataclasses.replace(self.updater.options, recompute="graph" if graph else "recursive")
            return self.twin.sweep(self.updater, size, one, self.penalized)

        key = ("sweep", size, sizes.gradient_checkpointing, graph)
        peak = self._once(key, lambda: measure(draw)).peak if draw_visits(draw, self.plan) else 0
        if graph and longest > cut:  # every further step adds as much as the last one did
            shorter = self._once((*key, "shorter"), lambda: measure(shortened(draw))).peak
            peak += (longest - cut) * (peak - shorter)
        if self.plan.rest_estimator == "prediction":
            peak += size * self.reward_bytes  # the sweep was measured with a reward that takes nothing
        if held:
            peak += held - self._step(sizes, size).held
        return peak

    def _once(self, key: Any, measure: Any) -> Cost:
        if key not in self._costs:
            self._costs[key] = measure()
        return self._costs[key]

    def _updater(self) -> tuple[Any, int]:
        """The trainer's own kind of updater, on the twin's networks; and the bytes of a reference network of its own."""
        parts, config, twin = self.trainer.parts, self.config, self.twin
        reference = None
        if parts.reference is not None:
            frozen = next((p.dtype for p in parts.reference.copy.parameters()), None) if parts.reference.copy else None
            reference = ReferencePolicy(
                twin.policy,
                parts.use_lora,
                META,
                frozen or torch.float32,
                contextlib.nullcontext,
                bool(config.gradient_checkpointing),
            )
        old = None
        if parts.old_policy is not None:
            old = type(parts.old_policy)(twin.policy, parts.old_policy.decay, lambda: False)
        kind = type(parts.updater)
        updater = kind(twin.sampler, twin.scorer, PlanState(self.plan), parts.processes, parts.updater.options, reference, old)
        return updater, 0 if reference is None or reference.copy is None else weight_bytes(reference.copy)

    def _reward(self) -> tuple[int, int]:
        """Bytes of the rewards' networks, and of one picture's graph through them: measured, on noise."""
        rewards = self.trainer.parts.rewards
        modules = [module for function in rewards.functions for module in modules_of(function)]
        weights = weight_bytes(*modules)
        if not self.plan.needs_differentiable_reward:
            self.notes.append("the reward's own memory while it scores: only its weights are counted")
            return weights, 0
        count = rewards.group_size if rewards.needs_groups else 1
        layout, device = self.twin.layout, self.trainer.accelerator.device
        frames = () if layout.num_frames is None else (layout.num_frames,)
        noise = torch.rand(count, *frames, 3, layout.height, layout.width, generator=torch.Generator().manual_seed(0)).to(device)
        prompt, queries = self._first_row(), rewards.queries
        try:
            with measuring_memory(device) as meter:
                pictures = noise.requires_grad_(True)
                result = rewards(
                    pictures, (prompt.prompt,) * count, (prompt.metadata,) * count, differentiable=True, where="the estimate"
                )
                (gradient,) = torch.autograd.grad(result.total.sum(), pictures)
                del gradient
                return weights, meter.peak() // count
        except Exception as error:  # a reward of one's own may raise anything; the trainer says so better
            self.notes.append(f"the reward's graph: it could not be tried ({type(error).__name__}: {str(error)[:120]})")
            return weights, 0
        finally:
            rewards.queries = queries

    def _first_row(self) -> Any:
        with self.trainer.parts.prompts.borrowed() as prompts:
            return prompts.peek(1)[0]


def draw_visits(draw: Any, plan: Any) -> bool:
    """Whether anything is differentiated."""
    return bool(draw.active_steps()) or plan.forward is not None


def modules_of(function: Any) -> list[nn.Module]:
    """The networks that a reward holds: itself, an attribute, or a variable of its closure."""
    if isinstance(function, nn.Module):
        return [function]
    cells = [cell.cell_contents for cell in getattr(function, "__closure__", None) or ()]
    values = [*cells, *vars(function).values()] if hasattr(function, "__dict__") else cells
    return [value for value in values if isinstance(value, nn.Module)]


def _optimizer_bytes(trainer: Any, trained: list[nn.Parameter], on_cpu: bool) -> tuple[int, int]:
    """Bytes of the optimizer's state, and what a step makes for a moment: of the configured optimizer, on shapes."""
    kind, options = type(trainer).get_optimizer_cls_and_kwargs(trainer.args)
    if "foreach" in inspect.signature(kind).parameters and "foreach" not in options and not options.get("fused"):
        options = options | {"foreach": not on_cpu}
    gradients = [torch.empty_like(p) for p in trained]
    for parameter, gradient in zip(trained, gradients, strict=True):
        parameter.grad = gradient
    try:
        optimizer = kind(trained, **options)
        with counting():
            optimizer.step()
        state = sum(v.nbytes for one in optimizer.state.values() for v in one.values() if isinstance(v, Tensor))
        with counting() as meter:
            optimizer.step()
        return state, meter.peak
    except Exception:  # kernels of its own, which know no shapes: two moments, as Adam has
        return 2 * sum(p.nbytes for p in trained), 0
    finally:
        for parameter in trained:
            parameter.grad = None


def _proposal(work: _Work, sizes: Sizes, memory: Memory, limit: float) -> tuple[dict[str, Any] | None, Memory | None]:
    if memory.peak <= limit:
        return {}, memory
    tried = list(candidates(sizes))
    least = work.memory(tried[-1])
    if least.peak > limit:  # the others need more, and each takes seconds to follow
        return None, least
    above, needed = tried[-1], least
    for candidate in tried:
        if work.bound(candidate, above, needed) > limit:
            continue
        above, needed = candidate, work.memory(candidate)
        if needed.peak <= limit:
            break
    fields = dataclasses.asdict(candidate)
    return {name: value for name, value in fields.items() if value != getattr(sizes, name)}, needed
