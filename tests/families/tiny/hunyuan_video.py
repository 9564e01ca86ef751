"""A tiny HunyuanVideo of the real classes: videos of 5 frames of 16 x 16, prompts through a Llama and CLIP."""

from __future__ import annotations

from typing import Any

import torch
from families.chat_tokenizers import mistral_tokenizer
from families.tokenizers import CLIP_SPECIAL_TOKENS, CLIP_VOCAB_SIZE, clip_tokenizer

SIZE = {"height": 16, "width": 16, "num_frames": 5}
WIDTH = 16  # of each encoder


def make_pipeline(**transformer_options: Any) -> Any:
    """A `HunyuanVideoPipeline` with the same random weights at every call; `transformer_options` are exchanged in its configuration."""
    from diffusers import (
        AutoencoderKLHunyuanVideo,
        FlowMatchEulerDiscreteScheduler,
        HunyuanVideoPipeline,
        HunyuanVideoTransformer3DModel,
    )
    from transformers import CLIPTextConfig, CLIPTextModel, LlamaConfig, LlamaModel

    tokenizer = mistral_tokenizer()
    tokenizer.padding_side = "right"
    llama = LlamaConfig(
        hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2, vocab_size=len(tokenizer),
        initializer_range=0.3, bos_token_id=1, eos_token_id=2, pad_token_id=3,
    )  # fmt: skip
    clip = CLIPTextConfig(
        hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, vocab_size=CLIP_VOCAB_SIZE,
        max_position_embeddings=77, initializer_range=0.3, **CLIP_SPECIAL_TOKENS,
    )  # fmt: skip
    options = {
        "in_channels": 4, "out_channels": 4, "num_attention_heads": 2, "attention_head_dim": 10, "num_layers": 1, "num_single_layers": 1,
        "num_refiner_layers": 1, "text_embed_dim": WIDTH, "pooled_projection_dim": WIDTH, "rope_axes_dim": (2, 4, 4),
    }  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        transformer = HunyuanVideoTransformer3DModel(**options | transformer_options)
        vae = AutoencoderKLHunyuanVideo(
            down_block_types=("HunyuanVideoDownBlock3D",) * 3, up_block_types=("HunyuanVideoUpBlock3D",) * 3, block_out_channels=(8, 8, 8),
            latent_channels=4, layers_per_block=1, norm_num_groups=4, spatial_compression_ratio=4, scaling_factor=0.8,
        )  # fmt: skip
        text_encoder, text_encoder_2 = LlamaModel(llama), CLIPTextModel(clip)
    pipeline = HunyuanVideoPipeline(
        text_encoder=text_encoder.eval(), tokenizer=tokenizer, text_encoder_2=text_encoder_2.eval(), tokenizer_2=clip_tokenizer(77),
        transformer=transformer.eval(), vae=vae.eval(), scheduler=FlowMatchEulerDiscreteScheduler(shift=7.0),
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
