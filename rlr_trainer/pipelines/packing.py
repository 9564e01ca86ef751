"""Pictures whose latents a transformer takes in patches of 2 x 2 (Flux.1, Flux.2, Qwen-Image)."""

from __future__ import annotations

from rlr_trainer.pipelines.adapter import PipelineAdapter


def patched_size(
    adapter: PipelineAdapter, height: int | None, width: int | None, num_frames: int | None
) -> tuple[int, int, int, int]:
    """Height and width of a picture, in pixels and in patches, checked as by `PipelineAdapter.picture_size`."""
    factor = adapter.pipeline.vae_scale_factor
    own, side = adapter.pipeline.default_sample_size * factor, 2 * factor
    rule = f"twice the VAE's scale factor {factor}, because latents are packed 2 x 2"
    height, width = adapter.picture_size(height, width, num_frames, default=(own, own), multiple=side, rule=rule)
    return height, width, height // side, width // side
