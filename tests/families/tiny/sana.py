"""A tiny Sana of the real classes: pictures of 32 x 32, prompts through a Gemma 2; and its distilled Sana-Sprint."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from families.tokenizers_gemma import gemma_tokenizer

WIDTH = 16  # of the text encoder
FLOW = {"use_flow_sigmas": True, "flow_shift": 3.0, "prediction_type": "flow_prediction"}  # of the released scheduler


def make_pipeline(scheduler: Any = None, timestep_scale: float = 1.0, levels: int = 3, sample_size: int = 8) -> Any:
    """A `SanaPipeline` with the same random weights at every call.

    Args:
        scheduler: by default the multistep solver of the released pipelines, which the sampler "auto" replaces.
        timestep_scale: of the transformer.
        levels: of the autoencoder, which makes 2^(levels - 1) pixels of one latent; 6 of those that are released.
        sample_size: side of the latents that the transformer is made for.
    """
    from diffusers import DPMSolverMultistepScheduler, SanaPipeline

    scheduler = scheduler or DPMSolverMultistepScheduler(**FLOW)
    return _make(SanaPipeline, scheduler, levels, timestep_scale=timestep_scale, sample_size=sample_size)


def make_sprint() -> Any:
    """A `SanaSprintPipeline` with the same random weights at every call."""
    from diffusers import SanaSprintPipeline, SCMScheduler

    return _make(SanaSprintPipeline, SCMScheduler(), 3, sample_size=8, guidance_embeds=True, qk_norm="rms_norm_across_heads")


def _make(pipeline_class: Any, scheduler: Any, levels: int, **transformer_options: Any) -> Any:
    from diffusers import AutoencoderDC, SanaTransformer2DModel
    from transformers import Gemma2Config, Gemma2Model

    instruction = inspect.signature(pipeline_class.__call__).parameters["complex_human_instruction"].default
    tokenizer = gemma_tokenizer(" ".join(instruction))
    gemma = Gemma2Config(
        hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1, head_dim=8,
        query_pre_attn_scalar=8, vocab_size=len(tokenizer), sliding_window=64, max_position_embeddings=1024, initializer_range=0.3,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        transformer = SanaTransformer2DModel(
            in_channels=4, out_channels=4, num_layers=2, num_attention_heads=2, attention_head_dim=8, num_cross_attention_heads=2,
            cross_attention_head_dim=8, cross_attention_dim=16, caption_channels=WIDTH, patch_size=1, **transformer_options,
        )  # fmt: skip
        vae = AutoencoderDC(latent_channels=4, attention_head_dim=4, scaling_factor=0.41407, **_levels(levels))
        text_encoder = Gemma2Model(gemma)
    pipeline = pipeline_class(
        transformer=transformer.eval(), vae=vae.eval(), text_encoder=text_encoder.eval(), tokenizer=tokenizer, scheduler=scheduler
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _levels(count: int) -> dict[str, Any]:
    """Options of an `AutoencoderDC` whose encoder and decoder have `count` levels, attention on the last one."""
    last = count - 1
    one = {
        "block_types": ("ResBlock",) * last + ("EfficientViTBlock",),
        "block_out_channels": (8,) * count,
        "layers_per_block": (1,) * count,
        "qkv_multiscales": ((),) * last + ((5,),),
    }
    return {f"{part}_{name}": value for part in ("encoder", "decoder") for name, value in one.items()}
