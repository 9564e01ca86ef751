"""Our chain without its noise, for solvers that the conformance kit exchanges for others."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlr_trainer.pipelines import Policy, PromptCache, adapt
from rlr_trainer.schedules import SamplerOptions


def assert_solved_alike(pipeline: Any, **call: Any) -> None:
    """Our chain makes the pictures of the pipeline's own call, whose scheduler is a solver of first order."""
    prompts, negatives, noise = ["A red  Fox", "a house"], ["ugly", ""], torch.randn(2, 4, 8, 8)
    call = {"num_inference_steps": 5, "output_type": "pt", **call}
    theirs = pipeline(prompts, negative_prompt=negatives, guidance_scale=3.0, latents=noise, **call).images
    ours = solve(adapt(pipeline), 5, prompts, negatives, 3.0, noise)
    torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def assert_on_the_grid_of_its_scheduler(adapter: Any) -> None:
    """The schedule visits the timesteps of the pipeline's own scheduler."""
    schedule = adapter.schedule(adapter.layout(None, None), SamplerOptions(5))
    adapter.pipeline.scheduler.set_timesteps(5)
    assert schedule.times == tuple(adapter.pipeline.scheduler.timesteps.tolist())


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
