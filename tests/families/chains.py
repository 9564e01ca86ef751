"""Our chain without its noise, for solvers that the conformance kit exchanges for others."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlr_trainer.pipelines import Policy, PromptCache
from rlr_trainer.schedules import SamplerOptions


def solve(adapter: Any, num_steps: int, prompts: list[str], negatives: list[str], scale: float, noise: Tensor) -> Tensor:
    """Pictures [N, 3, H, W] of the ODE from `noise`, on the grid of the pipeline's scheduler."""
    layout, policy = adapter.layout(None, None), Policy(adapter.denoiser)
    schedule = adapter.schedule(layout, SamplerOptions(num_steps, sampler="ode"))
    conditioning = adapter.encode(prompts, negatives, scale, layout, PromptCache())
    x = schedule.init_std * noise
    with torch.no_grad():
        for step in range(num_steps):
            x, _ = schedule.transition(step, x, adapter.predict(policy, x, schedule.time(step), conditioning))
        return adapter.decode(x, layout)
