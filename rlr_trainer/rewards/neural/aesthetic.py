"""LAION's aesthetic score: a linear head on CLIP ViT-L/14's image embedding (github.com/christophschuhmann/improved-aesthetic-predictor)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Unpack

import torch
from torch import Tensor, nn

from rlr_trainer.rewards.neural.base import ModelOptions, NeuralReward
from rlr_trainer.rewards.neural.clip import CLIP_L14, image_embeddings
from rlr_trainer.rewards.neural.preprocessing import ImagePreprocessor
from rlr_trainer.rewards.neural.weights import companion, find_file, load_model, load_strictly, read_state_dict


class ScoreHead(nn.Module):
    """Five linear layers, D -> 1024 -> 128 -> 64 -> 16 -> 1, with nothing but dropout between them; [B, D] -> [B].

    The head of the aesthetic predictor and of ImageReward. Its layers keep the numbers that they have in the published files.
    """

    def __init__(self, features: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(features, 1024),
            nn.Dropout(0.2),
            nn.Linear(1024, 128),
            nn.Dropout(0.2),
            nn.Linear(128, 64),
            nn.Dropout(0.1),
            nn.Linear(64, 16),
            nn.Linear(16, 1),
        )

    def forward(self, features: Tensor) -> Tensor:
        return self.layers(features.to(next(self.parameters()).dtype)).squeeze(-1)


def cast_all_but_head(model: Any, dtype: torch.dtype) -> None:
    """Parameters to `dtype`, those of `model.head` at least to float32: in bfloat16, scores around 5 would be multiples of 1/32."""
    head: nn.Module = model.head
    model.head = nn.Identity()
    model.to(dtype=dtype)
    model.head = head.to(dtype=torch.promote_types(dtype, torch.float32))


class _AestheticModel(nn.Module):
    def __init__(self, clip: Any, head: ScoreHead) -> None:
        super().__init__()
        self.vision_model, self.visual_projection = clip.vision_model, clip.visual_projection
        self.head = head


class AestheticScore(NeuralReward):
    """Aesthetic score: the head on the unit image embedding; trained on ratings from 1 to 10, mostly 4 to 7. Prompts are not read.
    Differentiable.

    Args:
        clip: a transformers `CLIPModel` (its text tower is not kept).
        head: the head on its embedding.
        preprocess, name, options: as `NeuralReward`.
    """

    HUB_ID = "trl-lib/ddpo-aesthetic-predictor"
    FILES = ("aesthetic-model.pth", "sac+logos+ava1-l14-linearMSE.pth")  # the same weights: TRL's name and LAION's

    def __init__(
        self,
        clip: Any,
        head: ScoreHead,
        preprocess: Callable[[Tensor], Tensor],
        *,
        name: str = "aesthetic",
        **options: Unpack[ModelOptions],
    ) -> None:
        super().__init__(_AestheticModel(clip, head), preprocess, name=name, **options)

    def cast(self, dtype: torch.dtype) -> None:
        cast_all_but_head(self.model, dtype)

    def score(self, pixels: Tensor, conditions: Tensor | None) -> Tensor:
        return self.model.head(image_embeddings(self.model, pixels))

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path = HUB_ID,
        *,
        clip: str | Path | None = None,
        eight_bit: bool = False,
        **options: Unpack[ModelOptions],
    ) -> AestheticScore:
        """Loads the head, and the CLIP model that it stands on.

        Args:
            source: folder or hub id of the head, or its file.
            clip: folder or hub id of the CLIP model; None: the folder `clip` beside the head or the head's own folder, if one of
                them has a config.json, else openai/clip-vit-large-patch14.
            eight_bit: see `ImagePreprocessor`.
            options: device, dtype, batch_size, recompute; see `NeuralReward`.

        Raises:
            WeightsError: something is missing or damaged, or the head is for embeddings of another size.
        """
        from transformers import CLIPModel

        name = "aesthetic"
        path = find_file(source, name, *cls.FILES)
        model = load_model(CLIPModel, companion(source, clip, CLIP_L14, ("config.json",), "clip"), name)
        head = ScoreHead(model.config.projection_dim)
        load_strictly(head, read_state_dict(path, name), path, name)
        preprocess = ImagePreprocessor.torchvision_clip(model.config.vision_config.image_size, eight_bit=eight_bit)
        return cls(model, head, preprocess, name=name, **options)
