"""A run's networks as shapes, and what single pieces of an update take with them: bytes at the peak, bytes held, operations."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from rlr_trainer.diagnosis.memory import LiveStorages
from rlr_trainer.diagnosis.shapes import META, FusedAttention, counting, tensors_of
from rlr_trainer.estimators.chain import Rollout, seeded_generator
from rlr_trainer.estimators.plan import EstimatorPlan
from rlr_trainer.estimators.plan_draw import PlanDraw
from rlr_trainer.estimators.prediction import ControlVariate
from rlr_trainer.pipelines import Policy
from rlr_trainer.rollouts.batches import ScoredBatch
from rlr_trainer.rollouts.prompts import PromptRow
from rlr_trainer.rollouts.sampler import Sampler
from rlr_trainer.rollouts.scorer import Scorer


@dataclasses.dataclass(frozen=True)
class Cost:
    """Of one piece of work.

    Attributes:
        peak: bytes of what it makes, at their most.
        held: bytes of what is left of it at its middle: of a forward pass with a graph, before the backward pass.
        flops: floating-point operations of all of it.
        flops_forward: of the part before the middle.
    """

    peak: int
    held: int = 0
    flops: int = 0
    flops_forward: int = 0


class Twin:
    """The networks of a run on the meta device, with the run's own adapter, sampler and estimators.

    Args:
        trainer: an `RLRTrainer`; nothing of it is changed.
        precision: of the network's forward passes, where autocast gives them another than float32.
        on_cpu: whether the run is on a CPU, whose autocast leaves norms in the lower precision and whose convolutions take workspace.
        float32_decoder: whether the decoder stays in float32, as with fp16.
    """

    def __init__(self, trainer: Any, precision: torch.dtype | None, on_cpu: bool, float32_decoder: bool = False) -> None:
        parts = trainer.parts
        self.trainer, self.plan, self.layout, self.on_cpu = trainer, parts.plan, parts.layout, on_cpu
        memo = _weights_on_meta(parts.policy, parts.adapter.decoder)
        self.policy: Policy = copy.deepcopy(parts.policy, memo)
        _Precision(precision, on_cpu).attach(self.policy)
        decoder = copy.deepcopy(parts.adapter.decoder, memo)
        _Precision(None, on_cpu).attach(decoder)  # it may be checkpointed, too
        if float32_decoder:
            decoder.float()
        self.adapter = _replaced(parts.adapter, memo)
        self.adapter.pipeline = _replaced(parts.adapter.pipeline, memo)
        self.sampler: Sampler = dataclasses.replace(parts.sampler.apart(), adapter=self.adapter, policy=self.policy, device=META)
        self.scorer = Scorer(self.adapter, self.layout, _Brightness())  # type: ignore[arg-type]
        with parts.prompts.borrowed() as prompts, torch.no_grad(), LiveStorages() as storages:
            self._conditioning = parts.sampler.apart().condition(prompts.peek(1)).to(META)
        self._encoding_bytes = storages.peak

    @property
    def trained(self) -> list[nn.Parameter]:
        """The trained parameters."""
        return list(self.policy.trainable_parameters().values())

    @property
    def guided(self) -> bool:
        """Whether each call has two rows per sample."""
        scale = self._conditioning.at(0)
        return scale.negative is not None

    @property
    def conditioning_bytes(self) -> int:
        """Of one sample."""
        scale = self._conditioning.at(0)
        rows = [*scale.positive.values(), *(scale.negative or {}).values()]
        return sum(t.nbytes for t in rows if isinstance(t, Tensor)) * (1 + len(self.sampler.first_steps))

    def encoding_bytes(self, count: int) -> int:
        """At the peak of encoding the run's next `count` prompts: those of one, measured, times the different texts among them."""
        with self.trainer.parts.prompts.borrowed() as prompts:
            rows = prompts.peek(count)
        return self._encoding_bytes * self._texts(rows) // self._texts(rows[:1])

    def _texts(self, rows: Sequence[PromptRow]) -> int:
        """Encoded in one call; negative ones are, too, unless they are encoded in another way."""
        texts = {row.prompt for row in rows}
        if self.guided and not self.adapter.negatives_apart:
            usual = self.sampler.negative_prompt
            texts |= {usual if row.negative_prompt is None else row.negative_prompt for row in rows}
        return len(texts)

    def latents(self, count: int) -> Tensor:
        """Of `count` samples, float32."""
        return torch.empty(count, *self.layout.shape, device=META)

    def checkpoint(self, enabled: bool) -> None:
        """Turns activation checkpointing on or off."""
        if enabled:
            self.policy.gradient_checkpointing_enable()
        elif getattr(self.policy.denoiser, "is_gradient_checkpointing", False):
            self.policy.denoiser.disable_gradient_checkpointing()

    def chain(self, count: int) -> Any:
        """The chain of `count` samples of the first prompt."""
        rows = torch.zeros(count, dtype=torch.long)
        return self.sampler.chain(self.policy, self._conditioning.select(rows))

    def sampling_step(self, count: int) -> Cost:
        """One step without a graph."""
        chain, x = self.chain(count), self.latents(count)
        with torch.no_grad(), counting(self.on_cpu) as meter:
            kept = chain.transition(0, x, chain.parameters())
        del kept
        return Cost(meter.peak, 0, meter.flops, meter.flops)

    def differentiated_step(self, count: int, through_input: bool) -> Cost:
        """One step, forward and backward, without the gradients that it leaves."""
        chain, x = self.chain(count), self.latents(count).requires_grad_(through_input)
        self._clear()
        with counting(self.on_cpu) as meter:
            mean, _ = chain.transition(0, x, chain.parameters())
            held, forward = meter.live(), meter.flops
            mean.sum().backward()
        self._clear()
        return Cost(meter.peak, held, meter.flops, forward)

    def decoding(self, count: int, differentiable: bool) -> Cost:
        """Decoding of `count` samples; forward and backward where the reward's gradient is needed."""
        x = self.latents(count).requires_grad_(differentiable)
        with torch.set_grad_enabled(differentiable), counting(self.on_cpu) as meter:
            pictures = self.scorer.decode(x)
            held, forward = meter.live(), meter.flops
            if differentiable:
                torch.autograd.grad(pictures.mean(), x)
        return Cost(meter.peak, held, meter.flops, forward)

    def sweep(self, updater: Any, count: int, draw: PlanDraw, penalized: bool) -> Cost:
        """An update's backward pass over the steps of `draw`, on `count` samples, by an updater of this twin: its gradients are in the peak."""
        batch = self._batch(count, draw, penalized)
        self._clear()

        def backward(surrogate: Tensor, ends_update: bool) -> float:
            (-surrogate).backward()
            return -1.0

        with counting(self.on_cpu) as meter:
            updater.accumulate(self.policy, batch, backward, -1.0)
            meter_peak, flops = meter.peak, meter.flops
            del batch
        updater.reset()
        self._clear()
        return Cost(meter_peak, 0, flops)

    def _clear(self) -> None:
        for parameter in self.policy.parameters():
            parameter.grad = None

    def _batch(self, count: int, draw: PlanDraw, penalized: bool) -> ScoredBatch:
        """Samples as a rollout leaves them, all of the same few tensors."""
        x, steps, ones = self.latents(count), self.plan.num_steps, torch.ones(count, device=META)
        schedule = self.sampler.schedule
        visited = draw.active_steps()
        # steps that are not visited here seem to have no noise, so that a penalty does not visit them
        stds = tuple(torch.tensor(schedule.stds[step] if step in visited else 0.0) for step in range(steps))
        rollout = Rollout((x,) * (steps + 1), (x,) * steps, (x,) * steps, stds)
        forward, control = self.plan.forward is not None, None
        if self.plan.uses_control_variate:
            control = ControlVariate(torch.zeros(count, steps, device=META), dict.fromkeys(draw.scored_steps(), x))
        return ScoredBatch(
            rollout=rollout.sample_alone() if forward else rollout,
            schedule=schedule,
            draw=draw.expand(count),
            conditioning=self._conditioning.select(torch.zeros(count, dtype=torch.long)),
            prompts=("",) * count,
            metadata=({},) * count,
            index=torch.arange(count),
            noise_seeds=torch.arange(count) if forward else None,
            rewards=torch.ones(count),
            advantage=ones,
            scale=ones,
            reward_gradient=x if self.plan.needs_differentiable_reward else None,
            divergence_to_go=torch.zeros(count, steps, device=META) if penalized else None,
            control=control,
        )


