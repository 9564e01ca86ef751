"""Zeroth-order (ZO) estimator: perturb the parameters while sampling, and weight the perturbations by the reward.

The directions are never stored: each is remade from its seed (as in MeZO, arXiv:2305.17333).
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from rlr_trainer.estimators.chain import DenoisingChain, Parameters, StepFunction, seeded_generator


@dataclasses.dataclass(frozen=True)
class Perturbations:
    """The perturbations of one batch: which direction, with which sign, each sample is run with.

    Attributes:
        seed: with the step and the direction's number, fixes every direction.
        direction: int [N]; samples with the same number share their directions. With antithetic perturbations two groups
            share a direction and differ in sign.
        sign: float [N]; +1 or -1.
        scale: s, the standard deviation of the perturbation.
    """

    seed: int
    direction: Tensor
    sign: Tensor
    scale: float

    @classmethod
    def assign(cls, num_samples: int, seed: int, scale: float, num_directions: int, antithetic: bool) -> Perturbations:
        """Shares a batch out evenly; with antithetic perturbations samples 2k and 2k + 1 form a pair of opposite signs.

        Raises:
            ValueError: the batch cannot be shared out evenly.
        """
        groups = num_directions * (2 if antithetic else 1)
        if num_samples % groups:
            raise ValueError(
                f"zo_num_perturbations={num_directions} with zo_antithetic={antithetic} splits a batch into {groups} equal groups, but the "
                f"batch has {num_samples} samples; use a batch that is a multiple of {groups}, or fewer perturbations"
            )
        index = torch.arange(num_samples)
        sign = 1.0 - 2.0 * (index % 2) if antithetic else torch.ones(num_samples)
        return cls(seed, index // (num_samples // num_directions), sign, scale)

    def select(self, rows: Tensor) -> Perturbations:
        """Those of some samples."""
        return dataclasses.replace(self, direction=self.direction[rows], sign=self.sign[rows])

    def groups(self) -> list[tuple[Tensor, int, float]]:
        """(rows, direction, sign) of every set of samples that runs with the same parameters."""
        key = self.direction * 2 + (self.sign < 0)
        sets = [torch.nonzero(key == value)[:, 0] for value in key.unique().tolist()]
        return [(rows, int(self.direction[rows[0]]), float(self.sign[rows[0]])) for rows in sets]

    def directions(self, params: Parameters, step: int, direction: int) -> dict[str, Tensor]:
        """e_i ~ N(0, I) of one step and direction, in the shapes and dtypes of `params`."""
        generator = seeded_generator(self.seed, step, direction)
        return {name: torch.randn(p.shape, generator=generator, dtype=p.dtype).to(p.device) for name, p in params.items()}

    def perturb(self, params: Parameters, step: int, direction: int, sign: float) -> dict[str, Tensor]:
        """theta + sign * s * e_i."""
        directions = self.directions(params, step, direction)
        return {name: p.detach() + sign * self.scale * directions[name] for name, p in params.items()}


def perturbed_steps(chain: DenoisingChain, params: Parameters, zeroth: Tensor, perturbations: Perturbations) -> StepFunction:
    """Transition of a batch in which each sample's zeroth-order steps run with its own perturbed parameters.

    Args:
        zeroth: bool [N, T] or [1, T]; which steps of which sample are perturbed.
    """
    groups = perturbations.groups()
    zeroth = zeroth.expand(len(perturbations.sign), -1)

    def run(step: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """The samples whose step is perturbed run group by group, each with its own parameters; the others run with `params`."""
        touched = zeroth[:, step]
        if not touched.any():
            return chain.transition(step, x, params)
        pieces = [(rows[touched[rows]], perturbations.perturb(params, step, d, s)) for rows, d, s in groups]
        pieces.append((torch.nonzero(~touched)[:, 0], dict(params)))
        mean, std = torch.empty_like(x), torch.empty_like(x)
        for rows, row_params in pieces:
            if len(rows):
                rows = rows.to(x.device)
                part = chain.select(rows) if hasattr(chain, "select") else chain
                row_mean, row_std = part.transition(step, x[rows], row_params)
                mean[rows], std[rows] = row_mean, row_std.expand_as(row_mean)
        return mean, std

    return run


def zeroth_order(advantage: Tensor, zeroth: Tensor, perturbations: Perturbations, params: Parameters) -> dict[str, Tensor]:
    """Estimate from perturbed sampling: sum over samples of A(x_0) . (1/s) . sum_{i in C} e_i.

    Approximates: sum_{i in C} grad_i E[R], smoothed by the perturbations.
    With: the Gaussian-smoothing (evolution strategies, arXiv:1703.03864) identity; ZO term of eq. 6, arXiv:2502.00639.
    Requires: nothing of reward or network. A baseline inside `advantage` must not use samples that share a direction, or it
        is correlated with the direction and biases the estimate.
    Returns: one tensor per parameter, in its shape (the sum over samples: fold 1/N into `advantage`).

    Args:
        advantage: [N].
        zeroth: bool [N, T] or [1, T]; the set C of every sample.
        perturbations: what the samples were run with.
        params: the unperturbed parameters.
    """
    gradient = {name: torch.zeros_like(p) for name, p in params.items()}
    signed = (advantage.cpu() * perturbations.sign).double() / perturbations.scale
    zeroth = zeroth.expand(len(signed), -1)
    for direction in perturbations.direction.unique().tolist():
        covered = zeroth & (perturbations.direction == direction)[:, None]
        for step in covered.any(0).nonzero()[:, 0].tolist():
            coefficient = float(signed[covered[:, step]].sum())
            for name, e in perturbations.directions(params, step, direction).items():
                gradient[name].add_(e, alpha=coefficient)
    return gradient
