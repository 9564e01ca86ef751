"""Calling users' reward functions: one or several, checked, combined, with or without a graph.

A reward is a function `(images, prompts, metadata) -> rewards` or `-> (rewards, reward_metadata)`:

- images: float tensor [B, 3, H, W] in [0, 1]; has a graph exactly when the plan needs a differentiable reward;
- prompts: tuple of B strings; metadata: tuple of B dicts (whatever the prompt function or the dataset row brought);
- rewards: [B] tensor, array or list of numbers; None or NaN marks a sample that the reward does not apply to.
"""

from __future__ import annotations

import dataclasses
import numbers
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rlr_trainer.estimators.first_order import NON_DIFFERENTIABLE, NonDifferentiableRewardError

RewardFunction = Callable[[Tensor, tuple[str, ...], tuple[Any, ...]], Any]


class RewardError(ValueError):
    """A reward returned something that is not one number per sample."""


@dataclasses.dataclass(frozen=True)
class RewardResult:
    """Rewards of one batch.

    Attributes:
        total: [B] float32, the weighted sum; NaN where no reward applies; with a graph when one was asked for.
        parts: reward name -> [B], detached.
        metadata: what the functions returned beside the rewards: that of a single one, or name -> metadata of several.
    """

    total: Tensor
    parts: dict[str, Tensor]
    metadata: Any


class Rewards:
    """One or several reward functions behind one call.

    Args:
        functions: a callable or a list of them.
        weights: one per function; None means 1 each.

    Raises:
        TypeError: something that cannot be called.
        ValueError: no function, or another number of weights than functions.
    """

    def __init__(self, functions: RewardFunction | Sequence[RewardFunction], weights: Sequence[float] | None = None) -> None:
        self.functions: list[Any] = list(functions) if isinstance(functions, list | tuple) else [functions]
        if not self.functions:
            raise ValueError("reward_function=[]: needs at least one reward function")
        for function in self.functions:
            if not callable(function):
                raise TypeError(
                    f"reward_function={function!r}: must be a function (images, prompts, metadata) -> rewards, or a list of them"
                )
        self.weights = [1.0] * len(self.functions) if weights is None else list(weights)
        if len(self.weights) != len(self.functions):
            raise ValueError(f"reward_weights has {len(self.weights)} entries for {len(self.functions)} reward functions")
        self.names = _unique_names(self.functions)
        self.queries = 0  # pictures scored so far, over all functions together counted once

    def __call__(
        self, images: Tensor, prompts: tuple[str, ...], metadata: tuple[Any, ...], *, differentiable: bool
    ) -> RewardResult:
        """Scores one batch.

        Raises:
            RewardError: wrong length, shape or type; names the reward.
            NonDifferentiableRewardError: `differentiable` and a reward without a graph; names it.
        """
        images = images if differentiable else images.detach()
        parts: dict[str, Tensor] = {}
        notes: dict[str, Any] = {}
        with torch.set_grad_enabled(differentiable):
            for name, function in zip(self.names, self.functions, strict=True):
                returned = function(images, prompts, metadata)
                values, notes[name] = returned if isinstance(returned, tuple) and len(returned) == 2 else (returned, {})
                parts[name] = _check_values(name, values, len(prompts), images.device)
                if differentiable and not parts[name].requires_grad:
                    raise NonDifferentiableRewardError(f"reward {name!r}: {NON_DIFFERENTIABLE}")
            weighted = torch.stack([w * parts[name] for w, name in zip(self.weights, self.names, strict=True)])
            applies = ~torch.isnan(weighted)
            total = torch.where(applies, weighted, 0.0).sum(0)
            total = torch.where(applies.any(0), total, torch.nan)
        self.queries += len(prompts)
        return RewardResult(
            total=total,
            parts={name: part.detach() for name, part in parts.items()},
            metadata=notes[self.names[0]] if len(self.names) == 1 else notes,
        )


def _unique_names(functions: Sequence[RewardFunction]) -> list[str]:
    names: list[str] = []
    for function in functions:
        name = getattr(function, "__name__", None) or type(function).__name__
        taken = sum(other == name or other.startswith(f"{name}_") for other in names)
        names.append(f"{name}_{taken + 1}" if taken else name)
    return names


def _check_values(name: str, values: Any, count: int, device: torch.device) -> Tensor:
    """One float32 number per sample, [B], on the pictures' device; None becomes NaN."""
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
