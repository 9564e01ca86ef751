"""Picture rewards on videos [B, F, 3, H, W]: which frames are scored, and what their scores become."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from rlr_trainer.rewards.calling import invoke
from rlr_trainer.rewards.values import RewardError, check_values, split_returned

CHOICES = ("even", "random")
COMBINATIONS: dict[str, Callable[[Tensor], Tensor]] = {"mean": lambda values: values.mean(1), "min": lambda values: values.amin(1)}


def even_frames(count: int, total: int) -> list[int]:
    """Numbers of `count` of `total` frames, evenly spaced from the first to the last; of a single one, that of the middle."""
    if count == 1:
        return [total // 2]
    gaps = 2 * (count - 1)
    return [(2 * number * (total - 1) + count - 1) // gaps for number in range(count)]  # halves up


def random_frames(videos: int, count: int, total: int) -> Tensor:
    """Numbers [videos, count] of different frames in their order, every set of them equally likely, drawn for each video by itself.

    From PyTorch's global generator on the CPU, which a run seeds and its checkpoints keep. The draws of a video do not depend on how the
    videos are divided into calls.
    """
    return torch.rand(videos, total).argsort(1)[:, :count].sort(1).values


def as_pictures(videos: Tensor, prompts: Sequence[str] | None, metadata: Sequence[Any] | None) -> tuple[Tensor, Any, Any]:
    """Videos [B, F, 3, H, W] as pictures [B F, 3, H, W], each with the prompt of its video, and its metadata in a dict of its own."""
    count = videos.shape[1]
    texts = None if prompts is None else tuple(prompt for prompt in prompts for _ in range(count))
    rows = None if metadata is None else tuple(copy.copy(row) for row in metadata for _ in range(count))
    return videos.flatten(0, 1), texts, rows


def mean_over_frames(reward: Callable[..., Tensor], videos: Tensor, prompts: Any, metadata: Any) -> Tensor:
    """The mean [B] of a picture reward over all frames of videos [B, F, 3, H, W]."""
    return reward(*as_pictures(videos, prompts, metadata)).unflatten(0, videos.shape[:2]).mean(1)


def scores_videos(reward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """A picture reward that takes videos as well, by `mean_over_frames`."""

    @functools.wraps(reward)
    def of_pictures_or_videos(images: Tensor, prompts: tuple[str, ...], metadata: tuple[Any, ...]) -> Tensor:
        return (partial(mean_over_frames, reward) if images.dim() == 5 else reward)(images, prompts, metadata)

    return of_pictures_or_videos


class FrameReward:
    """A picture reward on chosen frames of videos: `(images [B, F, 3, H, W], prompts, metadata) -> [B]`. Pictures it scores as they are.

    Each frame is scored as a picture, with the prompt and the metadata of its video. A gradient goes to the chosen frames. A video with a
    frame that has no reward (None or NaN) has none.

    The mean over frames drawn at random is an unbiased estimate of the mean over all, and so is its gradient; the least of some frames is
    at least the least of all. Drawn frames add noise to the reward: for evaluations, which should differ by the weights alone, take "even".

    Args:
        reward: a reward of pictures.
        num_frames: frames that are scored; None: all.
        choice: "even" (evenly spaced, the same ones every time) or "random" (`random_frames`, anew in every call).
        combine: "mean" or "min" over the frames, or a function from scores [B, N] to rewards [B].
        gradient_frames: frames through which the gradient goes, drawn at random from the scored ones and weighted so that it stays
            unbiased; all are scored, but a network keeps the graph of these alone. Only with "mean". None: all.
        name: of the reward in logs; None: that of `reward`.

    Raises:
        ValueError: an argument outside its range.
        TypeError: a group-wise reward, which must get all pictures of a prompt and nothing else.
    """

    def __init__(
        self,
        reward: Callable[..., Any],
        num_frames: int | None = None,
        *,
        choice: str = "even",
        combine: str | Callable[[Tensor], Tensor] = "mean",
        gradient_frames: int | None = None,
        name: str | None = None,
    ) -> None:
        self.reward, self.num_frames, self.choice, self.gradient_frames = reward, num_frames, choice, gradient_frames
        self.__name__ = name or getattr(reward, "__name__", None) or type(reward).__name__
        self.black_box = getattr(reward, "black_box", False)
        if getattr(reward, "needs_group", False):
            raise TypeError(
                f"reward {self.__name__!r} is group-wise: it compares the videos of a prompt, and cannot score their frames one by one; "
                "choose the frames inside it"
            )
        if choice not in CHOICES:
            raise ValueError(f"choice={choice!r}: must be one of {', '.join(CHOICES)}")
        if not callable(combine) and combine not in COMBINATIONS:
            raise ValueError(f"combine={combine!r}: must be one of {', '.join(COMBINATIONS)}, or a function [B, N] -> [B]")
        for field, value in (("num_frames", num_frames), ("gradient_frames", gradient_frames)):
            if value is not None and value < 1:
                raise ValueError(f"{field}={value}: must be at least 1, or None for all")
        if gradient_frames is not None and combine != "mean":
            raise ValueError(
                f"gradient_frames={gradient_frames} with combine={combine!r}: only a mean has an unbiased gradient from some of its frames; "
                "set combine='mean', or gradient_frames=None"
            )
        if gradient_frames is not None and num_frames is not None and gradient_frames > num_frames:
            raise ValueError(f"gradient_frames={gradient_frames}: must be at most num_frames={num_frames}")
        self.combine = combine if callable(combine) else COMBINATIONS[combine]

    def __call__(self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Any]) -> Any:
        """Rewards [B], or (rewards, reward_metadata) where `reward` returns such; lists with an entry per frame become one per video.

        Raises:
            RewardError: fewer frames than are to be chosen, or `reward` does not return one number per picture.
        """
        return self.drawn(images)(images, prompts, metadata)

    def drawn(self, images: Tensor) -> Callable[..., Any]:
        """This reward for a batch of the size of `images`, with its frames drawn: the same, whenever it is called."""
        if images.dim() != 5:
            return self.reward
        videos, total = images.shape[:2]
        scored, differentiated = self.num_frames or total, self.gradient_frames or self.num_frames or total
        for field, count in (("num_frames", scored), ("gradient_frames", differentiated)):
            if count > total:
                raise RewardError(
                    f"reward {self.__name__!r}: {field}={count}, but the videos have {total} frames; set at most that, or None for all"
                )
        even = torch.tensor(even_frames(scored, total)).expand(videos, -1)
        frames = even if self.choice == "even" else random_frames(videos, scored, total)
        chosen = None if differentiated == scored else random_frames(videos, differentiated, scored)
        return partial(self._score, frames, chosen)

    def _score(self, frames: Tensor, chosen: Tensor | None, videos: Tensor, prompts: Sequence[str], metadata: Sequence[Any]) -> Any:
        """Scores the frames [B, N]; of these, with a graph the ones at the places `chosen` [B, K]."""
        picked = videos if frames.shape == videos.shape[:2] else take_frames(videos, frames)
        if chosen is None or not (torch.is_grad_enabled() and videos.requires_grad):
            values, notes = self._of_each(picked, prompts, metadata)
            rewards = self.combine(values)
        else:
            with torch.no_grad():
                values, notes = self._of_each(picked, prompts, metadata)
            part, _ = self._of_each(take_frames(picked, chosen), prompts, metadata)
            estimate = part.mean(1)
            rewards = self.combine(values) + (estimate - estimate.detach())  # the value of all, the gradient of some
        return (rewards, notes) if notes else rewards

    def _of_each(self, videos: Tensor, prompts: Sequence[str], metadata: Sequence[Any]) -> tuple[Tensor, Any]:
        """The scores [B, N] of all frames of videos [B, N, ...], and what the reward returned beside them."""
        shape = videos.shape[:2]
        returned = invoke(self.__name__, self.reward, as_pictures(videos, prompts, metadata), None)
        values, notes = split_returned(returned)
        return check_values(self.__name__, values, shape.numel(), videos.device).unflatten(0, shape), _by_video(notes, *shape)


def take_frames(videos: Tensor, frames: Tensor) -> Tensor:
    """The frames of the numbers `frames` [B, N] of videos [B, F, ...]: [B, N, ...], with a graph."""
    rows = torch.arange(len(videos), device=videos.device)[:, None]
    return videos[rows, frames.to(videos.device)]


def _by_video(notes: Any, videos: int, frames: int) -> Any:
    """Notes with one entry per frame as one entry per video, a list; others as they are."""
    if isinstance(notes, dict):
        return {key: _by_video(note, videos, frames) for key, note in notes.items()}
    if isinstance(notes, list | tuple) and len(notes) == videos * frames:
        return [list(notes[first : first + frames]) for first in range(0, len(notes), frames)]
    return notes
