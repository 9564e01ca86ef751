"""Stable Diffusion 1.x and 2.x (`StableDiffusionPipeline`), and its distillation LCM (`LatentConsistencyModelPipeline`)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rlr_trainer.pipelines.adapter import Layout, PipelineAdapter


class StableDiffusionAdapter(PipelineAdapter):
    """Adapter of `diffusers.StableDiffusionPipeline` and `diffusers.LatentConsistencyModelPipeline`.

    A UNet with `time_cond_proj_dim` was distilled to take the guidance scale as an input (LCM, arXiv:2310.04378): it is told the scale, and
    there is no second branch, nor anything to rescale.

    Attributes:
        addition_embed_types: what the UNet may take beside latents, time and prompt, by the name in its config.

    Raises:
        ValueError: the UNet takes inputs that this adapter does not give it (a picture and its mask, a class, an IP-Adapter's picture).
    """

    lora_targets = ("to_q", "to_k", "to_v", "to_out.0")
    denoiser_folder = "unet"
    addition_embed_types: tuple[str | None, ...] = (None, "text")

    def __init__(self, pipeline: Any) -> None:
        super().__init__(pipeline)
        config = pipeline.unet.config
        self.rescales_guidance = not self._embeds_guidance
        self.check_channels(pipeline.vae.config.latent_channels, "the VAE makes", "an inpainting or image-conditioned")
        fed: dict[str, tuple[str | None, ...]] = {
            "class_embed_type": (None,),
            "num_class_embeds": (None,),
            "encoder_hid_dim_type": (None, "text_proj"),
            "addition_embed_type": self.addition_embed_types,
        }
        for name, allowed in fed.items():
            value = config.get(name)
            if value not in allowed:
                raise ValueError(
                    f"the UNet has {name}={value!r}, for an input that is not fed here: it must be one of {allowed}; use a plain text-to-image "
                    "model of this pipeline's own kind (pipeline.unload_ip_adapter() takes an IP-Adapter off)"
                )

    def layout(self, height: int | None, width: int | None, num_frames: int | None = None) -> Layout:
        """Latents [C, H / f, W / f], f the VAE's scale factor; ValueError for a size that is not a multiple of f, and for frames."""
        unet, factor = self.pipeline.unet.config, self.pipeline.vae_scale_factor
        own = (unet.sample_size, unet.sample_size) if isinstance(unet.sample_size, int) else tuple(unet.sample_size)
        default = (own[0] * factor, own[1] * factor)
        height, width = self.picture_size(
            height, width, num_frames, default=default, multiple=factor, rule="the VAE's scale factor"
        )
        return Layout((unet.in_channels, height // factor, width // factor), height, width)

    @property
    def _embeds_guidance(self) -> bool:
        return self.pipeline.unet.config.time_cond_proj_dim is not None

    def is_guided(self, guidance_scale: float) -> bool:
        """Whether this scale needs a second branch: above 1, unless the UNet takes the scale as an input."""
        return super().is_guided(guidance_scale) and not self._embeds_guidance

    def encode_prompts(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Text-encoder states [N, tokens, width], as the pipeline itself computes them."""
        device = self.pipeline.text_encoder.device
        embeddings, _ = self.pipeline.encode_prompt(list(prompts), device, 1, do_classifier_free_guidance=False)
        return {"encoder_hidden_states": embeddings}

    def batch_inputs(self, layout: Layout, guidance_scale: float) -> dict[str, Tensor]:
        """The embedded guidance scale [1, width], where the UNet takes it."""
        if not self._embeds_guidance:
            return {}
        scale, width = torch.tensor([guidance_scale - 1.0]), self.pipeline.unet.config.time_cond_proj_dim
        return {"timestep_cond": self.pipeline.get_guidance_scale_embedding(scale, embedding_dim=width)}

    def call(self, network: Any, x: Tensor, time: Tensor, rows: Mapping[str, Any], batch: Mapping[str, Tensor]) -> Tensor:
        """The UNet's output [N, C, h, w]."""
        inputs = {name: tensor.to(x.device).expand(len(x), -1) for name, tensor in batch.items()}
        return network(x, time, **rows, **inputs)
