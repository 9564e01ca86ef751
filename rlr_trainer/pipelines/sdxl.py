"""Stable Diffusion XL (`StableDiffusionXLPipeline`), SDXL-Turbo and LCM-SDXL among it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rlr_trainer.pipelines.adapter import Layout
from rlr_trainer.pipelines.stable_diffusion import StableDiffusionAdapter


class StableDiffusionXLAdapter(StableDiffusionAdapter):
    """Adapter of `diffusers.StableDiffusionXLPipeline`.

    The UNet is told, as by the pipeline's defaults, that the picture is as large as the training's were and not cropped. A negative prompt
    "" stands for none: its embedding is zero where the pipeline has `force_zeros_for_empty_prompt`. The pipeline's call also puts an invisible
    watermark on its pictures if the package invisible_watermark is installed (`add_watermarker`); pictures in training have none.

    Raises:
        ValueError: as its parent; or the pipeline lacks its second text encoder, or the UNet is the refiner's.
    """

    text_encoders = ("text_encoder", "text_encoder_2")
    negatives_apart = True
    addition_embed_types = ("text_time",)

    def __init__(self, pipeline: Any) -> None:
        super().__init__(pipeline)
        if pipeline.text_encoder_2 is None:
            raise ValueError("text_encoder_2 is None: the UNet takes its pooled output; load the pipeline with it")
        try:
            self._time_ids(1, 1)
        except ValueError as error:
            raise ValueError(
                f"the UNet takes other facts of a picture than its sizes and its crop: {error} The refiner, which takes an aesthetic score, "
                "makes no pictures from noise; use the base model"
            ) from error

    def encode_prompts(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """States of both text encoders [N, tokens, width], and the second one's pooled output [N, width]."""
        device = self.pipeline.text_encoder_2.device
        states, _, pooled, _ = self.pipeline.encode_prompt(list(prompts), device=device, do_classifier_free_guidance=False)
        return {"encoder_hidden_states": states, "text_embeds": pooled}

    def encode_negative_prompts(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """The same, with zeros for "" where the pipeline has them for no negative prompt."""
        rows = self.encode_prompts(prompts)
        if self.pipeline.config.force_zeros_for_empty_prompt:
            none_given = [i for i, prompt in enumerate(prompts) if not prompt]
            for tensor in rows.values():
                tensor[none_given] = 0
        return rows

    def batch_inputs(self, layout: Layout, guidance_scale: float) -> dict[str, Tensor]:
        """Sizes and crops [1, 6] beside the parent's."""
        return {**super().batch_inputs(layout, guidance_scale), "time_ids": self._time_ids(layout.height, layout.width)}

    def call(self, network: Any, x: Tensor, time: Tensor, rows: Mapping[str, Any], batch: Mapping[str, Tensor]) -> Tensor:
        """The UNet's output [N, C, h, w]."""
        rows, batch = dict(rows), dict(batch)
        time_ids = batch.pop("time_ids").to(x.device).expand(len(x), -1)
        added = {"text_embeds": rows.pop("text_embeds"), "time_ids": time_ids}
        return super().call(network, x, time, {**rows, "added_cond_kwargs": added}, batch)

    def unpack(self, latents: Tensor, layout: Layout) -> Tensor:
        """Latents [N, C, h, w] in the VAE's own scale; some VAEs have one per channel."""
        config = self.pipeline.vae.config
        mean, std = (getattr(config, name, None) for name in ("latents_mean", "latents_std"))
        if mean is None or std is None:
            return super().unpack(latents, layout)
        mean, std = (torch.tensor(values).view(1, -1, 1, 1).to(latents) for values in (mean, std))
        return latents * std / config.scaling_factor + mean

    def _time_ids(self, height: int, width: int) -> Tensor:
        """Original size, crop and target size, [1, 6] in pixels; ValueError if the UNet takes another number of them."""
        size, width_of_pooled = (height, width), self.pipeline.text_encoder_2.config.projection_dim
        return self.pipeline._get_add_time_ids(size, (0, 0), size, torch.float32, width_of_pooled)
