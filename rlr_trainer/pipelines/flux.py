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
        taken, made = pipeline.transformer.config.in_channels, 4 * pipeline.vae.config.latent_channels
        if taken != made:
            raise ValueError(
                f"the transformer takes {taken} channels but packed latents have {made}: an inpainting or control model, which this "
                "adapter cannot sample; use a text-to-image model"
            )
        for name in self.text_encoders:
            if getattr(pipeline, name) is None:
                raise ValueError(f"{name}=None: prompts go through both text encoders; load the pipeline with it")

    def layout(self, height: int | None, width: int | None, num_frames: int | None = None) -> Layout:
        """Packed latents [H / 2f * W / 2f, 4C], f the VAE's scale factor; ValueError for a size that is not a multiple of 2f."""
        factor = self.pipeline.vae_scale_factor
        own = self.pipeline.default_sample_size * factor
        rule = f"twice the VAE's scale factor {factor}, because latents are packed 2 x 2"
        height, width = self.picture_size(height, width, num_frames, default=(own, own), multiple=2 * factor, rule=rule)
        tokens = (height // (2 * factor)) * (width // (2 * factor))
        return Layout((tokens, self.pipeline.transformer.config.in_channels), height, width)

    def timestep_arguments(self, layout: Layout, num_steps: int) -> dict[str, Any]:
        """Sigmas from 1 to 1 / T, and `mu` of the number of tokens, which schedulers without dynamic shifting ignore."""
        from diffusers.pipelines.flux.pipeline_flux import calculate_shift

        scheduler = self.pipeline.scheduler.config
        mu = calculate_shift(
            layout.shape[0],
            scheduler.get("base_image_seq_len", 256),
            scheduler.get("max_image_seq_len", 4096),
            scheduler.get("base_shift", 0.5),
            scheduler.get("max_shift", 1.15),
        )
        if scheduler.get("use_flow_sigmas"):  # of schedulers of other classes, which make their own
            return {"mu": mu}
        return {"sigmas": torch.linspace(1, 1 / num_steps, num_steps, dtype=torch.float64).tolist(), "mu": mu}

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
