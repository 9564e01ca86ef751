"""The denoising chain that a pipeline makes of a batch of prompts."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from rlr_trainer.estimators.chain import Generators, Parameters, draw_noise
from rlr_trainer.estimators.forward_process import ForwardSchedule
from rlr_trainer.pipelines.adapter import Layout, PipelineAdapter
from rlr_trainer.pipelines.conditioning import AnyConditioning
from rlr_trainer.pipelines.policy import Policy
from rlr_trainer.schedules import Schedule


@dataclasses.dataclass(frozen=True)
class PipelineChain:
    """The denoising chain of a batch of prompts under a pipeline; implements `DenoisingChain`.

    Called with its own live parameters (the mapping that `parameters()` returns), it runs the wrapped policy, so that gradients
    synchronize across processes; with any other mapping it runs the bare policy on those tensors.

    Attributes:
        adapter: the pipeline.
        model: the policy as Trainer wrapped it.
        policy: the policy itself.
        schedule: steps and noise levels.
        conditioning: one row per sample, the same in all steps or one per scale.
        layout: of one latent.
        device: where latents live.
        live: the policy's trainable parameters.
    """

    adapter: PipelineAdapter
    model: nn.Module
    policy: Policy
    schedule: Schedule
    conditioning: AnyConditioning
    layout: Layout
    device: torch.device
    live: Parameters

    @property
    def num_steps(self) -> int:
        return self.schedule.num_steps

    def parameters(self) -> Parameters:
        """The policy's trainable parameters, live."""
        return self.live

    def select(self, rows: Tensor) -> PipelineChain:
        """The chain of some of the prompts."""
        return dataclasses.replace(self, conditioning=self.conditioning.select(rows))

    def under(self, policy: Policy) -> PipelineChain:
        """The chain of the same prompts under another policy."""
        return dataclasses.replace(self, model=policy, policy=policy, live=policy.trainable_parameters())

    def initial(self, num_samples: int, generator: Generators) -> Tensor:
        """Noise of the schedule's initial standard deviation, float32 [N, ...]; drawn on the CPU for any device."""
        noise = draw_noise(torch.empty(num_samples, *self.layout.shape), generator)
        return self.schedule.init_std * noise.to(self.device)

    def output(self, step: int, x: Tensor, params: Parameters) -> Tensor:
        """The network's guided output at `x = latents[step]`, [N, ...]."""
        time, conditioning = self.schedule.time(step), self.conditioning.at(step)
        if params is self.live:
            return self.adapter.predict(self.model, x, time, conditioning)
        if torch.is_grad_enabled() and getattr(self.policy.denoiser, "is_gradient_checkpointing", False):
            # A checkpointed block runs again in the backward pass, when the network would have its own tensors back.
            if any(params[name].data_ptr() != p.data_ptr() for name, p in self.live.items()):
                raise ValueError("gradient_checkpointing=True: the network cannot be differentiated at other weights than its own")
            return self.adapter.predict(self.policy, x, time, conditioning)

        def network(*args: Any, **kwargs: Any) -> Tensor:
            return functional_call(self.policy, dict(params), args, kwargs)

        return self.adapter.predict(network, x, time, conditioning)

    def transition(self, step: int, x: Tensor, params: Parameters) -> tuple[Tensor, Tensor]:
        """Mean [N, ...] and standard deviation (a scalar) of the next latent, float32."""
        return self.schedule.transition(step, x, self.output(step, x, params))

    @property
    def forward_schedule(self) -> ForwardSchedule:
        """The forward process at the schedule's noise levels.

        Raises:
            TypeError: a schedule of one's own that does not know it.
        """
        if not isinstance(self.schedule, ForwardSchedule):
            raise TypeError(
                f"{type(self.schedule).__name__} says nothing of the forward process; give it noise_level, noised, target and denoised "
                "(estimators/forward_process.py), or choose another estimator than awm and nft"
            )
        return self.schedule

    def predict_clean(self, step: int, x: Tensor, params: Parameters) -> Tensor:
        """The network's one-step prediction of the clean latent, [N, ...]."""
        return self.schedule.clean(step, x, self.output(step, x, params))
