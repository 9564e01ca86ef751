"""Flux.2 (`Flux2Pipeline`) and Flux.2 klein (`Flux2KleinPipeline`)."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rlr_trainer.pipelines.adapter import Layout, PipelineAdapter
from rlr_trainer.pipelines.conditioning import Rows
from rlr_trainer.pipelines.packing import patched_size
from rlr_trainer.pipelines.timesteps import with_flow_sigmas

logger = logging.getLogger(__name__)


class Flux2Adapter(PipelineAdapter):
    """Adapter of `diffusers.Flux2Pipeline`, without pictures in the prompt and without upsampling of prompts.

    The guidance scale is an input of the network. Latents are [4C, h, w], as `latents` of the pipeline's call: patches of 2 x 2 are made
    of the VAE's channels, and only the network has them in a row.

    Attributes:
        max_sequence_length: tokens of a padded prompt with its system message, as the argument of the pipeline's call.

    Raises:
        ValueError: a transformer that takes more than noisy latents.
    """

    max_sequence_length = 512

    def __init__(self, pipeline: Any) -> None:
        super().__init__(pipeline)
        self.check_channels(4 * pipeline.vae.config.latent_channels, "patches of latents have", "an inpainting or control")
        single = (f"single_transformer_blocks.{i}.attn.to_out" for i in range(pipeline.transformer.config.num_single_layers))
        self.lora_targets = ("to_q", "to_k", "to_v", "to_out.0", "to_qkv_mlp_proj", *single)

    def layout(self, height: int | None, width: int | None, num_frames: int | None = None) -> Layout:
        """Patches of latents [4C, H / 2f, W / 2f], f the VAE's scale factor; ValueError for a size that is not a multiple of 2f."""
        height, width, rows, columns = patched_size(self, height, width, num_frames)
        return Layout((self.pipeline.transformer.config.in_channels, rows, columns), height, width)

    def timestep_arguments(self, layout: Layout, num_steps: int) -> dict[str, Any]:
        """Sigmas from 1 to 1 / T, and `mu` of the numbers of tokens and of steps, which schedulers without dynamic shifting ignore."""
        from diffusers.pipelines.flux2.pipeline_flux2 import compute_empirical_mu

        _, height, width = layout.shape
        return with_flow_sigmas(self.pipeline.scheduler, num_steps, {"mu": compute_empirical_mu(height * width, num_steps)})

    def encode_prompts(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """States of three layers of the text encoder side by side, [N, tokens, 3 width], of the padding too."""
        device = self.pipeline.text_encoder.device
        states, _ = self.pipeline.encode_prompt(list(prompts), device, max_sequence_length=self.max_sequence_length)
        return {"encoder_hidden_states": states}

    def is_guided(self, guidance_scale: float) -> bool:
        """Never: the guidance scale is an input of the network."""
        return False

    def batch_inputs(self, layout: Layout, guidance_scale: float) -> dict[str, Any]:
        """Positions of patches and tokens, [1, L, 4] each, and the guidance scale [1]."""
        return {**self._positions(layout), "guidance": torch.tensor([guidance_scale])}

    def _positions(self, layout: Layout) -> dict[str, Tensor]:
        tokens = torch.empty(1, self.max_sequence_length, 1)
        patches = torch.empty(1, *layout.shape)
        return {"txt_ids": self.pipeline._prepare_text_ids(tokens), "img_ids": self.pipeline._prepare_latent_ids(patches)}

    def call(self, network: Callable[..., Tensor], x: Tensor, time: Tensor, rows: Rows, batch: Mapping[str, Any]) -> Tensor:
        """One call of the transformer, [N, 4C, h, w]; the time is a share of 1."""
        count, inputs = x.shape[0], {name: tensor.to(x.device) for name, tensor in batch.items()}
        if "guidance" in inputs:
            inputs["guidance"] = inputs["guidance"].expand(count)
        output = network(x.flatten(2).mT, timestep=time.expand(count) / 1000, **rows, **inputs)
        return output.mT.unflatten(2, x.shape[2:])

    def unpack(self, latents: Tensor, layout: Layout) -> Tensor:
        """Patches [N, 4C, h, w] as latents [N, C, 2h, 2w], in the running mean and variance of the VAE's batch normalization."""
        vae: Any = self.decoder
        mean, variance = (tensor.float().view(1, -1, 1, 1) for tensor in (vae.bn.running_mean, vae.bn.running_var))
        return self.pipeline._unpatchify_latents(latents * (variance + vae.config.batch_norm_eps).sqrt() + mean)


class Flux2KleinAdapter(Flux2Adapter):
    """Adapter of `diffusers.Flux2KleinPipeline`: guided in two calls, unless the model is distilled.

    The pipeline's own negative prompt is always ""; other ones may be given here.
    """

    batched_guidance = False

    def is_guided(self, guidance_scale: float) -> bool:
        """At a scale above 1, where the model is not distilled."""
        if self.pipeline.config.is_distilled and guidance_scale > 1:
            _warn_of_unused_guidance()
        return guidance_scale > 1 and not self.pipeline.config.is_distilled

    def batch_inputs(self, layout: Layout, guidance_scale: float) -> dict[str, Any]:
        """Positions of patches and tokens, [1, L, 4] each."""
        return self._positions(layout)


@functools.cache  # once per process
def _warn_of_unused_guidance() -> None:
    logger.warning("sample_guidance_scale has no effect: this Flux.2 klein is distilled (is_distilled=True); set it to 1")
