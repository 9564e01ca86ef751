"""What is measured while an estimate accumulates: gradient norms of its parts; and what is logged of many measurements."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from rlr_trainer.estimators.chain import Parameters
from rlr_trainer.rollouts.processes import Processes

LARGEST = {"ratio/max_abs_dev"}  # metrics of which the largest value is logged, not the mean


class GradientMeter:
    """Norms of the gradient per part, and per step where asked for, from hooks that see each backward pass before it is accumulated.

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
    def measuring(self, step: int | None, part: str, factor: float) -> Iterator[None]:
        """While open, gradients belong to `part` and, unless None, to `step`; `factor` is what the backward pass multiplies them by."""
        sums = self.sums.setdefault(part, {})
        hooks = {name: functools.partial(self._add, sums, name, step, factor) for name in self.params}
        handles = [parameter.register_hook(hooks[name]) for name, parameter in self.params.items()]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _add(self, sums: dict[str, Tensor], name: str, step: int | None, factor: float, gradient: Tensor) -> None:
        """Takes in what one backward pass gives parameter `name`; a hook that returns None leaves the gradient as it is."""
        true = gradient.detach() / factor
        sums[name] = sums[name].add_(true) if name in sums else true
        if step is not None:
            square = true.square().sum()
            self.squares[step] = self.squares[step] + square if step in self.squares else square

    def part_norms(self) -> dict[str, float]:
        """Part -> norm of its summed gradient."""
        return {part: sum(squared_norms(tensors)) ** 0.5 for part, tensors in self.sums.items()}

    def step_norms(self) -> dict[int, float]:
        """Step -> root of the summed squares of its gradients (one per batch of the update)."""
        if not self.squares:
            return {}
        return dict(zip(self.squares, torch.stack(list(self.squares.values())).sqrt().tolist(), strict=True))


def squared_norms(tensors: Mapping[str, Tensor]) -> list[float]:
    """Squared norm of every tensor, asked of the device at once."""
    return torch.stack([tensor.square().sum() for tensor in tensors.values()]).tolist() if tensors else []


class MetricsLog:
    """Values taken down since the last log line. All processes take down the same names."""

    def __init__(self) -> None:
        self.values: dict[str, list[float]] = {}

    def add(self, metrics: Mapping[str, float]) -> None:
        """Takes down one value under each name."""
        for name, value in metrics.items():
            self.values.setdefault(name, []).append(value)

    def take(self, processes: Processes) -> dict[str, float]:
        """The mean under each name, of those in `LARGEST` the largest, over all processes; NaN where one is. Collective; begins anew."""
        names = sorted(self.values)
        if not names:
            return {}
        is_largest = torch.tensor([name in LARGEST for name in names])
        columns = [torch.tensor(self.values[name], dtype=torch.float64) for name in names]
        own = torch.stack([column.max() if name in LARGEST else column.mean() for name, column in zip(names, columns, strict=True)])
        if processes.count > 1:
            everyone = processes.gather(own[None])
            own = torch.where(is_largest, everyone.amax(0), everyone.mean(0))
        self.values = {}
        return dict(zip(names, own.tolist(), strict=True))

    def state_dict(self) -> dict[str, list[float]]:
        return {name: list(values) for name, values in self.values.items()}

    def load_state_dict(self, state: dict[str, list[float]]) -> None:
        self.values = {name: list(values) for name, values in state.items()}
