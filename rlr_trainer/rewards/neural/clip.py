"""Rewards on CLIP embeddings: CLIP score, PickScore and HPSv2, which are a cosine, and LAION's aesthetic score, a linear head.

cos is the product of the unit embeddings of a picture and its prompt.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self, Unpack

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlr_trainer.rewards.neural import weights
from rlr_trainer.rewards.neural.base import ModelOptions, NeuralReward, PromptCache, ScoreHead, token_ids
from rlr_trainer.rewards.neural.open_clip import VIT_H_14, convert_open_clip
from rlr_trainer.rewards.neural.preprocessing import ImagePreprocessor

CLIP_L14 = "openai/clip-vit-large-patch14"
CLIP_H14 = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"
TOKENIZER_FILES = ("tokenizer.json", "vocab.json", "tokenizer_config.json")
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")


def _image_embeddings(model: Any, pixels: Tensor) -> Tensor:
    return _unit(model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output))


def _unit(embeddings: Tensor) -> Tensor:
    return F.normalize(embeddings.to(torch.promote_types(embeddings.dtype, torch.float32)), dim=-1)


class CosineReward(NeuralReward):
    """A function of the cosine between a picture's and its prompt's embedding; the text tower runs once a distinct prompt.

    Args:
        model, tokenizer: a transformers `CLIPModel` and its tokenizer.
        preprocess, name, options: as `NeuralReward`.
    """

    reads_prompts = True

    def __init__(
        self, model: Any, tokenizer: Any, preprocess: Callable[[Tensor], Tensor], *, name: str, **options: Unpack[ModelOptions]
    ) -> None:
        self.logit_scale = float(model.logit_scale.detach().exp())  # before the model may become bfloat16: 99 there instead of 100
        super().__init__(model, preprocess, name=name, **options)
        self.tokenizer = tokenizer
        self.prompt_cache = PromptCache(self._encode)

    def conditions(self, prompts: Sequence[str], metadata: Sequence[Any]) -> Tensor:
        return self.prompt_cache(prompts, self.parameter.device)

    def score(self, pixels: Tensor, conditions: Tensor | None) -> Tensor:
        assert conditions is not None
        return self.from_cosine((_image_embeddings(self.model, pixels) * conditions).sum(-1))

    def from_cosine(self, cosine: Tensor) -> Tensor:
        """The reward [B] of cosines [B]."""
        return cosine

    def _encode(self, prompts: list[str]) -> Tensor:
        length = self.model.config.text_config.max_position_embeddings
        tokens = token_ids(self.tokenizer, prompts, length, pad_to_length=False).to(self.parameter.device)
        hidden = self.model.text_model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"])
        return _unit(self.model.text_projection(hidden.pooler_output))


class _TransformersCosine(CosineReward):
    NAME: str  # of the metric
    HUB_ID: str
    PARTS: str | None = None  # hub id of the tokenizer and the image processor, if those are another's

    @classmethod
    def from_pretrained(
        cls, source: str | Path | None = None, *, processor: str | Path | None = None, **options: Unpack[ModelOptions]
    ) -> Self:
        """Loads a transformers CLIP model with its tokenizer and image processor.

        Args:
            source: folder or hub id of the weights; None: the published ones.
            processor: folder or hub id of tokenizer and image processor; None: `source`, if it is a folder that has them, else
                those that the published weights were trained with.
            options: as `NeuralReward`.

        Raises:
            WeightsError: something is missing or damaged.
        """
        from transformers import AutoTokenizer, CLIPModel

        source, default = source or cls.HUB_ID, cls.PARTS or str(source or cls.HUB_ID)
        model = weights.load_model(CLIPModel, source, cls.NAME)
        words, pixels = (weights.companion(source, processor, default, files) for files in (TOKENIZER_FILES, PROCESSOR_FILES))
        tokenizer = weights.load_tokenizer(AutoTokenizer, words, cls.NAME, model.config.text_config.vocab_size)
        preprocess = weights.load_pretrained(ImagePreprocessor, pixels, cls.NAME)
        return cls(model, tokenizer, preprocess, name=cls.NAME, **options)


class CLIPScore(_TransformersCosine):
    """CLIP score: max(100 cos, 0), about 15 to 35 for pictures and prompts that belong together. Differentiable where cos > 0.

    arXiv:2104.08718, equation 1, with w = 100 as torchmetrics has it (the paper: w = 2.5).
    """

    NAME = "clip_score"
    HUB_ID = CLIP_L14
    SCALE = 100.0

    def from_cosine(self, cosine: Tensor) -> Tensor:
        return (self.SCALE * cosine).clamp_min(0)


class PickScore(_TransformersCosine):
    """PickScore (arXiv:2305.01569): exp(logit_scale) cos, about 15 to 25 with the published weights. Differentiable."""

    NAME = "pickscore"
    HUB_ID = "yuvalkirstain/PickScore_v1"
    PARTS = CLIP_H14

    def from_cosine(self, cosine: Tensor) -> Tensor:
        return self.logit_scale * cosine


class HPSv2(CosineReward):
    """Human Preference Score v2 (arXiv:2306.09341): the cosine itself, about 0.2 to 0.35. Differentiable.

    The published tables give 100 times this; to train on that scale, set `reward_weights`. Scores of v2.0 and v2.1 are not comparable.
    """

    HUB_ID = "xswu/HPSv2"
    NAMES = {"v2.0": "hpsv2", "v2.1": "hpsv2.1"}
    FILES = {"v2.0": "HPS_v2_compressed.pt", "v2.1": "HPS_v2.1_compressed.pt"}
    CONFIG = VIT_H_14

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path = HUB_ID,
        *,
        version: str = "v2.1",
        tokenizer: str | Path | None = None,
        **options: Unpack[ModelOptions],
    ) -> HPSv2:
        """Loads a checkpoint in OpenCLIP's layout into a transformers `CLIPModel`.

        Args:
            source: folder or hub id that has the version's file, or the file itself.
            version: "v2.0" or "v2.1".
            tokenizer: folder or hub id; None: the weights' folder, if it has one, else laion/CLIP-ViT-H-14-laion2B-s32B-b79K.
            options: as `NeuralReward`.

        Raises:
            ValueError: another version.
            WeightsError: something is missing, damaged, or not in OpenCLIP's layout.
        """
        from transformers import AutoTokenizer, CLIPConfig, CLIPModel

        if version not in cls.FILES:
            raise ValueError(f"version={version!r}: must be {' or '.join(cls.FILES)}")
        name = cls.NAMES[version]
        path = weights.find_file(source, name, cls.FILES[version])
        text, place = cls.CONFIG["text_config"], weights.companion(source, tokenizer, CLIP_H14, TOKENIZER_FILES)
        words = weights.load_tokenizer(AutoTokenizer, place, name, text["vocab_size"])
        end = words.eos_token_id  # its position gives the text's embedding
        tokens = {"bos_token_id": words.bos_token_id, "eos_token_id": end, "pad_token_id": end}
        model = CLIPModel(CLIPConfig(**cls.CONFIG | {"text_config": text | tokens}))
        state = convert_open_clip(weights.read_state_dict(path, name))
        weights.load_strictly(model, state, path, name, unused=r"attn_mask|.*position_ids")
        preprocess = ImagePreprocessor.hpsv2(cls.CONFIG["vision_config"]["image_size"])
        return cls(model, words, preprocess, name=name, **options)


class AestheticScore(NeuralReward):
    """Aesthetic score: the head on the unit image embedding, trained on ratings from 1 to 10, mostly 4 to 7. Differentiable.

    github.com/christophschuhmann/improved-aesthetic-predictor; prompts are not read.

    Args:
        clip, head: a transformers `CLIPModel` (its text tower is not kept), and the head on its embedding.
        preprocess, name, options: as `NeuralReward`.
    """

    HUB_ID = "trl-lib/ddpo-aesthetic-predictor"
    FILES = ("aesthetic-model.pth", "sac+logos+ava1-l14-linearMSE.pth")  # the same weights: TRL's name and LAION's
    full_precision = "head"

    def __init__(
        self, clip: Any, head: ScoreHead, preprocess: Callable[[Tensor], Tensor], *, name: str = "aesthetic", **options: Any
    ) -> None:
        parts = {"vision_model": clip.vision_model, "visual_projection": clip.visual_projection, "head": head}
        super().__init__(nn.ModuleDict(parts), preprocess, name=name, **options)

    def score(self, pixels: Tensor, conditions: Tensor | None) -> Tensor:
        return self.model.head(_image_embeddings(self.model, pixels))

    @classmethod
    def from_pretrained(
        cls, source: str | Path = HUB_ID, *, clip: str | Path | None = None, **options: Unpack[ModelOptions]
    ) -> AestheticScore:
        """Loads the head, and the CLIP model that it stands on.

        Args:
            source: folder or hub id of the head, or its file.
            clip: folder or hub id of the CLIP model; None: the folder `clip` beside the head or the head's own folder, if one of
                them has a config.json, else openai/clip-vit-large-patch14.
            options: as `NeuralReward`.

        Raises:
            WeightsError: something is missing or damaged, or the head is for embeddings of another size.
        """
        from transformers import CLIPModel

        name = "aesthetic"
        path = weights.find_file(source, name, *cls.FILES)
        model = weights.load_model(CLIPModel, weights.companion(source, clip, CLIP_L14, ("config.json",), "clip"), name)
        head = ScoreHead(model.config.projection_dim)
        weights.load_strictly(head, weights.read_state_dict(path, name), path, name)
        preprocess = ImagePreprocessor.torchvision_clip(model.config.vision_config.image_size)
        return cls(model, head, preprocess, name=name, **options)
