"""The benchmark's tasks: what is rewarded, and how pictures are judged by measures that no training sees."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from functools import lru_cache
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from benchmarks.ocr import ocr_reward
from rlr_trainer import digits
from rlr_trainer.digits.rewards import digit_reward, ink
from rlr_trainer.rewards import jpeg_compressibility

Reward = Callable[[Tensor, tuple[str, ...], tuple[Any, ...]], Tensor]
TARGET = 7


@dataclasses.dataclass(frozen=True)
class Task:
    """One reward.

    Attributes:
        reward: makes the reward function; that of a video, if a number of frames is passed, scores so many drawn at random.
        differentiable: whether methods that need the reward's gradient may take part.
        target: the digit that the pictures should show; None if any digit will do.
        direction: in which it should move; None on pictures, and if any will do.
        measure: (pictures or videos, task, reward) -> numbers; None: `measure`.
    """

    reward: Callable[..., Reward]
    differentiable: bool
    target: int | None = None
    direction: str | None = None
    measure: Callable[[Tensor, Task, Reward], dict[str, float]] | None = None


def black_box_ink(images: Tensor, prompts: tuple[str, ...], metadata: tuple[Any, ...]) -> Tensor:
    return ink(images.detach(), prompts, metadata)


def digit_and_ink() -> Reward:
    digit = digit_reward(TARGET)
    return lambda images, prompts, metadata: digit(images, prompts, metadata) + ink(images, prompts, metadata)


TASKS = {
    "digit": Task(lambda: digit_reward(TARGET), True, TARGET),
    "ink": Task(lambda: ink, True),
    "ink_black_box": Task(lambda: black_box_ink, False),
    "compressibility": Task(lambda: jpeg_compressibility, False),
    "digit_and_ink": Task(digit_and_ink, True, TARGET),
    "ocr": Task(lambda: ocr_reward(TARGET), False, TARGET),
}


@lru_cache(maxsize=1)
def _judge() -> tuple[torch.nn.Module, dict[str, Tensor]]:
    return digits.load_classifier("judge"), load_file(digits.WEIGHTS / "statistics.safetensors")


def frechet_to_all(features: Tensor) -> float:
    """Frechet distance of judge features [N, F] to those of the real digits of all classes, every class weighing the same.

    Of the mixture of the classes: mean = mean of means; covariance = mean of covariances + covariance of means.
    """
    _, statistics = _judge()
    means, covariances = statistics["class_means"], statistics["class_covariances"]
    covariance = covariances.mean(0) + torch.cov(means.T, correction=0)
    projected = (features.double() - statistics["mean"]) @ statistics["components"]
    return digits.gaussian_frechet_distance(projected.mean(0), torch.cov(projected.T), means.mean(0), covariance)


@torch.no_grad()
def measure(images: Tensor, task: Task, reward: Reward) -> dict[str, float]:
    """Numbers of one set of pictures [N, 3, H, W]; to be compared between sets of equal size only.

    - reward: the training's own reward;
    - judge: the judge's mean probability of the target; its mean confidence in any digit where there is no target;
    - frechet: distance to the real digits of the target, or of all classes;
    - diversity: mean distance of two pictures in the judge's features.
    """
    judge, _ = _judge()
    features = judge.features(images)
    probabilities = judge(images).softmax(-1)
    count = len(images)
    return {
        "reward": float(reward(images, (digits.PROMPT,) * count, ({},) * count).mean()),
        "judge": float((probabilities.amax(-1) if task.target is None else probabilities[:, task.target]).mean()),
        "frechet": frechet_to_all(features) if task.target is None else digits.frechet_distance(images, task.target),
        "diversity": float(torch.pdist(features).mean()),
    }
