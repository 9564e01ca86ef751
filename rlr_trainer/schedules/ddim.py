"""DDIM (arXiv:2010.02502) as a Gaussian transition, from the tables of a diffusers scheduler.

| here                | paper            | meaning                                                 |
|---------------------|------------------|---------------------------------------------------------|
| `alpha`             | alpha_t          | cumulative product at this step's timestep              |
| `alpha_next`        | alpha_{t-1}      | the same where the step leads                           |
| `std`               | sigma_t (eq. 16) | eta * sqrt((1 - alpha_{t-1}) / (1 - alpha_t) * (1 - alpha_t / alpha_{t-1})) |
| `clean`             | f_theta(x_t)     | predicted clean latent (eq. 9)                          |
| `noise`             | eps_theta(x_t)   | predicted noise                                         |
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor

PREDICTION_TYPES = ("epsilon", "sample", "v_prediction")


@dataclasses.dataclass(frozen=True)
class DDIMSchedule:
    """The tables of one sampling schedule; steps count from the noisy end.

    Attributes:
        timesteps: T integers, the network's time input.
        alphas, alphas_next: T floats each, see the module's table.
        stds: T floats, in latent units; 0 where the step adds no noise.
        prediction_type: what the network predicts: "epsilon", "sample" or "v_prediction".
        clip_range: limit of the predicted clean latent, or None.
        init_std: standard deviation of the initial latent.
    """

    timesteps: tuple[int, ...]
    alphas: tuple[float, ...]
    alphas_next: tuple[float, ...]
    stds: tuple[float, ...]
    prediction_type: str = "epsilon"
    clip_range: float | None = None
    init_std: float = 1.0

    @classmethod
    def from_scheduler(cls, scheduler: Any, num_steps: int, eta: float) -> DDIMSchedule:
        """Reads a diffusers scheduler's tables (and leaves the scheduler as it is).

        Args:
            scheduler: a `DDIMScheduler`, or any scheduler whose config makes one.
            num_steps: T, from 1 to the number of training timesteps.
            eta: 0 is deterministic, 1 has the noise of DDPM.

        Raises:
            ValueError: a setting that is not a Gaussian transition, or is outside its range.
        """
        from diffusers import DDIMScheduler

        ddim = DDIMScheduler.from_config(scheduler.config)
        config = ddim.config
        if not 1 <= num_steps <= config.num_train_timesteps:
            most = f"the scheduler's {config.num_train_timesteps} training timesteps"
            raise ValueError(f"sample_num_steps={num_steps}: must lie between 1 and {most}")
        if not 0 <= eta <= 1:
            raise ValueError(f"sample_eta={eta}: must lie between 0 (no noise) and 1 (the noise of DDPM)")
        if config.thresholding:
            raise ValueError("the scheduler has thresholding=True, which this chain does not model; set it to False")
        if config.prediction_type not in PREDICTION_TYPES:
            raise ValueError(f"the scheduler's prediction_type={config.prediction_type!r} must be one of {PREDICTION_TYPES}")
        ddim.set_timesteps(num_steps)
        table = ddim.alphas_cumprod.double()
        stride = config.num_train_timesteps // num_steps
        timesteps = tuple(int(t) for t in ddim.timesteps)
        if max(timesteps) >= len(table):
            raise ValueError(
                f"sample_num_steps={num_steps} with the scheduler's steps_offset={config.steps_offset} starts at timestep "
                f"{max(timesteps)}, beyond the last one, {len(table) - 1}; use {num_steps - 1} steps or steps_offset=0"
            )
        alphas = tuple(float(table[t]) for t in timesteps)
        final = float(ddim.final_alpha_cumprod)
        alphas_next = tuple(float(table[t - stride]) if t >= stride else final for t in timesteps)
        stds = tuple(eta * _ddpm_std(a, b) for a, b in zip(alphas, alphas_next, strict=True))
        limit = config.clip_sample_range if config.clip_sample else None
        return cls(timesteps, alphas, alphas_next, stds, config.prediction_type, limit, float(ddim.init_noise_sigma))

    @property
    def num_steps(self) -> int:
        return len(self.timesteps)

    def time(self, step: int) -> int:
        """The timestep of a step."""
        return self.timesteps[step]

    def clean(self, step: int, x: Tensor, output: Tensor) -> Tensor:
        """Predicted clean latent, [N, ...] (eq. 9)."""
        return self.clean_and_noise(step, x, output)[0]

    def clean_and_noise(self, step: int, x: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
        """Predicted clean latent and noise, [N, ...] each, from the network's output at `x` (eq. 9 and 12)."""
        alpha = self.alphas[step]
        signal, sigma = alpha**0.5, (1 - alpha) ** 0.5
        if self.prediction_type == "epsilon":
            clean, noise = (x - sigma * output) / signal, output
        elif self.prediction_type == "sample":
            clean, noise = output, (x - signal * output) / sigma
        else:
            clean, noise = signal * x - sigma * output, signal * output + sigma * x
        if self.clip_range is not None:
            clean = clean.clamp(-self.clip_range, self.clip_range)
        return clean, noise

    def transition(self, step: int, x: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
        """Mean [N, ...] and std (a scalar tensor) of the next latent (eq. 12)."""
        clean, noise = self.clean_and_noise(step, x, output)
        alpha_next, std = self.alphas_next[step], self.stds[step]
        direction = max(1 - alpha_next - std**2, 0.0) ** 0.5  # rounding can push a zero just below zero
        mean = alpha_next**0.5 * clean + direction * noise
        return mean, torch.tensor(std, dtype=x.dtype, device=x.device)


def _ddpm_std(alpha: float, alpha_next: float) -> float:
    """sigma_t at eta = 1, eq. 16; 0 for a step that goes nowhere or ends at the clean latent."""
    return max((1 - alpha_next) / (1 - alpha) * (1 - alpha / alpha_next), 0.0) ** 0.5
