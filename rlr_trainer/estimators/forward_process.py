"""Losses on the forward process: the sample is noised again, and the network matched to it, more or less by its reward.

They stand beside the sweep. The chain that made the sample does not matter: any sampler will do, no noise is needed, no log-density is
formed, and of a rollout x_0 alone is kept. What they ascend is not the gradient of the expected reward: both push the network's
prediction towards samples that are better than the others and away from those that are worse.

    x = A x_0 + B x_1,    x_1 ~ N(0, I) drawn anew,    A and B those at which a step of the sampling grid starts
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from rlr_trainer.estimators.chain import seeded_generator
from rlr_trainer.estimators.half_order import clipped_surrogate

GHUBER_POWER, GHUBER_FLOOR = 0.25, 1e-10  # of AWM's generalized Huber loss
SMALLEST_ERROR = 1e-5  # of NFT's self-normalization

LOSSES = {
    "awm": "advantage weighted matching (arXiv:2509.25050)",
    "nft": "negative-aware fine-tuning (arXiv:2509.16117)",
}


@dataclasses.dataclass(frozen=True)
class ForwardProcess:
    """A loss on the forward process, and where it is formed.

    Attributes:
        loss: "awm" or "nft".
        steps: (first, end), the steps of the sampling grid at whose noise levels it may be formed.
        times: how many of them, distinct, for every sample.
        beta: of NFT, how far its two implicit policies are from the old one; smaller steps further for the same loss.
        decay: (flat, rate, limit) of the old policy, see `old_policy_decay`. It samples, and is what ratios and implicit policies refer to.
    """

    loss: str
    steps: tuple[int, int]
    times: int
    beta: float = 1.0
    decay: tuple[float, float, float] = (0.0, 0.0, 0.0)

    @classmethod
    def awm(cls, num_steps: int) -> ForwardProcess:
        """As its authors train Stable Diffusion 3.5: six times, neither the first step's nor those of the last tenth."""
        first = min(1, num_steps - 1)
        steps = first, max(first + 1, int(0.9 * num_steps))
        return cls("awm", steps, times=min(6, steps[1] - steps[0]))

    @classmethod
    def nft(cls, num_steps: int) -> ForwardProcess:
        """As its authors train Stable Diffusion 3.5: 99 % of the steps (all but one), beta 1, a slow average of the policies samples."""
        return cls("nft", (0, num_steps), times=max(1, int(0.99 * num_steps)), decay=(0.0, 0.001, 0.5))

    @property
    def averages(self) -> bool:
        """Whether the old policy is more than the one that a rollout began with."""
        return any(self.decay[1:])

    def __str__(self) -> str:
        (first, end), extra = self.steps, f", beta {self.beta:g}" if self.loss == "nft" else ""
        return (
            f"{LOSSES[self.loss]} on the forward process at {self.times} of the noise levels of steps {first} to {end - 1}{extra}"
        )


def old_policy_decay(updates: int, flat: float, rate: float, limit: float) -> float:
    """eta in old = eta old + (1 - eta) policy after so many updates: min(rate (n - flat), limit), 0 up to `flat` (DiffusionNFT)."""
    return min(rate * max(updates - flat, 0.0), limit)


def matching_log_probability(output: Tensor, target: Tensor, noise_level: float) -> Tensor:
    """What AWM takes for the log-probability of a sample: minus its matching loss, as a generalized Huber loss. Shape [N].

    With: -B (m^p - c^p) / p, m the mean squared error plus c, p = 1/4 and c = 1e-10: "ghuber", with which its authors train.

    Args:
        output, target: [N, ...], in the network's own prediction (epsilon, v, sample or flow): the loss of its pretraining.
        noise_level: B, the time of a flow.
    """
    error = (output - target).square().flatten(1).mean(1) + GHUBER_FLOOR
    return -noise_level * (error**GHUBER_POWER - GHUBER_FLOOR**GHUBER_POWER) / GHUBER_POWER


def advantage_weighted_matching(
    advantage: Tensor, log_probability: Tensor, old_log_probability: Tensor, clip_range: float | None = None
) -> tuple[Tensor, Tensor]:
    """Surrogate of AWM at one time: A exp(l - l_old), clipped as in PPO; arXiv:2509.25050, with l of `matching_log_probability`.

    While the policy is the one that sampled, its gradient is A grad l: the matching loss of pretraining, weighted by the advantage.

    Returns: (surrogate [N], log-ratio [N]).
    """
    log_ratio = log_probability - old_log_probability.detach()
    return clipped_surrogate(advantage, log_ratio.exp(), clip_range), log_ratio.detach()


def optimality(advantage: Tensor, limit: float) -> Tensor:
    """r in [0, 1], the probability that a sample is good: 1/2 + clip(A / limit, -1, 1) / 2; arXiv:2509.16117. Shape [N]."""
    return 0.5 + 0.5 * (advantage / limit).clamp(-1, 1)


def self_normalized_error(predicted: Tensor, clean: Tensor) -> Tensor:
    """Mean of (predicted - clean)^2 / w, w the mean of |predicted - clean| (no gradient through it, at least 1e-5). Shape [N]."""
    difference = (predicted - clean).flatten(1)
    return (difference.square() / difference.detach().abs().mean(1, keepdim=True).clamp_min(SMALLEST_ERROR)).mean(1)


