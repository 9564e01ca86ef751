"""What the trainer needs of a diffusers pipeline, and the denoising chain that it makes of one."""

from __future__ import annotations

import abc
import dataclasses
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from rlr_trainer.estimators.chain import Generators, Parameters, draw_noise
from rlr_trainer.schedules.ddim import DDIMSchedule

PROMPT_CACHE_SIZE = 1024  # encoded prompts kept; 118 kB each for Stable Diffusion 1.5 in half precision


class Policy(nn.Module):
    """The trained network. Trainer, DDP and FSDP wrap this module, and every forward pass goes through the wrapper.

    Its `config` is a `PretrainedConfig`, because Trainer's logging callbacks and model cards read one.
    """

    def __init__(self, denoiser: Any, name_or_path: str = "") -> None:
        from transformers import PretrainedConfig

        super().__init__()
        self.denoiser: Any = denoiser
        self.config: Any = PretrainedConfig()
        self.config.name_or_path = name_or_path
        setattr(self.config, "model_type", "rlr-policy")  # noqa: B010  # a class variable there

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        """The denoiser's output, in float32 so that means and log-densities are formed in full precision."""
        return self.denoiser(*args, **kwargs, return_dict=False)[0].float()

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict | None = None, **_: Any) -> None:
        """Called by Trainer: activation checkpointing inside one network call, on top of the recursion over steps."""
        self.denoiser.enable_gradient_checkpointing()

    # transformers 5 renamed it
    activation_checkpointing_enable = gradient_checkpointing_enable

    def trainable_parameters(self) -> dict[str, nn.Parameter]:
        """name -> parameter, for those that require a gradient."""
        return {name: p for name, p in self.named_parameters() if p.requires_grad}


def cast_frozen(module: nn.Module, device: torch.device, dtype: torch.dtype) -> None:
    """Moves `module` to `device` and its frozen weights to `dtype`, except those that its class keeps in float32."""
    keep = getattr(module, "_keep_in_fp32_modules", None) or []
    module.to(device)
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if tensor.is_floating_point() and not tensor.requires_grad and not any(part in name.split(".") for part in keep):
            tensor.data = tensor.data.to(dtype)


