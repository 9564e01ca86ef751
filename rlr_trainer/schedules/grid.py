"""The noise levels that a diffusers scheduler visits.

Everywhere x = A x0 + B x1, with the clean latent x0 and the noise x1:

| kind                  | A, B                            | of                                                          |
|-----------------------|---------------------------------|-------------------------------------------------------------|
| "vp"                  | sqrt(alpha), sqrt(1 - alpha)    | DDIM, DDPM, PNDM; Euler, DPM-Solver, UniPC, DEIS, LMS, whose sigma = B / A |
| "lcm", "tcd"          | the same                        | LCM, TCD; apart, because their samplers need their timesteps |
| "flow"                | 1 - sigma, sigma                | FlowMatchEuler, FlowMatchLCM; DPM-Solver, UniPC, DEIS with `use_flow_sigmas` |
| "scm"                 | cos t, sin t                    | SCM (arXiv:2410.11081), where x1 has the standard deviation sigma_data |

`alpha` is the cumulative product of the table (alpha_t of arXiv:2010.02502).
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

VARIANCE_PRESERVING = ("vp", "lcm", "tcd")
# What schedulers of each kind may predict, in their own words; those of a flow without the setting always predict x1 - x0.
_PREDICTIONS = {
    **dict.fromkeys(VARIANCE_PRESERVING, ("epsilon", "sample", "v_prediction")),
    "flow": ("epsilon", "sample", "flow_prediction"),
    "scm": ("trigflow",),
}
# Ours. TrigFlow's output is v in the coordinates cos t, sin t.
_SAME_PREDICTION = {"flow_prediction": "flow", "trigflow": "v_prediction"}


@dataclasses.dataclass(frozen=True)
class Grid:
    """Where each of T steps starts and leads. A step need not lead to where the next one starts: DDIM's do not under "linspace".

    Attributes:
        kind: of coordinates, see the module's table.
        times: T numbers, the network's time input: integers where the scheduler's timesteps are.
        signal, noise: T floats each, A and B where a step starts.
        next_signal, next_noise: T floats each, A and B where it leads.
        alphas, alphas_next: the cumulative products behind them (A^2 is not alpha to the last bit); empty for "flow" and "scm".
        prediction_type: what the network predicts: "epsilon", "sample", "v_prediction" or "flow".
        init_std: standard deviation of the initial latent.
        noise_std: that of x1.
        clip_range: limit of the predicted clean latent, or None.
        scheduler: the copy that was read, its timesteps set.
    """

    kind: str
    times: tuple[float, ...]
    signal: tuple[float, ...]
    noise: tuple[float, ...]
    next_signal: tuple[float, ...]
    next_noise: tuple[float, ...]
    prediction_type: str
    scheduler: Any = dataclasses.field(repr=False, compare=False)
    alphas: tuple[float, ...] = ()
    alphas_next: tuple[float, ...] = ()
    init_std: float = 1.0
    noise_std: float = 1.0
    clip_range: float | None = None

    @property
    def num_steps(self) -> int:
        return len(self.times)

    @property
    def scheduler_name(self) -> str:
        return type(self.scheduler).__name__

    @property
    def next_variance(self) -> tuple[float, ...]:
        """B^2 where each step leads."""
        return tuple(1 - a for a in self.alphas_next) if self.alphas_next else tuple(b * b for b in self.next_noise)


def read_grid(scheduler: Any, num_steps: int, **set_timesteps_arguments: Any) -> Grid:
    """The grid of a diffusers scheduler, which is left as it is.

    Args:
        scheduler: of a class in `SCHEDULERS`.
        num_steps: T.
        set_timesteps_arguments: what the pipeline gives to `set_timesteps` beside it, such as `mu` or `sigmas`.

    Raises:
        ValueError: a scheduler without a known Gaussian transition, a setting that this chain does not model, or a number of steps
            that the scheduler does not make.
    """
    name = type(scheduler).__name__
    if name not in _READERS:
        raise ValueError(
            f"the pipeline's scheduler is a {name}, which has no known Gaussian transition; exchange it "
            f"(`pipeline.scheduler = Other.from_config(pipeline.scheduler.config)`) for one of {', '.join(SCHEDULERS)}"
        )
    if name == "PNDMScheduler":  # its own grid repeats timesteps
        from diffusers import DDIMScheduler

        # a PNDM never clips: DDIM's default, True, is not what it was trained with
        clips = scheduler.config.get("clip_sample", False)
        scheduler = DDIMScheduler.from_config(scheduler.config, clip_sample=clips)
    own = copy.deepcopy(scheduler)
    _check_settings(name, own.config)
    _set_timesteps(name, own, num_steps, set_timesteps_arguments)
    grid = _READERS[name](own, num_steps)
    _check_grid(grid, num_steps)
    return grid


def _check_settings(name: str, config: Any) -> None:
    refused = {
        "thresholding": (bool, "False"),
        "invert_sigmas": (bool, "False"),
        "scale_factors": (bool, "None"),
        "variance_type": (lambda value: value in ("learned", "learned_range", "fixed_large_log"), "'fixed_small' or 'fixed_large'"),
    }
    for field, (matters, instead) in refused.items():
        of_others = field == "variance_type" and not name.startswith(("DDPM", "DPMSolver"))  # left over in a configuration
        if matters(config.get(field)) and not of_others:
            value = config[field]
            raise ValueError(f"the scheduler has {field}={value!r}, which this chain does not model; set it to {instead}")


def _set_timesteps(name: str, own: Any, num_steps: int, arguments: dict[str, Any]) -> None:
    most = own.config.num_train_timesteps
    if not 1 <= num_steps <= most:
        raise ValueError(f"sample_num_steps={num_steps}: must lie between 1 and the scheduler's {most} training timesteps")
    if name == "SCMScheduler" and num_steps != 2:  # its default intermediate timestep is for two steps only
        arguments = {"intermediate_timesteps": None, **arguments}
    if name == "SCMScheduler" or not {"sigmas", "timesteps"} & arguments.keys():
        arguments = {"num_inference_steps": num_steps, **arguments}
    try:
        own.set_timesteps(**arguments)
    except (ValueError, TypeError, AssertionError) as error:
        reason = str(error) or "an argument does not fit the scheduler's configuration"
        raise ValueError(f"sample_num_steps={num_steps}: {name}.set_timesteps({_shown(arguments)}) failed: {reason}") from error


def _shown(arguments: dict[str, Any]) -> str:
    return ", ".join(f"{name}={value!r}" for name, value in arguments.items())


# ---- one reader for each way in which schedulers store their levels ----


def _read_table(own: Any, num_steps: int) -> Grid:
    """Whole timesteps that index the table `alphas_cumprod`."""
    name, config, table = type(own).__name__, own.config, own.alphas_cumprod.cpu().double()
    times = [int(t) for t in own.timesteps]
    if max(times) >= len(table):
        raise ValueError(
            f"sample_num_steps={num_steps} with the scheduler's steps_offset={config.steps_offset} starts at timestep "
            f"{max(times)}, beyond the last one, {len(table) - 1}; use {num_steps - 1} steps or steps_offset=0"
        )
    stride = config.num_train_timesteps // num_steps
    if name in ("DDPMScheduler", "DDPMParallelScheduler", "LCMScheduler"):
        following, last = [*times[1:], -1], 1.0
    elif name == "TCDScheduler":
        following, last = [*times[1:], 0], 1.0
    else:
        following, last = [t - stride for t in times], float(own.final_alpha_cumprod)
    alphas = [float(table[t]) for t in times]
    alphas_next = [float(table[t]) if t >= 0 else last for t in following]
    clips = config.get("clip_sample", False) and name not in ("TCDScheduler", *_COGVIDEOX)  # whose steps do not look at it
    kind = {"LCMScheduler": "lcm", "TCDScheduler": "tcd"}.get(name, "vp")
    limit = config.clip_sample_range if clips else None
    return _variance_preserving(own, kind, times, alphas, alphas_next, init_std=float(own.init_noise_sigma), clip_range=limit)


def _read_sigmas(own: Any, num_steps: int) -> Grid:
    """Levels `sigmas`: B / A, or B itself for flow models."""
    times, sigmas = _numbers(own.timesteps), own.sigmas.double().tolist()[: len(own.timesteps) + 1]
    if own.config.get("use_flow_sigmas", False):
        return _flow(own, times, sigmas, _prediction(own, "flow"))
    alphas = [1 / (sigma * sigma + 1) for sigma in sigmas]
    init_std = float(own.init_noise_sigma)
    if type(own).__name__ in _VARIANCE_EXPLODING:  # their latents are x / A
        init_std *= alphas[0] ** 0.5
    return _variance_preserving(own, "vp", times, alphas[:-1], alphas[1:], init_std=init_std)


def _read_flow(own: Any, num_steps: int) -> Grid:
    return _flow(own, _numbers(own.timesteps), own.sigmas.double().tolist(), "flow")


def _read_angles(own: Any, num_steps: int) -> Grid:
    """The timesteps are angles, one more than there are steps."""
    angles = _numbers(own.timesteps)
    cosines, sines = tuple(math.cos(t) for t in angles), tuple(math.sin(t) for t in angles)
    std, prediction = own.config.sigma_data, _prediction(own, "scm")
    times, levels = tuple(angles[:-1]), (cosines[:-1], sines[:-1], cosines[1:], sines[1:])
    return Grid("scm", times, *levels, prediction_type=prediction, scheduler=own, init_std=std, noise_std=std)


def _variance_preserving(
    own: Any,
    kind: str,
    times: Sequence[float],
    alphas: Sequence[float],
    alphas_next: Sequence[float],
    init_std: float,
    clip_range: float | None = None,
) -> Grid:
    return Grid(
        kind,
        tuple(times),
        tuple(a**0.5 for a in alphas),
        tuple((1 - a) ** 0.5 for a in alphas),
        tuple(a**0.5 for a in alphas_next),
        tuple((1 - a) ** 0.5 for a in alphas_next),
        _prediction(own, kind),
        own,
        tuple(alphas),
        tuple(alphas_next),
        init_std,
        clip_range=clip_range,
    )


def _flow(own: Any, times: Sequence[float], sigmas: Sequence[float], prediction_type: str) -> Grid:
    if not all(0 <= sigma <= 1 for sigma in sigmas):
        raise ValueError(
            f"the scheduler's sigmas reach {max(sigmas):.4g}: those of a flow model lie between 0 and 1; check its settings"
        )
    signal = tuple(1 - sigma for sigma in sigmas)
    noise = tuple(sigmas)
    return Grid("flow", tuple(times), signal[:-1], noise[:-1], signal[1:], noise[1:], prediction_type, own)


def _numbers(timesteps: torch.Tensor) -> list[float]:
    return timesteps.tolist()  # integers of integer tensors


def _prediction(own: Any, kind: str) -> str:
    given, allowed = own.config.prediction_type, _PREDICTIONS[kind]
    if given not in allowed:
        raise ValueError(f"the scheduler's prediction_type={given!r} must be one of {allowed}")
    return _SAME_PREDICTION.get(given, given)


def _check_grid(grid: Grid, num_steps: int) -> None:
    if grid.num_steps != num_steps or len(grid.next_noise) != num_steps:
        raise ValueError(
            f"sample_num_steps={num_steps}: {grid.scheduler_name} makes {grid.num_steps} steps of it; choose another number, or another "
            "timestep_spacing of the scheduler"
        )
    for step in range(num_steps):
        if grid.noise[step] <= 0:
            raise ValueError(
                f"sample_num_steps={num_steps}: step {step} of {grid.scheduler_name} starts without noise; give sigmas above 0, without the "
                "last one"
            )
        if grid.next_noise[step] * grid.signal[step] > grid.noise[step] * grid.next_signal[step] + 1e-9:
            raise ValueError(
                f"sample_num_steps={num_steps}: step {step} of {grid.scheduler_name} leads to more noise than it starts from; use fewer "
                "steps, or final_sigmas_type='zero'"
            )
    # Noise says nothing of the clean latent that it hides: epsilon has to be divided by A.
    rescaled = grid.kind == "flow" or grid.scheduler.config.get("rescale_betas_zero_snr", False)
    if grid.prediction_type == "epsilon" and min(grid.signal) <= (1e-3 if rescaled else 0):
        raise ValueError(
            "the scheduler starts at pure noise (zero terminal SNR) with prediction_type='epsilon', which cannot tell the clean latent "
            "there; use a model and a scheduler with another prediction_type, or rescale_betas_zero_snr=False"
        )


_COGVIDEOX = ("CogVideoXDDIMScheduler", "CogVideoXDPMScheduler")
_VARIANCE_EXPLODING = ("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler", "LMSDiscreteScheduler")
_READERS: dict[str, Callable[[Any, int], Grid]] = {
    **dict.fromkeys(
        ("DDIMScheduler", "DDIMParallelScheduler", "DDPMScheduler", "DDPMParallelScheduler", "PNDMScheduler", *_COGVIDEOX),
        _read_table,
    ),
    **dict.fromkeys(("LCMScheduler", "TCDScheduler"), _read_table),
    **dict.fromkeys(_VARIANCE_EXPLODING, _read_sigmas),
    **dict.fromkeys(("DPMSolverMultistepScheduler", "DPMSolverSinglestepScheduler"), _read_sigmas),
    **dict.fromkeys(("UniPCMultistepScheduler", "DEISMultistepScheduler"), _read_sigmas),
    **dict.fromkeys(("FlowMatchEulerDiscreteScheduler", "FlowMatchLCMScheduler"), _read_flow),
    "SCMScheduler": _read_angles,
}
SCHEDULERS: tuple[str, ...] = tuple(_READERS)
