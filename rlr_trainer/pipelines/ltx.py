"""LTX-Video (`LTXPipeline`), text to video."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rlr_trainer.pipelines.adapter import Layout
from rlr_trainer.pipelines.conditioning import Rows
from rlr_trainer.pipelines.timesteps import shift_of_tokens, with_flow_sigmas
from rlr_trainer.pipelines.video import VideoAdapter


class LTXAdapter(VideoAdapter):
    """Adapter of `diffusers.LTXPipeline`.

    A decoder with `timestep_conditioning` removes noise too. It is told `decode_timestep`, and no noise is added before it, as the pipeline's
    call does with `decode_noise_scale=0.0` (its default is `decode_timestep`): a reward is a function of the latents.

    Attributes:
        frame_rate: pictures per second, as the argument of the pipeline's call.
        decode_timestep: the same.
        max_sequence_length: tokens of a prompt for T5, as the argument of the pipeline's call.

    Raises:
        ValueError: a transformer that takes other latents or several frames per patch, or a pipeline without a text encoder.
    """

    lora_targets = ("to_q", "to_k", "to_v", "to_out.0")
    task = "text-to-video"
    rescales_guidance = True
    frame_rate = 25
    decode_timestep = 0.0
    max_sequence_length = 128

    def __init__(self, pipeline: Any) -> None:
        super().__init__(pipeline)
        config = pipeline.transformer.config
        self.check_channels(
            pipeline.vae.config.latent_channels * config.patch_size**2, "packed latents have", "an image-conditioned"
        )
        self.check_encoders(self.text_encoders, "prompts cannot be encoded")
        if config.patch_size_t != 1:
            raise ValueError(f"the transformer has patch_size_t={config.patch_size_t}: must be 1, one latent frame per patch")

    def layout(self, height: int | None, width: int | None, num_frames: int | None = None) -> Layout:
        """Packed latents [F' H / fp W / fp, C p^2] of F' = 1 + (F - 1) / t frames; ValueError for a size that does not fit.

        f and t are the VAE's factors in space and time, p is the side of the transformer's patches.
        """
        config, factor = self.pipeline.transformer.config, self.pipeline.vae_spatial_compression_ratio
        rule = f"the pipeline's 32, and the VAE's scale factor {factor} times the transformer's patch of {config.patch_size}"
        height, width, num_frames = self.video_size(
            height, width, num_frames, multiple=math.lcm(32, factor * config.patch_size), rule=rule,
            period=self.pipeline.vae_temporal_compression_ratio,
        )  # fmt: skip
        tokens = math.prod(self._latent_size(height, width, num_frames)) // config.patch_size**2
        return Layout((tokens, config.in_channels), height, width, num_frames)

    def _latent_size(self, height: int, width: int, num_frames: int | None) -> tuple[int, int, int]:
        """Frames, height and width of latents before packing."""
        factor, period = self.pipeline.vae_spatial_compression_ratio, self.pipeline.vae_temporal_compression_ratio
        return ((num_frames or 1) - 1) // period + 1, height // factor, width // factor

    def timestep_arguments(self, layout: Layout, num_steps: int) -> dict[str, Any]:
        """Sigmas from 1 to 1 / T, and `mu` of the size of the latents, which schedulers without dynamic shifting ignore."""
        size = math.prod(self._latent_size(layout.height, layout.width, layout.num_frames))
        return with_flow_sigmas(self.pipeline.scheduler, num_steps, {"mu": shift_of_tokens(self.pipeline.scheduler, size)})

    def encode_prompts(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """T5's states [N, tokens, width] and their mask [N, tokens]."""
        device = self.pipeline.text_encoder.device
        states, mask, _, _ = self.pipeline.encode_prompt(
            list(prompts), do_classifier_free_guidance=False, device=device, max_sequence_length=self.max_sequence_length
        )
        return {"encoder_hidden_states": states, "encoder_attention_mask": mask}

    def batch_inputs(self, layout: Layout, guidance_scale: float) -> dict[str, Any]:
        """Size of the latents, and the scales of their positions: of a frame in seconds, and of a side in pixels."""
        factor, period = self.pipeline.vae_spatial_compression_ratio, self.pipeline.vae_temporal_compression_ratio
        names = ("num_frames", "height", "width")
        sizes = dict(zip(names, self._latent_size(layout.height, layout.width, layout.num_frames), strict=True))
        return {**sizes, "rope_interpolation_scale": (period / self.frame_rate, factor, factor)}

    def call(self, network: Callable[..., Tensor], x: Tensor, time: Tensor, rows: Rows, batch: Mapping[str, Any]) -> Tensor:
        """One call of the transformer, [N, L, C]; the time as one number per sample."""
        return network(x, timestep=time.expand(x.shape[0]), **rows, **batch)

    def unpack(self, latents: Tensor, layout: Layout) -> Tensor:
        """Latents [N, L, C] as [N, C, F', h, w], in the mean and standard deviation of the VAE's channels."""
        size, vae = self._latent_size(layout.height, layout.width, layout.num_frames), self.decoder
        latents = self.pipeline._unpack_latents(latents, *size, self.pipeline.transformer_spatial_patch_size)
        return self.pipeline._denormalize_latents(latents, vae.latents_mean, vae.latents_std, vae.config.scaling_factor)

    def decoded(self, latents: Tensor) -> Tensor:
        """See `PipelineAdapter`; the decoder is told its time, where it takes one."""
        vae = self.decoder
        time = torch.full(latents.shape[:1], self.decode_timestep, device=latents.device, dtype=latents.dtype)
        return vae.decode(latents, time if vae.config.timestep_conditioning else None, return_dict=False)[0]
