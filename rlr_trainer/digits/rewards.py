"""Rewards on pictures of digits, and of anything."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from rlr_trainer.digits import load_classifier


def ink(images: Tensor, prompts: tuple[str, ...], metadata: tuple[Any, ...]) -> Tensor:
    """Mean brightness of the picture, [B] in [0, 1]; differentiable."""
    return images.mean(dim=(1, 2, 3))


def digit_reward(target: int) -> Callable[[Tensor, tuple[str, ...], tuple[Any, ...]], Tensor]:
    """Probability of `target` under the bundled reward classifier, [B]; differentiable."""
    classifier = load_classifier("reward")

    def digit(images: Tensor, prompts: tuple[str, ...], metadata: tuple[Any, ...]) -> Tensor:
        return classifier(images).softmax(dim=-1)[:, target]

    return digit
