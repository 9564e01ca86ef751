"""Sana (`SanaPipeline`)."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from rlr_trainer.pipelines.adapter import Layout, PipelineAdapter
from rlr_trainer.pipelines.conditioning import Rows


class SanaAdapter(PipelineAdapter):
    """Adapter of `diffusers.SanaPipeline`.

    Prompts are preceded by the instruction that the pipeline's call gives its text encoder by default, negative prompts are not.
    Pictures have the size that is asked for: the pipeline's call does the same with `use_resolution_binning=False`.

    Raises:
        ValueError: a transformer that takes other inputs (other channels, a guidance scale), or a pipeline without a text encoder.
    """

    lora_targets = ("to_q", "to_k", "to_v")
    negatives_apart = True
    takes_guidance = False

    def __init__(self, pipeline: Any) -> None:
        super().__init__(pipeline)
        config = pipeline.transformer.config
        self.check_channels(pipeline.vae.config.latent_channels, "the VAE makes", "an image-conditioned")
        if config.guidance_embeds != self.takes_guidance:
            fitting = "SanaSprintPipeline" if config.guidance_embeds else "SanaPipeline"
            raise ValueError(
                f"the transformer has guidance_embeds={config.guidance_embeds}, which {type(pipeline).__name__} does not "
                f"feed; load it as a {fitting}"
            )
        self.check_encoders(self.text_encoders, "prompts cannot be encoded")

    def layout(self, height: int | None, width: int | None, num_frames: int | None = None) -> Layout:
        """Latents [C, H / f, W / f], f the VAE's scale factor; ValueError for a size that does not fit it, and for frames.

        The model's own size is the one that it was trained at. The pipeline's call resizes its pictures of that size to 1024 pixels.
        """
        config, factor = self.pipeline.transformer.config, self.pipeline.vae_scale_factor
        own = config.sample_size * factor
        multiple = math.lcm(32, factor * config.patch_size)
        rule = f"the pipeline's 32, and the VAE's scale factor {factor} times the transformer's patch of {config.patch_size}"
        height, width = self.picture_size(height, width, num_frames, default=(own, own), multiple=multiple, rule=rule)
        return Layout((config.in_channels, height // factor, width // factor), height, width)

    def encode_prompts(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Gemma's states [N, 300, width] and their mask [N, 300], after the instruction."""
        call = inspect.signature(self.pipeline.__call__)
        return self._encode(prompts, call.parameters["complex_human_instruction"].default)

    def encode_negative_prompts(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """The same without the instruction."""
        return self._encode(prompts, None)

    def _encode(self, prompts: Sequence[str], instruction: list[str] | None) -> dict[str, Tensor]:
        device = self.pipeline.text_encoder.device
        options = {} if self.takes_guidance else {"do_classifier_free_guidance": False}
        states, mask, *_ = self.pipeline.encode_prompt(
            list(prompts), device=device, complex_human_instruction=instruction, **options
        )
        return {"encoder_hidden_states": states, "encoder_attention_mask": mask}

    def call(self, network: Callable[..., Tensor], x: Tensor, time: Tensor, rows: Rows, batch: Mapping[str, Any]) -> Tensor:
        """One call of the transformer, [N, C, h, w], without the variances where it predicts them beside."""
        told = time.expand(x.shape[0]) * self.pipeline.transformer.config.timestep_scale
        output = network(x, timestep=told, **rows)
        return output.chunk(2, dim=1)[0] if output.shape[1] // 2 == x.shape[1] else output