@dataclasses.dataclass(frozen=True)
class Conditioning:
    """What the network is conditioned on, one row per sample.

    Attributes:
        positive: name -> [N, ...], keyword arguments of the network.
        negative: the same for the unconditional branch, or None without guidance.
        guidance_scale: w in eps = eps_uncond + w (eps_cond - eps_uncond).
    """

    positive: Mapping[str, Tensor]
    negative: Mapping[str, Tensor] | None
    guidance_scale: float

    def select(self, rows: Tensor) -> Conditioning:
        """The conditioning of some rows."""

        def pick(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {name: tensor[rows.to(tensor.device)] for name, tensor in tensors.items()}

        return Conditioning(pick(self.positive), self.negative and pick(self.negative), self.guidance_scale)

    def to(self, device: torch.device | str) -> Conditioning:
        """The same conditioning on another device."""

        def move(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
            return {name: tensor.to(device) for name, tensor in tensors.items()}

        return Conditioning(move(self.positive), self.negative and move(self.negative), self.guidance_scale)

    @staticmethod
    def concatenate(parts: Sequence[Conditioning]) -> Conditioning:
        """Joins conditionings of the same kind along the batch."""

        def join(rows: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
            return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}

        negative = None if parts[0].negative is None else join([part.negative or {} for part in parts])
        return Conditioning(join([part.positive for part in parts]), negative, parts[0].guidance_scale)

    def at(self, step: int) -> Conditioning:
        """The conditioning of a step."""
        return self

    def guided(self) -> dict[str, Tensor]:
        """Keyword arguments of one network call: negative rows first, then positive."""
        if self.negative is None:
            return dict(self.positive)
        return {name: torch.cat([self.negative[name], tensor]) for name, tensor in self.positive.items()}


@dataclasses.dataclass(frozen=True)
class ScaledConditioning:
    """Conditioning that changes along the chain: Diffusive Chain-of-Thought (section 3.3 of arXiv:2502.00639).

    Attributes:
        scales: one conditioning per group of steps, coarse to fine.
        first_steps: the step at which each group but the first begins, increasing.
    """

    scales: tuple[Conditioning, ...]
    first_steps: tuple[int, ...]

    def at(self, step: int) -> Conditioning:
        """The conditioning of a step."""
        return self.scales[sum(step >= first for first in self.first_steps)]

    def select(self, rows: Tensor) -> ScaledConditioning:
        """The conditioning of some rows."""
        return ScaledConditioning(tuple(scale.select(rows) for scale in self.scales), self.first_steps)

    def to(self, device: torch.device | str) -> ScaledConditioning:
        """The same conditioning on another device."""
        return ScaledConditioning(tuple(scale.to(device) for scale in self.scales), self.first_steps)

    @staticmethod
    def concatenate(parts: Sequence[ScaledConditioning]) -> ScaledConditioning:
        """Joins conditionings with the same groups along the batch."""
        groups = zip(*(part.scales for part in parts), strict=True)
        return ScaledConditioning(tuple(Conditioning.concatenate(group) for group in groups), parts[0].first_steps)


class PipelineAdapter(abc.ABC):
    """A diffusers pipeline, seen as the parts of a denoising chain. One subclass per family of pipelines."""

    lora_targets: tuple[str, ...]

    def __init__(self, pipeline: Any) -> None:
        self.pipeline = pipeline
        self._encoded: OrderedDict[str, dict[str, Tensor]] = OrderedDict()

    @property
    @abc.abstractmethod
    def denoiser(self) -> Any:
        """The network that is trained."""

    @property
    @abc.abstractmethod
    def frozen_modules(self) -> list[nn.Module]:
        """The pipeline's other networks, except those that decode."""

    @property
    @abc.abstractmethod
    def decoder(self) -> nn.Module:
        """The network that makes pictures of latents."""

    @abc.abstractmethod
    def latent_shape(self, height: int | None, width: int | None) -> tuple[int, ...]:
        """Shape of one latent for a picture of this size in pixels (None: the model's own size)."""

    @abc.abstractmethod
    def encode_prompts(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Encodes prompts to the network's keyword arguments, one row each. Called once per distinct prompt."""

    @abc.abstractmethod
    def decode(self, latents: Tensor) -> Tensor:
        """Latents [N, ...] to pictures [N, 3, H, W] in [0, 1], with a graph if the latents have one."""

    @abc.abstractmethod
    def save_lora(self, directory: str | Path) -> None:
        """Writes the LoRA weights in the format that `pipeline.load_lora_weights` reads."""

    @abc.abstractmethod
    def load_lora(self, directory: str | Path) -> None:
        """Reads them back into the adapter that is being trained."""

    denoiser_folder = "unet"  # of the pipeline's layout on disk

    def save_denoiser(self, directory: str | Path) -> None:
        """Writes the whole network, in float32, to its folder of the pipeline's layout."""
        self.denoiser.save_pretrained(Path(directory) / self.denoiser_folder)

    def load_denoiser(self, directory: str | Path) -> None:
        """Reads it back in place.

        Raises:
            ValueError: the weights are missing, damaged, or of another network.
        """
        folder = Path(directory) / self.denoiser_folder
        try:
            loaded = type(self.denoiser).from_pretrained(str(folder))
            self.denoiser.load_state_dict(loaded.state_dict())
        except Exception as error:  # diffusers and safetensors raise kinds of their own
            raise ValueError(f"cannot read the network from {folder}: {type(error).__name__}: {error}") from error

    def schedule(self, num_steps: int, eta: float) -> DDIMSchedule:
        """The sampling schedule."""
        return DDIMSchedule.from_scheduler(self.pipeline.scheduler, num_steps, eta)

    @torch.no_grad()
    def condition(self, prompts: Sequence[str], negative_prompts: Sequence[str], guidance_scale: float) -> Conditioning:
        """Conditioning of a batch; each distinct prompt is encoded once and kept. No guidance at a scale of 1 or less."""
        guided = guidance_scale > 1
        wanted = [*prompts, *negative_prompts] if guided else list(prompts)
        missing = [prompt for prompt in dict.fromkeys(wanted) if prompt not in self._encoded]
        if missing:
            rows = self.encode_prompts(missing)
            for index, prompt in enumerate(missing):
                self._encoded[prompt] = {name: tensor[index] for name, tensor in rows.items()}

        def stack(batch: Sequence[str]) -> dict[str, Tensor]:
            return {name: torch.stack([self._encoded[p][name] for p in batch]) for name in self._encoded[batch[0]]}

        conditioning = Conditioning(stack(prompts), stack(negative_prompts) if guided else None, guidance_scale)
        for prompt in dict.fromkeys(wanted):
            self._encoded.move_to_end(prompt)
        while len(self._encoded) > PROMPT_CACHE_SIZE:
            self._encoded.popitem(last=False)
        return conditioning

    def clear_prompt_cache(self) -> None:
        """Forgets encoded prompts (after a change of device, precision or text encoder)."""
        self._encoded.clear()

    def scale_model_input(self, x: Tensor, timestep: int) -> Tensor:
        """What the network sees of a latent; DDIM's is the latent itself."""
        return x

    def call(self, policy: Callable[..., Tensor], x: Tensor, timestep: int, conditioning: Conditioning) -> Tensor:
        """The guided network output at latents `x` [N, ...], in one batched call."""
        sees = self.scale_model_input(x, timestep)
        if conditioning.negative is None:
            return policy(sees, torch.tensor(timestep, device=x.device), **conditioning.positive)
        both = policy(torch.cat([sees, sees]), torch.tensor(timestep, device=x.device), **conditioning.guided())
        unconditional, conditional = both.float().chunk(2)  # FSDP2 casts the policy's output to the precision of the run
        return unconditional + conditioning.guidance_scale * (conditional - unconditional)


class PipelineChain:
    """The denoising chain of a batch of prompts under a pipeline; implements `DenoisingChain`.

    Called with its own live parameters (the mapping that `parameters()` returns), it runs the wrapped policy, so that
    gradients synchronize across processes; with any other mapping it runs the bare policy on those tensors instead.

    Args:
        adapter: the pipeline.
        policy: the policy as Trainer wrapped it.
        bare_policy: the policy itself.
        schedule: steps and noise levels.
        conditioning: one row per sample, the same in all steps or one per scale.
        latent_shape: of one latent.
        device: where latents live.
    """

    def __init__(
        self,
        adapter: PipelineAdapter,
        policy: nn.Module,
        bare_policy: Policy,
        schedule: DDIMSchedule,
        conditioning: Conditioning | ScaledConditioning,
        latent_shape: tuple[int, ...],
        device: torch.device,
    ) -> None:
        self.adapter, self.policy, self.bare_policy = adapter, policy, bare_policy
        self.schedule, self.conditioning = schedule, conditioning
        self.latent_shape, self.device = latent_shape, device
        self.num_steps = schedule.num_steps
        self._parameters = bare_policy.trainable_parameters()

    def parameters(self) -> Parameters:
        """The policy's trainable parameters, live."""
        return self._parameters

    def select(self, rows: Tensor) -> PipelineChain:
        """The chain of some of the prompts."""
        chain = PipelineChain(
            self.adapter,
            self.policy,
            self.bare_policy,
            self.schedule,
            self.conditioning.select(rows),
            self.latent_shape,
            self.device,
        )
        chain._parameters = self._parameters
        return chain

    def under(self, policy: Policy) -> PipelineChain:
        """The chain of the same prompts under another policy."""
        return PipelineChain(self.adapter, policy, policy, self.schedule, self.conditioning, self.latent_shape, self.device)

    def initial(self, num_samples: int, generator: Generators) -> Tensor:
        """Noise of the schedule's initial standard deviation, float32 [N, C, H, W]; drawn on the CPU for any device."""
        noise = draw_noise(torch.empty(num_samples, *self.latent_shape), generator)
        return self.schedule.init_std * noise.to(self.device)

    def _output(self, step: int, x: Tensor, params: Parameters) -> Tensor:
        timestep, conditioning = self.schedule.timesteps[step], self.conditioning.at(step)
        if params is self._parameters:
            return self.adapter.call(self.policy, x, timestep, conditioning)
        if torch.is_grad_enabled() and getattr(self.bare_policy.denoiser, "is_gradient_checkpointing", False):
            # A checkpointed block runs again in the backward pass, when the network would have its own tensors back.
            if any(params[name].data_ptr() != p.data_ptr() for name, p in self._parameters.items()):
                raise ValueError("gradient_checkpointing=True: the network cannot be differentiated at other weights than its own")
            return self.adapter.call(self.bare_policy, x, timestep, conditioning)

        def policy(*args: Any, **kwargs: Any) -> Tensor:
            return functional_call(self.bare_policy, dict(params), args, kwargs)

        return self.adapter.call(policy, x, timestep, conditioning)

    def transition(self, step: int, x: Tensor, params: Parameters) -> tuple[Tensor, Tensor]:
        """Mean [N, ...] and standard deviation (a scalar) of the next latent, float32."""
        return self.schedule.mean_and_std(step, x, self._output(step, x, params))

    def predict_clean(self, step: int, x: Tensor, params: Parameters) -> Tensor:
        """The network's one-step prediction of the clean latent, [N, ...]."""
        return self.schedule.clean_and_noise(step, x, self._output(step, x, params))[0]
