"""The random choices of a plan for one batch: masks and weights, the steps of a random subset, the start of a sub-chain."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import torch
from torch import Tensor

from rlr_trainer.estimators.chain import map_tensors


@dataclasses.dataclass(frozen=True)
class PlanDraw:
    """The random choices of a plan for one batch. R is the number of rows: N, or 1 where the whole batch shares a draw.

    Attributes:
        pathwise: bool [R, T]; the adjoint of the step's output goes through this step: on first-order steps and inside a sub-chain.
        score: float [R, T]; weight of the likelihood-ratio term of the step (0: none). A sub-chain has it at its end.
        prediction: float [R, T]; weight of the pathwise term through the one-step prediction.
        zeroth: bool [R, T]; the step is sampled with perturbed parameters.
        forward: float [R, T]; weight of the loss on the forward process at the noise level of the step.
        first_order: bool [R, T]; the steps whose gradient belongs to the first-order part (for metrics).
        start: int [R]; first step of the sub-chain, -1 where there is none.
    """

    pathwise: Tensor
    score: Tensor
    prediction: Tensor
    zeroth: Tensor
    forward: Tensor
    first_order: Tensor
    start: Tensor

    @property
    def num_steps(self) -> int:
        return self.pathwise.shape[1]

    def active_steps(self) -> list[int]:
        """The steps that any row differentiates, in the order of generation."""
        return (self.pathwise | (self.score != 0) | (self.prediction != 0)).any(0).nonzero()[:, 0].tolist()

    def visited_steps(self, penalized: Sequence[bool] = ()) -> list[int]:
        """The steps that a sweep differentiates: the active ones, and those on which there is a penalty (T of them, or none)."""
        return sorted({*self.active_steps(), *(step for step, asked in enumerate(penalized) if asked)})

    def carries(self, step: int) -> bool:
        """Whether the adjoint of a step's input matters: to the step before, if that is pathwise for any row."""
        return step > 0 and bool(self.pathwise[:, step - 1].any())

    def scored_steps(self) -> list[int]:
        """The steps that any row scores, in the order of generation."""
        return (self.score != 0).any(0).nonzero()[:, 0].tolist()

    def expand(self, num_samples: int) -> PlanDraw:
        """One row per sample."""
        return map_tensors(self, lambda t: t.expand(num_samples, *t.shape[1:]))

    def select(self, rows: Tensor) -> PlanDraw:
        """The choices of some samples; a shared draw stays as it is."""
        return self if self.pathwise.shape[0] == 1 else map_tensors(self, lambda t: t[rows.to(t.device)])

    @staticmethod
    def concatenate(draws: Sequence[PlanDraw]) -> PlanDraw:
        """Joins draws that have one row per sample."""
        names = [field.name for field in dataclasses.fields(PlanDraw)]
        return PlanDraw(*(torch.cat([getattr(draw, name) for draw in draws]) for name in names))


def with_segments(pathwise: Tensor, score: Tensor, silent_steps: Sequence[int]) -> Tensor:
    """Half-order segments: a step without noise passes on the adjoint of the step after it, if that has one. Bool [R, T].

    So every sub-chain ends at a step with noise, which is scored, and reaches back over the steps without noise before it; those before
    the first-order tail lengthen the tail. Each step is covered once, as in eq. 6 of arXiv:2502.00639 with the segments laid by the
    sampler's noise.
    """
    pathwise = pathwise.clone()
    for step in sorted(set(silent_steps) - {pathwise.shape[1] - 1}, reverse=True):
        pathwise[:, step] |= pathwise[:, step + 1] | (score[:, step + 1] != 0)
    return pathwise


