"""Samplers whose next latent is a combination of the predicted clean latent, the predicted noise and fresh noise.

x' = A' x0_hat + d x1_hat + s z, with z of standard deviation 1. Of x = A x0 + B x1, the network's output tells x0_hat and x1_hat:

| prediction     | clean x0_hat      | noise x1_hat      |
|----------------|-------------------|-------------------|
| "epsilon"      | (x - B out) / A   | out               |
| "sample"       | out               | (x - A out) / B   |
| "v_prediction" | A x - B out       | A out + B x       |
| "flow"         | x - B out         | x + A out         |

Samplers differ in s. For most, d is what keeps the noise level: d^2 + s^2 = B'^2. Primes mark where a step leads.

| sampler           | s                                              | source                                              |
|-------------------|------------------------------------------------|-----------------------------------------------------|
| "ddim"            | eta B'/B sqrt(1 - A^2/A'^2)                    | DDIM, arXiv:2010.02502, eq. 12 and 16               |
| "ddpm"            | B'/B sqrt(1 - A^2/A'^2), "fixed_large" without B'/B; d is the first's | DDPM, arXiv:2006.11239, eq. 7, section 3.2 |
| "euler_ancestral" | A' sigma' sqrt(1 - sigma'^2/sigma^2), sigma = B / A | arXiv:2011.13456, appendix F, in coordinates x / A |
| "dpm_sde"         | B' sqrt(1 - exp(-2h)), h = log(A'/B') - log(A/B) | SDE-DPM-Solver++ of first order, arXiv:2211.01095 |
| "lcm"             | B'; x0_hat becomes c_out x0_hat + c_skip x     | LCM, arXiv:2310.04378, algorithm of multistep sampling |
| "tcd"             | sqrt(1 - alpha'/alpha_r) at timestep r = floor((1 - eta) t') | TCD, arXiv:2402.19159, strategic stochastic sampling |
| "scm"             | sigma_data B'                                  | sCM, arXiv:2410.11081; SANA-Sprint, arXiv:2503.09641 |
| "flow_cps"        | sin(eta pi / 2) B'                             | Flow-CPS, arXiv:2509.05952                          |
| "flow_sde"        | g sqrt(B - B'), g = eta sqrt(B / A)            | Flow-GRPO, arXiv:2505.05470                         |
| "dance_sde"       | g sqrt(B - B'), g = eta                        | DanceGRPO, arXiv:2505.07818                         |
| "ode"             | 0                                              | DDIM at eta = 0; Euler's step of a flow             |

The Euler-Maruyama steps of Flow-GRPO and DanceGRPO, x - v D - g^2 / (2 B) x1_hat D + g sqrt(D) z with D = B - B' and the flow v,
are of the same form: x - v D = A' x0_hat + B' x1_hat, so that d = B' - g^2 D / (2 B).
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor


@dataclasses.dataclass(frozen=True)
class InterpolantSchedule:
    """The tables of one sampler on one grid; steps count from the noisy end. `make_schedule` makes it.

    Attributes:
        times: T numbers, the network's time input.
        signal, noise: T floats each, A and B where a step starts.
        next_signal: T floats, A'.
        direction: T floats, d.
        stds: T floats, in latent units; 0 where the step adds no noise.
        prediction_type: what the network predicts, see the module's table.
        init_std: standard deviation of the initial latent.
        clip_range: limit of the predicted clean latent, or None.
        noise_follows_clipping: whether x1_hat is what the clipped x0_hat leaves of x, as in DDPM, or the network's own, as in DDIM.
        consistency: T pairs (c_skip, c_out) of a consistency model, or None.
        noise_std: standard deviation of x1.
    """

    times: tuple[float, ...]
    signal: tuple[float, ...]
    noise: tuple[float, ...]
    next_signal: tuple[float, ...]
    direction: tuple[float, ...]
    stds: tuple[float, ...]
    prediction_type: str
    init_std: float = 1.0
    clip_range: float | None = None
    noise_follows_clipping: bool = False
    consistency: tuple[tuple[float, float], ...] | None = None
    noise_std: float = 1.0

    @property
    def num_steps(self) -> int:
        return len(self.times)

    def time(self, step: int) -> float:
        """The network's time input: a whole number for models that count timesteps."""
        return self.times[step]

    def clean(self, step: int, x: Tensor, output: Tensor) -> Tensor:
        """Predicted clean latent x0_hat, [N, ...]."""
        return self.clean_and_noise(step, x, output)[0]

    def clean_and_noise(self, step: int, x: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
        """x0_hat and x1_hat, [N, ...] each, from the network's output at `x`."""
        signal, sigma = self.signal[step], self.noise[step]
        clean, noise = self._told(step, x, output)
        if self.clip_range is not None:
            clean = clean.clamp(-self.clip_range, self.clip_range)
            if self.noise_follows_clipping:
                noise = (x - signal * clean) / sigma
        if self.consistency is not None:
            skip, out = self.consistency[step]
            clean = out * clean + skip * x
        return clean, noise

    def _told(self, step: int, x: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
        """x0_hat and x1_hat as the output says, neither clipped nor made consistent."""
        signal, sigma = self.signal[step], self.noise[step]
        output = output.to(torch.promote_types(x.dtype, output.dtype))  # not to round products in half precision
        if self.prediction_type == "epsilon":
            return (x - sigma * output) / signal, output
        if self.prediction_type == "sample":
            return output, (x - signal * output) / sigma
        if self.prediction_type == "v_prediction":
            return signal * x - sigma * output, signal * output + sigma * x
        return x - sigma * output, x + signal * output

    # ---- the forward process, for losses on it (estimators/forward_process.py) ----

    def noise_level(self, step: int) -> float:
        """B where a step starts."""
        return self.noise[step]

    def noised(self, step: int, clean: Tensor, noise: Tensor) -> Tensor:
        """x = A x0 + B x1 where a step starts, [N, ...], of standard normal noise."""
        return self.signal[step] * clean + self.noise[step] * self.noise_std * noise

    def target(self, step: int, clean: Tensor, noise: Tensor) -> Tensor:
        """What the network ought to predict at that x, [N, ...]: x1, x0, A x1 - B x0, or x1 - x0."""
        noise = self.noise_std * noise
        if self.prediction_type == "epsilon":
            return noise
        if self.prediction_type == "sample":
            return clean
        if self.prediction_type == "v_prediction":
            return self.signal[step] * noise - self.noise[step] * clean
        return noise - clean

    def denoised(self, step: int, x: Tensor, output: Tensor) -> Tensor:
        """x0_hat as the output says, neither clipped nor made consistent: linear in it. [N, ...]."""
        return self._told(step, x, output)[0]

    def transition(self, step: int, x: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
        """Mean [N, ...] and std (a scalar tensor) of the next latent."""
        clean, noise = self.clean_and_noise(step, x, output)
        mean = self.next_signal[step] * clean + self.direction[step] * noise
        return mean, torch.full((), self.stds[step], dtype=x.dtype, device=x.device)
