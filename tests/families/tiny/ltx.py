"""A tiny LTX-Video of the real classes: videos of 3 frames of 32 x 32, prompts through a T5."""

from __future__ import annotations

from typing import Any

import torch
from families.tokenizers import T5_VOCAB_SIZE, t5_tokenizer

SIZE = {"height": 32, "width": 32, "num_frames": 3}


def make_pipeline(timestep_conditioning: bool = False, **transformer_options: Any) -> Any:
    """An `LTXPipeline` with the same random weights at every call.

    Args:
        timestep_conditioning: whether the decoder is told a time.
        transformer_options: exchanged in the transformer's configuration.
    """
    from diffusers import AutoencoderKLLTXVideo, FlowMatchEulerDiscreteScheduler, LTXPipeline, LTXVideoTransformer3DModel
    from transformers import T5Config, T5EncoderModel

    t5 = T5Config(d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, vocab_size=T5_VOCAB_SIZE)
    options = {
        "in_channels": 4, "out_channels": 4, "num_layers": 1, "num_attention_heads": 2, "attention_head_dim": 12, "caption_channels": 16,
        "cross_attention_dim": 24,
    }  # fmt: skip
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(0)
        transformer = LTXVideoTransformer3DModel(**options | transformer_options)
        vae = AutoencoderKLLTXVideo(
            latent_channels=4, block_out_channels=(8, 8), decoder_block_out_channels=(8, 8), layers_per_block=(1, 1, 1),
            decoder_layers_per_block=(1, 1, 1), spatio_temporal_scaling=(True, False), decoder_spatio_temporal_scaling=(True, False),
            decoder_inject_noise=(False, False, False), upsample_residual=(False, False), upsample_factor=(1, 1), patch_size=2,
            patch_size_t=1, encoder_causal=True, decoder_causal=False, timestep_conditioning=timestep_conditioning, scaling_factor=1.2,
        )  # fmt: skip
        vae.latents_mean.copy_(torch.tensor([0.1, -0.2, 0.3, -0.1]))
        vae.latents_std.copy_(torch.tensor([1.2, 0.8, 1.5, 0.7]))
        text_encoder = T5EncoderModel(t5)
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True,
        base_shift=0.95,
        max_shift=2.05,
        base_image_seq_len=1024,
        max_image_seq_len=4096,
        shift_terminal=0.1,
    )
    pipeline = LTXPipeline(
        scheduler=scheduler,
        vae=vae.eval(),
        text_encoder=text_encoder.eval(),
        tokenizer=t5_tokenizer(),
        transformer=transformer.eval(),
    )
    pipeline.set_progress_bar_config(disable=True)
    return pipeline
