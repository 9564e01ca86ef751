"""What training needs of a diffusers pipeline. One short subclass per family of pipelines."""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlr_trainer.pipelines.conditioning import Conditioning, PromptCache, Rows
from rlr_trainer.schedules import SamplerOptions, Schedule, make_schedule


@dataclasses.dataclass(frozen=True)
class Layout:
    """The shape of what is sampled.

    Attributes:
        shape: of one latent, as the network takes it (packed where the family packs).
        height, width: of the picture, in pixels.
        num_frames: of a video; None for pictures.
    """

    shape: tuple[int, ...]
    height: int
    width: int
    num_frames: int | None = None


class PipelineAdapter(abc.ABC):
    """A diffusers pipeline, seen as the parts of a denoising chain.

    The layout comes before the schedule, because some samplers depend on the number of tokens.

    Attributes:
        pipeline: the pipeline.
        lora_targets: names of the modules that get LoRA weights by default.
        denoiser_folder: of the trained network in the pipeline's layout on disk.
    """

    lora_targets: tuple[str, ...]
    denoiser_folder = "unet"

    def __init__(self, pipeline: Any) -> None:
        self.pipeline = pipeline

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
    def layout(self, height: int | None, width: int | None, num_frames: int | None = None) -> Layout:
        """The layout of samples of this size in pixels (None: the model's own).

        Raises:
            ValueError: a size that does not fit, or frames of a model that makes pictures; names the rule.
        """

    def schedule(self, layout: Layout, sampler: SamplerOptions) -> Schedule:
        """The steps of the sampler on samples of this layout."""
        return make_schedule(self.pipeline.scheduler, sampler)

    @abc.abstractmethod
    def encode_prompts(self, prompts: Sequence[str]) -> Rows:
        """Encodes prompts to the network's keyword arguments, one row each. Called once per distinct prompt, without gradients."""

    def batch_inputs(self, layout: Layout) -> dict[str, Any]:
        """Keyword arguments of the network that are the same for every sample of a batch."""
        return {}

    def encode(
        self, prompts: Sequence[str], negative_prompts: Sequence[str], guidance_scale: float, layout: Layout, cache: PromptCache
    ) -> Conditioning:
        """Conditioning of a batch; each distinct prompt is encoded once. No guidance at a scale of 1 or less."""
        guided = guidance_scale > 1
        with torch.no_grad():
            positive = cache.rows(prompts, self.encode_prompts, keep=negative_prompts if guided else ())
            negative = cache.rows(negative_prompts, self.encode_prompts) if guided else None
        cache.shrink()
        return Conditioning(positive, negative, guidance_scale, self.batch_inputs(layout))

    def predict(self, network: Callable[..., Tensor], x: Tensor, time: float, conditioning: Conditioning) -> Tensor:
        """The guided output of `network` (x, time, **conditioning) at latents `x` [N, ...] and `Schedule.time`, in one batched call."""
        told = torch.tensor(time, device=x.device)
        if conditioning.negative is None:
            return network(x, told, **conditioning.positive, **conditioning.batch)
        both = network(torch.cat([x, x]), told, **conditioning.guided(), **conditioning.batch)
        unconditional, conditional = both.float().chunk(2)  # FSDP2 casts the policy's output to the precision of the run
        return unconditional + conditioning.guidance_scale * (conditional - unconditional)

    @abc.abstractmethod
    def decode(self, latents: Tensor, layout: Layout) -> Tensor:
        """Latents [N, ...] to pictures [N, 3, H, W] (videos [N, F, 3, H, W]) in [0, 1], with a graph if the latents have one."""

    @abc.abstractmethod
    def save_lora(self, directory: str | Path) -> None:
        """Writes the LoRA weights in the format that `pipeline.load_lora_weights` reads."""

    @abc.abstractmethod
    def load_lora(self, directory: str | Path) -> None:
        """Reads them back into the adapter that is being trained."""

    def save_denoiser(self, directory: str | Path) -> None:
        """Writes the whole network, in float32, to its folder of the pipeline's layout."""
        self.denoiser.save_pretrained(Path(directory) / self.denoiser_folder)

    def load_denoiser(self, directory: str | Path) -> None:
        """Reads it back in place; ValueError if the weights are missing, damaged, or of another network."""
        folder = Path(directory) / self.denoiser_folder
        try:
            loaded = type(self.denoiser).from_pretrained(str(folder))
            self.denoiser.load_state_dict(loaded.state_dict())
        except Exception as error:  # diffusers and safetensors raise kinds of their own
            raise ValueError(f"cannot read the network from {folder}: {type(error).__name__}: {error}") from error
