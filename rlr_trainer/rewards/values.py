"""What reward functions get and return: finite pictures; one number per sample, in any numeric form, and notes beside them."""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge


class RewardError(ValueError):
    """A reward failed, took too long, or returned something that is not one number per sample."""


def finite_rows(values: Tensor) -> Tensor:
    """Which of B samples [B, ...] are finite throughout, bool [B]."""
    return torch.isfinite(values).flatten(1).all(1)


def check_finite(images: Tensor, prompts: Sequence[str], where: str) -> None:
    """Raises `FloatingPointError` for pictures [B, ...] with NaN: a mean of them would say "not applicable", and a JPEG file shows black."""
    finite = finite_rows(images).tolist()
    if not all(finite):
        bad = [prompt for prompt, good in zip(prompts, finite, strict=True) if not good]
        raise FloatingPointError(
            f"{len(bad)} of {len(images)} pictures to be scored have non-finite values ({place(where, bad)}): where they come out of the "
            "decoder, use a wider precision (bf16 or float32 instead of fp16)"
        )


def place(where: str, prompts: Sequence[str]) -> str:
    """What the batch is, and the first three prompts, for messages."""
    shown = ", ".join(f"{prompt!r:.80}" for prompt in prompts[:3])
    more = f" and {len(prompts) - 3} more" if len(prompts) > 3 else ""
    return f"{f'in {where}, ' if where else ''}on {len(prompts)} prompts: {shown}{more}"


def graph_node(tensor: Tensor) -> Any:
    """Where the tensor stands in the autograd graph; None without one."""
    return get_gradient_edge(tensor).node if tensor.requires_grad else None


def depends_on(values: Tensor, images: Any) -> bool:
    """Whether a graph leads from the values to the images' node: one that ends at a network's own parameters does not."""
    seen: set[Any] = set()
    waiting = [graph_node(values)] if images is not None else []
    while waiting:
        node = waiting.pop()
        if node is images:
            return True
        if node is not None and node not in seen:
            seen.add(node)
            waiting.extend(following for following, _ in node.next_functions)
    return False


def split_returned(returned: Any) -> tuple[Any, Any]:
    """(rewards, notes) of what a function returned: a pair is taken apart, anything else has no notes.

    Two numbers are the rewards of two samples; a list is a pair if it ends with a dict.
    """
    if isinstance(returned, list):
        is_pair = len(returned) == 2 and isinstance(returned[1], dict)
    else:
        is_pair = isinstance(returned, tuple) and len(returned) == 2 and not all(map(_is_number, returned))
    return tuple(returned) if is_pair else (returned, {})


def _is_number(value: Any) -> bool:
    return isinstance(value, numbers.Real) or (isinstance(value, Tensor | np.ndarray) and value.ndim == 0)


def check_values(name: str, values: Any, count: int, device: torch.device) -> Tensor:
    """One float32 number per sample, [count], on `device`; None becomes NaN. A graph is kept.

    Raises:
        RewardError: another shape, no numbers, complex or infinite ones; names the reward.
    """
    try:
        if isinstance(values, list | tuple):
            scalars = [torch.as_tensor(torch.nan if v is None else v, dtype=torch.float32, device=device) for v in values]
            values = torch.stack([scalar.reshape(()) for scalar in scalars])  # fails for more than one number in an entry
        tensor = torch.as_tensor(values)
        if tensor.is_complex():
            raise TypeError("complex numbers")
    except (TypeError, ValueError, RuntimeError) as error:
        raise RewardError(
            f"reward {name!r} returned {type(values).__name__} ({values!r:.80}): must be a tensor, array or list of {count} real numbers "
            "(None where it does not apply), or a pair (rewards, reward_metadata)"
        ) from error
    if tensor.shape == (count, 1):  # as heads of one output return
        tensor = tensor.squeeze(1)
    if tensor.shape != (count,):
        raise RewardError(
            f"reward {name!r} returned shape {tuple(tensor.shape)} for a batch of {count}: must be ({count},), one number per sample "
            "in the order of the pictures (a batch mean, or an extra dimension, has to go)"
        )
    tensor = tensor.to(device=device, dtype=torch.float32)
    if torch.isinf(tensor).any():
        raise RewardError(f"reward {name!r} returned an infinite value; return NaN or None for a sample that it does not apply to")
    return tensor


def merge_notes(notes: Sequence[Any], counts: Sequence[int]) -> Any:
    """Notes of several calls, of `counts` samples, as of one call where that can be told; otherwise a list with those of each.

    Lists, tuples, arrays and tensors with one entry per sample become one list or tensor; dicts with the same keys are merged by key.
    """
    first = notes[0]
    if len(notes) == 1:
        return first
    if all(isinstance(note, dict) and note.keys() == first.keys() for note in notes):
        return {key: merge_notes([note[key] for note in notes], counts) for key in first}
    rows = all(isinstance(note, list | tuple | np.ndarray | Tensor) and getattr(note, "ndim", 1) for note in notes)
    if not rows or list(map(len, notes)) != list(counts):
        return list(notes)
    return torch.cat(list(notes)) if all(isinstance(note, Tensor) for note in notes) else list(chain(*notes))


@dataclasses.dataclass(frozen=True)
class RewardResult:
    """Rewards of one batch.

    Attributes:
        total: [B] float32, the weighted sum; NaN where no reward applies or one failed; with a graph if one was asked for.
        values: [K, B], the rewards before weights, likewise.
        notes: reward name -> what the function returned beside the rewards; K of them.
        errors: calls that failed (on_error="skip").
    """

    total: Tensor
    values: Tensor
    notes: dict[str, Any]
    errors: int = 0

    @property
    def parts(self) -> dict[str, Tensor]:
        """Reward name -> [B], detached."""
        return dict(zip(self.notes, self.values.detach(), strict=True))

    @property
    def metadata(self) -> Any:
        """What the functions returned beside the rewards: that of a single one, or name -> metadata of several."""
        return self.notes if len(self.notes) > 1 else next(iter(self.notes.values()))

    def detach(self) -> RewardResult:
        """The same without a graph."""
        return dataclasses.replace(self, total=self.total.detach(), values=self.values.detach())

    @staticmethod
    def concatenate(results: Sequence[RewardResult]) -> RewardResult:
        """Results of pieces of a batch, joined."""
        counts = [len(result.total) for result in results]
        return RewardResult(
            total=torch.cat([result.total for result in results]),
            values=torch.cat([result.values for result in results], 1),
            notes={name: merge_notes([result.notes[name] for result in results], counts) for name in results[0].notes},
            errors=sum(result.errors for result in results),
        )
