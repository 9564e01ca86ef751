"""Samplers by name, and the one that belongs to a pipeline's scheduler. Formulas: the table in interpolant.py."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from rlr_trainer.schedules.grid import VARIANCE_PRESERVING, Grid, read_grid
from rlr_trainer.schedules.interpolant import InterpolantSchedule
from rlr_trainer.schedules.protocol import SamplerOptions

logger = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Level:
    """The range of a sampler's noise level (`sample_eta`).

    Attributes:
        default: where none is given.
        valid: whether a level lies in the range.
        rule: the range in words, after "must".
    """

    default: float
    valid: Callable[[float], bool]
    rule: str


@dataclasses.dataclass(frozen=True)
class GaussianSampler:
    """How a sampler makes its tables.

    Attributes:
        grids: kinds of grid that it works on.
        stds: (grid, level) -> T standard deviations, in units of x1's.
        direction: (grid, stds) -> T factors of the predicted noise, without which the noise level is kept.
        level: the noise level's range, or None where the sampler has none.
    """

    grids: tuple[str, ...]
    stds: Callable[[Grid, float], list[float]]
    direction: Callable[[Grid, Sequence[float]], list[float]]
    level: Level | None = None


def make_schedule(scheduler: Any, options: SamplerOptions, **set_timesteps_arguments: Any) -> InterpolantSchedule:
    """The sampler's steps on the grid of a diffusers scheduler, which is left as it is.

    Args:
        scheduler: the pipeline's, of a class in `SCHEDULERS`.
        options: number of steps, sampler, noise level and noisy steps.
        set_timesteps_arguments: what the pipeline gives to `set_timesteps` beside the number of steps, such as `mu` or `sigmas`.

    Raises:
        ValueError: an option out of its range, a sampler that does not fit the scheduler, or a scheduler or setting without a known
            Gaussian transition.
    """
    if options.sampler != "auto" and options.sampler not in SAMPLERS:
        raise ValueError(f"sampler={options.sampler!r}: must be one of auto, {', '.join(SAMPLERS)}")
    grid = read_grid(scheduler, options.num_steps, **set_timesteps_arguments)
    name = _sampler_of(grid, type(scheduler).__name__) if options.sampler == "auto" else options.sampler
    sampler = SAMPLERS[name]
    if grid.kind not in sampler.grids:
        fitting = [other for other, one in SAMPLERS.items() if grid.kind in one.grids]
        raise ValueError(
            f"sampler={name!r} does not fit the pipeline's {grid.scheduler_name}; set sampler to one that does: {', '.join(fitting)}"
        )
    stds = sampler.stds(grid, _level(name, sampler, options, grid))
    direction = sampler.direction(grid, stds)
    for step in set(range(grid.num_steps)) - set(_noisy_steps(options)):
        stds[step], direction[step] = 0.0, grid.next_noise[step]
    if options.noise_steps is not None and not any(stds):
        raise ValueError(
            f"noise_steps={options.noise_steps}: sampler {name!r} adds no noise in these steps; choose others or leave it unset"
        )
    return InterpolantSchedule(
        grid.times,
        grid.signal,
        grid.noise,
        grid.next_signal,
        tuple(direction),
        tuple(grid.noise_std * std for std in stds),
        grid.prediction_type,
        grid.init_std,
        grid.clip_range,
        noise_follows_clipping=name == "ddpm",
        consistency=_consistency(grid) if name == "lcm" else None,
        noise_std=grid.noise_std,
    )


# ---- options ----


def _level(name: str, sampler: GaussianSampler, options: SamplerOptions, grid: Grid) -> float:
    """The noise level that was asked for, or the sampler's own."""
    eta = options.eta
    if sampler.level is None:
        if eta is not None and not (name == "ode" and eta == 0):
            raise ValueError(f"sample_eta={eta}: sampler {name!r} has no noise level; leave sample_eta unset")
        return 0.0
    if eta is None:
        fresh = grid.scheduler_name == "FlowMatchLCMScheduler" or grid.scheduler.config.get("stochastic_sampling", False)
        return 1.0 if options.sampler == "auto" and name == "flow_cps" and fresh else sampler.level.default
    if not sampler.level.valid(eta):
        raise ValueError(f"sample_eta={eta}: must {sampler.level.rule}")
    return eta


