"""Rewards of videos by name: `frames:8:random:hpsv2.1`, `motion_amount`, `enough_motion:0.05`, `prompt_agreement:clip_score`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from rlr_trainer.rewards.frames import CHOICES, COMBINATIONS, FrameReward
from rlr_trainer.rewards.motion import PromptAgreement, enough_motion, motion_amount, motion_smoothness

MOTION: dict[str, Callable[..., Any]] = {"motion_amount": motion_amount, "motion_smoothness": motion_smoothness}
FRAMES, ENOUGH, AGREEMENT = "frames", "enough_motion", "prompt_agreement"
NAMES = [*MOTION, f"{ENOUGH}:AMOUNT", f"{AGREEMENT}:REWARD", f"{FRAMES}:NUMBER:REWARD"]
PICTURE_REWARD = "clip_score"  # of prompt_agreement, if none is named


def load_video_reward(name: str, load: Callable[[str], Any]) -> Any:
    """The reward of a name of `NAMES`; None for another name. `load` gives the pictures' rewards by their names.

    Raises:
        ValueError: what follows the name cannot be understood.
    """
    kind, _, rest = name.partition(":")
    if name in MOTION:
        return MOTION[name]
    if kind == ENOUGH:
        try:
            return enough_motion(float(rest))
        except ValueError as error:
            raise ValueError(f"reward={name!r}: must be {ENOUGH}:AMOUNT, such as {ENOUGH}:0.05 ({error})") from error
    if kind == AGREEMENT:
        return PromptAgreement(load(rest or PICTURE_REWARD))
    return _frame_reward(name, rest, load) if kind == FRAMES else None


def _frame_reward(name: str, rest: str, load: Callable[[str], Any]) -> FrameReward:
    """Of `8:random:min:REWARD`: words in any order, each kind at most once, and the pictures' reward."""
    options: dict[str, Any] = {}
    twice = False
    while (field := _field(word := rest.partition(":")[0])) is not None:
        twice |= field in options
        options[field] = int(word) if field == "num_frames" else word
        rest = rest.partition(":")[2]
    if twice or not options or not rest:
        words = f"a number of frames, {' or '.join(CHOICES)}, and {' or '.join(COMBINATIONS)}, each at most once"
        raise ValueError(
            f"reward={name!r}: must be {FRAMES}:WORDS:REWARD, such as {FRAMES}:8:random:hpsv2.1; the words are {words}"
        )
    return FrameReward(load(rest), **options)


def _field(word: str) -> str | None:
    """The option of `FrameReward` that a word sets; None for the beginning of a reward's name."""
    if word.isdecimal():
        return "num_frames"
    return "choice" if word in CHOICES else "combine" if word in COMBINATIONS else None
