"""Qwen-Image (`QwenImagePipeline`)."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rlr_trainer.pipelines.adapter import Layout, PipelineAdapter
from rlr_trainer.pipelines.conditioning import Conditioning, Rows
from rlr_trainer.pipelines.packing import patched_size
from rlr_trainer.pipelines.timesteps import flow_sigmas, shift_of_tokens

# Of the transformer: inputs of the variants for editing, layers and distilled guidance.
_NOT_FED = ("guidance_embeds", "zero_cond_t", "use_additional_t_cond", "use_layer3d_rope")


class QwenImageAdapter(PipelineAdapter):
    """Adapter of `diffusers.QwenImagePipeline`. The guidance scale is its `true_cfg_scale`.

    The pipeline guides only where a negative prompt is given; here "" counts as given (the model's authors give " ").

    Attributes:
        max_sequence_length: most tokens of a prompt, as the argument of the pipeline's call.

    Raises:
        ValueError: a transformer that takes more than noisy latents and prompts (editing, layers, distilled guidance).
    """

    lora_targets = ("to_q", "to_k", "to_v", "to_out.0")
    guidance_argument = "true_cfg_scale"
    batched_guidance = False
    max_sequence_length = 512

    def __init__(self, pipeline: Any) -> None:
        super().__init__(pipeline)
        config = pipeline.transformer.config
        self.check_channels(4 * pipeline.vae.config.z_dim, "packed latents have", "an inpainting or control")
        for name in _NOT_FED:
            if config.get(name):
                raise ValueError(
                    f"the transformer has {name}=True, an input that this adapter does not give it; use a text-to-image model"
                )

    def layout(self, height: int | None, width: int | None, num_frames: int | None = None) -> Layout:
        """Packed latents [H / 2f * W / 2f, 4C], f the VAE's scale factor; ValueError for a size that is not a multiple of 2f."""
        height, width, rows, columns = patched_size(self, height, width, num_frames)
        return Layout((rows * columns, self.pipeline.transformer.config.in_channels), height, width)

    def timestep_arguments(self, layout: Layout, num_steps: int) -> dict[str, Any]:
        """Sigmas from 1 to 1 / T, and `mu` of the number of tokens."""
        return {"sigmas": flow_sigmas(num_steps), "mu": shift_of_tokens(self.pipeline.scheduler, layout.shape[0])}

    def encode_prompts(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """States of the text encoder [N, tokens, width], zeros after the end of a prompt, and their mask [N, tokens]."""
        device = self.pipeline.text_encoder.device
        states, mask = self.pipeline.encode_prompt(list(prompts), device, max_sequence_length=self.max_sequence_length)
        if mask is None:  # prompts of one length
            mask = torch.ones(states.shape[:2], dtype=torch.long, device=states.device)
        return {"encoder_hidden_states": states, "encoder_hidden_states_mask": mask}

    def batch_inputs(self, layout: Layout, guidance_scale: float) -> dict[str, Any]:
        """Frames, height and width in tokens."""
        side = 2 * self.pipeline.vae_scale_factor
        return {"img_shape": (1, layout.height // side, layout.width // side)}

    def call(self, network: Callable[..., Tensor], x: Tensor, time: Tensor, rows: Rows, batch: Mapping[str, Any]) -> Tensor:
        """One call of the transformer, [N, L, 4C]; the time is a share of 1."""
        count, mask = x.shape[0], rows["encoder_hidden_states_mask"]
        return network(
            x,
            timestep=time.expand(count) / 1000,
            encoder_hidden_states=rows["encoder_hidden_states"],
            encoder_hidden_states_mask=None if mask.all() else mask,  # attention without a mask is faster
            img_shapes=[[batch["img_shape"]]] * count,
        )

    def guide(self, unconditional: Tensor, conditional: Tensor, conditioning: Conditioning) -> Tensor:
        """Classifier-free guidance, each token rescaled to the norm of the conditional output."""
        guided = unconditional + conditioning.guidance_scale * (conditional - unconditional)
        return guided * (conditional.norm(dim=-1, keepdim=True) / guided.norm(dim=-1, keepdim=True))

    def unpack(self, latents: Tensor, layout: Layout) -> Tensor:
        """Latents [N, L, 4C] as a video of one frame [N, C, 1, h, w], in the mean and standard deviation of the VAE's channels."""
        config = self.decoder.config
        latents = self.pipeline._unpack_latents(latents, layout.height, layout.width, self.pipeline.vae_scale_factor)
        mean, std = (latents.new_tensor(values).view(1, -1, 1, 1, 1) for values in (config.latents_mean, config.latents_std))
        return latents * std + mean

    def decode(self, latents: Tensor, layout: Layout) -> Tensor:
        """Latents [N, L, 4C] to pictures [N, 3, H, W], the only frame of what the VAE makes; see `PipelineAdapter.decode`."""
        return super().decode(latents, layout)[:, :, 0]
