"""Size of a picture as a JPEG file (DDPO, arXiv:2305.13301, section 5.2): a black-box reward that needs no model. Videos: the mean over
the frames.
"""

from __future__ import annotations

import io
from typing import Any

import torch
from torch import Tensor

from rlr_trainer.rewards.black_box import pil_pictures
from rlr_trainer.rewards.frames import scores_videos

JPEG_QUALITY = 95  # DDPO's setting


@scores_videos
def jpeg_incompressibility(images: Tensor, prompts: tuple[str, ...], metadata: tuple[Any, ...]) -> Tensor:
    """Size of the JPEG file in kilobytes (1,000 bytes), [B]. Not differentiable."""
    sizes = []
    for picture in pil_pictures(images):
        buffer = io.BytesIO()
        picture.save(buffer, format="JPEG", quality=JPEG_QUALITY)
        sizes.append(buffer.tell() / 1000)
    return torch.tensor(sizes)


@scores_videos
def jpeg_compressibility(images: Tensor, prompts: tuple[str, ...], metadata: tuple[Any, ...]) -> Tensor:
    """Minus the size of the JPEG file in kilobytes, [B]. Not differentiable."""
    return -jpeg_incompressibility(images, prompts, metadata)


jpeg_incompressibility.black_box = jpeg_compressibility.black_box = True  # type: ignore[attr-defined]
