"""Flux.1 dev and schnell (`FluxPipeline`)."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rlr_trainer.pipelines.adapter import Layout, PipelineAdapter
from rlr_trainer.pipelines.conditioning import Rows
from rlr_trainer.pipelines.packing import patched_size
from rlr_trainer.pipelines.timesteps import shift_of_tokens, with_flow_sigmas

logger = logging.getLogger(__name__)


class FluxAdapter(PipelineAdapter):
    """Adapter of `diffusers.FluxPipeline`. The guidance scale is an input of the network (dev), or has no effect (schnell).

    Attributes:
        max_sequence_length: tokens of a prompt for T5, as the argument of the pipeline's call; set it to 256 for schnell.

    Raises:
        ValueError: a transformer that takes more than noisy latents (Fill, Depth, Canny), or a pipeline without a text encoder.
    """

    lora_targets = (
        "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0",
        "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out",
        "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2",
    )  # fmt: skip
    text_encoders = ("text_encoder", "text_encoder_2")
    max_sequence_length = 512

    def __init__(self, pipeline: Any) -> None:
        super().__init__(pipeline)
        self.check_channels(4 * pipeline.vae.config.latent_channels, "packed latents have", "an inpainting or control")
        self.check_encoders(self.text_encoders, "prompts go through both text encoders")

    def layout(self, height: int | None, width: int | None, num_frames: int | None = None) -> Layout:
        """Packed latents [H / 2f * W / 2f, 4C], f the VAE's scale factor; ValueError for a size that is not a multiple of 2f."""
        height, width, rows, columns = patched_size(self, height, width, num_frames)
        return Layout((rows * columns, self.pipeline.transformer.config.in_channels), height, width)

    def timestep_arguments(self, layout: Layout, num_steps: int) -> dict[str, Any]:
        """Sigmas from 1 to 1 / T, and `mu` of the number of tokens, which schedulers without dynamic shifting ignore."""
        mu = {"mu": shift_of_tokens(self.pipeline.scheduler, layout.shape[0])}
        return with_flow_sigmas(self.pipeline.scheduler, num_steps, mu)

    def encode_prompts(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """States of T5 [N, tokens, width] and the pooled ones of CLIP [N, width]."""
        device = self.pipeline.text_encoder.device
        states, pooled, _ = self.pipeline.encode_prompt(
            list(prompts), None, device=device, max_sequence_length=self.max_sequence_length
        )
        return {"encoder_hidden_states": states, "pooled_projections": pooled}

    def is_guided(self, guidance_scale: float) -> bool:
        """Never: the pipeline's guidance scale is an input of the network."""
        return False

    def batch_inputs(self, layout: Layout, guidance_scale: float) -> dict[str, Any]:
        """Positions of the tokens [L, 3]; and the guidance scale [1], where the network takes it."""
        inputs = {"img_ids": self._positions(layout)}
        if self.pipeline.transformer.config.guidance_embeds:
            inputs["guidance"] = torch.tensor([guidance_scale])
        elif guidance_scale > 1:
            _warn_of_unused_guidance()
        return inputs

    def _positions(self, layout: Layout) -> Tensor:
        side = 2 * self.pipeline.vae_scale_factor
        return self.pipeline._prepare_latent_image_ids(1, layout.height // side, layout.width // side, "cpu", torch.float32)

    def call(self, network: Callable[..., Tensor], x: Tensor, time: Tensor, rows: Rows, batch: Mapping[str, Any]) -> Tensor:
        """One call of the transformer, [N, L, 4C]; prompts have no positions, and the time is a share of 1."""
        count, states = x.shape[0], rows["encoder_hidden_states"]
        guidance = batch["guidance"].to(x.device).expand(count) if "guidance" in batch else None
        return network(
            x,
            timestep=time.expand(count) / 1000,
            txt_ids=x.new_zeros(states.shape[1], 3),
            img_ids=batch["img_ids"].to(x.device),
            guidance=guidance,
            **rows,
        )

    def unpack(self, latents: Tensor, layout: Layout) -> Tensor:
        """Latents [N, L, 4C] as [N, C, h, w], in the VAE's scale and shift."""
        config = self.decoder.config
        latents = self.pipeline._unpack_latents(latents, layout.height, layout.width, self.pipeline.vae_scale_factor)
        return latents / config.scaling_factor + config.shift_factor


@functools.cache  # once per process
def _warn_of_unused_guidance() -> None:
    logger.warning("sample_guidance_scale has no effect: this transformer (as Flux.1 schnell) has no input for it; set it to 1")
