"""A linear-Gaussian chain: under a quadratic reward its gradient has a closed form, so estimators are tested on it."""

from __future__ import annotations

import torch
from torch import Tensor

from rlr_trainer.estimators.chain import Generators, Parameters, draw_noise


class LinearGaussianChain:
    """x_{t+1} = A_t x_t + b_t + std_t * eps, x_0 ~ N(0, I), one pair (A_t, b_t) of parameters per step.

    With separate parameters per step, grad_t J is the gradient with respect to step t's own pair, so a wrong share shows.

    Args:
        num_steps: T.
        dim: d, size of the latent.
        stds: T positive numbers; None spreads them from 1 down to 0.2 as a real chain does.
        seed: fixes the parameters.
        dtype: of everything.
        shared: use one pair (A, b) in all steps, as a network does.
    """

    def __init__(
        self,
        num_steps: int,
        dim: int = 2,
        stds: list[float] | None = None,
        seed: int = 0,
        dtype: torch.dtype = torch.float64,
        shared: bool = False,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.num_steps, self.dim, self.dtype, self.shared = num_steps, dim, dtype, shared
        self.stds = torch.tensor(stds or torch.linspace(1.0, 0.2, num_steps).tolist(), dtype=dtype)
        self._parameters: dict[str, Tensor] = {}
        for step in range(1 if shared else num_steps):
            noise = torch.randn(dim, dim, generator=generator, dtype=dtype)
            self._parameters[f"matrix.{step}"] = 0.8 * torch.eye(dim, dtype=dtype) + 0.2 * noise
            self._parameters[f"bias.{step}"] = 0.3 * torch.randn(dim, generator=generator, dtype=dtype)

    def parameters(self) -> Parameters:
        """name -> [d, d] and [d]."""
        return self._parameters

    def _pair(self, step: int, params: Parameters) -> tuple[Tensor, Tensor]:
        key = 0 if self.shared else step
        return params[f"matrix.{key}"], params[f"bias.{key}"]

    def initial(self, num_samples: int, generator: Generators) -> Tensor:
        """Standard normal, [N, d]."""
        return draw_noise(torch.empty(num_samples, self.dim, dtype=self.dtype), generator)

    def transition(self, step: int, x: Tensor, params: Parameters) -> tuple[Tensor, Tensor]:
        """A_t x + b_t and std_t."""
        matrix, bias = self._pair(step, params)
        return x @ matrix.mT + bias, self.stds[step]

    def predict_clean(self, step: int, x: Tensor, params: Parameters) -> Tensor:
        """E[sample | x = latents[step]]: the remaining means, without noise."""
        for later in range(step, self.num_steps):
            x, _ = self.transition(later, x, params)
        return x
