"""Divergence from a reference policy: a penalty whose gradient is that of E[R] - w KL(p_theta || p_ref) over whole chains.

The divergence of two chains of Gaussian steps from the same noise is E[sum_t k_t(x_t)], k_t the divergence of step t's two
Gaussians at the latent where it stands. Its gradient has two parts: the gradient of each k_t at its latent, and the change of the
latents that later steps see. The sweep takes the first directly, on every step, and the second as it takes the reward's:
along the adjoint on pathwise steps, and in the advantage on scored ones, where `divergence_to_go` stands for what comes later.
A step without noise has no divergence: the penalty is that of the other steps.
(Penalties that take the first part alone, as Flow-GRPO's, arXiv:2505.05470, are not the gradient of any objective.)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rlr_trainer.estimators.chain import Rollout, sum_over_latent
from rlr_trainer.estimators.plan import PlanError

# (step, x) -> mean and standard deviation of the next latent under the reference policy
ReferenceStep = Callable[[int, Tensor], tuple[Tensor, Tensor]]


def check_noise(stds: Sequence[float], option: str, way_out: str) -> None:
    """Raises PlanError where one of the T `stds` is not above 0; names the step, `option` that asks for the divergence, and `way_out`."""
    for step, std in enumerate(stds):
        if not std > 0:
            raise PlanError(f"{option}: step {step} of {len(stds)} adds no noise, so the divergence there is infinite; {way_out}")


@dataclasses.dataclass(frozen=True)
class Penalty:
    """What the sweep needs to know of it.

    Attributes:
        reference: the reference policy's transitions.
        weight: [N], w of each sample, 1/N folded in.
        to_go: [N, T], the divergence of the steps after each one, centred without the sample's own (see `leave_one_out_to_go`).
    """

    reference: ReferenceStep
    weight: Tensor
    to_go: Tensor


def gaussian_divergence(mean: Tensor, std: Tensor, reference_mean: Tensor, reference_std: Tensor) -> Tensor:
    """KL(N(mean, std^2) || N(reference_mean, reference_std^2)) in nats, summed over the latent: [N]. 0, exactly, for equal ones."""
    std, reference_std = std.expand_as(mean), reference_std.expand_as(mean)
    spread = torch.log(reference_std / std) + (std**2 - reference_std**2) / (2 * reference_std**2)
    return sum_over_latent(spread + (mean - reference_mean) ** 2 / (2 * reference_std**2))


@torch.no_grad()
def step_divergences(rollout: Rollout, reference: ReferenceStep) -> Tensor:
    """k_t at every stored latent, by the policy that sampled: [N, T], not below 0 but for rounding; 0 at steps without noise."""
    steps = enumerate(zip(rollout.means, rollout.stds, rollout.latents[:-1], strict=True))
    zeros = rollout.latents[0].new_zeros(len(rollout.latents[0]))
    return torch.stack(
        [gaussian_divergence(mean, std, *reference(step, x)) if (std > 0).all() else zeros for step, (mean, std, x) in steps], dim=1
    )


def leave_one_out_to_go(divergences: Tensor) -> Tensor:
    """Sum over the steps after each one, minus the mean of the other samples' (a baseline, to reduce the variance): [N, T] -> [N, T]."""
    to_go = divergences.flip(1).cumsum(1).flip(1) - divergences
    count = len(to_go)
    return to_go if count == 1 else (to_go - to_go.mean(0)) * (count / (count - 1))
