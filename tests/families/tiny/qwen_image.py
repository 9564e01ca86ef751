"""A tiny Qwen-Image of the real classes: pictures of 16 x 16, prompts through a Qwen2.5-VL."""

from __future__ import annotations

from typing import Any

import torch
from families.chat_tokenizers import qwen_tokenizer

WIDTH = 16  # of the text encoder


def make_pipeline(**transformer_options: Any) -> Any:
    """A `QwenImagePipeline` with the same random weights at every call.

    Args:
        transformer_options: exchanged in the transformer's configuration.
    """
    from diffusers import (
        AutoencoderKLQwenImage,
        FlowMatchEulerDiscreteScheduler,
        QwenImagePipeline,
        QwenImageTransformer2DModel,
    )

    tokenizer = qwen_tokenizer()
    options = {
        "in_channels": 16, "out_channels": 4, "num_layers": 2, "attention_head_dim": 16, "num_attention_heads": 2,
        "joint_attention_dim": WIDTH, "axes_dims_rope": (8, 4, 4),
    }  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        transformer = QwenImageTransformer2DModel(**options | transformer_options)
        vae = AutoencoderKLQwenImage(
            base_dim=8, z_dim=4, dim_mult=[1, 1], num_res_blocks=1, temperal_downsample=[False],
            latents_mean=[0.1, -0.2, 0.3, -0.1], latents_std=[1.2, 0.8, 1.5, 0.7],
        )  # fmt: skip
        text_encoder = _qwen25_vl(len(tokenizer))
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, max_image_seq_len=8192, shift_terminal=0.02
    )
    pipeline = QwenImagePipeline(
        scheduler=scheduler, vae=vae.eval(), text_encoder=text_encoder.eval(), tokenizer=tokenizer, transformer=transformer.eval()
    )
    pipeline.default_sample_size = 8  # 128 in every QwenImagePipeline: 1024 pixels
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _qwen25_vl(vocab_size: int) -> Any:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    config = Qwen2_5_VLConfig(
        text_config={
            "hidden_size": WIDTH, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 2,
            "vocab_size": vocab_size, "initializer_range": 0.3, "bos_token_id": None, "eos_token_id": 0, "pad_token_id": 0,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [1, 1, 2]},
        },
        vision_config={"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": WIDTH},
    )  # fmt: skip
    return Qwen2_5_VLForConditionalGeneration(config)
