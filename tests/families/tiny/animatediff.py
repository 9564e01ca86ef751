"""A tiny AnimateDiff of the real classes: videos of 3 frames of 16 x 16."""

from __future__ import annotations

from typing import Any

import torch
from families.tokenizers import CLIP_SPECIAL_TOKENS, CLIP_VOCAB_SIZE, clip_tokenizer

SIZE = {"height": 16, "width": 16, "num_frames": 3}


def make_pipeline(**unet_options: Any) -> Any:
    """An `AnimateDiffPipeline` with the same random weights at every call.

    Args:
        unet_options: exchanged in the UNet's configuration.
    """
    from diffusers import AnimateDiffPipeline, AutoencoderKL, DDIMScheduler, MotionAdapter, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    clip = CLIPTextConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=CLIP_VOCAB_SIZE,
        max_position_embeddings=32, initializer_range=0.3, **CLIP_SPECIAL_TOKENS,
    )  # fmt: skip
    options = {
        "sample_size": 8, "in_channels": 4, "out_channels": 4, "layers_per_block": 1, "block_out_channels": (8,), "norm_num_groups": 4,
        "down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",),
        "cross_attention_dim": 16, "attention_head_dim": 2,
    }  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        unet = UNet2DConditionModel(**options | unet_options)
        motion = MotionAdapter(
            block_out_channels=(8,), motion_layers_per_block=1, motion_norm_num_groups=2, motion_num_attention_heads=2,
            motion_max_seq_length=24,
        )  # fmt: skip
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, block_out_channels=(8, 8),
            norm_num_groups=4, layers_per_block=1, latent_channels=4, sample_size=16, scaling_factor=0.8,
        )  # fmt: skip
        text_encoder = CLIPTextModel(clip)
    scheduler = DDIMScheduler(beta_schedule="linear", steps_offset=1, clip_sample=False)
    pipeline = AnimateDiffPipeline(
        vae=vae.eval(), text_encoder=text_encoder.eval(), tokenizer=clip_tokenizer(), unet=unet.eval(), motion_adapter=motion.eval(),
        scheduler=scheduler,
    )  # fmt: skip
    pipeline.unet.eval()
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
