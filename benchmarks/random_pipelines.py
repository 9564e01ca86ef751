"""Pipelines of diffusers' own classes with random weights, made on the device: the published sizes, or tiny ones.

No weights, vocabularies or configurations are downloaded. Text encoders have one layer, and the widths that the denoiser expects.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    FluxTransformer2DModel,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, processors
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    PreTrainedTokenizerFast,
    T5Config,
    T5EncoderModel,
)

LETTERS = "abcdefghijklmnopqrstuvwxyz "
SPECIAL = ("<pad>", "<unk>", "<start>", "<end>")  # the end is not token 2, which CLIP's text model takes for an older vocabulary
END = SPECIAL.index("<end>")
VOCAB_SIZE = len(SPECIAL) + len(LETTERS)


@dataclasses.dataclass(frozen=True)
class Size:
    """Sizes of one pipeline.

    Attributes:
        denoiser, decoder: options of their classes.
        widths, heads: of the text encoders.
        pixels: side of a picture.
        batch: samples of an update.
        tokens: of a prompt for T5.
    """

    denoiser: dict[str, Any]
    decoder: dict[str, Any]
    widths: tuple[int, ...]
    heads: tuple[int, ...]
    pixels: int
    batch: int = 2
    tokens: int = 512


_TINY_UNET = {
    "block_out_channels": (16,), "norm_num_groups": 8, "layers_per_block": 1, "sample_size": 8,
    "down_block_types": ("CrossAttnDownBlock2D",), "up_block_types": ("CrossAttnUpBlock2D",),
}  # fmt: skip
_TINY_DECODER = {"block_out_channels": (8, 8), "norm_num_groups": 4, "layers_per_block": 1}
_DECODER = {"block_out_channels": (128, 256, 512, 512), "layers_per_block": 2}
_FLUX_DECODER = {"use_quant_conv": False, "use_post_quant_conv": False, "scaling_factor": 0.3611, "shift_factor": 0.1159}
_SDXL = {"addition_embed_type": "text_time", "use_linear_projection": True}

# Published sizes: unet/config.json, transformer/config.json and vae/config.json of stable-diffusion-v1-5, stable-diffusion-xl-base-1.0
# and FLUX.1-dev. Flux is made at 512 pixels, half of what it can: at 1024 the whole table takes more than ten minutes.
FULL = {
    "sd15": Size({"sample_size": 64, "cross_attention_dim": 768}, _DECODER, (768,), (12,), 512, batch=4),
    "sdxl": Size(
        {
            **_SDXL, "sample_size": 128, "cross_attention_dim": 2048, "block_out_channels": (320, 640, 1280),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            "transformer_layers_per_block": (1, 2, 10), "attention_head_dim": (5, 10, 20),
            "addition_time_embed_dim": 256, "projection_class_embeddings_input_dim": 2816,
        },
        {**_DECODER, "scaling_factor": 0.13025}, (768, 1280), (12, 20), 1024,
    ),
    "flux": Size(
        {
            "in_channels": 64, "num_layers": 19, "num_single_layers": 38, "attention_head_dim": 128, "num_attention_heads": 24,
            "joint_attention_dim": 4096, "pooled_projection_dim": 768, "axes_dims_rope": (16, 56, 56), "guidance_embeds": True,
        },
        {**_DECODER, **_FLUX_DECODER, "latent_channels": 16}, (768, 4096), (12, 64), 512,
    ),
}  # fmt: skip
TINY = {
    "sd15": Size({**_TINY_UNET, "cross_attention_dim": 16, "attention_head_dim": 2}, _TINY_DECODER, (16,), (2,), 16),
    "sdxl": Size(
        {
            **_TINY_UNET, **_SDXL, "cross_attention_dim": 32, "attention_head_dim": 2, "transformer_layers_per_block": 1,
            "addition_time_embed_dim": 8, "projection_class_embeddings_input_dim": 6 * 8 + 16,
        },
        _TINY_DECODER, (16, 16), (2, 2), 16,
    ),
    "flux": Size(
        {
            "in_channels": 16, "num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads": 2,
            "joint_attention_dim": 32, "pooled_projection_dim": 16, "axes_dims_rope": (4, 4, 8), "guidance_embeds": True,
        },
        {**_TINY_DECODER, **_FLUX_DECODER, "latent_channels": 4}, (16, 32), (2, 4), 16, tokens=16,
    ),
}  # fmt: skip


def make_pipeline(model: str, size: Size, device: torch.device, dtype: torch.dtype) -> Any:
    """The pipeline of a model ("sd15", "sdxl" or "flux"). The same weights on every call on the same device."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), _making(device, dtype):
        torch.manual_seed(0)
        pipeline = MAKERS[model](size)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


