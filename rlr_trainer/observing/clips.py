"""Videos where pictures are shown: animated GIFs, and strips of frames where only pictures fit."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rlr_trainer.rewards.black_box import eight_bit
from rlr_trainer.rewards.frames import even_frames

MILLISECONDS = 120  # of each frame; a GIF counts in steps of 10
STRIP_FRAMES = 8  # most frames of a strip


def pixels(image: Tensor) -> np.ndarray:
    """[3, H, W] in [0, 1] -> bytes [H, W, 3]; of a batch [N, 3, H, W] the pictures side by side."""
    image = torch.cat(list(image), dim=-1) if image.dim() == 4 else image
    return eight_bit(image.float())


def strip_frames(total: int) -> list[int]:
    """The numbers of the frames that a strip shows: evenly spaced, the first and the last among them."""
    return even_frames(min(total, STRIP_FRAMES), total)


def strips(videos: Tensor) -> Tensor:
    """Videos [N, F, 3, H, W] as pictures [N, 3, H, n W] of their `strip_frames`, side by side."""
    return torch.cat([videos[:, number] for number in strip_frames(videos.shape[1])], dim=-1)


def gif_bytes(frames: Sequence[Any]) -> bytes:
    """PIL pictures of one size as an animated GIF that repeats for ever; 256 colours a frame, and equal frames become one that lasts longer."""
    buffer = io.BytesIO()
    first, *others = frames
    first.save(buffer, "GIF", save_all=True, append_images=others, duration=MILLISECONDS, loop=0)
    return buffer.getvalue()


def frame_pictures(video: Tensor) -> list[Any]:
    """The frames of a video [F, 3, H, W] in [0, 1] as PIL pictures."""
    from PIL import Image

    return [Image.fromarray(pixels(frame)) for frame in video]


def clip_bytes(video: Tensor) -> bytes:
    """`gif_bytes` of a video [F, 3, H, W] in [0, 1]."""
    return gif_bytes(frame_pictures(video))