def typical_draw(plan: EstimatorPlan, graph: bool, seed: int = 0) -> tuple[PlanDraw, int, int]:
    """A draw of the plan cut down to the steps that take most, the length of its longest block of one graph, and that of the cut one.

    With recursion memory is that of one step: two neighbours are left where the adjoint goes from one to the other, and one step of every
    other kind. With `graph` the last steps of the longest block are left, three at most.
    """
    generator = seeded_generator(seed)
    draws = [plan.draw(1, generator, shared=True) for _ in range(8)]
    draw = max(draws, key=lambda one: len(one.active_steps()))
    if plan.forward is not None:
        return _only(draw, (draw.forward != 0).any(0).nonzero()[:1, 0].tolist()), 1, 1
    blocks: list[list[int]] = []
    for step in reversed(draw.active_steps()):
        linked = bool(blocks) and blocks[-1][-1] == step + 1 and bool(draw.pathwise[0, step])
        (blocks[-1].append(step) if linked else blocks.append([step]))
    if not blocks:
        return _only(draw, []), 0, 0
    longest = max(blocks, key=len)
    chosen = set(longest[: 3 if graph else 2])
    scored, asked = (mask.any(0).nonzero()[:, 0].tolist() for mask in (draw.score != 0, draw.prediction != 0))
    if scored and not chosen & set(scored):
        chosen.add(scored[0])
    if asked:
        chosen.add(asked[0])  # not the last step, whose prediction is the sample itself and needs no call
    return _only(draw, sorted(chosen)), len(longest), min(len(longest), 3 if graph else 2)


