"""What `rlr-trainer demo` draws with each bundled model: the prompt, the reward, the numbers of the judges, and the pictures of the result."""

from __future__ import annotations

import argparse
import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlr_trainer import digits
from rlr_trainer.digits import moving
from rlr_trainer.digits.rewards import digit_reward, ink, moving_digit_reward
from rlr_trainer.observing.clips import gif_bytes
from rlr_trainer.observing.pictures import clip_grid, mean_motion, picture_grid
from rlr_trainer.rewards import jpeg_compressibility

Numbers = dict[str, float | None]
Reward = Callable[[Tensor, tuple[str, ...], tuple[Any, ...]], Tensor]
FREE_REWARDS: dict[str, Reward] = {"ink": ink, "compressibility": jpeg_compressibility}  # which ask for no digit
DIRECTION = "right"  # that the demo asks for, unless told otherwise


@dataclass(frozen=True)
class Subject:
    """What is drawn, rewarded and judged.

    Attributes:
        prompt: of every sample.
        reward: of images [B, ...] in [0, 1].
        target: what the reward asks for, for the summary; empty if for no digit.
        labels: of each number, in words: "reward", and those of `judge`.
        judge: samples [N, ...] -> numbers, without the reward; None where the reward asks for no digit.
        show: writes pictures of the samples before and after, with texts, to a folder, and returns the files' names.
        divisor: of the number of samples of an evaluation.
        updates: of a run.
        options: of `RLRConfig`.
    """

    prompt: str
    reward: Reward
    target: dict[str, Any]
    labels: dict[str, str]
    judge: Callable[[Tensor], Numbers]
    show: Callable[[Mapping[str, Tensor], list[str], Path], list[str]]
    divisor: int = 1
    updates: int = 40
    options: dict[str, Any] = field(default_factory=dict)

    @torch.no_grad()
    def measure(self, images: Tensor) -> Numbers:
        """The reward's mean and the judge's numbers, by the names of `labels`."""
        reward = float(self.reward(images, (self.prompt,) * len(images), ({},) * len(images)).mean())
        numbers = {"reward": reward, **self.judge(images)}
        return {name: None if value is None else round(value, 4) for name, value in numbers.items()}


def make_subject(options: argparse.Namespace) -> Subject:
    """The subject of the options `model`, `reward`, `target` and `direction` of the command.

    Raises:
        ValueError: a direction for a model or a reward that knows none.
    """
    if options.model == "moving-digits":
        return _clips(options)
    if options.direction is not None:
        raise ValueError(f"--direction {options.direction}: {options.model} makes pictures; use it with --model moving-digits")
    return _pictures(options)


def _pictures(options: argparse.Namespace) -> Subject:
    free = FREE_REWARDS.get(options.reward)
    return Subject(
        prompt=digits.PROMPT,
        reward=free or digit_reward(options.target),
        target={} if free else {"target": options.target},
        labels={"reward": "mean reward", "judge": "independent judge", "frechet": "Frechet distance"},
        judge=functools.partial(_judge_pictures, None if free else options.target),
        show=_show_pictures,
    )


def _clips(options: argparse.Namespace) -> Subject:
    free = FREE_REWARDS.get(options.reward)
    if free and options.direction is not None:
        raise ValueError(f"--direction {options.direction}: the reward {options.reward} asks for none; use --reward digit")
    direction = options.direction or DIRECTION
    of_target = {"judge": "judged as the digit", "judge_direction": "judged as the direction"}
    of_motion = {"one_digit": "frames of one digit", "motion": "motion"}
    return Subject(
        prompt=moving.moving_prompt(),
        reward=free or moving_digit_reward(options.target, direction),
        target={} if free else {"target": options.target, "direction": direction},
        labels={"reward": "mean reward", **of_target, **of_motion},
        judge=functools.partial(_judge_clips, None if free else (options.target, direction)),
        show=_show_clips,
        divisor=2,  # a clip costs several pictures
        updates=50,
        options={**moving.OPTIONS, "per_device_train_batch_size": 16, "recompute": "auto"},
    )


def _judge_pictures(target: int | None, images: Tensor) -> Numbers:
    """The judge's mean probability of the digit, and the distance to real pictures of it."""
    if target is None:
        return {"judge": None, "frechet": None}
    judge = float(digits.load_classifier("judge")(images).softmax(dim=-1)[:, target].mean())
    return {"judge": judge, "frechet": digits.frechet_distance(images, target)}


def _judge_clips(target: tuple[int, str] | None, videos: Tensor) -> Numbers:
    """The shares of clips that the judge reads as the digit and the direction asked for; and whether clips stay one digit, and move."""
    judge = moving.load_moving_classifier("judge")
    numbers: Numbers = {"judge": None, "judge_direction": None}
    if target is not None:
        numbers = dict(zip(numbers, moving.share_read_as(judge, videos, *target), strict=True))
    return {**numbers, "one_digit": float(moving.one_digit_share(judge, videos).mean()), "motion": mean_motion(videos)}


def tile(images: Tensor, rows: int, columns: int) -> Tensor:
    """The first rows x columns pictures [N, ..., 3, H, W] as one, [..., 3, rows H, columns W]."""
    cells = images[: rows * columns].unflatten(0, (rows, columns)).movedim((0, 1), (-4, -2))  # [..., 3, rows, H, columns, W]
    return cells.flatten(-4, -3).flatten(-2, -1)


def _show_pictures(images: Mapping[str, Tensor], texts: list[str], folder: Path) -> list[str]:
    """Grids of the same 64 seeds before and after, side by side."""
    picture_grid(torch.stack([tile(part, 8, 8) for part in images.values()]), texts).save(folder / "before_after.png")
    return ["before_after.png"]


def _show_clips(images: Mapping[str, Tensor], texts: list[str], folder: Path) -> list[str]:
    """The same 36 seeds, or fewer in a square, before and after as moving grids side by side, and frames of 4 of them as strips."""
    side = min(6, *(math.isqrt(len(part)) for part in images.values()))
    frames = clip_grid(torch.stack([tile(part, side, side) for part in images.values()]), texts)
    (folder / "before_after.gif").write_bytes(gif_bytes(frames))
    picture_grid(torch.stack([tile(part, 4, 1) for part in images.values()]), texts).save(folder / "before_after.png")
    return ["before_after.gif", "before_after.png"]
