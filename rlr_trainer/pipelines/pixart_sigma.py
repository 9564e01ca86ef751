"""PixArt-Sigma (`PixArtSigmaPipeline`)."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from rlr_trainer.pipelines.adapter import Layout, PipelineAdapter
from rlr_trainer.pipelines.conditioning import Rows
from rlr_trainer.pipelines.peft_format import PEFT_FILE, add_peft_lora, load_peft_lora, save_peft_lora

logger = logging.getLogger(__name__)
NO_SIZES: dict[str, None] = {"resolution": None, "aspect_ratio": None}  # Sigma's time embedding does not know the picture's size


class PixArtSigmaAdapter(PipelineAdapter):
    """Adapter of `diffusers.PixArtSigmaPipeline`.

    Pictures have the size that is asked for: the pipeline's call does the same with `use_resolution_binning=False`. LoRA weights are
    in peft's format, because diffusers has none for this family.

    Raises:
        ValueError: a transformer that takes other inputs (inpainting, or the picture's size as PixArt-Alpha at 1024 pixels), or a
            pipeline without a text encoder.
    """

    lora_targets = ("to_q", "to_k", "to_v", "to_out.0")
    lora_file = PEFT_FILE

    def __init__(self, pipeline: Any) -> None:
        super().__init__(pipeline)
        self.check_channels(pipeline.vae.config.latent_channels, "the VAE makes", "an inpainting or image-conditioned")
        if self.denoiser.use_additional_conditions:
            raise ValueError(
                "the transformer has use_additional_conditions=True: it takes the picture's size, as PixArt-Alpha does, and "
                "PixArtSigmaPipeline does not give it; use a PixArt-Sigma model"
            )
        self.check_encoders(self.text_encoders, "prompts cannot be encoded")
        self.cleans_captions = _can_clean_captions()

    @property
    def denoiser(self) -> Any:
        """The transformer, without the wrapper of `peft.PeftModel.from_pretrained`."""
        from peft import PeftModel

        transformer = self.pipeline.transformer
        return transformer.get_base_model() if isinstance(transformer, PeftModel) else transformer

    def layout(self, height: int | None, width: int | None, num_frames: int | None = None) -> Layout:
        """Latents [C, H / f, W / f], f the VAE's scale factor; ValueError for a size that does not fit the patches, and for frames."""
        config, factor = self.denoiser.config, self.pipeline.vae_scale_factor
        own = config.sample_size * factor
        multiple = math.lcm(8, factor * config.patch_size)
        rule = f"the pipeline's 8, and the VAE's scale factor {factor} times the transformer's patch of {config.patch_size}"
        height, width = self.picture_size(height, width, num_frames, default=(own, own), multiple=multiple, rule=rule)
        return Layout((config.in_channels, height // factor, width // factor), height, width)

    def encode_prompts(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """T5 states [N, 300, width] and their mask [N, 300] of the cleaned captions."""
        states, mask, _, _ = self.pipeline.encode_prompt(
            list(prompts), False, device=self.pipeline.text_encoder.device, clean_caption=self.cleans_captions
        )
        return {"encoder_hidden_states": states, "encoder_attention_mask": mask}

    def call(self, network: Callable[..., Tensor], x: Tensor, time: Tensor, rows: Rows, batch: Mapping[str, Any]) -> Tensor:
        """One call of the transformer, [N, C, h, w], without the variances that it predicts beside."""
        output = network(x, timestep=time.expand(x.shape[0]), added_cond_kwargs=NO_SIZES, **rows)
        return output.chunk(2, dim=1)[0] if output.shape[1] // 2 == x.shape[1] else output

    def save_lora(self, directory: str | Path) -> None:
        """Writes the LoRA weights as peft does, for `peft.PeftModel.from_pretrained(pipeline.transformer, directory)`."""
        save_peft_lora(self.denoiser, directory)

    def load_lora(self, directory: str | Path) -> None:
        """Reads them back into the adapter that is being trained."""
        load_peft_lora(self.denoiser, directory)

    def add_lora(self, source: str | Path) -> None:
        """Adds saved LoRA weights (a folder, or a hub id) to a pipeline that has none."""
        add_peft_lora(self.denoiser, source)

    def lora_snippet(self, source: str) -> str:
        """Code that adds saved LoRA weights to `pipe`; `source` is the code of a string."""
        return f"from peft import PeftModel\n\npipe.transformer = PeftModel.from_pretrained(pipe.transformer, {source})"


def _can_clean_captions() -> bool:
    """Whether captions can be cleaned, as the pipeline's call does by default; it says so once where they cannot."""
    from diffusers.utils import is_bs4_available, is_ftfy_available

    if is_bs4_available() and is_ftfy_available():
        return True
    logger.warning(
        "prompts are put in lower case but not cleaned, as the pipeline itself does without beautifulsoup4 and ftfy; install both to "
        "clean them (URLs, HTML, unusual signs)"
    )
    return False
