"""A tiny Z-Image of the real classes: pictures of 16 x 16, prompts through a Qwen3."""

from __future__ import annotations

from typing import Any

import torch
from families.chat_tokenizers import qwen_tokenizer

WIDTH = 16  # of the text encoder


def make_pipeline(**transformer_options: Any) -> Any:
    """A `ZImagePipeline` with the same random weights at every call.

    Args:
        transformer_options: exchanged in the transformer's configuration.
    """
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, ZImagePipeline, ZImageTransformer2DModel
    from transformers import Qwen3Config, Qwen3Model

    tokenizer = qwen_tokenizer()
    qwen3 = Qwen3Config(
        hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2, num_key_value_heads=2, head_dim=8,
        vocab_size=len(tokenizer), initializer_range=0.3, bos_token_id=None, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    options = {
        "in_channels": 4, "dim": 32, "n_layers": 2, "n_refiner_layers": 1, "n_heads": 2, "n_kv_heads": 2, "cap_feat_dim": WIDTH,
        "axes_dims": [8, 4, 4], "axes_lens": [256, 256, 256],
    }  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        transformer = ZImageTransformer2DModel(**options | transformer_options)
        for token in (transformer.x_pad_token, transformer.cap_pad_token):
            torch.nn.init.normal_(token)  # zeros as diffusers makes them
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, block_out_channels=(8, 8),
            norm_num_groups=4, layers_per_block=1, latent_channels=4, sample_size=16, scaling_factor=0.4, shift_factor=0.1,
            use_quant_conv=False, use_post_quant_conv=False,
        )  # fmt: skip
        text_encoder = Qwen3Model(qwen3)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=False)
    pipeline = ZImagePipeline(
        scheduler=scheduler, vae=vae.eval(), text_encoder=text_encoder.eval(), tokenizer=tokenizer, transformer=transformer.eval()
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
