"""Stable Diffusion 1.x and 2.x (`StableDiffusionPipeline`)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlr_trainer.pipelines.adapter import Layout, PipelineAdapter
from rlr_trainer.pipelines.lora import load_lora_weights, save_lora_weights


class StableDiffusionAdapter(PipelineAdapter):
    """Adapter of `diffusers.StableDiffusionPipeline`.

    Raises:
        ValueError: the UNet takes inputs that this adapter does not give it (inpainting, or a distilled guidance input).
    """

    lora_targets = ("to_q", "to_k", "to_v", "to_out.0")

    def __init__(self, pipeline: Any) -> None:
        super().__init__(pipeline)
        config = pipeline.unet.config
        if config.in_channels != pipeline.vae.config.latent_channels:
            raise ValueError(
                f"the UNet takes {config.in_channels} channels but the VAE makes {pipeline.vae.config.latent_channels}: an inpainting or "
                "image-conditioned model, which this adapter cannot sample; use a text-to-image model"
            )
        if config.time_cond_proj_dim is not None:
            text = "a guidance-distilled model, such as LCM, which this adapter does not feed; use a model without it"
            raise ValueError(f"the UNet has time_cond_proj_dim={config.time_cond_proj_dim}: {text}")

    @property
    def denoiser(self) -> Any:
        return self.pipeline.unet

    @property
    def frozen_modules(self) -> list[nn.Module]:
        return [self.pipeline.text_encoder]

    @property
    def decoder(self) -> nn.Module:
        return self.pipeline.vae

    def layout(self, height: int | None, width: int | None, num_frames: int | None = None) -> Layout:
        """Latents [C, H / f, W / f], f the VAE's scale factor; ValueError for a size that is not a multiple of f, and for frames."""
        if num_frames is not None:
            raise ValueError(f"num_frames={num_frames}: {type(self.pipeline).__name__} makes pictures, not videos; leave it unset")
        factor, size = self.pipeline.vae_scale_factor, self.pipeline.unet.config.sample_size
        own = (size, size) if isinstance(size, int) else tuple(size)
        edges = []
        for name, pixels, default in (("height", height, own[0]), ("width", width, own[1])):
            if pixels is not None and (pixels < factor or pixels % factor):
                raise ValueError(f"{name}={pixels}: must be a positive multiple of {factor}, the VAE's scale factor")
            edges.append(default if pixels is None else pixels // factor)
        return Layout((self.pipeline.unet.config.in_channels, *edges), edges[0] * factor, edges[1] * factor)

    def encode_prompts(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Text-encoder states [N, tokens, width], as the pipeline itself computes them."""
        device = self.pipeline.text_encoder.device
        embeddings, _ = self.pipeline.encode_prompt(list(prompts), device, 1, do_classifier_free_guidance=False)
        return {"encoder_hidden_states": embeddings}

    def decode(self, latents: Tensor, layout: Layout) -> Tensor:
        """Pictures [N, 3, H, W], float32 in [0, 1]; in the VAE's own precision, within autocast too."""
        vae = self.pipeline.vae
        with torch.autocast(latents.device.type, enabled=False):
            images = vae.decode(latents.to(vae.dtype) / vae.config.scaling_factor, return_dict=False)[0]
        return (images.float() / 2 + 0.5).clamp(0, 1)

    def save_lora(self, directory: str | Path) -> None:
        save_lora_weights(type(self.pipeline), self.denoiser, directory, layers="unet_lora_layers")

    def load_lora(self, directory: str | Path) -> None:
        load_lora_weights(type(self.pipeline), self.denoiser, directory, prefix="unet")
