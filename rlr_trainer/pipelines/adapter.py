"""What training needs of a diffusers pipeline. One short subclass per family of pipelines."""

from __future__ import annotations

import abc
import contextlib
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rlr_trainer.estimators.chain import to_device, without_autocast
from rlr_trainer.pipelines.conditioning import Conditioning, PromptCache, Rows
from rlr_trainer.pipelines.decoding import calls_checkpointed
from rlr_trainer.pipelines.lora import LORA_FILE, attach_lora, load_lora_weights, save_lora_weights
from rlr_trainer.schedules import SamplerOptions, Schedule, make_schedule


@dataclasses.dataclass(frozen=True)
class Layout:
    """The shape of what is sampled.

    Attributes:
        shape: of one latent, as the network takes it (packed where the family packs).
        height, width: of the picture, in pixels.
        num_frames: of a video; None for pictures.
    """

    shape: tuple[int, ...]
    height: int
    width: int
    num_frames: int | None = None


def check_sides(height: int | None, width: int | None, multiple: int, rule: str) -> None:
    """Refuses sides in pixels that are no multiples of `multiple`, which `rule` explains; ValueError names the nearest that are."""
    for name, pixels in (("height", height), ("width", width)):
        if pixels is None or (pixels > 0 and pixels % multiple == 0):
            continue
        below = max(pixels, 0) // multiple * multiple
        nearest = f"the nearest are {below} and {below + multiple}" if below else f"the nearest is {multiple}"
        raise ValueError(f"{name}={pixels}: must be a positive multiple of {multiple}, {rule}; {nearest}")


