"""The bundled Stable Diffusion pipeline with the sampler of latent consistency models."""

from __future__ import annotations

from typing import Any

import torch
from families.tiny import stable_diffusion


def make_pipeline(distilled: bool = True, pipeline_class: str = "StableDiffusionPipeline") -> Any:
    """A fresh pipeline of 32 x 32 pixels.

    Args:
        distilled: the UNet takes the guidance scale as an input (LCM-Dreamshaper); False is a UNet as LCM-LoRA leaves it.
        pipeline_class: "StableDiffusionPipeline" or "LatentConsistencyModelPipeline".
    """
    import diffusers

    pipeline = stable_diffusion.make_pipeline()
    parts = {**pipeline.components, "scheduler": diffusers.LCMScheduler.from_config(pipeline.scheduler.config)}
    if distilled:
        parts["unet"] = with_guidance_input(pipeline.unet)
    made = getattr(diffusers, pipeline_class)(**parts, requires_safety_checker=False)
    made.set_progress_bar_config(disable=True)
    return made


def with_guidance_input(unet: Any) -> Any:
    """The same UNet with one more layer, which takes the guidance scale."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        made = type(unet).from_config({**unet.config, "time_cond_proj_dim": 8})
    missing, _ = made.load_state_dict(unet.state_dict(), strict=False)
    assert missing == ["time_embedding.cond_proj.weight"]
    return made.eval()