@contextlib.contextmanager
def _making(device: torch.device, dtype: torch.dtype) -> Iterator[None]:
    """Makes parameters on a device in a dtype: those of Flux would fill 48 GB of the CPU's memory in float32."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            yield
    finally:
        torch.set_default_dtype(before)


def _sd15(size: Size) -> StableDiffusionPipeline:
    unet, vae, encoder = _unet(size), _decoder(size), _clip(CLIPTextModel, size, 0)
    scheduler = _on_cpu(DDIMScheduler, **_BETAS, clip_sample=False, set_alpha_to_one=False, steps_offset=1)
    return StableDiffusionPipeline(
        vae=vae, text_encoder=encoder, tokenizer=tokenizer(77, start=True), unet=unet, scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip


def _sdxl(size: Size) -> StableDiffusionXLPipeline:
    unet, vae = _unet(size), _decoder(size)
    first, second = _clip(CLIPTextModel, size, 0), _clip(CLIPTextModelWithProjection, size, 1)
    scheduler = _on_cpu(EulerDiscreteScheduler, **_BETAS, timestep_spacing="leading", steps_offset=1)
    return StableDiffusionXLPipeline(
        vae=vae, text_encoder=first, text_encoder_2=second, tokenizer=tokenizer(77, start=True), tokenizer_2=tokenizer(77, start=True),
        unet=unet, scheduler=scheduler, add_watermarker=False,
    )  # fmt: skip


def _flux(size: Size) -> FluxPipeline:
    transformer = FluxTransformer2DModel(**size.denoiser).eval()
    transformer.proj_out.weight.data.mul_(OUTPUT_SCALE)
    width, heads = size.widths[1], size.heads[1]
    t5 = T5Config(d_model=width, d_kv=width // heads, d_ff=5 * width // 2, num_layers=1, num_heads=heads, vocab_size=VOCAB_SIZE)
    clip, t5_encoder, vae = _clip(CLIPTextModel, size, 0), T5EncoderModel(t5).eval(), _decoder(size)
    scheduler = _on_cpu(FlowMatchEulerDiscreteScheduler, shift=3.0, use_dynamic_shifting=True)
    return FluxPipeline(
        scheduler=scheduler, vae=vae, transformer=transformer, text_encoder=clip, tokenizer=tokenizer(77, start=True),
        text_encoder_2=t5_encoder, tokenizer_2=tokenizer(512, start=False),
    )  # fmt: skip


MAKERS: dict[str, Callable[[Size], Any]] = {"sd15": _sd15, "sdxl": _sdxl, "flux": _flux}
OUTPUT_SCALE = 0.01  # of the last layer's weights: a random network predicts next to nothing, and the chain does not run away
_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def _unet(size: Size) -> UNet2DConditionModel:
    unet = UNet2DConditionModel(**size.denoiser).eval()
    unet.conv_out.weight.data.mul_(OUTPUT_SCALE)
    return unet


def _decoder(size: Size) -> AutoencoderKL:
    levels = len(size.decoder["block_out_channels"])
    blocks = {"down_block_types": ("DownEncoderBlock2D",) * levels, "up_block_types": ("UpDecoderBlock2D",) * levels}
    return AutoencoderKL(**blocks, sample_size=size.pixels, **size.decoder).eval()


def _clip(kind: Any, size: Size, number: int) -> Any:
    width = size.widths[number]
    config = CLIPTextConfig(
        hidden_size=width, intermediate_size=4 * width, num_hidden_layers=1, num_attention_heads=size.heads[number], projection_dim=width,
        vocab_size=VOCAB_SIZE, max_position_embeddings=77, pad_token_id=0, bos_token_id=SPECIAL.index("<start>"), eos_token_id=END,
    )  # fmt: skip
    return kind(config).eval()


def _on_cpu(scheduler: Any, **options: Any) -> Any:
    """A scheduler as diffusers makes it: float32, on the CPU."""
    with _making(torch.device("cpu"), torch.float32):
        return scheduler(**options)


def tokenizer(max_length: int, start: bool) -> PreTrainedTokenizerFast:
    """A tokenizer of one token per letter, padded to `max_length`, with <end> after the text and, if asked for, <start> before it."""
    vocabulary = {token: number for number, token in enumerate([*SPECIAL, *LETTERS])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex("."), "isolated")
    special = [(token, vocabulary[token]) for token in ("<start>", "<end>")]
    core.post_processor = processors.TemplateProcessing(single="<start> $A <end>" if start else "$A <end>", special_tokens=special)
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        model_max_length=max_length,
        pad_token="<pad>",
        unk_token="<unk>",
        bos_token="<start>",
        eos_token="<end>",
    )