def _noisy_steps(options: SamplerOptions) -> range:
    """The steps that may add noise."""
    wanted, num_steps = options.noise_steps, options.num_steps
    if wanted is None:
        return range(num_steps)
    if isinstance(wanted, int) and not isinstance(wanted, bool):
        if not 1 <= wanted <= num_steps:
            raise ValueError(
                f"noise_steps={wanted}: a number of steps from the noisy end must lie between 1 and {num_steps} (sample_num_steps)"
            )
        return range(wanted)
    if not isinstance(wanted, (tuple, list)) or len(wanted) != 2 or any(type(step) is not int for step in wanted):
        raise ValueError(f"noise_steps={wanted!r}: must be a number of steps or a pair of step numbers, the first and the last")
    first, last = wanted
    if not 0 <= first <= last < num_steps:
        raise ValueError(
            f"noise_steps={wanted}: first and last step must be in order and lie between 0 and {num_steps - 1}, the last step"
        )
    return range(first, last + 1)


# ---- the sampler of a scheduler ----

_OWN_SAMPLERS = {
    "DDIMScheduler": "ddim",
    "DDIMParallelScheduler": "ddim",
    "CogVideoXDDIMScheduler": "ddim",
    "PNDMScheduler": "ddim",
    "DDPMScheduler": "ddpm",
    "DDPMParallelScheduler": "ddpm",
    "EulerAncestralDiscreteScheduler": "euler_ancestral",
    "LCMScheduler": "lcm",
    "TCDScheduler": "tcd",
    "SCMScheduler": "scm",
    "FlowMatchEulerDiscreteScheduler": "flow_cps",
    "FlowMatchLCMScheduler": "flow_cps",
}


def _sampler_of(grid: Grid, scheduler_name: str) -> str:
    """The scheduler's own sampler, or the nearest one with a Gaussian transition, which is logged."""
    if scheduler_name in _OWN_SAMPLERS:
        return _OWN_SAMPLERS[scheduler_name]
    config = grid.scheduler.config
    algorithm = config.get("algorithm_type", "") if scheduler_name.startswith("DPMSolver") else ""
    if algorithm.startswith("sde-") or scheduler_name == "CogVideoXDPMScheduler":
        if algorithm != "sde-dpmsolver++" or config.solver_order > 1:
            logger.warning(
                "sampler='auto': dpm_sde, of first order, stands in for %s's own steps, on the same grid", scheduler_name
            )
        return "dpm_sde"
    nearest = "flow_cps" if grid.kind == "flow" else "ddim"
    logger.warning("sampler='auto': %s stands in for %s, which adds no noise, on the same grid", nearest, scheduler_name)
    return nearest


# ---- tables ----


def _no_noise(grid: Grid, level: float) -> list[float]:
    return [0.0] * grid.num_steps


def _ddim_stds(grid: Grid, eta: float) -> list[float]:
    """sigma_t of DDIM, eq. 16."""
    return [eta * _ddpm_std(a, b) for a, b in zip(grid.alphas, grid.alphas_next, strict=True)]


def _ddpm_std(alpha: float, alpha_next: float) -> float:
    """sigma_t at eta = 1, eq. 16; 0 for a step that goes nowhere or ends at the clean latent."""
    return max((1 - alpha_next) / (1 - alpha) * (1 - alpha / alpha_next), 0.0) ** 0.5


def _ancestral_stds(grid: Grid, level: float) -> list[float]:
    """sigma_up of Euler ancestral, times A'. A level of `sigma` is B / A."""
    stds = []
    for signal, noise, next_signal, next_noise in _levels(grid):
        ratio = next_noise * signal / (noise * next_signal)  # sigma' / sigma
        stds.append(next_noise * max(1 - ratio**2, 0.0) ** 0.5)
    return stds


def _dpm_sde_stds(grid: Grid, level: float) -> list[float]:
    """With h the step in log(A / B); exp(-h) = 0 where the step ends at the clean latent."""
    stds = []
    for signal, noise, next_signal, next_noise in _levels(grid):
        decay = next_noise / next_signal * (signal / noise)  # exp(-h)
        stds.append(next_noise * max(1 - decay**2, 0.0) ** 0.5)
    return stds


def _ddpm_stds(grid: Grid, level: float) -> list[float]:
    """Posterior variance ("fixed_small") or beta ("fixed_large"); timestep 0 is the clean latent."""
    large = grid.scheduler_name.startswith("DDPM") and grid.scheduler.config.variance_type == "fixed_large"
    pairs = zip(grid.alphas, grid.alphas_next, strict=True)
    stds = [max(1 - a / b, 0.0) ** 0.5 if large else _ddpm_std(a, b) for a, b in pairs]
    return [std if time > 0 else 0.0 for std, time in zip(stds, grid.times, strict=True)]


def _fresh_noise_stds(grid: Grid, level: float) -> list[float]:
    """LCM and SCM: all noise is fresh."""
    return list(grid.next_noise)


