"""CogVideoX 1.0 and 1.5 (`CogVideoXPipeline`), text to video."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from rlr_trainer.pipelines.adapter import Layout, check_sides
from rlr_trainer.pipelines.conditioning import Conditioning, Rows
from rlr_trainer.pipelines.video import VideoAdapter, call_default
from rlr_trainer.schedules import SamplerOptions, Schedule


class CogVideoXAdapter(VideoAdapter):
    """Adapter of `diffusers.CogVideoXPipeline`: CogVideoX 1.0 (2B, 5B) and 1.5, whose transformer takes two latent frames per patch.

    Attributes:
        dynamic_cfg_steps: number of steps of a call with `use_dynamic_cfg=True`, whose guidance depends on the time (`dynamic_scale`); None
            for a constant guidance. It must be `sample_num_steps`, because the formula counts with it.
        max_sequence_length: tokens of a prompt for T5, as the argument of the pipeline's call.

    Raises:
        ValueError: a transformer that takes a picture beside the latents, or a pipeline without a text encoder.
    """

    lora_targets = ("to_q", "to_k", "to_v", "to_out.0")
    task = "text-to-video"
    dynamic_cfg_steps: int | None = None

    def __init__(self, pipeline: Any) -> None:
        super().__init__(pipeline)
        config = pipeline.transformer.config
        self.check_channels(pipeline.vae.config.latent_channels, "the VAE makes", "an image-to-video")
        self.check_encoders(self.text_encoders, "prompts cannot be encoded")
        for name in ("ofs_embed_dim", "use_learned_positional_embeddings"):
            if config[name]:
                raise ValueError(f"the transformer has {name}={config[name]}: it starts from a picture; use a text-to-video model")
        own = None if config.use_rotary_positional_embeddings else config.max_text_seq_length  # a table of fixed length
        self.max_sequence_length = own or call_default(pipeline, "max_sequence_length")

    def layout(self, height: int | None, width: int | None, num_frames: int | None = None) -> Layout:
        """Latents [F', C, H / f, W / f] of F' = 1 + floor((F - 1) / p) frames; ValueError for a size that does not fit.

        f and p are the VAE's factors in space and time. CogVideoX 1.5 makes F' even, by a frame in front, which is not decoded.
        """
        config, factor = self.pipeline.transformer.config, self.pipeline.vae_scale_factor_spatial
        rule = f"the pipeline's 8, and the VAE's scale factor {factor} times the transformer's patch of {config.patch_size}"
        check_sides(height, width, math.lcm(8, factor * config.patch_size), rule)
        most = {"height": config.sample_height * factor, "width": config.sample_width * factor}
        height, width = most["height"] if height is None else height, most["width"] if width is None else width
        for name, pixels in (("height", height), ("width", width)):
            if config.patch_size_t is not None and pixels > most[name]:
                raise ValueError(f"{name}={pixels}: the transformer has positions for {most[name]} pixels at most")
        num_frames = config.sample_frames if num_frames is None else num_frames
        _check_frames(num_frames, self.pipeline.vae_scale_factor_temporal)
        latent_frames = self._decoded_frames(num_frames)
        latent_frames += -latent_frames % (config.patch_size_t or 1)
        return Layout((latent_frames, config.in_channels, height // factor, width // factor), height, width, num_frames)

    def _decoded_frames(self, num_frames: int | None) -> int:
        """Latent frames that the VAE makes `num_frames` of."""
        return ((num_frames or 1) - 1) // self.pipeline.vae_scale_factor_temporal + 1

    def schedule(self, layout: Layout, sampler: SamplerOptions) -> Schedule:
        """See `PipelineAdapter`; ValueError for another number of steps than `dynamic_cfg_steps`."""
        if self.dynamic_cfg_steps not in (None, sampler.num_steps):
            raise ValueError(
                f"sample_num_steps={sampler.num_steps} with the adapter's dynamic_cfg_steps={self.dynamic_cfg_steps}: must be equal, because "
                "dynamic guidance counts with the number of steps; set them alike, or dynamic_cfg_steps=None for a constant guidance"
            )
        return super().schedule(layout, sampler)

    def encode_prompts(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """T5's states [N, tokens, width]."""
        config, tokens = self.pipeline.transformer.config, self.max_sequence_length
        if not config.use_rotary_positional_embeddings and tokens != config.max_text_seq_length:
            raise ValueError(
                f"max_sequence_length={tokens}: must be {config.max_text_seq_length}, for which the transformer has positions"
            )
        states, _ = self.pipeline.encode_prompt(
            list(prompts),
            do_classifier_free_guidance=False,
            device=self.pipeline.text_encoder.device,
            max_sequence_length=tokens,
        )
        return {"encoder_hidden_states": states}

    def batch_inputs(self, layout: Layout, guidance_scale: float) -> dict[str, Any]:
        """Cosines and sines of the tokens' positions [L, width of a head], of transformers that rotate by them."""
        if not self.pipeline.transformer.config.use_rotary_positional_embeddings:
            return {}
        tables = self.pipeline._prepare_rotary_positional_embeddings(layout.height, layout.width, layout.shape[0], "cpu")
        return dict(zip(("cosines", "sines"), tables, strict=True))

    def predict(self, network: Callable[..., Tensor], x: Tensor, time: float, conditioning: Conditioning) -> Tensor:
        """The guided output, with a guidance scale of this time where it depends on it."""
        if self.dynamic_cfg_steps is not None:
            scale = dynamic_scale(conditioning.guidance_scale, time, self.dynamic_cfg_steps)
            conditioning = dataclasses.replace(conditioning, guidance_scale=scale)
        return super().predict(network, x, time, conditioning)

    def call(self, network: Callable[..., Tensor], x: Tensor, time: Tensor, rows: Rows, batch: Mapping[str, Any]) -> Tensor:
        """One call of the transformer, [N, F', C, h, w]; the time as one number per sample."""
        tables = tuple(table.to(x.device) for table in batch.values()) or None
        return network(x, timestep=time.expand(x.shape[0]), image_rotary_emb=tables, **rows)

    def unpack(self, latents: Tensor, layout: Layout) -> Tensor:
        """Latents [N, F', C, h, w] as [N, C, F', h, w], in the VAE's scale, without the frame in front that only fills a patch."""
        filling = latents.shape[1] - self._decoded_frames(layout.num_frames)
        return super().unpack(latents[:, filling:].transpose(1, 2), layout)


def dynamic_scale(scale: float, time: float, num_steps: int) -> float:
    """The guidance scale of a time under `use_dynamic_cfg`: 1 + scale (1 - cos(pi ((T - t) / T)^5)) / 2, with T the number of steps.

    As in `CogVideoXPipeline.__call__`: t is the scheduler's timestep, not the number of the step.
    """
    return 1 + scale * (1 - math.cos(math.pi * ((num_steps - time) / num_steps) ** 5)) / 2


def _check_frames(num_frames: int, period: int) -> None:
    """Refuses a number of frames that the VAE does not make; ValueError names the nearest that it does.

    It decodes its latent frames two by two, 2 `period` frames of each pair; a single one in front makes one frame.
    """
    pair = 2 * period
    if num_frames > 0 and num_frames % pair in (0, 1):
        return
    below = num_frames // pair * pair + 1
    nearest = "the nearest is 1" if num_frames < 1 else f"the nearest are {below} and {below - 1 + pair}"
    raise ValueError(
        f"num_frames={num_frames}: must be a multiple of {pair}, or one more, because the VAE makes {pair} frames of every two latent frames, "
        f"and one of a single latent frame in front; {nearest}"
    )