class PipelineAdapter(abc.ABC):
    """A diffusers pipeline, seen as the parts of a denoising chain.

    The layout comes before the schedule, because some samplers depend on the number of tokens. A family says what is special about it:
    most need `layout`, `encode_prompts` and `call`, and those that pack or normalize their latents `unpack`.

    Attributes:
        pipeline: the pipeline.
        lora_targets: names of the modules that get LoRA weights by default.
        lora_file: name of the file that `save_lora` writes the weights to.
        shardable: whether FSDP and DeepSpeed can spread the network.
        task: what the models do, for messages.
        denoiser_folder: the pipeline's name of the trained network, and its folder in the layout on disk.
        text_encoders: the pipeline's names of its text encoders; those that it lacks are left out.
        guidance_argument: argument of the pipeline's `__call__` that `sample_guidance_scale` stands for.
        batched_guidance: whether both branches of guidance go through the network in one call, negative rows first.
        rescales_guidance: whether the pipeline's `__call__` takes a `guidance_rescale`.
        negatives_apart: whether negative prompts are encoded in another way than prompts, by `encode_negative_prompts`.
        conditions: names of the metadata (columns of a dataset) that every sample must bring, such as "image".
        encoder_device: where text encoders work, if they wait on the CPU between calls; None leaves them where they are.
        undivided: why decoding cannot go chunk by chunk through a video, and what to do instead; None if it can.
        decodes_in_chunks: whether a decoder that can keeps its graph for one chunk of frames at a time.
    """

    lora_targets: tuple[str, ...]
    lora_file = LORA_FILE
    shardable = True
    task = "text-to-image"
    denoiser_folder = "transformer"
    text_encoders: tuple[str, ...] = ("text_encoder",)
    guidance_argument = "guidance_scale"
    batched_guidance = True
    rescales_guidance = False
    negatives_apart = False
    conditions: tuple[str, ...] = ()
    encoder_device: torch.device | None = None
    decodes_in_chunks = False

    def __init__(self, pipeline: Any) -> None:
        self.pipeline = pipeline

    @property
    def denoiser(self) -> Any:
        """The network that is trained."""
        return getattr(self.pipeline, self.denoiser_folder)

    @property
    def lora_loads(self) -> tuple[dict[str, Any], ...]:
        """What `pipeline.load_lora_weights` takes beside the folder to load what `save_lora` wrote, one mapping per call."""
        return ({"weight_name": self.lora_file},)

    @property
    def frozen_modules(self) -> list[nn.Module]:
        """The text encoders."""
        found = [getattr(self.pipeline, name, None) for name in self.text_encoders]
        return [module for module in found if module is not None]

    @property
    def decoder(self) -> Any:
        """The network that makes pictures of latents."""
        return self.pipeline.vae

    @property
    def undivided(self) -> str | None:
        """Why decoding cannot go chunk by chunk."""
        return "its adapter knows no chunks of frames; leave it unset (reward_batch_size=1 decodes pictures one by one)"

    @abc.abstractmethod
    def layout(self, height: int | None, width: int | None, num_frames: int | None = None) -> Layout:
        """The layout of samples of this size in pixels (None: the model's own).

        Raises:
            ValueError: a size that does not fit, or frames of a model that makes pictures; names the rule.
        """

    def picture_size(
        self, height: int | None, width: int | None, num_frames: int | None, *, default: tuple[int, int], multiple: int, rule: str
    ) -> tuple[int, int]:
        """Height and width in pixels of a picture, checked.

        Args:
            height, width, num_frames: as asked for; None is the model's own.
            default: the model's own size.
            multiple: both must be multiples of it.
            rule: what `multiple` is, in words, for the message.

        Raises:
            ValueError: another size, or a number of frames.
        """
        if num_frames is not None:
            raise ValueError(f"num_frames={num_frames}: {type(self.pipeline).__name__} makes pictures, not videos; leave it unset")
        check_sides(height, width, multiple, rule)
        return default[0] if height is None else height, default[1] if width is None else width

    def check_channels(self, made: int, maker: str, kind: str) -> None:
        """Refuses a network that takes other latents than it would be given.

        Args:
            made: channels of what it would be given.
            maker: what makes them, in words before their number.
            kind: of models that take others, in words.

        Raises:
            ValueError: names both numbers, and the way out.
        """
        taken, network = self.denoiser.config.in_channels, {"unet": "UNet"}.get(self.denoiser_folder, self.denoiser_folder)
        if taken != made:
            raise ValueError(
                f"the {network} takes {taken} channels but {maker} {made}: {kind} model, which this adapter cannot sample; use a "
                f"{self.task} model"
            )

    def check_encoders(self, names: Sequence[str], use: str) -> None:
        """Refuses a pipeline that was loaded without one of the text encoders `names`; ValueError says what their `use` is."""
        for name in names:
            if getattr(self.pipeline, name) is None:
                raise ValueError(f"{name}=None: {use}; load the pipeline with it")

    def schedule(self, layout: Layout, sampler: SamplerOptions) -> Schedule:
        """The steps of the sampler on samples of this layout, on the grid that the pipeline's own call would use."""
        return make_schedule(self.pipeline.scheduler, sampler, **self.timestep_arguments(layout, sampler.num_steps))

    def timestep_arguments(self, layout: Layout, num_steps: int) -> dict[str, Any]:
        """What the pipeline's call gives to `scheduler.set_timesteps` beside the number of steps: `sigmas`, `mu`."""
        return {}

    @abc.abstractmethod
    def encode_prompts(self, prompts: Sequence[str]) -> Rows:
        """Encodes prompts to the network's keyword arguments, one row each. Called once per distinct prompt, without gradients."""

    def encode_negative_prompts(self, prompts: Sequence[str]) -> Rows:
        """The same for negative prompts, where `negatives_apart`; "" stands for none given."""
        return self.encode_prompts(prompts)

    def encode_metadata(self, metadata: Sequence[Mapping[str, Any]], layout: Layout) -> Rows:
        """Encodes the `conditions` of a batch of samples to rows, which both branches of guidance get."""
        return {}

    def batch_inputs(self, layout: Layout, guidance_scale: float) -> dict[str, Any]:
        """Keyword arguments of `call` that are the same for every sample of a batch (position ids, an embedded guidance scale)."""
        return {}

    def is_guided(self, guidance_scale: float) -> bool:
        """Whether this scale needs a second, unconditional branch: not at 1 or less, nor where the network takes the scale as an input."""
        return guidance_scale > 1

    def encode(
        self,
        prompts: Sequence[str],
        negative_prompts: Sequence[str],
        guidance_scale: float,
        layout: Layout,
        cache: PromptCache,
        *,
        guidance_rescale: float = 0.0,
        metadata: Sequence[Mapping[str, Any]] = (),
    ) -> Conditioning:
        """Conditioning of a batch; each distinct prompt is encoded once."""
        guided, apart = self.is_guided(guidance_scale), self.negatives_apart
        with torch.no_grad():
            shared = negative_prompts if guided and not apart else ()
            positive = cache.rows(prompts, functools.partial(self._on_device, self.encode_prompts), keep=shared)
            negative = None
            if guided:
                encode = functools.partial(self._on_device, self.encode_negative_prompts)
                negative = cache.rows(negative_prompts, encode, kind="negative" if apart else "")
            extra = self.encode_metadata(metadata, layout) if self.conditions else {}
        cache.shrink()
        return Conditioning(
            {**positive, **extra},
            None if negative is None else {**negative, **extra},
            guidance_scale,
            self.batch_inputs(layout, guidance_scale),
            guidance_rescale,
        )

    def _on_device(self, encode: Callable[[Sequence[str]], Rows], prompts: Sequence[str]) -> Rows:
        """`encode(prompts)`, for which text encoders that wait on the CPU come to their device."""
        if self.encoder_device is None:
            return encode(prompts)
        for module in self.frozen_modules:
            module.to(self.encoder_device)
        try:
            return encode(prompts)
        finally:
            for module in self.frozen_modules:
                module.to("cpu")

    def predict(self, network: Callable[..., Tensor], x: Tensor, time: float, conditioning: Conditioning) -> Tensor:
        """The guided output of `network` at latents `x` [N, ...] and `Schedule.time`, as the pipeline's own call makes it."""
        told = to_device(torch.tensor(time), x.device)
        positive, negative, batch = conditioning.positive, conditioning.negative, conditioning.batch
        if negative is None:
            return self.call(network, x, told, positive, batch)
        if self.batched_guidance:
            both = self.call(network, torch.cat([x, x]), told, conditioning.guided(), batch)
            unconditional, conditional = both.float().chunk(2)  # FSDP2 casts the policy's output to the precision of the run
        else:
            conditional = self.call(network, x, told, positive, batch).float()
            unconditional = self.call(network, x, told, negative, batch).float()
        return self.guide(unconditional, conditional, conditioning)

    def call(self, network: Callable[..., Tensor], x: Tensor, time: Tensor, rows: Rows, batch: Mapping[str, Any]) -> Tensor:
        """One call of `network`, which passes its arguments to the denoiser and returns its output, [N, ...] as `x`.

        Args:
            x: latents [N, ...].
            time: `Schedule.time`, a tensor without dimensions on the device of `x`.
            rows: of `encode_prompts` and `encode_metadata`, N each.
            batch: of `batch_inputs`.
        """
        return network(x, time, **rows, **batch)

    def guide(self, unconditional: Tensor, conditional: Tensor, conditioning: Conditioning) -> Tensor:
        """Classifier-free guidance (arXiv:2207.12598), rescaled to the norm of the conditional output (section 3.4 of arXiv:2305.08891)."""
        guided = unconditional + conditioning.guidance_scale * (conditional - unconditional)
        share = conditioning.guidance_rescale
        if not share:
            return guided
        dims = tuple(range(1, guided.dim()))
        rescaled = guided * (conditional.std(dims, keepdim=True) / guided.std(dims, keepdim=True))
        return share * rescaled + (1 - share) * guided

    def unpack(self, latents: Tensor, layout: Layout) -> Tensor:
        """Latents [N, ...] as the decoder takes them: unpacked, and in its own scale."""
        return latents / self.decoder.config.scaling_factor

    def decoded(self, latents: Tensor) -> Tensor:
        """What the decoder makes of unpacked latents, in [-1, 1]."""
        return self.decoder.decode(latents, return_dict=False)[0]

    def decode(self, latents: Tensor, layout: Layout) -> Tensor:
        """Latents [N, ...] to pictures [N, 3, H, W] (videos [N, F, 3, H, W]), float32 in [0, 1], with a graph if the latents have one.

        In the decoder's own precision, within autocast too.
        """
        vae = self.decoder
        chunks = calls_checkpointed(vae.decoder) if self.decodes_in_chunks else contextlib.nullcontext()
        with without_autocast(latents.device), chunks:
            images = self.decoded(self.unpack(latents, layout).to(vae.dtype))
        return (images.float() / 2 + 0.5).clamp(0, 1)

    def attach_lora(self, lora_config: Any, seed: int) -> bool:
        """Makes LoRA weights of the network trainable and the rest frozen; see `rlr_trainer.pipelines.lora.attach_lora`."""
        return attach_lora(self.denoiser, lora_config, seed)

    def train_whole(self) -> None:
        """Makes the whole network trainable, in float32."""
        self.denoiser.requires_grad_(True)
        self.denoiser.to(torch.float32)

    def save_lora(self, directory: str | Path) -> None:
        """Writes the LoRA weights in the format that `pipeline.load_lora_weights` reads."""
        save_lora_weights(type(self.pipeline), self.denoiser, directory, layers=f"{self.denoiser_folder}_lora_layers")

    def load_lora(self, directory: str | Path) -> None:
        """Reads them back into the adapter that is being trained."""
        load_lora_weights(self.denoiser, directory, prefix=self.denoiser_folder)

    def add_lora(self, source: str | Path) -> None:
        """Adds saved LoRA weights (a folder, or a hub id) to a pipeline that has none."""
        for arguments in self.lora_loads:
            self.pipeline.load_lora_weights(str(source), **arguments)

    def lora_snippet(self, source: str) -> str:
        """Code that adds saved LoRA weights to `pipe`, for model cards; `source` is the code of a string."""
        return f"pipe.load_lora_weights({source})"

    def save_denoiser(self, directory: str | Path) -> None:
        """Writes the whole network, in float32, to its folder of the pipeline's layout."""
        self.denoiser.save_pretrained(Path(directory) / self.denoiser_folder)

    def load_denoiser(self, directory: str | Path) -> None:
        """Reads it back in place; ValueError if the weights are missing, damaged, or of another network."""
        load_network(self.denoiser, Path(directory) / self.denoiser_folder)


def load_network(network: Any, folder: Path) -> None:
    """Reads the weights of `network` in place; ValueError if they are missing, damaged, or of another network."""
    try:
        loaded = type(network).from_pretrained(str(folder))
        network.load_state_dict(loaded.state_dict())
    except Exception as error:  # diffusers and safetensors raise kinds of their own
        raise ValueError(f"cannot read the network from {folder}: {type(error).__name__}: {error}") from error
