"""A tiny Stable Diffusion 3 of the real classes: pictures of 16 x 16, prompts through two CLIP encoders and a T5."""

from __future__ import annotations

from typing import Any

import torch
from families.tokenizers import CLIP_SPECIAL_TOKENS, CLIP_VOCAB_SIZE, T5_VOCAB_SIZE, clip_tokenizer, t5_tokenizer

WIDTH = 16  # of each encoder; the transformer takes both CLIPs' states side by side


def make_pipeline(t5: bool = True, dynamic_shifting: bool = False) -> Any:
    """A `StableDiffusion3Pipeline` with the same random weights at every call.

    Args:
        t5: whether it has its third encoder.
        dynamic_shifting: whether its scheduler shifts by the number of patches.
    """
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

    clip = CLIPTextConfig(
        hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, projection_dim=WIDTH,
        vocab_size=CLIP_VOCAB_SIZE, max_position_embeddings=32, initializer_range=0.3, **CLIP_SPECIAL_TOKENS,
    )  # fmt: skip
    t5_config = T5Config(d_model=2 * WIDTH, d_kv=8, d_ff=32, num_layers=1, num_heads=2, vocab_size=T5_VOCAB_SIZE)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        transformer = SD3Transformer2DModel(
            sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=2,
            joint_attention_dim=2 * WIDTH, caption_projection_dim=16, pooled_projection_dim=2 * WIDTH, pos_embed_max_size=12,
            dual_attention_layers=(0,), qk_norm="rms_norm",
        )  # fmt: skip
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, block_out_channels=(8, 8),
            norm_num_groups=4, layers_per_block=1, latent_channels=4, sample_size=16, scaling_factor=1.5, shift_factor=0.06,
            use_quant_conv=False, use_post_quant_conv=False,
        )  # fmt: skip
        encoders = {name: CLIPTextModelWithProjection(clip).eval() for name in ("text_encoder", "text_encoder_2")}
        third = T5EncoderModel(t5_config).eval()
    with torch.no_grad():  # with diffusers' own weights the pictures are mostly their noise, and hardly anything can be learnt
        for name, parameter in transformer.named_parameters():
            if name.endswith(("proj_out.weight", "norm1.linear.weight", "norm1_context.linear.weight", "norm_out.linear.weight")):
                parameter *= 3
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=dynamic_shifting)
    pipeline = StableDiffusion3Pipeline(
        transformer=transformer.eval(), vae=vae.eval(), scheduler=scheduler, **encoders,
        tokenizer=clip_tokenizer(), tokenizer_2=clip_tokenizer(pad_token="!"),
        text_encoder_3=third if t5 else None, tokenizer_3=t5_tokenizer() if t5 else None,
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
