"""A diffusers scheduler and our schedule, side by side along one chain."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlr_trainer.estimators.chain import next_latent
from rlr_trainer.schedules import InterpolantSchedule

SHAPE = (2, 4, 3, 3)
STABLE_DIFFUSION = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"}


def network(x: Tensor) -> Tensor:
    """Any function of the latent will do."""
    return 0.7 * x.roll(1, 1).tanh() + 0.2 * x


def noise(seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(SHAPE, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def largest_difference(
    scheduler: Any, schedule: InterpolantSchedule, dtype: torch.dtype = torch.float32, set_timesteps: dict | None = None, **how: Any
) -> float:
    """Between the latents of the two chains, relative to their size. Each starts from the same noise, runs on its own latents and gets
    the same noise in each step. `how` is given to the scheduler's `step`."""
    num_steps = schedule.num_steps
    if "sigmas" in (set_timesteps or {}):
        scheduler.set_timesteps(**set_timesteps)
    else:
        scheduler.set_timesteps(num_steps, **(set_timesteps or {}))
    if dtype == torch.float64 and hasattr(scheduler, "sigmas"):
        scheduler.sigmas = scheduler.sigmas.double()
    exploding = type(scheduler).__name__ in ("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "LMSDiscreteScheduler")
    theirs = noise(0, dtype) * getattr(scheduler, "init_noise_sigma", 1.0)
    if "SCM" in type(scheduler).__name__:  # its pipeline scales the latents
        theirs = theirs * scheduler.config.sigma_data
    ours = noise(0, dtype) * schedule.init_std
    worst = 0.0
    for step in range(num_steps):
        timestep = scheduler.timesteps[step]
        assert schedule.time(step) == timestep and isinstance(schedule.time(step), float) == timestep.is_floating_point()
        scaled = scheduler.scale_model_input(theirs, timestep) if exploding else theirs
        worst = max(worst, float((ours - scaled).norm() / scaled.norm()))
        mean, std = schedule.transition(step, ours, network(ours))
        ours = next_latent(mean, std, noise(step + 1, dtype))
        theirs = one_step(scheduler, network(scaled), timestep, theirs, step + 1, how)
        assert mean.dtype == std.dtype == dtype and std.shape == ()
    final = theirs * schedule.next_signal[-1] if exploding else theirs
    return max(worst, float((ours - final).norm() / final.norm()))


def one_step(scheduler: Any, output: Tensor, timestep: Tensor, x: Tensor, seed: int, how: dict) -> Tensor:
    """The scheduler's own step, with the noise of a seed."""
    generator = torch.Generator().manual_seed(seed)
    name = type(scheduler).__name__
    if name == "CogVideoXDPMScheduler":  # without an earlier prediction it is of first order
        return scheduler.step(output, None, int(timestep), None, x, generator=generator)[0]
    takes_noise = name.startswith(("DDPM", "DDIM", "EulerA", "LCM", "TCD", "SCM", "FlowMatch", "DPMSolverMultistep"))
    with torch.random.fork_rng(devices=()):
        torch.manual_seed(seed)  # older diffusers' stochastic flow matching does not look at the generator
        return scheduler.step(output, timestep, x, **({"generator": generator} if takes_noise else {}), **how)[0]
