"""A tiny CogVideoX of the real classes: videos of 4 frames of 16 x 16, prompts through a T5."""

from __future__ import annotations

from typing import Any

import torch
from families.short_prompts import TOKENS
from families.tokenizers import T5_VOCAB_SIZE, t5_tokenizer

SIZE = {"height": 16, "width": 16, "num_frames": 4}
ROTARY = {"use_rotary_positional_embeddings": True}  # of the 5B
VERSION_1_5 = {**ROTARY, "patch_size_t": 2, "patch_bias": False}


def make_pipeline(**transformer_options: Any) -> Any:
    """A `CogVideoXPipeline` with the same random weights at every call; `transformer_options` are exchanged in the configuration."""
    from diffusers import AutoencoderKLCogVideoX, CogVideoXDDIMScheduler, CogVideoXPipeline, CogVideoXTransformer3DModel
    from transformers import T5Config, T5EncoderModel

    t5 = T5Config(d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, vocab_size=T5_VOCAB_SIZE)
    options = {
        "in_channels": 4, "out_channels": 4, "num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 16, "text_embed_dim": 16,
        "time_embed_dim": 16, "sample_height": 12, "sample_width": 12, "sample_frames": 5, "temporal_compression_ratio": 2,
        "max_text_seq_length": TOKENS,
    }  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        transformer = CogVideoXTransformer3DModel(**options | transformer_options)
        vae = AutoencoderKLCogVideoX(
            down_block_types=("CogVideoXDownBlock3D",) * 2, up_block_types=("CogVideoXUpBlock3D",) * 2, block_out_channels=(8, 8),
            latent_channels=4, layers_per_block=1, norm_num_groups=4, temporal_compression_ratio=2, sample_height=24, sample_width=24,
            scaling_factor=0.8,
        )  # fmt: skip
        text_encoder = T5EncoderModel(t5)
    scheduler = CogVideoXDDIMScheduler(
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        snr_shift_scale=3.0,
        timestep_spacing="trailing",
        clip_sample=False,
    )
    pipeline = CogVideoXPipeline(
        tokenizer=t5_tokenizer(),
        text_encoder=text_encoder.eval(),
        vae=vae.eval(),
        transformer=transformer.eval(),
        scheduler=scheduler,
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
