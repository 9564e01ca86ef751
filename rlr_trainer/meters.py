"""Gradient norms of the parts of an estimate, measured while it accumulates."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import Tensor

from rlr_trainer.chain import Parameters


class GradientMeter:
    """Norms of the gradient per step and per part, from hooks that see each backward pass before it is accumulated.

    Args:
        params: the trained parameters.
        part_of: names the part ("fo" or "ho") that a step belongs to; asked before each backward pass.
    """

    def __init__(self, params: Parameters) -> None:
        self.params = params
        self.reset()

    def reset(self) -> None:
        """Starts a new update."""
        self.sums: dict[str, dict[str, Tensor]] = {}
        self.squares: dict[int, Tensor] = {}

    @contextlib.contextmanager
    def measuring(self, step: int, part: str, factor: float) -> Iterator[None]:
        """While open, gradients belong to `step` and `part`; `factor` is what the backward pass multiplies them by."""
        sums = self.sums.setdefault(part, {})

        def hook(name: str):
            def add(gradient: Tensor) -> None:
                true = gradient.detach() / factor
                sums[name] = sums[name].add_(true) if name in sums else true
                self.squares[step] = self.squares.get(step, torch.zeros((), device=true.device)) + true.square().sum()

            return add

        handles = [parameter.register_hook(hook(name)) for name, parameter in self.params.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def part_norms(self) -> dict[str, float]:
        """Part -> norm of its summed gradient."""
        return {part: _norm(tensors) for part, tensors in self.sums.items()}

    def step_norms(self) -> dict[int, float]:
        """Step -> root of the summed squares of its gradients (one per batch of the update)."""
        return {step: float(total.sqrt()) for step, total in self.squares.items()}


def _norm(tensors: dict[str, Tensor]) -> float:
    total = sum(float(tensor.square().sum()) for tensor in tensors.values())
    return total**0.5
