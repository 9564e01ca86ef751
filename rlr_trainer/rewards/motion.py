"""Rewards of motion: how much, how smooth, and whether every frame keeps to the prompt.

Each of them alone can be won by something that nobody wants; their docstrings say by what. Together they exclude most of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rlr_trainer.rewards.frames import FrameReward
from rlr_trainer.rewards.values import RewardError


def mean_frame_difference(videos: Tensor) -> Tensor:
    """Mean of |x_(f+1) - x_f| over the pairs of neighbouring frames, colours and pixels of videos [B, F, 3, H, W]: [B].

    In the unit of the pixels, which lie in [0, 1]: 0 for a frozen video, 1/3 for independent uniform noise. The gradient of a pixel that
    does not change is 0.
    """
    return (videos[:, 1:] - videos[:, :-1]).abs().flatten(1).mean(1)


def interpolation_error(videos: Tensor) -> Tensor:
    """Mean of |x_f - (x_(f-1) + x_(f+1)) / 2| over the inner frames, colours and pixels of videos [B, F, 3, H, W]: [B] in [0, 1].

    How far each frame is from the mean of its neighbours, as VBench's motion smoothness (arXiv:2311.17982), which has a network interpolate
    between them.
    """
    between = (videos[:, :-2] + videos[:, 2:]) / 2
    return (videos[:, 1:-1] - between).abs().flatten(1).mean(1)


def soft_minimum(values: Tensor, temperature: float) -> Tensor:
    """-t log(mean_n exp(-v_n / t)) of values [B, N] with the temperature t > 0 (in their unit): [B].

    Between the least value (t to 0) and the mean (t to infinity). The gradient of a value is its weight exp(-v_n / t) / sum_m exp(-v_m / t).
    """
    return temperature * (math.log(values.shape[1]) - torch.logsumexp(-values / temperature, 1))


def check_video(name: str, images: Tensor, least: int) -> None:
    """Raises `RewardError` unless the images are videos [B, F, 3, H, W] of at least so many frames; `name` is the reward's."""
    if images.dim() != 5 or images.shape[1] < least:
        raise RewardError(
            f"reward {name!r}: images has the shape {tuple(images.shape)}, but must be videos [B, F, 3, H, W] of at least {least} frames; use "
            "it with a pipeline that makes videos, or raise num_frames"
        )


def motion_amount(images: Tensor, prompts: tuple[str, ...], metadata: tuple[Any, ...]) -> Tensor:
    """Amount of motion, `mean_frame_difference`, [B] in [0, 1]; differentiable.

    Cheated by flicker, flashes of the whole picture and noise from frame to frame, and it has no upper end: see `enough_motion`, and add
    `motion_smoothness`. A video whose frames are exactly equal has no gradient.
    """
    check_video("motion_amount", images, 2)
    return mean_frame_difference(images)


def enough_motion(amount: float) -> Callable[[Tensor, tuple[str, ...], tuple[Any, ...]], Tensor]:
    """The reward min(`motion_amount` / amount, 1), [B] in [0, 1]; differentiable, with a gradient of 0 where there is enough.

    Beside another reward it keeps a video from freezing without making it restless. A good `amount` is the mean of the base model's videos.
    Cheated by what cheats `motion_amount`, up to that amount.

    Raises:
        ValueError: an amount that is not above 0, or above 1.
    """
    if not 0 < amount <= 1:
        raise ValueError(f"amount={amount}: must be above 0 and at most 1, the mean difference of two frames with pixels in [0, 1]")

    def reward(images: Tensor, prompts: tuple[str, ...], metadata: tuple[Any, ...]) -> Tensor:
        check_video("enough_motion", images, 2)
        return (mean_frame_difference(images) / amount).clamp_max(1.0)

    reward.__name__ = "enough_motion"
    return reward


def motion_smoothness(images: Tensor, prompts: tuple[str, ...], metadata: tuple[Any, ...]) -> Tensor:
    """Smoothness, 1 - `interpolation_error`, [B] in [0, 1]; differentiable.

    Cheated by freezing, which gives 1, by fading from one picture to another instead of moving, and by blur and little contrast: add
    `enough_motion` and a reward of the picture.
    """
    check_video("motion_smoothness", images, 3)
    return 1 - interpolation_error(images)


class PromptAgreement(FrameReward):
    """Agreement of all frames with the prompt: the `soft_minimum` of a picture's agreement over the frames, [B]; differentiable.

    The worst frames count most, and every frame has a gradient. Cheated by freezing at one good frame, by whatever cheats the picture's
    reward (such as written words), and it does not see the order of the frames: add `enough_motion`.

    Args:
        reward: of pictures and prompts, such as `CLIPScore.from_pretrained()`.
        num_frames, choice: as `FrameReward`.
        temperature: of the soft minimum, in the unit of `reward`: frames that are better than the worst by much more hardly count. 1 fits
            a CLIP score, whose frames differ by a few units.

    Raises:
        ValueError: a temperature that is not above 0, or an argument of `FrameReward` outside its range.
    """

    def __init__(
        self,
        reward: Callable[..., Any],
        num_frames: int | None = None,
        *,
        choice: str = "even",
        temperature: float = 1.0,
        name: str = "prompt_agreement",
    ) -> None:
        if not (temperature > 0 and math.isfinite(temperature)):
            raise ValueError(f"temperature={temperature}: must be a finite number above 0, in the unit of the reward")
        combine = partial(soft_minimum, temperature=temperature)
        super().__init__(reward, num_frames, choice=choice, combine=combine, name=name)

    def drawn(self, images: Tensor) -> Callable[..., Any]:
        """As `FrameReward.drawn`, for videos alone."""
        check_video(self.__name__, images, 2)
        return super().drawn(images)
