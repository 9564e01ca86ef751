"""What reward functions get and return: finite pictures; one number per sample, in any numeric form, and notes beside them."""

from __future__ import annotations

import numbers
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.graph import get_gradient_edge


class RewardError(ValueError):
    """A reward failed, took too long, or returned something that is not one number per sample."""


def check_finite(images: Tensor, prompts: Sequence[str], where: str) -> None:
    """Refuses pictures with NaN, which a reward might take for "not applicable", and a JPEG file for black.

    Args:
        images: [B, ...].
        prompts: B of them, for the message.
        where: what the batch is, for the message.

    Raises:
        FloatingPointError: some are not finite; names their prompts.
    """
    finite = torch.isfinite(images).flatten(1).all(1)
    if not finite.all():
        bad = torch.nonzero(~finite)[:, 0].tolist()
        raise FloatingPointError(
            f"{len(bad)} of {len(images)} pictures to be scored have non-finite values ({f'in {where}, ' if where else ''}prompts "
            f"{', '.join(f'{prompts[i]!r:.80}' for i in bad[:3])}): where they come out of the decoder, use a wider precision (bf16 or "
            "float32 instead of fp16)"
        )


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
    wrong_type = next(
        (v for v in values if v is not None and not isinstance(v, numbers.Real) and not hasattr(v, "__float__")), None
    )
    if wrong_type is not None or not values:
        raise RewardError(
            f"reward {name!r} returned a list with {wrong_type!r:.80} ({type(wrong_type).__name__}): each entry must be a number or None"
        )
    if any(isinstance(value, Tensor) for value in values):
        scalars = [torch.as_tensor(torch.nan if value is None else value) for value in values]
        wrong = next((tuple(s.shape) for s in scalars if s.numel() != 1), None)
        if wrong is not None:
            raise RewardError(f"reward {name!r} returned a list with a tensor of shape {wrong}: each entry must be one number")
        return torch.stack([scalar.reshape(()).float() for scalar in scalars])
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
