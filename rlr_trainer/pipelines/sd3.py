"""Stable Diffusion 3 and 3.5 (`StableDiffusion3Pipeline`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from rlr_trainer.pipelines.adapter import Layout, PipelineAdapter
from rlr_trainer.pipelines.conditioning import Rows
from rlr_trainer.pipelines.timesteps import shift_of_tokens


class StableDiffusion3Adapter(PipelineAdapter):
    """Adapter of `diffusers.StableDiffusion3Pipeline`, with or without its T5 encoder.

    Attributes:
        max_sequence_length: tokens of a prompt for T5 (zeros without one), as the argument of the pipeline's call; None is what
            the pipeline's `encode_prompt` takes by default, 256.

    Raises:
        ValueError: a transformer that takes more than noisy latents (inpainting), or a pipeline without its CLIP encoders.
    """

    lora_targets = (
        "attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0",
        "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out",
    )  # fmt: skip
    text_encoders = ("text_encoder", "text_encoder_2", "text_encoder_3")
    max_sequence_length: int | None = None

    def __init__(self, pipeline: Any) -> None:
        super().__init__(pipeline)
        self.check_channels(pipeline.vae.config.latent_channels, "the VAE makes", "an inpainting")
        self.check_encoders(self.text_encoders[:2], "prompts go through both CLIP encoders (text_encoder_3 may be None)")

    def layout(self, height: int | None, width: int | None, num_frames: int | None = None) -> Layout:
        """Latents [C, H / f, W / f], f the VAE's scale factor; ValueError for a size that does not fit the patches or their positions."""
        config, factor = self.pipeline.transformer.config, self.pipeline.vae_scale_factor
        own = self.pipeline.default_sample_size * factor
        multiple = factor * config.patch_size
        rule = f"the VAE's scale factor {factor} times the transformer's patch of {config.patch_size}"
        height, width = self.picture_size(height, width, num_frames, default=(own, own), multiple=multiple, rule=rule)
        largest = config.pos_embed_max_size * multiple
        for name, pixels in (("height", height), ("width", width)):
            if pixels > largest:
                raise ValueError(f"{name}={pixels}: the transformer has positions for {largest} pixels at most; make it smaller")
        return Layout((config.in_channels, height // factor, width // factor), height, width)

    def timestep_arguments(self, layout: Layout, num_steps: int) -> dict[str, Any]:
        """`mu` of the number of patches, where the scheduler shifts its timesteps by it."""
        scheduler, patch = self.pipeline.scheduler, self.pipeline.transformer.config.patch_size
        if not scheduler.config.get("use_dynamic_shifting"):
            return {}
        _, height, width = layout.shape
        return {"mu": shift_of_tokens(scheduler, (height // patch) * (width // patch), max_shift=1.16)}

    def encode_prompts(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """States of all encoders [N, tokens, width] (T5's are zeros without one), and the pooled ones of both CLIP encoders [N, width]."""
        options: dict[str, Any] = {"device": self.pipeline.text_encoder.device, "do_classifier_free_guidance": False}
        if self.max_sequence_length is not None:
            options["max_sequence_length"] = self.max_sequence_length
        states, _, pooled, _ = self.pipeline.encode_prompt(list(prompts), None, None, **options)
        return {"encoder_hidden_states": states, "pooled_projections": pooled}

    def call(self, network: Callable[..., Tensor], x: Tensor, time: Tensor, rows: Rows, batch: Mapping[str, Any]) -> Tensor:
        """One call of the transformer, [N, C, h, w]; the time as one number per sample."""
        return network(x, timestep=time.expand(x.shape[0]), **rows)

    def unpack(self, latents: Tensor, layout: Layout) -> Tensor:
        """Latents [N, C, h, w] in the VAE's scale and shift."""
        config = self.decoder.config
        return latents / config.scaling_factor + config.shift_factor
