"""`estimate_gradient`: the gradient of an expected reward on any chain, with the code that the trainer uses."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from rlr_trainer.estimators.advantages import ADVANTAGES
from rlr_trainer.estimators.chain import DenoisingChain, Parameters, PerSampleChain, Rollout, StepFunction, sample_chain
from rlr_trainer.estimators.divergence import Penalty, check_noise, leave_one_out_to_go, step_divergences
from rlr_trainer.estimators.first_order import reward_and_gradient
from rlr_trainer.estimators.plan import EstimatorPlan
from rlr_trainer.estimators.plan_draw import PlanDraw
from rlr_trainer.estimators.prediction import ControlVariateScale
from rlr_trainer.estimators.sweep import Feedback, Sweep
from rlr_trainer.estimators.zeroth_order import Perturbations, perturbed_steps, zeroth_order


@dataclasses.dataclass(frozen=True)
class GradientEstimate:
    """What `estimate_gradient` returns.

    Attributes:
        gradient: parameter name -> tensor of its shape, the mean over the samples.
        per_sample: parameter name -> [N, ...], or None. With antithetic zeroth order, samples 2k and 2k + 1 share their noise
            and direction: average such pairs before computing a standard error.
        rewards: [N].
        rollout: the sampled chains.
    """

    gradient: dict[str, Tensor]
    per_sample: dict[str, Tensor] | None
    rewards: Tensor
    rollout: Rollout


def estimate_gradient(
    chain: DenoisingChain,
    reward: Callable[[Tensor], Tensor],
    plan: EstimatorPlan,
    num_samples: int,
    generator: torch.Generator | None = None,
    *,
    per_sample: bool = False,
    advantage: str = "none",
    recompute: str = "recursive",
    control_scale: ControlVariateScale | None = None,
    reference: Parameters | None = None,
    kl_coef: float = 0.0,
) -> GradientEstimate:
    """Estimates grad_theta E[R(x_0)] under `plan`. The chain's own parameters and their `.grad` are left alone.

    With `reference` it is the gradient of E[R(x_0)] - kl_coef * KL(p_theta || p_reference) over whole chains, in nats.

    Args:
        chain: any `DenoisingChain`.
        reward: x_0 [N, ...] -> [N]; differentiable where the plan needs it.
        plan: which estimator covers which step.
        num_samples: N. Every sample draws its own start, K and subset of steps.
        generator: source of all randomness (a CPU generator); None uses torch's global one.
        per_sample: also return one gradient per sample (N times the memory of the parameters); transitions must then act on
            each row alone, and every sample (pair, if antithetic) gets its own zeroth-order perturbation. Otherwise a batch
            has `plan.zo_num_perturbations` of them, as in the trainer.
        advantage: "none", "leave_one_out" or "normalize".
        recompute: "recursive" or "graph", see `Sweep`.
        control_scale: fitted factors of the control variate; None uses 1.
        reference: parameters of the reference policy; every step then needs noise, and none may be zeroth-order.
        kl_coef: weight of the divergence from it, in units of the advantage per nat.

    Raises:
        PlanError: the plan scores a step without noise, or there is one beside a reference.
        ValueError: the plan has another number of steps; an unknown advantage; all rewards are NaN.
        NonDifferentiableRewardError: the plan needs dR/dx_0 and the reward has no graph.
    """
    _check_arguments(chain, plan, advantage, reference)
    base = {name: p.detach() for name, p in chain.parameters().items()}
    draw, pairs = plan.draw(num_samples, generator), None
    if plan.uses_zeroth_order and plan.zo_antithetic:
        pairs = torch.arange(num_samples) // 2
        draw = draw.select(pairs)  # a pair shares its random choices as well as its noise
    zeroth: _SharedZerothOrder | _PerSampleZerothOrder | None = None
    if plan.uses_zeroth_order:
        kind = _PerSampleZerothOrder if per_sample else _SharedZerothOrder
        zeroth = kind(chain, base, plan, draw, num_samples, generator)
    step_function = zeroth.step_function if zeroth else None
    rollout = sample_chain(chain, num_samples, generator, step_function=step_function, paired=pairs is not None)
    plan.check_noise([float(std.min()) for std in rollout.stds])
    rewards, reward_gradient = _score(reward, rollout.sample, plan)
    valid = float((~torch.isnan(rewards)).float().mean())
    if valid == 0:
        raise ValueError(f"reward: all {num_samples} values are NaN, so there is no gradient to estimate; check the reward")
    share = (1.0 if per_sample else 1.0 / num_samples) / valid
    runner: DenoisingChain = PerSampleChain(chain) if per_sample else chain
    leaves = {name: _leaf(p, num_samples if per_sample else None) for name, p in base.items()}
    weight = torch.full_like(rewards, kl_coef * share * valid)  # of all samples, rewarded or not
    penalty = None if reference is None else _penalty(chain, dict(reference), rollout, weight)
    feedback = Feedback.of(
        plan,
        ADVANTAGES[advantage](rewards, None, pairs),
        share,
        reward_gradient=reward_gradient,
        blocks=pairs,
        penalty=penalty,
    )
    sweep = Sweep.of_plan(plan, runner, leaves, _plain_backward, reward, control_scale=control_scale, recompute=recompute)
    sweep.run(rollout, draw, feedback)
    gradient = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in leaves.items()}
    if zeroth is not None:
        perturbed = ADVANTAGES[advantage](rewards, None, zeroth.blocks)
        for name, term in zeroth.gradient(perturbed.values * share * plan.rest_weight).items():
            gradient[name] = gradient[name] + term
    if not per_sample:
        return GradientEstimate(gradient, None, rewards, rollout)
    return GradientEstimate({name: g.mean(0) for name, g in gradient.items()}, gradient, rewards, rollout)


def _check_arguments(chain: DenoisingChain, plan: EstimatorPlan, advantage: str, reference: Parameters | None) -> None:
    if plan.num_steps != chain.num_steps:
        raise ValueError(f"plan.num_steps={plan.num_steps} but the chain has {chain.num_steps} steps; make the plan for it")
    if advantage not in ADVANTAGES:
        raise ValueError(f"advantage={advantage!r}: must be one of {', '.join(ADVANTAGES)}")
    if reference is not None and plan.uses_zeroth_order:
        raise ValueError(
            "reference with a zeroth-order plan: perturbed steps have no divergence of their own; use rest_estimator='lr'"
        )


def _score(reward: Callable[[Tensor], Tensor], sample: Tensor, plan: EstimatorPlan) -> tuple[Tensor, Tensor | None]:
    """Rewards [N], and their gradient [N, ...] where the plan needs it."""
    if plan.needs_differentiable_reward:
        return reward_and_gradient(reward, sample)
    with torch.no_grad():
        return reward(sample), None


def _leaf(parameter: Tensor, copies: int | None) -> Tensor:
    leaf = parameter if copies is None else parameter.expand(copies, *parameter.shape)
    return leaf.clone().requires_grad_(True)


def _penalty(chain: DenoisingChain, reference: Parameters, rollout: Rollout, weight: Tensor) -> Penalty:
    check_noise([float(std.min()) for std in rollout.stds], "reference", "give every step noise, or leave reference unset")

    def step_of_reference(step: int, x: Tensor) -> tuple[Tensor, Tensor]:
        return chain.transition(step, x, reference)

    return Penalty(step_of_reference, weight, leave_one_out_to_go(step_divergences(rollout, step_of_reference)))


def _plain_backward(surrogate: Tensor) -> float:
    surrogate.backward()
    return 1.0


def _scale_rows(tensor: Tensor, factor: Tensor) -> Tensor:
    return tensor * factor.reshape(-1, *[1] * (tensor.dim() - 1))


class _SharedZerothOrder:
    """Zeroth-order part of a batch with a few perturbations, each shared by many samples (as in the trainer)."""

    def __init__(
        self,
        chain: DenoisingChain,
        params: Parameters,
        plan: EstimatorPlan,
        draw: PlanDraw,
        num_samples: int,
        generator: torch.Generator | None,
    ) -> None:
        seed = int(torch.randint(2**62, (), generator=generator))
        self.params, self.draw = params, draw
        self.perturbations = Perturbations.assign(num_samples, seed, plan.zo_scale, plan.zo_num_perturbations, plan.zo_antithetic)
        self.blocks = self.perturbations.direction
        self.step_function: StepFunction = perturbed_steps(chain, params, draw.zeroth, self.perturbations)

    def gradient(self, advantage: Tensor) -> dict[str, Tensor]:
        return zeroth_order(advantage, self.draw.zeroth, self.perturbations, self.params)


class _PerSampleZerothOrder:
    """The same with one direction per sample (per pair, if antithetic), and one gradient per sample."""

    def __init__(
        self,
        chain: DenoisingChain,
        params: Parameters,
        plan: EstimatorPlan,
        draw: PlanDraw,
        num_samples: int,
        generator: torch.Generator | None,
    ) -> None:
        self.chain, self.params, self.plan, self.draw = PerSampleChain(chain), params, plan, draw
        self.num_samples, self.generator = num_samples, generator
        self.blocks = torch.arange(num_samples) // (2 if plan.zo_antithetic else 1)
        self.sums = {name: torch.zeros(num_samples, *p.shape, dtype=p.dtype) for name, p in params.items()}

    def step_function(self, step: int, x: Tensor) -> tuple[Tensor, Tensor]:
        touched = self.draw.zeroth[:, step].to(x)
        perturbed = {}
        for name, p in self.params.items():
            e = torch.randn(int(self.blocks.max()) + 1, *p.shape, generator=self.generator, dtype=p.dtype)
            e = torch.stack([e, -e], 1).flatten(0, 1) if self.plan.zo_antithetic else e
            e = _scale_rows(e, touched)
            self.sums[name] += e
            perturbed[name] = p + self.plan.zo_scale * e
        return self.chain.transition(step, x, perturbed)

    def gradient(self, advantage: Tensor) -> dict[str, Tensor]:
        """A(x_0) / s * sum_i e_i per sample."""
        return {name: _scale_rows(total, advantage / self.plan.zo_scale) for name, total in self.sums.items()}
