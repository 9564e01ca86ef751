"""HunyuanVideo (`HunyuanVideoPipeline`), text to video."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rlr_trainer.pipelines.adapter import Layout
from rlr_trainer.pipelines.conditioning import Rows
from rlr_trainer.pipelines.timesteps import with_flow_sigmas
from rlr_trainer.pipelines.video import VideoAdapter, call_default


class HunyuanVideoAdapter(VideoAdapter):
    """Adapter of `diffusers.HunyuanVideoPipeline`, whose guidance scale is an input of the network. It takes no `true_cfg_scale`.

    Attributes:
        prompt_template: what a prompt is put in for the Llama, as the argument of the pipeline's call.
        max_sequence_length: tokens of a prompt for the Llama, as the argument of the pipeline's call.

    Raises:
        ValueError: a transformer that takes a picture beside the latents or no guidance scale, or a pipeline without a text encoder.
    """

    lora_targets = ("to_q", "to_k", "to_v", "to_out.0")
    task = "text-to-video"
    text_encoders = ("text_encoder", "text_encoder_2")

    def __init__(self, pipeline: Any) -> None:
        super().__init__(pipeline)
        config = pipeline.transformer.config
        self.check_channels(pipeline.vae.config.latent_channels, "the VAE makes", "an image-to-video")
        self.check_encoders(self.text_encoders, "prompts cannot be encoded")
        if config.image_condition_type is not None:
            raise ValueError(
                f"the transformer has image_condition_type={config.image_condition_type!r}: it starts from a picture; use a text-to-video model"
            )
        if not config.guidance_embeds:
            raise ValueError("the transformer has guidance_embeds=False, but HunyuanVideoPipeline hands it a guidance scale")
        self.prompt_template: dict[str, Any] = call_default(pipeline, "prompt_template")
        self.max_sequence_length: int = call_default(pipeline, "max_sequence_length")

    def layout(self, height: int | None, width: int | None, num_frames: int | None = None) -> Layout:
        """Latents [C, 1 + (F - 1) / p, H / f, W / f], f and p the VAE's factors; ValueError for a size that does not fit."""
        config, pipeline = self.pipeline.transformer.config, self.pipeline
        factor, period = pipeline.vae_scale_factor_spatial, pipeline.vae_scale_factor_temporal
        rule = f"the pipeline's 16, and the VAE's scale factor {factor} times the transformer's patch of {config.patch_size}"
        height, width, num_frames = self.video_size(
            height, width, num_frames, multiple=math.lcm(16, factor * config.patch_size), rule=rule, period=period
        )
        frames = (num_frames - 1) // period + 1
        return Layout((config.in_channels, frames, height // factor, width // factor), height, width, num_frames)

    def timestep_arguments(self, layout: Layout, num_steps: int) -> dict[str, Any]:
        """Sigmas from 1 to 1 / T, before the scheduler's shift."""
        return with_flow_sigmas(self.pipeline.scheduler, num_steps, {})

    def encode_prompts(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """The Llama's states [N, tokens, width] with their mask [N, tokens], and CLIP's pooled states [N, width]."""
        states, pooled, mask = self.pipeline.encode_prompt(
            list(prompts),
            prompt_template=self.prompt_template,
            device=self.pipeline.text_encoder.device,
            max_sequence_length=self.max_sequence_length,
        )
        return {"encoder_hidden_states": states, "encoder_attention_mask": mask, "pooled_projections": pooled}

    def is_guided(self, guidance_scale: float) -> bool:
        """Never: the pipeline's guidance scale is an input of the network."""
        return False

    def batch_inputs(self, layout: Layout, guidance_scale: float) -> dict[str, Any]:
        """A thousand times the guidance scale, [1]."""
        return {"guidance": torch.tensor([1000.0 * guidance_scale])}

    def call(self, network: Callable[..., Tensor], x: Tensor, time: Tensor, rows: Rows, batch: Mapping[str, Any]) -> Tensor:
        """One call of the transformer, [N, C, F, h, w]; time and guidance scale as one number per sample."""
        count = x.shape[0]
        return network(x, timestep=time.expand(count), guidance=batch["guidance"].to(x.device).expand(count), **rows)
