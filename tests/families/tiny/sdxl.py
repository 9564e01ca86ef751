"""A Stable Diffusion XL pipeline of 16 x 16 pixels, with random weights from a fixed seed."""

from __future__ import annotations

from typing import Any

import torch
from families.tokenizers import CLIP_SPECIAL_TOKENS, CLIP_VOCAB_SIZE, clip_tokenizer


def make_pipeline(time_cond_proj_dim: int | None = None, vae: dict[str, Any] | None = None, **unet: Any) -> Any:
    """A `StableDiffusionXLPipeline`, with the base model's scheduler, but on steps that end later.

    The base model's "leading" steps end at timestep 1, where the output of a network hardly changes the picture.

    Args:
        time_cond_proj_dim: of a UNet that takes the guidance scale as an input.
        vae: options of the VAE's config.
        unet: options of the UNet's config.
    """
    from diffusers import AutoencoderKL, EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    text = CLIPTextConfig(
        vocab_size=CLIP_VOCAB_SIZE, hidden_size=16, intermediate_size=16, num_attention_heads=2, num_hidden_layers=2,
        max_position_embeddings=32, projection_dim=16, **CLIP_SPECIAL_TOKENS,
    )  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        denoiser = UNet2DConditionModel(
            **{
                "sample_size": 8, "block_out_channels": (8, 16), "layers_per_block": 1, "norm_num_groups": 4,
                "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"), "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"),
                "attention_head_dim": (1, 2), "transformer_layers_per_block": 1, "use_linear_projection": True,
                "cross_attention_dim": 32, "addition_embed_type": "text_time", "addition_time_embed_dim": 8,
                "projection_class_embeddings_input_dim": 6 * 8 + 16, "time_cond_proj_dim": time_cond_proj_dim,
            } | unet
        )  # fmt: skip
        for weight in denoiser.parameters():
            if weight.dim() > 1:  # so that prompt, time and size change the picture clearly
                weight.data.mul_(1.6)
        decoder = AutoencoderKL(
            block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4, latent_channels=4,
            down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, **(vae or {}),
        )  # fmt: skip
        encoders = CLIPTextModel(text), CLIPTextModelWithProjection(text)
        for encoder in encoders:  # CLIP starts with embeddings of 0.02, which tell prompts hardly apart
            encoder.get_input_embeddings().weight.data.normal_()
    pipeline = StableDiffusionXLPipeline(
        vae=decoder.eval(), text_encoder=encoders[0].eval(), text_encoder_2=encoders[1].eval(), tokenizer=clip_tokenizer(),
        tokenizer_2=clip_tokenizer(pad_token="!"), unet=denoiser.eval(), add_watermarker=False,
        scheduler=EulerDiscreteScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="trailing"
        ),
    )  # fmt: skip
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