def shortened(draw: PlanDraw) -> PlanDraw:
    """The draw without the first of its steps."""
    return _only(draw, draw.active_steps()[1:])


def _only(draw: PlanDraw, steps: list[int]) -> PlanDraw:
    keep = torch.tensor([step in steps for step in range(draw.num_steps)])
    names = ("pathwise", "score", "prediction", "zeroth", "forward", "first_order")
    return dataclasses.replace(draw, **{name: getattr(draw, name) * keep for name in names})


def _weights_on_meta(*modules: nn.Module) -> dict[int, Any]:
    """What `copy.deepcopy` needs to know to copy modules without their weights: id -> a tensor on the meta device."""
    memo: dict[int, Any] = {}
    for tensor in (tensor for module in modules for tensor in tensors_of(module)):
        shape = torch.empty_like(tensor, device=META)
        is_parameter = isinstance(tensor, nn.Parameter)
        memo[id(tensor)] = nn.Parameter(shape, requires_grad=tensor.requires_grad) if is_parameter else shape
    return memo


def _replaced(owner: Any, memo: dict[int, Any]) -> Any:
    """A shallow copy whose modules are those that were copied; the owner itself stays as it is."""
    twin = copy.copy(owner)
    for name, value in vars(owner).items():
        if isinstance(value, nn.Module) and id(value) in memo:
            object.__setattr__(twin, name, memo[id(value)])  # not diffusers' own, which writes to a config that both share
    return twin


class _Brightness:
    """A reward that takes next to nothing, for predictions: rewards themselves check values, and shapes have none."""

    on_error = "raise"
    total: Tensor

    def __call__(self, images: Tensor, *args: Any, **kwargs: Any) -> _Brightness:
        found = _Brightness()
        found.total = images.flatten(1).mean(1)
        return found


class _Precision:
    """Brings a network to work as on its own device: attention in one kernel, and autocast.

    By hooks of its modules, not around the whole pass: a backward pass runs checkpointed blocks again, and leaves such contexts.

    Args:
        dtype: of autocast; None for none.
        on_cpu: see `_Casting`.
    """

    def __init__(self, dtype: torch.dtype | None, on_cpu: bool) -> None:
        self.modes: list[TorchFunctionMode] = [FusedAttention(), *([] if dtype is None else [_Casting(dtype, on_cpu)])]
        self.depth = 0  # of modules that are being called

    def attach(self, network: nn.Module) -> None:
        """Puts hooks around every module: the modes are entered with the outermost call, and left with it."""
        for module in network.modules():
            module.register_forward_pre_hook(self._enter)
            module.register_forward_hook(self._leave, always_call=True)  # a block that runs again stops by an exception

    def _enter(self, module: nn.Module, args: Any) -> None:
        self.depth += 1
        if self.depth == 1:
            for mode in self.modes:
                mode.__enter__()

    def _leave(self, module: nn.Module, args: Any, output: Any) -> None:
        self.depth -= 1
        if self.depth == 0:
            for mode in reversed(self.modes):
                mode.__exit__(None, None, None)


class _Casting(TorchFunctionMode):
    """Autocast, which torch has not for the meta device: products in the lower precision, on CUDA norms and softmax in float32."""

    def __init__(self, dtype: torch.dtype, on_cpu: bool) -> None:
        super().__init__()
        self.targets = dict.fromkeys(_PRODUCTS, dtype) | ({} if on_cpu else dict.fromkeys(_NORMS, torch.float32))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs, target = kwargs or {}, self.targets.get(func)
        if target is None:
            return func(*args, **kwargs)
        return func(*(_cast(value, target) for value in args), **{name: _cast(value, target) for name, value in kwargs.items()})


def _cast(value: Any, dtype: torch.dtype) -> Any:
    if isinstance(value, list | tuple):  # of einsum
        return type(value)(_cast(item, dtype) for item in value)
    return value.to(dtype) if isinstance(value, Tensor) and value.is_floating_point() else value


_F = nn.functional
_PRODUCTS = (
    _F.linear, _F.conv1d, _F.conv2d, _F.conv3d, _F.conv_transpose2d, _F.conv_transpose3d, _F.scaled_dot_product_attention, torch.bmm,
    torch.baddbmm, torch.addmm, torch.mm, torch.matmul, torch.einsum, Tensor.matmul, Tensor.__matmul__, Tensor.bmm,
)  # fmt: skip
_NORMS = (_F.layer_norm, _F.group_norm, _F.softmax, torch.softmax, Tensor.softmax, torch.layer_norm, torch.group_norm)
