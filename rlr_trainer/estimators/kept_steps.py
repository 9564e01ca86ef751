"""Graphs of visited steps, kept from sampling to the sweep: the update then needs no second forward pass through the network."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from rlr_trainer.estimators.chain import StepFunction
from rlr_trainer.estimators.plan_draw import PlanDraw


class KeptStep(NamedTuple):
    """One step with its graph.

    Attributes:
        x: [N, ...], the step's input: a leaf of the graph.
        mean, std: of the next latent, with the graph.
    """

    x: Tensor
    mean: Tensor
    std: Tensor


class KeptSteps:
    """The steps that a sweep will visit, each with its graph. A step is handed out once, so that its backward pass frees it.

    Only for weights that have not changed since the sampling (autograd refuses others only where a backward pass reads them).

    Args:
        carries: step -> whether the adjoint of its input is asked for.
    """

    def __init__(self, carries: Mapping[int, bool]) -> None:
        self.carries = dict(carries)
        self._steps: dict[int, KeptStep] = {}

    @classmethod
    def of_draw(cls, draw: PlanDraw, stds: tuple[float, ...] = ()) -> KeptSteps:
        """Those of a plan's draw; with `stds`, T standard deviations, also every step with noise, which a penalty visits."""
        steps = draw.visited_steps([std > 0 for std in stds])
        return cls({step: draw.carries(step) for step in steps})

    def __len__(self) -> int:
        return len(self._steps)

    def recording(self, run_step: StepFunction) -> StepFunction:
        """`run_step` for `sample_chain`: keeps the graph of every step that will be visited, and returns values without one."""

        def run(step: int, x: Tensor) -> tuple[Tensor, Tensor]:
            """A visited step runs with gradients from a leaf of its own; the others as they are."""
            if step not in self.carries:
                return run_step(step, x)
            x = x.detach().requires_grad_(self.carries[step])
            with torch.enable_grad():
                mean, std = run_step(step, x)
            self._steps[step] = KeptStep(x, mean, std)
            return mean.detach(), std.detach()

        return run

    def take(self, step: int) -> KeptStep:
        """A step, which is forgotten here.

        Raises:
            ValueError: it was not kept, or is taken already.
        """
        if step not in self._steps:
            raise ValueError(
                f"step {step}: its graph was not kept, or is used up; a kept rollout is differentiated once, by its own plan"
            )
        return self._steps.pop(step)
