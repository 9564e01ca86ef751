"""Z-Image and Z-Image-Turbo (`ZImagePipeline`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rlr_trainer.pipelines.adapter import Layout, PipelineAdapter
from rlr_trainer.pipelines.conditioning import Conditioning, Rows
from rlr_trainer.pipelines.timesteps import flow_sigmas, shift_of_tokens

_PATCH = 2  # the pipeline's call leaves the transformer at its default
_OWN_SIZE = 1024  # pixels, of every ZImagePipeline


class ZImageAdapter(PipelineAdapter):
    """Adapter of `diffusers.ZImagePipeline`, at its defaults of `cfg_normalization` (False) and `cfg_truncation` (1, which is never passed).

    The pipeline counts guidance from 0, where others count from 1: output = conditional + w (conditional - unconditional), guided at any
    w > 0. Z-Image-Turbo takes w = 0.

    Attributes:
        max_sequence_length: most tokens of a prompt with its chat template, as the argument of the pipeline's call.

    Raises:
        ValueError: a transformer that takes other latents than the VAE's (control), or that has no patches of 2 x 2.
    """

    lora_targets = ("to_q", "to_k", "to_v", "to_out.0")
    max_sequence_length = 512

    def __init__(self, pipeline: Any) -> None:
        super().__init__(pipeline)
        config = pipeline.transformer.config
        self.check_channels(pipeline.vae.config.latent_channels, "the VAE makes", "an inpainting or control")
        if (_PATCH, 1) not in zip(config.all_patch_size, config.all_f_patch_size, strict=True):
            raise ValueError(
                f"the transformer has patches of {config.all_patch_size}, but ZImagePipeline samples with patches of {_PATCH}"
            )

    def layout(self, height: int | None, width: int | None, num_frames: int | None = None) -> Layout:
        """Latents [C, H / f, W / f], f the VAE's scale factor; ValueError for a size that does not fit the patches or their positions."""
        factor, config = self.pipeline.vae_scale_factor, self.pipeline.transformer.config
        multiple = _PATCH * factor
        rule = f"the VAE's scale factor {factor} times the transformer's patch of {_PATCH}"
        default = (_OWN_SIZE, _OWN_SIZE)
        height, width = self.picture_size(height, width, num_frames, default=default, multiple=multiple, rule=rule)
        for name, pixels, positions in (("height", height, config.axes_lens[1]), ("width", width, config.axes_lens[2])):
            if pixels > positions * multiple:
                most = f"the transformer has positions for {positions * multiple} pixels at most"
                raise ValueError(f"{name}={pixels}: {most}; make it smaller")
        return Layout((config.in_channels, height // factor, width // factor), height, width)

    def timestep_arguments(self, layout: Layout, num_steps: int) -> dict[str, Any]:
        """Sigmas from 1 to 1 / T, and `mu` of the number of patches."""
        _, height, width = layout.shape
        tokens = (height // _PATCH) * (width // _PATCH)
        return {"sigmas": flow_sigmas(num_steps), "mu": shift_of_tokens(self.pipeline.scheduler, tokens)}

    def encode_prompts(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """States of the text encoder [N, tokens, width], zeros after the end of a prompt, and their mask [N, tokens]."""
        device = self.pipeline.text_encoder.device
        states, _ = self.pipeline.encode_prompt(
            list(prompts), device, do_classifier_free_guidance=False, max_sequence_length=self.max_sequence_length
        )
        masks = [torch.ones(len(one), dtype=torch.bool, device=one.device) for one in states]
        return {"states": pad_sequence(states, batch_first=True), "mask": pad_sequence(masks, batch_first=True)}

    def is_guided(self, guidance_scale: float) -> bool:
        """At any scale above 0."""
        return guidance_scale > 0

    def call(self, network: Callable[..., Tensor], x: Tensor, time: Tensor, rows: Rows, batch: Mapping[str, Any]) -> Tensor:
        """One call of the transformer, [N, C, h, w]. It takes lists, and its time runs from 0 (noise) to 1, so that it predicts x0 - x1."""
        lengths = rows["mask"].sum(1).tolist()  # padding is at the end
        prompts = [states[:length] for states, length in zip(rows["states"], lengths, strict=True)]
        output = network(list(x.unsqueeze(2)), (1000 - time.expand(x.shape[0])) / 1000, prompts)
        return -output.squeeze(2)

    def guide(self, unconditional: Tensor, conditional: Tensor, conditioning: Conditioning) -> Tensor:
        """Classifier-free guidance, where a scale of 0 is none."""
        return conditional + conditioning.guidance_scale * (conditional - unconditional)

    def unpack(self, latents: Tensor, layout: Layout) -> Tensor:
        """Latents [N, C, h, w] in the VAE's scale and shift."""
        config = self.decoder.config
        return latents / config.scaling_factor + config.shift_factor
