"""Stable Diffusion 1.x and 2.x (`StableDiffusionPipeline`)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from rlr_trainer.pipelines.adapter import Layout, PipelineAdapter


class StableDiffusionAdapter(PipelineAdapter):
    """Adapter of `diffusers.StableDiffusionPipeline`.

    Raises:
        ValueError: the UNet takes inputs that this adapter does not give it (inpainting, or a distilled guidance input).
    """

    lora_targets = ("to_q", "to_k", "to_v", "to_out.0")
    denoiser_folder = "unet"
    rescales_guidance = True

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

    def layout(self, height: int | None, width: int | None, num_frames: int | None = None) -> Layout:
        """Latents [C, H / f, W / f], f the VAE's scale factor; ValueError for a size that is not a multiple of f, and for frames."""
        unet, factor = self.pipeline.unet.config, self.pipeline.vae_scale_factor
        own = (unet.sample_size, unet.sample_size) if isinstance(unet.sample_size, int) else tuple(unet.sample_size)
        default = (own[0] * factor, own[1] * factor)
        height, width = self.picture_size(
            height, width, num_frames, default=default, multiple=factor, rule="the VAE's scale factor"
        )
        return Layout((unet.in_channels, height // factor, width // factor), height, width)

    def encode_prompts(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Text-encoder states [N, tokens, width], as the pipeline itself computes them."""
        device = self.pipeline.text_encoder.device
        embeddings, _ = self.pipeline.encode_prompt(list(prompts), device, 1, do_classifier_free_guidance=False)
        return {"encoder_hidden_states": embeddings}