def negative_aware_matching(good: Tensor, predicted: Tensor, old_predicted: Tensor, clean: Tensor, beta: float) -> Tensor:
    """Minus the loss of DiffusionNFT at one time, arXiv:2509.16117: -(r e(x_plus) + (1 - r) e(x_minus)) / beta. Shape [N].

    With: x_plus = (1 - beta) x_old + beta x_theta and x_minus = (1 + beta) x_old - beta x_theta, predictions of the clean latent, which
        are linear in the network's output, so that mixing velocities is the same; e of `self_normalized_error`.
    At theta = old its gradient is -(2 r - 1) grad e(x_theta): the matching loss weighted by the centred reward.

    Args:
        good: r [N].
        predicted, old_predicted: x_theta and x_old [N, ...].
        clean: x_0 [N, ...].
    """
    positive = (1 - beta) * old_predicted + beta * predicted
    negative = (1 + beta) * old_predicted - beta * predicted
    return -(good * self_normalized_error(positive, clean) + (1 - good) * self_normalized_error(negative, clean)) / beta


@runtime_checkable
class ForwardSchedule(Protocol):
    """The forward process at the noise levels of a sampler's steps."""

    def noise_level(self, step: int) -> float:
        """B."""

    def noised(self, step: int, clean: Tensor, noise: Tensor) -> Tensor:
        """x = A x_0 + B x_1 [N, ...], of standard normal noise."""

    def target(self, step: int, clean: Tensor, noise: Tensor) -> Tensor:
        """What the network ought to predict at that x, [N, ...]."""

    def denoised(self, step: int, x: Tensor, output: Tensor) -> Tensor:
        """The clean latent that an output predicts, not clipped: linear in it. [N, ...]."""


@dataclasses.dataclass
class MatchingResult:
    """What was seen: the weighted surrogates summed over samples and steps, and step -> log-ratio [N] for AWM. It has no divergence."""

    scored: Tensor = dataclasses.field(default_factory=lambda: torch.zeros(()))
    divergence: float = 0.0
    log_ratios: dict[int, Tensor] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True)
class Matching:
    """How a loss on the forward process is differentiated; `run` does it.

    Attributes:
        process: the loss.
        schedule: the noise levels.
        output: (step, x) -> the network's output, with a graph.
        old_output: the same of the old policy; None where it is the present one.
        backward, scope: as in `Sweep`.
        limit: of the advantage's magnitude, at which NFT's r is 0 or 1.
        clip_range: of AWM's ratio; None leaves it unclipped.
    """

    process: ForwardProcess
    schedule: ForwardSchedule
    output: Callable[[int, Tensor], Tensor]
    old_output: Callable[[int, Tensor], Tensor] | None
    backward: Callable[[Tensor], float]
    scope: Callable[[list[int], bool], AbstractContextManager] = lambda steps, is_last: contextlib.nullcontext()
    limit: float = 1.0
    clip_range: float | None = None

    def run(self, clean: Tensor, weights: Tensor, advantage: Tensor, share: Tensor, seeds: Tensor) -> MatchingResult:
        """Accumulates the gradient of the surrogate, summed over the batch, one step after the other.

        Args:
            clean: x_0 [N, ...].
            weights: [N, T], of every sample's loss at the noise level of every step; 0 where it has none.
            advantage: [N].
            share: [N], weight of a sample.
            seeds: int [N], of a sample's noises.
        """
        result, steps = MatchingResult(), (weights != 0).any(0).nonzero()[:, 0].tolist()
        for number, step in enumerate(steps):
            with self.scope([step], number == len(steps) - 1):
                surrogate = self._surrogate(step, clean, advantage, draw_noises(clean, seeds, step), result)
                total = (weights[:, step].to(surrogate) * share * surrogate).sum()
                result.scored = result.scored + total.detach()
                self.backward(total)
        return result

    def _surrogate(self, step: int, clean: Tensor, advantage: Tensor, noise: Tensor, result: MatchingResult) -> Tensor:
        process, schedule = self.process, self.schedule
        x = schedule.noised(step, clean, noise)
        old = None
        if self.old_output is not None:
            with torch.no_grad():
                old = self.old_output(step, x)
        output = self.output(step, x)
        old = output.detach() if old is None else old
        if process.loss == "nft":
            predicted, before = (schedule.denoised(step, x, one) for one in (output, old))
            return self.limit * negative_aware_matching(optimality(advantage, self.limit), predicted, before, clean, process.beta)
        target, level = schedule.target(step, clean, noise), schedule.noise_level(step)
        log_probability, before = (matching_log_probability(one, target, level) for one in (output, old))
        surrogate, result.log_ratios[step] = advantage_weighted_matching(advantage, log_probability, before, self.clip_range)
        return surrogate


def draw_noises(like: Tensor, seeds: Tensor, step: int) -> Tensor:
    """Standard normal noise of the shape of `like` [N, ...], every row a function of its seed and the step alone."""
    rows = [torch.randn(like.shape[1:], generator=seeded_generator(seed, step), dtype=like.dtype) for seed in seeds.tolist()]
    return torch.stack(rows).to(like.device)
