"""A tiny Wan of the real classes: videos of 3 frames of 16 x 16, prompts through a UMT5; with one denoiser or two."""

from __future__ import annotations

from typing import Any

import torch
from families.tokenizers import T5_VOCAB_SIZE, t5_tokenizer

SIZE = {"height": 16, "width": 16, "num_frames": 3}


def make_pipeline(boundary_ratio: float | None = None, expand_timesteps: bool = False, **transformer_options: Any) -> Any:
    """A `WanPipeline` with the same random weights at every call.

    Args:
        boundary_ratio: share of the training times from which on its first denoiser works; None for one denoiser.
        expand_timesteps: whether the transformer is told a time per token.
        transformer_options: exchanged in the transformers' configuration.
    """
    from diffusers import AutoencoderKLWan, UniPCMultistepScheduler, WanPipeline, WanTransformer3DModel
    from transformers import UMT5Config, UMT5EncoderModel

    t5 = UMT5Config(d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, vocab_size=T5_VOCAB_SIZE)
    options = {
        "in_channels": 4, "out_channels": 4, "num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 12, "text_dim": 16,
        "freq_dim": 16, "ffn_dim": 32, "rope_max_seq_len": 32,
    }  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        networks = [
            WanTransformer3DModel(**options | transformer_options).eval() for _ in range(1 if boundary_ratio is None else 2)
        ]
        vae = AutoencoderKLWan(
            base_dim=8, z_dim=4, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[True], scale_factor_temporal=2,
            scale_factor_spatial=2, latents_mean=[0.1, -0.2, 0.3, -0.1], latents_std=[1.2, 0.8, 1.5, 0.7],
        )  # fmt: skip
        text_encoder = UMT5EncoderModel(t5)
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0)
    pipeline = WanPipeline(
        tokenizer=t5_tokenizer(), text_encoder=text_encoder.eval(), vae=vae.eval(), scheduler=scheduler, transformer=networks[0],
        transformer_2=networks[1] if len(networks) > 1 else None, boundary_ratio=boundary_ratio, expand_timesteps=expand_timesteps,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
