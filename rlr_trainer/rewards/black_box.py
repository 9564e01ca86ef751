"""Rewards that work on numpy arrays or PIL pictures, and have no gradient."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor


def numpy_reward(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator: hands pictures to a reward as a numpy array, uint8 [B, H, W, 3] (videos [B, F, H, W, 3]), RGB from 0 to 255.

    The reward counts as a black box: plans that need its gradient are refused before any work. Prompts, metadata and what it
    returns are as for every reward.
    """
    return _on(eight_bit, function)


def pil_reward(function: Callable[..., Any]) -> Callable[..., Any]:
    """Decorator: hands pictures to a reward as a list of B PIL pictures (videos: B lists of F pictures). A black box, as `numpy_reward`."""
    return _on(pil_pictures, function)


def eight_bit(images: Tensor) -> np.ndarray:
    """[..., 3, H, W] in [0, 1] -> uint8 [..., H, W, 3]: round(255 x), the values clamped."""
    return (images.detach().clamp(0, 1) * 255).round().to(torch.uint8).movedim(-3, -1).cpu().numpy()


def pil_pictures(images: Tensor) -> list[Any]:
    """[B, 3, H, W] in [0, 1] -> B PIL pictures; [B, F, 3, H, W] -> B lists of F."""
    from PIL import Image

    if images.dim() == 5:
        return [pil_pictures(video) for video in images]
    return [Image.fromarray(picture) for picture in eight_bit(images)]


def _on(convert: Callable[[Tensor], Any], function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)  # also takes over the mark of `groupwise`
    def reward(images: Tensor, prompts: tuple[str, ...], metadata: tuple[Any, ...]) -> Any:
        return function(convert(images), prompts, metadata)

    reward.__name__ = getattr(function, "__name__", type(function).__name__)
    reward.black_box = True  # type: ignore[attr-defined]
    return reward