def inverse_inclusion_weights(
    eligible: Tensor, count: int | None, step_weights: Sequence[float] | None, generator: torch.Generator | None
) -> Tensor:
    """1 / inclusion probability of the drawn steps, 0 elsewhere (Horvitz-Thompson). Shapes [R, T] -> [R, T].

    Systematic sampling: laid end to end, the probabilities of a row have length `count`; a comb of unit spacing with one random
    offset picks `count` distinct steps, each with its own probability.
    """
    if count is None:
        return eligible.float()
    probability = inclusion_probabilities(eligible, count, step_weights)
    ends = probability.cumsum(1)
    ends = torch.where(ends > ends[:, -1:] - 1e-9, ends[:, -1:].round(), ends)  # rounding must not lose the last step
    offset = torch.rand(eligible.shape[0], 1, generator=generator, dtype=torch.float64)
    teeth = torch.floor(ends + offset)
    drawn = torch.diff(teeth, dim=1, prepend=torch.zeros_like(offset)) > 0
    return torch.where(drawn, 1 / probability.clamp_min(1e-12), 0.0).float()


def inclusion_probabilities(eligible: Tensor, count: int, step_weights: Sequence[float] | None) -> Tensor:
    """Probabilities proportional to the weights, at most 1, that add up to min(count, eligible steps). Float64 [R, T]."""
    weights = torch.ones(eligible.shape[1], dtype=torch.float64)
    if step_weights is not None:
        weights = torch.tensor(step_weights, dtype=torch.float64)
    weights = torch.where(eligible, weights, 0.0)
    total = eligible.sum(1, keepdim=True).clamp_max(count).double()
    certain = torch.zeros_like(eligible)
    probability = torch.zeros_like(weights)
    for _ in range(eligible.shape[1]):  # a step whose share exceeds 1 is taken for certain and the others share what is left
        open_weights = torch.where(certain, 0.0, weights)
        left = total - certain.sum(1, keepdim=True)
        probability = left * open_weights / open_weights.sum(1, keepdim=True).clamp_min(1e-300)
        probability = torch.where(certain, 1.0, probability)
        over = (probability >= 1 - 1e-12) & ~certain & eligible
        if not over.any():
            break
        certain = certain | over
    return probability.clamp_max(1.0)


class RunningMeans:
    """Running means of what every step (or start) has shown: `means` [S, M] and `counts` [S]; the first value counts in full."""

    def __init__(self, size: int, width: int, decay: float) -> None:
        self.decay = decay
        self.means = torch.zeros(size, width, dtype=torch.float64)
        self.counts = torch.zeros(size, dtype=torch.long)

    def add(self, index: int, values: Sequence[float]) -> None:
        """Takes in the M values that step or start `index` has shown."""
        new = torch.tensor(values, dtype=torch.float64)
        self.means[index] = new if self.counts[index] == 0 else self.decay * self.means[index] + (1 - self.decay) * new
        self.counts[index] += 1

    def state_dict(self) -> dict[str, list]:
        return {"means": self.means.tolist(), "counts": self.counts.tolist()}

    def load_state_dict(self, state: dict[str, list]) -> None:
        self.means = torch.tensor(state["means"], dtype=torch.float64)
        self.counts = torch.tensor(state["counts"], dtype=torch.long)


class StartDistribution(RunningMeans):
    """Softmax of running per-step gradient norms over the admissible starts (section 3.2 of the paper).

    Norms are divided by their mean first, so that the temperature does not depend on the reward's scale.
    """

    def __init__(self, num_starts: int, decay: float = 0.9, temperature: float = 1.0) -> None:
        super().__init__(num_starts, 1, decay)
        self.temperature = temperature

    def update(self, start: int, norm: float) -> None:
        """Takes in the gradient norm of a sub-chain that started at `start`; not one that overflowed, which fp16 skips."""
        if math.isfinite(norm):
            self.add(start, [norm])

    def probabilities(self) -> list[float]:
        """Probability per start; starts not seen yet count as the mean of those seen."""
        norms, seen = self.means[:, 0], self.counts > 0
        mean = norms[seen].mean()
        if not seen.any() or mean == 0:
            return [1 / len(norms)] * len(norms)
        return torch.softmax(torch.where(seen, norms / mean, 1.0) / self.temperature, 0).tolist()
