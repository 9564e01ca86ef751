"""What reward functions return: one number per sample, in any numeric form, and notes beside them."""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor


class RewardError(ValueError):
    """A reward failed, took too long, or returned something that is not one number per sample."""


def split_returned(returned: Any) -> tuple[Any, Any]:
    """(rewards, notes) of what a function returned: a pair is taken apart, anything else has no notes."""
    return returned if isinstance(returned, tuple) and len(returned) == 2 else (returned, {})


def check_values(name: str, values: Any, count: int, device: torch.device) -> Tensor:
    """One float32 number per sample, [count], on `device`; None becomes NaN. A graph is kept.

    Raises:
        RewardError: another shape, no numbers, complex or infinite ones; names the reward.
    """
    if isinstance(values, list | tuple):
        values = _from_list(name, values)
    try:
        tensor = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise RewardError(
            f"reward {name!r} returned {type(values).__name__} ({values!r:.80}): must be a tensor, array or list of {count} numbers, "
            "or a pair (rewards, reward_metadata)"
        ) from error
    if tensor.is_complex():
        raise RewardError(f"reward {name!r} returned complex numbers ({tensor.dtype}): return real ones")
    if tensor.shape != (count,):
        raise RewardError(
            f"reward {name!r} returned shape {tuple(tensor.shape)} for a batch of {count}: must be ({count},), one number per sample "
            "in the order of the pictures (a batch mean, or an extra dimension, has to go)"
        )
    tensor = tensor.to(device=device, dtype=torch.float32)
    if torch.isinf(tensor).any():
        raise RewardError(f"reward {name!r} returned an infinite value; return NaN or None for a sample that it does not apply to")
    return tensor


def _from_list(name: str, values: Sequence[Any]) -> Tensor:
    if any(isinstance(value, Tensor) for value in values):
        scalars = [torch.as_tensor(torch.nan if value is None else value) for value in values]
        wrong = next((tuple(s.shape) for s in scalars if s.numel() != 1), None)
        if wrong is not None:
            raise RewardError(f"reward {name!r} returned a list with a tensor of shape {wrong}: each entry must be one number")
        return torch.stack([scalar.reshape(()).float() for scalar in scalars])
    wrong_type = next(
        (v for v in values if v is not None and not isinstance(v, numbers.Real) and not hasattr(v, "__float__")), None
    )
    if wrong_type is not None or not values:
        raise RewardError(
            f"reward {name!r} returned a list with {wrong_type!r:.80} ({type(wrong_type).__name__}): each entry must be a number or None"
        )
    return torch.tensor([torch.nan if value is None else float(value) for value in values])


def merge_notes(notes: Sequence[Any], counts: Sequence[int]) -> Any:
    """Notes of several calls as if one call had been made, where that can be told; otherwise a list with those of each call.

    Lists, tuples, arrays and tensors with one entry per sample are joined; dicts with the same keys are merged key by key.

    Args:
        notes: one entry per call.
        counts: samples of each call.
    """
    if len(notes) == 1:
        return notes[0]
    first = notes[0]
    if all(isinstance(note, dict) for note in notes):
        if any(note.keys() != first.keys() for note in notes):
            return list(notes)
        return {key: merge_notes([note[key] for note in notes], counts) for key in first}
    if [_length(note) for note in notes] == list(counts):
        if all(isinstance(note, Tensor) for note in notes):
            return torch.cat(list(notes))
        if all(isinstance(note, np.ndarray) for note in notes):
            return np.concatenate(notes)
        if all(isinstance(note, list) for note in notes):
            return [item for note in notes for item in note]
        if all(isinstance(note, tuple) for note in notes):
            return tuple(item for note in notes for item in note)
    return list(notes)


def _length(note: Any) -> int:
    """Entries of a note that could have one per sample; -1 for anything else."""
    if isinstance(note, Tensor | np.ndarray):
        return len(note) if note.ndim else -1
    return len(note) if isinstance(note, list | tuple) else -1
