"""The reference policy: the model as it was before training."""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from rlr_trainer.pipelines.chain import PipelineChain
from rlr_trainer.pipelines.policy import Policy, cast_frozen


class ReferencePolicy:
    """The model without any LoRA weights, or a frozen copy of a network that is trained as a whole.

    Args:
        policy: the trained policy, before any training.
        use_lora: whether LoRA weights alone are trained.
        device, dtype: of the frozen copy.
        autocast: precision of the run's forward passes.
        checkpointing: activation checkpointing of the frozen copy.
    """

    def __init__(
        self,
        policy: Policy,
        use_lora: bool,
        device: torch.device,
        dtype: torch.dtype,
        autocast: Callable[[], AbstractContextManager],
        checkpointing: bool = False,
    ) -> None:
        self.policy, self.autocast = policy, autocast
        self.copy: Policy | None = None
        if not use_lora:
            self.copy = Policy(copy.deepcopy(policy.denoiser).requires_grad_(False).eval())
            if checkpointing:
                self.copy.gradient_checkpointing_enable()
            cast_frozen(self.copy, device, dtype)

    @contextlib.contextmanager
    def _without_lora(self) -> Iterator[None]:
        from peft.tuners.tuners_utils import BaseTunerLayer

        # not through disable_adapters(): it also turns requires_grad off, under a graph that still needs it
        # LoRA weights that are not trained, of the other one of two denoisers, belong to the reference
        found: list[Any] = [module for module in self.policy.denoiser.modules() if isinstance(module, BaseTunerLayer)]
        layers = [layer for layer in found if any(parameter.requires_grad for parameter in layer.parameters())]
        before = [layer._disable_adapters for layer in layers]
        for layer in layers:
            layer._disable_adapters = True
        try:
            yield
        finally:
            for layer, value in zip(layers, before, strict=True):
                layer._disable_adapters = value

    def steps_of(self, chain: PipelineChain) -> Callable[[int, Tensor], tuple[Tensor, Tensor]]:
        """(step, x) -> mean and standard deviation of the reference policy's next latent, on the prompts of `chain`."""
        # not through the wrapper: DDP takes one forward pass per backward pass (FSDP2 shards the policy in place and sees this one too)
        return functools.partial(self._transition, chain.under(self.policy if self.copy is None else self.copy))

    def _transition(self, chain: PipelineChain, step: int, x: Tensor) -> tuple[Tensor, Tensor]:
        run = functools.partial(chain.transition, step, params=chain.parameters())
        if self.copy is None and x.requires_grad and getattr(self.policy.denoiser, "is_gradient_checkpointing", False):
            # a checkpointed block runs again in the backward pass, when the LoRA layers would be on again
            return _Rerun.apply(x, run, self._as_reference)
        with self._as_reference():
            return run(x)

    @contextlib.contextmanager
    def _as_reference(self) -> Iterator[None]:
        with self.autocast(), contextlib.nullcontext() if self.copy is not None else self._without_lora():
            yield


class _Rerun(torch.autograd.Function):
    """(mean, std) of `run` at x, keeping no graph: the backward pass runs it again, forward and backward inside `context`."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, run: Callable[[Tensor], tuple[Tensor, Tensor]], context: Any) -> tuple[Tensor, Tensor]:
        """Runs without a graph; the deviation, which is the schedule's, gets no gradient."""
        ctx.run, ctx.context = run, context
        ctx.save_for_backward(x)
        with context():
            mean, std = run(x)
        ctx.mark_non_differentiable(std)  # of the schedule, the same at every x
        return mean, std

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        """Runs again at the stored input, for its gradient alone: the reference is not trained."""
        x = ctx.saved_tensors[0].detach().requires_grad_(True)
        with ctx.context(), torch.enable_grad():
            mean, _ = ctx.run(x)
            (gradient,) = torch.autograd.grad(mean, x, gradients[0])
        return gradient, None, None
