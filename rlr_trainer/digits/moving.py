"""moving-digits: prompts, classifiers and measures of the bundled text-to-video pipeline, whose clips show one digit that moves."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from rlr_trainer.digits import DIGIT_NAMES, MODELS, PROMPT, _check_digit, _load_frozen
from rlr_trainer.digits.moving_classifiers import DIRECTIONS, MOVING_CLASSIFIERS, PIXELS, MovingClassifier

NUM_FRAMES = 9  # 1 plus a multiple of 4, in which Wan's VAE encodes
SIZE = {"height": PIXELS, "width": PIXELS, "num_frames": NUM_FRAMES}
# Options of `RLRConfig` beside `digits.OPTIONS`. At 5e-3 the reward classifier is exploited within 20 updates (docs/demo.md).
OPTIONS: dict[str, float] = {**SIZE, "learning_rate": 2e-3}


def moving_prompt(digit: int | None = None, direction: str | None = None) -> str:
    """The prompt for a clip: `moving_prompt(7, "right")` is "a handwritten digit seven moving right"; what is None is left open.

    Raises:
        ValueError: `digit` is no class, or `direction` none of `DIRECTIONS`.
    """
    if digit is not None:
        _check_digit(digit)
    if direction is not None and direction not in DIRECTIONS:
        raise ValueError(f"direction={direction!r}: must be one of {', '.join(DIRECTIONS)}")
    words = [PROMPT, None if digit is None else DIGIT_NAMES[digit], "moving", direction]
    return " ".join(word for word in words if word is not None)


def load_moving_classifier(name: str, directory: str | Path | None = None) -> MovingClassifier:
    """One of the two classifiers of clips, in eval mode and frozen, differentiable in the videos.

    Args:
        name: "reward" (to train with) or "judge" (another architecture, for judging what the training has made).
        directory: folder of weights as `pretrain_moving.py` writes it; None for the bundled one.

    Returns:
        A module: videos [B, F, 3, H, W] float in [0, 1] -> digit logits [B, F, 10] of the frames, direction logits [B, 4] in the order of
        `DIRECTIONS`.

    Raises:
        ValueError: there is no classifier of this name.
        RuntimeError: the weights are missing or damaged.
    """
    return _load_frozen(MOVING_CLASSIFIERS, name, directory or MODELS["moving-digits"])


def read_clips(classifier: MovingClassifier, videos: Tensor) -> tuple[Tensor, Tensor]:
    """Probabilities of the digits [B, 10], means over the frames, and of the directions [B, 4], of videos [B, F, 3, H, W]; differentiable."""
    digit_logits, direction_logits = classifier(videos)
    return digit_logits.softmax(-1).mean(1), direction_logits.softmax(-1)


@torch.no_grad()
def share_read_as(classifier: MovingClassifier, videos: Tensor, digit: int, direction: str) -> tuple[float, float]:
    """Shares of clips [B, F, 3, H, W] whose most probable digit and direction are these.

    Shares, because the judge is trained to be careful: it reads 97 % of the held-out clips right, at a mean probability of 0.84.
    """
    place = DIRECTIONS.index(direction)
    of_digits, of_directions = read_clips(classifier, videos)
    return float((of_digits.argmax(-1) == digit).float().mean()), float((of_directions.argmax(-1) == place).float().mean())


@torch.no_grad()
def one_digit_share(classifier: MovingClassifier, videos: Tensor) -> Tensor:
    """Share of a clip's frames that show its most frequent digit, [B] in [1 / F, 1]: 1 for a clip that stays one digit."""
    classes_BF = classifier(videos)[0].argmax(-1)
    counts_BL = torch.nn.functional.one_hot(classes_BF, len(DIGIT_NAMES)).sum(1)
    return counts_BL.amax(-1) / classes_BF.shape[1]
