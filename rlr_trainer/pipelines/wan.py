"""Wan 2.1 and 2.2 (`WanPipeline`), text to video."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlr_trainer.pipelines.adapter import Layout, load_network
from rlr_trainer.pipelines.conditioning import Conditioning, Rows
from rlr_trainer.pipelines.denoiser_pair import DenoiserPair
from rlr_trainer.pipelines.lora import LORA_FILE, attach_lora, load_lora_weights, save_lora_weights
from rlr_trainer.pipelines.video import VideoAdapter

LORA_FILES = {"transformer": LORA_FILE, "transformer_2": "pytorch_lora_weights_2.safetensors"}


class WanAdapter(VideoAdapter):
    """Adapter of `diffusers.WanPipeline`: Wan 2.1, Wan 2.2 with two denoisers (A14B), and Wan 2.2 with a time per token (TI2V 5B).

    With `boundary_ratio`, steps at times of at least that share of the training times use `transformer`, the later ones `transformer_2`.
    Their LoRA weights are two files, because the pipeline's own loader reads one network's at a time.

    Args:
        pipeline: the pipeline.
        train: of a pipeline with two denoisers, which are trained: "transformer", "transformer_2", or both.

    Attributes:
        guidance_scale_2: guidance of `transformer_2`, as the argument of the pipeline's call; None is that of `transformer`.
        max_sequence_length: tokens of a prompt for UMT5, as the argument of the pipeline's call.

    Raises:
        ValueError: a transformer that takes more than noisy latents and prompts (image to video), a pipeline without a denoiser that its
            steps use or without a text encoder, or an unknown name in `train`.
    """

    lora_targets = ("to_q", "to_k", "to_v", "to_out.0", "ffn.net.0.proj", "ffn.net.2")
    task = "text-to-video"
    batched_guidance = False
    guidance_scale_2: float | None = None
    max_sequence_length = 512

    def __init__(self, pipeline: Any, train: Sequence[str] = tuple(LORA_FILES)) -> None:
        super().__init__(pipeline)
        ratio = pipeline.config.boundary_ratio
        names = ("transformer",) if ratio is None else tuple(LORA_FILES)
        for name in names:
            if getattr(pipeline, name) is None:
                raise ValueError(
                    f"{name}=None: with boundary_ratio={ratio} the steps use {' and '.join(names)}; load the pipeline with it"
                )
        self.trained = tuple(name for name in names if name in train)
        if not self.trained or set(train) - set(LORA_FILES):
            raise ValueError(f"train={list(train)}: must name some of {list(names)}, the denoisers that this pipeline's steps use")
        self.shardable = ratio is None
        self._pair = None if ratio is None else DenoiserPair({name: getattr(pipeline, name) for name in names}, self.trained)
        self._boundary = None if ratio is None else ratio * pipeline.scheduler.config.num_train_timesteps
        self.check_channels(pipeline.vae.config.z_dim, "the VAE makes", "an image-to-video or control")
        self.check_encoders(self.text_encoders, "prompts cannot be encoded")
        if self.denoiser.config.image_dim is not None:
            raise ValueError(
                f"the transformer has image_dim={self.denoiser.config.image_dim}: it takes a picture; use a text-to-video model"
            )

    @property
    def denoiser(self) -> Any:
        """The transformer, or both in one module."""
        return self.pipeline.transformer if self._pair is None else self._pair

    @property
    def _networks(self) -> dict[str, Any]:
        """The networks that are trained, by name."""
        return {"transformer": self.pipeline.transformer} if self._pair is None else self._pair.trained_networks

    def layout(self, height: int | None, width: int | None, num_frames: int | None = None) -> Layout:
        """Latents [C, 1 + (F - 1) / p, H / f, W / f], f and p the VAE's factors; ValueError for a size that does not fit."""
        config, pipeline = self.denoiser.config, self.pipeline
        factor, period = pipeline.vae_scale_factor_spatial, pipeline.vae_scale_factor_temporal
        patch = math.lcm(*config.patch_size[1:])
        rule = f"the pipeline's 16, and the VAE's scale factor {factor} times the transformer's patch of {patch}"
        height, width, num_frames = self.video_size(
            height, width, num_frames, multiple=math.lcm(16, factor * patch), rule=rule, period=period
        )
        frames = (num_frames - 1) // period + 1
        return Layout((config.in_channels, frames, height // factor, width // factor), height, width, num_frames)

    def encode_prompts(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """UMT5's states [N, tokens, width], zeros after the end of a prompt."""
        device = self.pipeline.text_encoder.device
        states, _ = self.pipeline.encode_prompt(
            list(prompts), do_classifier_free_guidance=False, device=device, max_sequence_length=self.max_sequence_length
        )
        return {"encoder_hidden_states": states}

    def predict(self, network: Callable[..., Tensor], x: Tensor, time: float, conditioning: Conditioning) -> Tensor:
        """The guided output of the denoiser that this time belongs to."""
        if self._boundary is None:
            return super().predict(network, x, time, conditioning)
        late = time < self._boundary
        if late and self.guidance_scale_2 is not None:
            conditioning = dataclasses.replace(conditioning, guidance_scale=self.guidance_scale_2)
        return super().predict(functools.partial(network, late=late), x, time, conditioning)

    def call(self, network: Callable[..., Tensor], x: Tensor, time: Tensor, rows: Rows, batch: Mapping[str, Any]) -> Tensor:
        """One call of a transformer, [N, C, F, h, w]; the time as one number per sample, or per token with `expand_timesteps`."""
        shape: tuple[int, ...] = (x.shape[0],)
        if self.pipeline.config.expand_timesteps:  # of patches of 1 x 2 x 2, whatever the transformer's
            shape = (x.shape[0], x[0, 0, :, ::2, ::2].numel())
        return network(x, timestep=time.expand(shape), **rows)

    def unpack(self, latents: Tensor, layout: Layout) -> Tensor:
        """Latents [N, C, F, h, w] in the mean and standard deviation of the VAE's channels."""
        config = self.decoder.config
        mean, std = (latents.new_tensor(values).view(1, -1, 1, 1, 1) for values in (config.latents_mean, config.latents_std))
        return latents * std + mean

    def attach_lora(self, lora_config: Any, seed: int) -> bool:
        """See `PipelineAdapter`; each trained denoiser gets LoRA weights of its own, or goes on with those that it has."""
        self.denoiser.requires_grad_(False)
        continued = [attach_lora(network, lora_config, seed + i) for i, network in enumerate(self._networks.values())]
        return any(continued)

    def train_whole(self) -> None:
        """See `PipelineAdapter`; a denoiser that is not trained stays frozen."""
        self.denoiser.requires_grad_(False)
        for network in self._networks.values():
            network.requires_grad_(True).to(torch.float32)

    @property
    def lora_loads(self) -> tuple[dict[str, Any], ...]:
        """See `PipelineAdapter`; one mapping per trained denoiser."""
        second: dict[str, Any] = {"load_into_transformer_2": True}
        return tuple({"weight_name": LORA_FILES[name], **(second if name == "transformer_2" else {})} for name in self.trained)

    def save_lora(self, directory: str | Path) -> None:
        """Writes the LoRA weights, a file for each trained denoiser."""
        for name, network in self._networks.items():
            save_lora_weights(type(self.pipeline), network, directory, "transformer_lora_layers", LORA_FILES[name])

    def load_lora(self, directory: str | Path) -> None:
        """Reads them back into the adapters that are being trained."""
        for name, network in self._networks.items():
            load_lora_weights(network, directory, "transformer", LORA_FILES[name])

    def add_lora(self, source: str | Path) -> None:
        """Adds saved LoRA weights to a pipeline that has none; of a folder, those of the denoisers that were trained."""
        there = [arguments for arguments in self.lora_loads if (Path(source) / arguments["weight_name"]).is_file()]
        for arguments in there or self.lora_loads:
            self.pipeline.load_lora_weights(str(source), **arguments)

    def lora_snippet(self, source: str) -> str:
        """Code that adds saved LoRA weights to `pipe`, for model cards; `source` is the code of a string."""
        if self._pair is None:
            return super().lora_snippet(source)
        calls = [", ".join([source, *(f"{name}={value!r}" for name, value in one.items())]) for one in self.lora_loads]
        return "\n".join(f"pipe.load_lora_weights({arguments})" for arguments in calls)

    def save_denoiser(self, directory: str | Path) -> None:
        """Writes each trained denoiser to its folder of the pipeline's layout."""
        for name, network in self._networks.items():
            network.save_pretrained(Path(directory) / name)

    def load_denoiser(self, directory: str | Path) -> None:
        """Reads them back in place; ValueError if the weights are missing, damaged, or of another network."""
        for name, network in self._networks.items():
            load_network(network, Path(directory) / name)
