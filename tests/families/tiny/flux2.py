"""A tiny Flux.2 and a tiny Flux.2 klein of the real classes: pictures of 16 x 16, prompts through a Mistral 3 and a Qwen3."""

from __future__ import annotations

from typing import Any

import torch
from families.chat_tokenizers import mistral_tokenizer, qwen_tokenizer

WIDTH = 8  # of the text encoders, three of whose layers the transformer takes side by side


def make_pipeline(**transformer_options: Any) -> Any:
    """A `Flux2Pipeline` with the same random weights at every call; `transformer_options` are exchanged in its transformer's configuration.

    Its tokenizer is the one inside the real pipeline's `PixtralProcessor`, which does the same with texts (and needs torchvision).
    """
    from diffusers import Flux2Pipeline

    tokenizer = mistral_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        parts = _parts(guidance_embeds=True, **transformer_options)
        text_encoder = _mistral3(len(tokenizer)).eval()
    return _ready(Flux2Pipeline(text_encoder=text_encoder, tokenizer=tokenizer, **parts))


def make_klein(distilled: bool = False) -> Any:
    """A `Flux2KleinPipeline` with the same random weights at every call; `distilled` ones are not guided."""
    from diffusers import Flux2KleinPipeline

    tokenizer = qwen_tokenizer()
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        parts = _parts(guidance_embeds=False)
        text_encoder = _qwen3(len(tokenizer)).eval()
    return _ready(Flux2KleinPipeline(text_encoder=text_encoder, tokenizer=tokenizer, is_distilled=distilled, **parts))


def _parts(**transformer_options: Any) -> dict[str, Any]:
    from diffusers import AutoencoderKLFlux2, FlowMatchEulerDiscreteScheduler, Flux2Transformer2DModel

    options = {
        "in_channels": 16, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2,
        "joint_attention_dim": 3 * WIDTH, "timestep_guidance_channels": 16, "axes_dims_rope": (4, 4, 4, 4),
    }  # fmt: skip
    transformer = Flux2Transformer2DModel(**options | transformer_options)
    with torch.no_grad():  # gates as wide as a trained network's, so that prompts, guidance and LoRA weights matter
        for embedder in transformer.time_guidance_embed.children():
            for weight in embedder.parameters():
                weight.mul_(4)
    vae = AutoencoderKLFlux2(
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2, block_out_channels=(8, 8),
        norm_num_groups=4, layers_per_block=1, latent_channels=4, sample_size=16, batch_norm_eps=0.1,
    )  # fmt: skip
    vae.bn.running_mean.normal_(std=0.3)  # as if trained: zeros and ones at first
    vae.bn.running_var.uniform_(0.5, 2)
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0, use_dynamic_shifting=True)
    return {"transformer": transformer.eval(), "vae": vae.eval(), "scheduler": scheduler}


def _ready(pipeline: Any) -> Any:
    pipeline.default_sample_size = 8  # 128 in every Flux.2 pipeline: 1024 pixels
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _mistral3(vocab_size: int) -> Any:
    from transformers import Mistral3Config, Mistral3ForConditionalGeneration

    text = {
        "model_type": "mistral", "hidden_size": WIDTH, "intermediate_size": 16, "num_hidden_layers": 31, "num_attention_heads": 2,
        "num_key_value_heads": 2, "head_dim": 4, "vocab_size": vocab_size, "initializer_range": 0.3,
    }  # fmt: skip
    vision = {
        "model_type": "pixtral", "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
        "head_dim": 8, "image_size": 16, "patch_size": 8,
    }  # fmt: skip
    return Mistral3ForConditionalGeneration(Mistral3Config(text_config=text, vision_config=vision, image_token_index=10))


def _qwen3(vocab_size: int) -> Any:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        hidden_size=WIDTH, intermediate_size=16, num_hidden_layers=28, num_attention_heads=2, num_key_value_heads=2, head_dim=4,
        vocab_size=vocab_size, initializer_range=0.3, bos_token_id=None, eos_token_id=0, pad_token_id=0,
    )  # fmt: skip
    return Qwen3ForCausalLM(config)
