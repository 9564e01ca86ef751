"""Rewards on pictures of digits, and of anything."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from rlr_trainer.digits import load_classifier
from rlr_trainer.digits.moving import load_moving_classifier, moving_prompt, read_clips
from rlr_trainer.digits.moving_classifiers import DIRECTIONS


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


def moving_digit_reward(target: int, direction: str) -> Callable[[Tensor, tuple[str, ...], tuple[Any, ...]], Tensor]:
    """Of clips of moving-digits: the mean of the probabilities of `target` (over the frames) and of `direction`, [B]; differentiable.

    The bundled reward classifier's. A mean and not a product, which is near 0, and hardly differs between clips, until both are nearly right.

    Raises:
        ValueError: there is no such direction or digit.
    """
    moving_prompt(target, direction)  # checks both
    classifier, place = load_moving_classifier("reward"), DIRECTIONS.index(direction)

    def moving_digit(images: Tensor, prompts: tuple[str, ...], metadata: tuple[Any, ...]) -> Tensor:
        of_digits, of_directions = read_clips(classifier, images)
        return (of_digits[:, target] + of_directions[:, place]) / 2

    moving_digit.__name__ = f"digit_{target}_{direction}"
    return moving_digit
