"""Size of a picture as a JPEG file (DDPO, arXiv:2305.13301, section 5.2): a black-box reward that needs no model. Videos: the mean over
the frames.
"""

from __future__ import annotations

import io
from typing import Any

import torch
from torch import Tensor

from rlr_trainer.rewards.frames import scores_videos

JPEG_QUALITY = 95  # DDPO's setting


@scores_videos
def jpeg_incompressibility(images: Tensor, prompts: tuple[str, ...], metadata: tuple[Any, ...]) -> Tensor:
    """Size of the JPEG file in kilobytes (1,000 bytes), [B]. Not differentiable."""
    from PIL import Image

    sizes = []
    for picture in (images.detach().clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu().numpy():
        buffer = io.BytesIO()
        Image.fromarray(picture).save(buffer, format="JPEG", quality=JPEG_QUALITY)
        sizes.append(buffer.tell() / 1000)
    return torch.tensor(sizes)


@scores_videos
def jpeg_compressibility(images: Tensor, prompts: tuple[str, ...], metadata: tuple[Any, ...]) -> Tensor:
    """Minus the size of the JPEG file in kilobytes, [B]. Not differentiable."""
    return -jpeg_incompressibility(images, prompts, metadata)


jpeg_incompressibility.black_box = jpeg_compressibility.black_box = True  # type: ignore[attr-defined]
