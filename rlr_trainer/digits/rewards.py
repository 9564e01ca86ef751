"""Rewards on pictures of digits, and of anything."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from rlr_trainer.digits import load_classifier


def ink(images: Tensor, prompts: tuple[str, ...], metadata: tuple[Any, ...]) -> Tensor:
    """Mean brightness of the picture, or of all frames of a video, [B] in [0, 1]; differentiable."""
    return images.mean(dim=tuple(range(1, images.dim())))


def digit_reward(target: int) -> Callable[[Tensor, tuple[str, ...], tuple[Any, ...]], Tensor]:
    """Probability of `target` under the bundled reward classifier, [B], of a video the mean over its frames; differentiable."""
    classifier = load_classifier("reward")

    def digit(images: Tensor, prompts: tuple[str, ...], metadata: tuple[Any, ...]) -> Tensor:
        if images.dim() == 5:
            return digit(images.flatten(0, 1), prompts, metadata).unflatten(0, images.shape[:2]).mean(1)
        return classifier(images).softmax(dim=-1)[:, target]

    digit.__name__ = f"digit_{target}"  # a name that every tracker takes; several of them are told apart
    return digit
