"""AnimateDiff on Stable Diffusion 1.x (`AnimateDiffPipeline`)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from rlr_trainer.pipelines.adapter import Layout, check_sides
from rlr_trainer.pipelines.conditioning import Rows
from rlr_trainer.pipelines.stable_diffusion import StableDiffusionAdapter
from rlr_trainer.pipelines.video import call_default


class AnimateDiffAdapter(StableDiffusionAdapter):
    """Adapter of `diffusers.AnimateDiffPipeline`: a Stable Diffusion whose UNet has motion modules between the frames.

    LoRA weights go to the attention of both, pictures and motion.

    Raises:
        ValueError: as `StableDiffusionAdapter`; a UNet that takes the guidance scale, or FreeInit or FreeNoise, which sample in another way.
    """

    undivided = None

    def __init__(self, pipeline: Any) -> None:
        super().__init__(pipeline)
        self.rescales_guidance = False
        if pipeline.unet.config.time_cond_proj_dim is not None:
            raise ValueError(
                f"the UNet has time_cond_proj_dim={pipeline.unet.config.time_cond_proj_dim}, an input for the guidance scale that "
                "AnimateDiffPipeline does not feed; use a Stable Diffusion that is not distilled to take it"
            )
        for name in ("free_init", "free_noise"):
            if getattr(pipeline, f"{name}_enabled"):
                raise ValueError(
                    f"{name}_enabled=True: its way of sampling is not that of training; call pipeline.disable_{name}()"
                )

    def layout(self, height: int | None, width: int | None, num_frames: int | None = None) -> Layout:
        """Latents [C, F, H / f, W / f], f the VAE's scale factor; ValueError for a size that does not fit, or more frames than positions."""
        unet, factor = self.pipeline.unet.config, self.pipeline.vae_scale_factor
        rule = f"the pipeline's 8, and the VAE's scale factor {factor}"
        check_sides(height, width, math.lcm(8, factor), rule)
        own, most = unet.sample_size * factor, unet.motion_max_seq_length
        frames = call_default(self.pipeline, "num_frames") if num_frames is None else num_frames
        if not 0 < frames <= most:
            nearest = most if frames > 0 else 1
            raise ValueError(
                f"num_frames={frames}: must be 1 to {most}, the positions of the motion modules; the nearest is {nearest}"
            )
        height, width = height or own, width or own
        return Layout((unet.in_channels, frames, height // factor, width // factor), height, width, frames)

    def call(self, network: Callable[..., Tensor], x: Tensor, time: Tensor, rows: Rows, batch: Mapping[str, Any]) -> Tensor:
        """The UNet's output [N, C, F, h, w]; every frame gets its prompt."""
        states = rows["encoder_hidden_states"].repeat_interleave(x.shape[2], dim=0)
        return network(x, time, encoder_hidden_states=states)

    def unpack(self, latents: Tensor, layout: Layout) -> Tensor:
        """Latents [N, C, F, h, w] as pictures [N F, C, h, w], in the VAE's scale."""
        return super().unpack(latents.transpose(1, 2).flatten(0, 1), layout)

    def decoded(self, latents: Tensor) -> Tensor:
        """Pictures [N F, 3, H, W] of latents [N F, C, h, w]; in chunks a frame at a time."""
        decoded = super().decoded
        return torch.cat([decoded(frame) for frame in latents.split(1)]) if self.decodes_in_chunks else decoded(latents)

    def decode(self, latents: Tensor, layout: Layout) -> Tensor:
        """Latents [N, C, F, h, w] to videos [N, F, 3, H, W], frame by frame; see `PipelineAdapter.decode`."""
        return super().decode(latents, layout).unflatten(0, latents.shape[:3:2])