def _tcd_stds(grid: Grid, eta: float) -> list[float]:
    """Down to timestep r = floor((1 - eta) t'), then up again to t' with fresh noise."""
    table = grid.scheduler.alphas_cumprod.cpu().double()
    stds = []
    for following, alpha_next in zip((*grid.times[1:], 0), grid.alphas_next, strict=True):
        reached = int(torch.floor((1 - eta) * torch.tensor(following)))  # in float32, as the scheduler rounds
        stds.append(max(1 - alpha_next / float(table[reached]), 0.0) ** 0.5)
    return stds


def _cps_stds(grid: Grid, level: float) -> list[float]:
    return [math.sin(level * math.pi / 2) * noise for noise in grid.next_noise]


def _flow_sde_stds(grid: Grid, level: float) -> list[float]:
    """g = level sqrt(sigma / (1 - sigma)); a first sigma of 1 counts as the second one in the denominator, as in Flow-GRPO."""
    denominators = list(grid.signal)
    if denominators[0] < 1e-3:  # solvers start a little below 1, where the formula would explode as well
        denominators[0] = grid.next_signal[0]
    diffusion = [level * (sigma / signal) ** 0.5 for sigma, signal in zip(grid.noise, denominators, strict=True)]
    return [g * duration**0.5 for g, duration in zip(diffusion, _durations(grid), strict=True)]


def _dance_stds(grid: Grid, level: float) -> list[float]:
    return [level * duration**0.5 for duration in _durations(grid)]


def _durations(grid: Grid) -> list[float]:
    """D = sigma - sigma' of a flow."""
    return [max(a - b, 0.0) for a, b in zip(grid.noise, grid.next_noise, strict=True)]


def _kept_level(grid: Grid, stds: Sequence[float]) -> list[float]:
    """What fresh noise leaves of B'. Rounding can push a zero just below zero."""
    return [max(variance - std**2, 0.0) ** 0.5 for variance, std in zip(grid.next_variance, stds, strict=True)]


def _ddpm_direction(grid: Grid, stds: Sequence[float]) -> list[float]:
    """Of the posterior mean, whatever variance is chosen."""
    return _kept_level(grid, _ddim_stds(grid, 1.0))


def _drift(grid: Grid, stds: Sequence[float]) -> list[float]:
    """B' - g^2 D / (2 B): Euler-Maruyama, with g^2 D the variance of the step."""
    return [after - std**2 / (2 * sigma) for sigma, after, std in zip(grid.noise, grid.next_noise, stds, strict=True)]


def _levels(grid: Grid) -> Any:
    return zip(grid.signal, grid.noise, grid.next_signal, grid.next_noise, strict=True)


def _consistency(grid: Grid) -> tuple[tuple[float, float], ...]:
    """(c_skip, c_out) of LCM's boundary condition, at sigma_data = 0.5 as in the scheduler."""
    scaled = [time * grid.scheduler.config.timestep_scaling for time in grid.times]
    return tuple((0.25 / (t * t + 0.25), t / (t * t + 0.25) ** 0.5) for t in scaled)


def _up_to_one(default: float, noise_of_one: str) -> Level:
    return Level(default, lambda eta: 0 <= eta <= 1, f"lie between 0 (no noise) and 1 ({noise_of_one})")


def _above_zero(default: float) -> Level:
    return Level(default, lambda eta: 0 < eta < math.inf, "be above 0 (for none, set sampler='ode')")


SAMPLERS: dict[str, GaussianSampler] = {
    "ddim": GaussianSampler(VARIANCE_PRESERVING, _ddim_stds, _kept_level, _up_to_one(1.0, "the noise of DDPM")),
    "ddpm": GaussianSampler(VARIANCE_PRESERVING, _ddpm_stds, _ddpm_direction),
    "euler_ancestral": GaussianSampler(VARIANCE_PRESERVING, _ancestral_stds, _kept_level),
    "dpm_sde": GaussianSampler((*VARIANCE_PRESERVING, "flow"), _dpm_sde_stds, _kept_level),
    "lcm": GaussianSampler(("lcm",), _fresh_noise_stds, _kept_level),
    "tcd": GaussianSampler(("tcd",), _tcd_stds, _kept_level, _up_to_one(0.3, "all noise is fresh")),
    "scm": GaussianSampler(("scm",), _fresh_noise_stds, _kept_level),
    "flow_cps": GaussianSampler(("flow",), _cps_stds, _kept_level, _up_to_one(0.8, "all noise is fresh")),
    "flow_sde": GaussianSampler(("flow",), _flow_sde_stds, _drift, _above_zero(0.7)),
    "dance_sde": GaussianSampler(("flow",), _dance_stds, _drift, _above_zero(0.3)),
    "ode": GaussianSampler((*VARIANCE_PRESERVING, "flow", "scm"), _no_noise, _kept_level),
}
