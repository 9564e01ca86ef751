"""The benchmark's tasks on the bundled video model: what is rewarded, and how clips are judged by measures that no training sees."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from benchmarks.tasks import TARGET, Reward, Task
from rlr_trainer.digits import moving
from rlr_trainer.digits.moving_classifiers import DIRECTIONS
from rlr_trainer.digits.rewards import ink
from rlr_trainer.rewards import FrameReward
from rlr_trainer.rewards.motion import mean_frame_difference

DIRECTION = "right"


def frames_digit(frames: int | None = None) -> Reward:
    """The reward classifier's probability of the target, the mean over all frames, or over so many drawn at random."""
    classifier = moving.load_moving_classifier("reward")

    def digit(images: Tensor, prompts: tuple[str, ...], metadata: tuple[Any, ...]) -> Tensor:
        return classifier.read_frames(images).softmax(-1)[:, TARGET]

    return FrameReward(digit, frames, choice="random" if frames else "even")


def digit_and_direction(frames: int | None = None) -> Reward:
    """The mean of `frames_digit` and the reward classifier's probability of the direction, which is one of whole clips."""
    classifier, of_frames = moving.load_moving_classifier("reward"), frames_digit(frames)
    place = DIRECTIONS.index(DIRECTION)

    def both(images: Tensor, prompts: tuple[str, ...], metadata: tuple[Any, ...]) -> Tensor:
        of_direction = classifier.read_directions(images).softmax(-1)[:, place]
        return (of_frames(images, prompts, metadata) + of_direction) / 2

    return both


def ink_of_frames(frames: int | None = None) -> Reward:
    """Mean brightness of all frames, or of so many drawn at random."""
    return FrameReward(ink, frames, choice="random" if frames else "even")


@functools.cache
def _judge() -> moving.MovingClassifier:
    return moving.load_moving_classifier("judge")


@torch.no_grad()
def measure_clips(videos: Tensor, task: Task, reward: Reward) -> dict[str, float]:
    """Numbers of one set of clips [N, F, 3, H, W].

    - reward: the training's own reward;
    - judge: share of the clips that the judge reads as the target digit; its mean confidence in any where there is no target;
    - direction: share that it reads as moving to the right; its mean confidence in any where the task asks for none;
    - one_digit: mean share of a clip's frames that show its most frequent digit;
    - motion: mean difference of neighbouring frames;
    - diversity: mean distance between two clips, in root mean square of their pixels.
    """
    if task.target is None or task.direction is None:
        judge, direction = (float(part.amax(-1).mean()) for part in moving.read_clips(_judge(), videos))
    else:
        judge, direction = moving.share_read_as(_judge(), videos, task.target, task.direction)
    count = len(videos)
    return {
        "reward": float(reward(videos, (moving.moving_prompt(),) * count, ({},) * count).mean()),
        "judge": judge,
        "direction": direction,
        "one_digit": float(moving.one_digit_share(_judge(), videos).mean()),
        "motion": float(mean_frame_difference(videos).mean()),
        "diversity": float(torch.pdist(videos.flatten(1)).mean()) / videos[0].numel() ** 0.5,
    }


CLIP_TASKS = {
    "digit_and_direction": Task(digit_and_direction, True, TARGET, direction=DIRECTION, measure=measure_clips),
    "frames_ink": Task(ink_of_frames, True, measure=measure_clips),
}
