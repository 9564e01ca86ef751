"""What a sampler has to offer: every one is a chain of Gaussian transitions."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from torch import Tensor


@dataclasses.dataclass(frozen=True)
class SamplerOptions:
    """How a chain is sampled.

    Attributes:
        num_steps: T.
        eta: noise level, in the sampler's own unit; None for its default, and for samplers that have none.
        sampler: a name in `SAMPLERS`, or "auto" for that of the pipeline's scheduler.
        noise_steps: which steps add noise: None for all, n for the first n, (first, last) for those and the ones between. The others
            are steps of the ODE.
    """

    num_steps: int
    eta: float | None = None
    sampler: str = "auto"
    noise_steps: int | Sequence[int] | None = None


@runtime_checkable
class Schedule(Protocol):
    """The steps of one sampler, counted 0..T-1 in the order of generation.

    Attributes:
        num_steps: T.
        init_std: standard deviation of the initial latent.
        stds: T standard deviations of the next latent, in latent units; 0 where a step adds no noise.
    """

    @property
    def num_steps(self) -> int: ...

    @property
    def init_std(self) -> float: ...

    @property
    def stds(self) -> tuple[float, ...]: ...

    def time(self, step: int) -> float:
        """What the network is told of the step: a whole number for models that count timesteps, a fraction for others."""

    def transition(self, step: int, x: Tensor, output: Tensor) -> tuple[Tensor, Tensor]:
        """Mean [N, ...] and standard deviation (broadcasts to it) of the next latent, from the latent and the network's output there."""

    def clean(self, step: int, x: Tensor, output: Tensor) -> Tensor:
        """One-step prediction of the clean latent, [N, ...]."""
