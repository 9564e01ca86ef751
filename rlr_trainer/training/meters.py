"""What is measured while an estimate accumulates: gradient norms of its parts; and what is logged of many measurements."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rlr_trainer.estimators.chain import Parameters

LARGEST = {"ratio/max_abs_dev"}  # metrics of which the largest value is logged, not the mean


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


def summarize(taken: Mapping[str, Sequence[float]], accelerator: Any) -> dict[str, float]:
    """The mean of the values under each name, of those in `LARGEST` the largest, over all processes; NaN where one is. Collective.

    Every process has values under the same names.
    """
    names = sorted(taken)
    if not names:
        return {}
    is_largest = torch.tensor([name in LARGEST for name in names])
    columns = [torch.tensor(taken[name], dtype=torch.float64) for name in names]
    own = torch.stack([column.max() if name in LARGEST else column.mean() for name, column in zip(names, columns, strict=True)])
    if accelerator.num_processes > 1:
        everyone = accelerator.gather(own[None].to(accelerator.device)).cpu()
        own = torch.where(is_largest, everyone.amax(0), everyone.mean(0))
    return dict(zip(names, own.tolist(), strict=True))
