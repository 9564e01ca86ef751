"""A tiny Flux.1 of the real classes: pictures of 16 x 16, prompts through CLIP and T5."""

from __future__ import annotations

from typing import Any

import torch
from families.tokenizers import CLIP_SPECIAL_TOKENS, CLIP_VOCAB_SIZE, T5_VOCAB_SIZE, clip_tokenizer, t5_tokenizer

WIDTH = 16  # of each encoder


def make_pipeline(schnell: bool = False, pipeline_class: str = "FluxPipeline") -> Any:
    """A pipeline with the same random weights at every call.

    Args:
        schnell: without an input for the guidance scale, and without a shift by the number of tokens.
        pipeline_class: one of diffusers' classes of these parts.
    """
    import diffusers
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxTransformer2DModel
    from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

    clip = CLIPTextConfig(
        hidden_size=WIDTH, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        vocab_size=CLIP_VOCAB_SIZE, max_position_embeddings=32, initializer_range=0.3, **CLIP_SPECIAL_TOKENS,
    )  # fmt: skip
    t5 = T5Config(d_model=WIDTH, d_kv=8, d_ff=32, num_layers=1, num_heads=2, vocab_size=T5_VOCAB_SIZE)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        transformer = FluxTransformer2DModel(
            in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=WIDTH, pooled_projection_dim=WIDTH, axes_dims_rope=(4, 4, 8), guidance_embeds=not schnell,
        )  # fmt: skip
        for name, layer in transformer.named_modules():
            if name.endswith(("to_v", "add_v_proj")):
                layer.weight.data *= 4  # what a token tells the others is seen among 512 tokens of the prompt
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, block_out_channels=(8, 8),
            norm_num_groups=4, layers_per_block=1, latent_channels=4, sample_size=16, scaling_factor=0.4, shift_factor=0.1,
            use_quant_conv=False, use_post_quant_conv=False,
        )  # fmt: skip
        vae.encoder.conv_out.weight.data *= 8  # latents of pictures in the scale of noise
        text_encoder, text_encoder_2 = CLIPTextModel(clip).eval(), T5EncoderModel(t5).eval()
    shift = {"shift": 1.0} if schnell else {"shift": 3.0, "use_dynamic_shifting": True}
    pipeline = getattr(diffusers, pipeline_class)(
        scheduler=FlowMatchEulerDiscreteScheduler(**shift), vae=vae.eval(), transformer=transformer.eval(),
        text_encoder=text_encoder, tokenizer=clip_tokenizer(), text_encoder_2=text_encoder_2, tokenizer_2=t5_tokenizer(),
    )  # fmt: skip
    pipeline.default_sample_size = 8  # 128 in every FluxPipeline: 1024 pixels
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
