"""Adapters to diffusers pipelines."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from rlr_trainer.pipelines.adapter import Layout, PipelineAdapter
from rlr_trainer.pipelines.animatediff import AnimateDiffAdapter
from rlr_trainer.pipelines.chain import PipelineChain
from rlr_trainer.pipelines.cogvideox import CogVideoXAdapter
from rlr_trainer.pipelines.conditioning import AnyConditioning, Conditioning, PromptCache, ScaledConditioning
from rlr_trainer.pipelines.flux import FluxAdapter
from rlr_trainer.pipelines.flux2 import Flux2Adapter, Flux2KleinAdapter
from rlr_trainer.pipelines.flux_kontext import FluxKontextAdapter
from rlr_trainer.pipelines.hunyuan_video import HunyuanVideoAdapter
from rlr_trainer.pipelines.lora import LORA_FILE, attach_lora
from rlr_trainer.pipelines.ltx import LTXAdapter
from rlr_trainer.pipelines.peft_format import PEFT_FILE
from rlr_trainer.pipelines.pixart_sigma import PixArtSigmaAdapter
from rlr_trainer.pipelines.policy import Policy, cast_frozen
from rlr_trainer.pipelines.qwen_image import QwenImageAdapter
from rlr_trainer.pipelines.sana import SanaAdapter
from rlr_trainer.pipelines.sana_sprint import SanaSprintAdapter
from rlr_trainer.pipelines.sd3 import StableDiffusion3Adapter
from rlr_trainer.pipelines.sdxl import StableDiffusionXLAdapter
from rlr_trainer.pipelines.sources import check_source
from rlr_trainer.pipelines.stable_diffusion import StableDiffusionAdapter
from rlr_trainer.pipelines.wan import LORA_FILES as WAN_LORA_FILES
from rlr_trainer.pipelines.wan import WanAdapter
from rlr_trainer.pipelines.z_image import ZImageAdapter

logger = logging.getLogger(__name__)

# Pipeline class name -> adapter. Names, so that no pipeline class has to be imported to look one up.
ADAPTERS: dict[str, type[PipelineAdapter]] = {
    "StableDiffusionPipeline": StableDiffusionAdapter,
    "LatentConsistencyModelPipeline": StableDiffusionAdapter,
    "StableDiffusionXLPipeline": StableDiffusionXLAdapter,
    "StableDiffusion3Pipeline": StableDiffusion3Adapter,
    "FluxPipeline": FluxAdapter,
    "FluxKontextPipeline": FluxKontextAdapter,
    "Flux2Pipeline": Flux2Adapter,
    "Flux2KleinPipeline": Flux2KleinAdapter,
    "QwenImagePipeline": QwenImageAdapter,
    "ZImagePipeline": ZImageAdapter,
    "PixArtSigmaPipeline": PixArtSigmaAdapter,
    "SanaPipeline": SanaAdapter,
    "SanaSprintPipeline": SanaSprintAdapter,
    "AnimateDiffPipeline": AnimateDiffAdapter,
    "WanPipeline": WanAdapter,
    "LTXPipeline": LTXAdapter,
    "CogVideoXPipeline": CogVideoXAdapter,
    "HunyuanVideoPipeline": HunyuanVideoAdapter,
}


def adapt(pipeline: Any) -> PipelineAdapter:
    """The adapter of a pipeline object (an adapter is returned as it is); TypeError where there is none."""
    if isinstance(pipeline, PipelineAdapter):
        return pipeline
    # TRL's DefaultDDPOStableDiffusionPipeline wraps the diffusers pipeline
    inner = getattr(pipeline, "sd_pipeline", pipeline)
    for cls in type(inner).__mro__:
        if cls.__name__ in ADAPTERS:
            return ADAPTERS[cls.__name__](inner)
    raise TypeError(
        f"sd_pipeline is a {type(inner).__name__}, which has no adapter; supported are {', '.join(ADAPTERS)}. Write a "
        "PipelineAdapter (docs/add-a-family.md), check it with rlr_trainer.testing.check_adapter, and pass it in place of the pipeline"
    )


def load_pipeline(source: str | Path, **options: Any) -> Any:
    """Loads a pipeline from a local folder or a hub id; a local folder's own LoRA weights are loaded too, to be continued.

    Args:
        source: path or hub id.
        options: for `DiffusionPipeline.from_pretrained` (`torch_dtype`, `revision`, `variant`, ...).

    Raises:
        ValueError: a folder that holds no pipeline, or files that are damaged or missing.
    """
    from diffusers import DiffusionPipeline

    folder = Path(source)
    if folder.is_dir() and not (folder / "model_index.json").is_file():
        raise ValueError(
            f"sd_pipeline={str(source)!r}: the folder has no model_index.json, so it is not a diffusers pipeline. Load LoRA weights alone "
            "on their base, pipe.load_lora_weights(folder) or what their model card says, then pass pipe"
        )
    try:
        check_source("sd_pipeline", source, "model_index.json", options.get("cache_dir"))
    except ValueError as error:
        raise ValueError(f"{error}; the bundled models are objects, digits.load_pipeline()") from None
    try:
        absent: dict[str, Any] = {}
        if folder.is_dir():
            # a part that the pipeline was saved without, such as Stable Diffusion 3's T5, must be named, or diffusers misses it
            absent = {name: None for name, part in DiffusionPipeline.load_config(str(source)).items() if part == [None, None]}
        pipeline = DiffusionPipeline.from_pretrained(str(source), **(absent | options))
    except Exception as error:  # diffusers, safetensors and the hub client raise kinds of their own
        raise ValueError(
            f"sd_pipeline={str(source)!r}: cannot be loaded ({type(error).__name__}: {error}). Pass a folder that "
            "pipe.save_pretrained wrote, a hub id, or a pipeline object; a damaged download goes away with force_download=True"
        ) from error
    if any((folder / name).is_file() for name in (WAN_LORA_FILES["transformer_2"], PEFT_FILE)):
        adapt(pipeline).add_lora(folder)
    elif (folder / LORA_FILE).is_file():
        pipeline.load_lora_weights(str(folder), weight_name=LORA_FILE)
    else:
        return pipeline
    logger.info("continuing the LoRA weights found in %s", folder)
    return pipeline


__all__ = [
    "ADAPTERS", "LORA_FILE", "AnyConditioning", "Conditioning", "Layout", "PipelineAdapter", "PipelineChain", "Policy", "PromptCache",
    "ScaledConditioning", "StableDiffusionAdapter", "adapt", "attach_lora", "cast_frozen", "load_pipeline",
]  # fmt: skip
