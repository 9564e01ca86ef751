"""A tiny PixArt-Sigma of the real classes: pictures of 16 x 16, prompts through a T5."""

from __future__ import annotations

from typing import Any

import torch
from families.tokenizers import T5_VOCAB_SIZE, t5_tokenizer

WIDTH = 16  # of the text encoder
NOISE = {
    "beta_schedule": "linear",
    "beta_end": 0.008,
}  # less than released, whose first steps enlarge what an untrained network says


def make_pipeline(scheduler: Any = None) -> Any:
    """A `PixArtSigmaPipeline` with the same random weights at every call.

    Args:
        scheduler: by default the multistep solver of the released pipelines, which the sampler "auto" replaces.
    """
    from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, PixArtSigmaPipeline, PixArtTransformer2DModel
    from transformers import T5Config, T5EncoderModel

    t5_config = T5Config(d_model=WIDTH, d_kv=8, d_ff=32, num_layers=1, num_heads=2, vocab_size=T5_VOCAB_SIZE)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        transformer = PixArtTransformer2DModel(
            sample_size=8, patch_size=2, in_channels=4, out_channels=8, num_layers=2, attention_head_dim=8, num_attention_heads=2,
            cross_attention_dim=16, caption_channels=WIDTH, use_additional_conditions=False, interpolation_scale=1,
        )  # fmt: skip
        # Normalization over small groups and attention would hide from rewards what LoRA weights do
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, block_out_channels=(8, 8),
            norm_num_groups=1, layers_per_block=1, latent_channels=4, sample_size=16, scaling_factor=0.13025, mid_block_add_attention=False,
        )  # fmt: skip
        text_encoder = T5EncoderModel(t5_config)
    for block in transformer.transformer_blocks:  # else an average over the prompt's tokens hardly depends on the prompt
        for layer in (block.attn2.to_q, block.attn2.to_k, block.attn2.to_v, block.attn2.to_out[0]):
            layer.weight.data *= 3
    pipeline = PixArtSigmaPipeline(
        transformer=transformer.eval(), vae=vae.eval(), text_encoder=text_encoder.eval(), tokenizer=t5_tokenizer(),
        scheduler=scheduler or DPMSolverMultistepScheduler(**NOISE),
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
