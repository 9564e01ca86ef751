"""`estimate_gradient`: the gradient of an expected reward on any chain, with the code that the trainer uses."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from rlr_trainer.estimators.advantages import ADVANTAGES
from rlr_trainer.estimators.chain import DenoisingChain, Parameters, PerSampleChain, Rollout, StepFunction, as_rows, sample_chain
from rlr_trainer.estimators.divergence import Penalty, check_noise, leave_one_out_to_go, step_divergences
from rlr_trainer.estimators.first_order import reward_and_gradient
from rlr_trainer.estimators.plan import EstimatorPlan, PlanError
from rlr_trainer.estimators.plan_draw import PlanDraw
from rlr_trainer.estimators.prediction import ControlVariate, ControlVariateScale, Predictions, control_terms, prediction_critic
from rlr_trainer.estimators.sweep import Feedback, Sweep
from rlr_trainer.estimators.zeroth_order import Perturbations, perturbed_steps, zeroth_order


@dataclasses.dataclass(frozen=True)
class GradientEstimate:
    """What `estimate_gradient` returns.

    Attributes:
        gradient: parameter name -> tensor of its shape, the mean over the samples.
        per_sample: parameter name -> [N, ...], or None. With antithetic zeroth order, samples 2k and 2k + 1 share their noise and
            direction: average such pairs before computing a standard error.
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
        per_sample: also return one gradient per sample (N times the memory of the parameters); transitions must then act on each row
            alone, and each sample (pair, if antithetic) has a zeroth-order perturbation of its own, not `plan.zo_num_perturbations`.
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
    step_function = None
    if plan.uses_zeroth_order:
        perturb = _own_directions if per_sample else _shared_directions
        blocks, step_function, zeroth_gradient = perturb(chain, base, plan, draw, num_samples, generator)
    rollout = sample_chain(chain, num_samples, generator, step_function=step_function, paired=pairs is not None)
    if plan.on_noise([float(std.min()) for std in rollout.stds]) != plan:
        raise PlanError(
            "silent_estimator='none': the choices depend on the steps without noise; pass plan.on_noise(stds), T deviations"
        )
    if plan.needs_differentiable_reward:
        rewards, reward_gradient = reward_and_gradient(reward, rollout.sample)
    else:
        with torch.no_grad():
            rewards, reward_gradient = reward(rollout.sample), None
    valid = float((~torch.isnan(rewards)).float().mean())
    if valid == 0:
        raise ValueError(f"reward: all {num_samples} values are NaN, so there is no gradient to estimate; check the reward")
    share = (1.0 if per_sample else 1.0 / num_samples) / valid
    runner: DenoisingChain = PerSampleChain(chain) if per_sample else chain
    copies = {name: p.expand(num_samples, *p.shape) if per_sample else p for name, p in base.items()}
    leaves = {name: p.clone().requires_grad_(True) for name, p in copies.items()}
    weight = torch.full_like(rewards, kl_coef * share * valid)  # of all samples, rewarded or not
    penalty = None if reference is None else _penalty(chain, plan, dict(reference), rollout, weight)
    advantages = ADVANTAGES[advantage](rewards, None, pairs)
    control = None
    if plan.uses_control_variate:
        control = _control(chain, base, reward, rollout, draw, rewards, control_scale or ControlVariateScale(plan.num_steps), pairs)
    feedback = Feedback.of(plan, advantages, share, reward_gradient=reward_gradient, control=control, penalty=penalty)
    sweep = Sweep.of_plan(plan, runner, leaves, _plain_backward, reward, recompute=recompute)
    sweep.run(rollout, draw, feedback)
    gradient = {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in leaves.items()}
    if plan.uses_zeroth_order:
        perturbed = ADVANTAGES[advantage](rewards, None, blocks)
        for name, term in zeroth_gradient(perturbed.values * share * plan.rest_weight).items():
            gradient[name] = gradient[name] + term
    mean = {name: g.mean(0) for name, g in gradient.items()} if per_sample else gradient
    return GradientEstimate(mean, gradient if per_sample else None, rewards, rollout)


def _check_arguments(chain: DenoisingChain, plan: EstimatorPlan, advantage: str, reference: Parameters | None) -> None:
    if plan.num_steps != chain.num_steps:
        raise ValueError(f"plan.num_steps={plan.num_steps} but the chain has {chain.num_steps} steps; make the plan for it")
    if plan.forward is not None:
        raise PlanError(
            f"estimate_gradient with a loss on the forward process ({plan.forward.loss!r}): a chain of one's own says nothing of it; use "
            "another plan, or RLRTrainer"
        )
    if advantage not in ADVANTAGES:
        raise ValueError(f"advantage={advantage!r}: must be one of {', '.join(ADVANTAGES)}")
    if reference is not None and plan.uses_zeroth_order:
        raise ValueError("reference with a zeroth-order plan: its steps have no divergence of their own; use rest_estimator='lr'")


def _penalty(chain: DenoisingChain, plan: EstimatorPlan, reference: Parameters, rollout: Rollout, weight: Tensor) -> Penalty:
    stds = [1.0 if step in plan.silent_steps else float(std.min()) for step, std in enumerate(rollout.stds)]
    check_noise(stds, "reference", "give every step noise, leave reference unset, or set silent_estimator='none'")

    def step_of_reference(step: int, x: Tensor) -> tuple[Tensor, Tensor]:
        return chain.transition(step, x, reference)

    return Penalty(step_of_reference, weight, leave_one_out_to_go(step_divergences(rollout, step_of_reference)))


def _control(
    chain: DenoisingChain,
    params: Parameters,
    reward: Callable[[Tensor], Tensor],
    rollout: Rollout,
    draw: PlanDraw,
    rewards: Tensor,
    scale: ControlVariateScale,
    pairs: Tensor | None,
) -> ControlVariate:
    outputs = {step: rollout.latents[step + 1] for step in draw.scored_steps()}
    predictions = Predictions.at(prediction_critic(chain, params, reward), outputs, len(rewards), chain.num_steps)
    everyone = torch.arange(len(rewards))
    (control,) = control_terms([predictions], [everyone], predictions.values, rewards, scale, pairs)
    return control


def _plain_backward(surrogate: Tensor) -> float:
    surrogate.backward()
    return 1.0


# Of a batch: int [N], equal where samples share their directions; its transition; the gradient, given the advantages [N].
_ZerothOrder = tuple[Tensor, StepFunction, Callable[[Tensor], dict[str, Tensor]]]


def _shared_directions(
    chain: DenoisingChain, params: Parameters, plan: EstimatorPlan, draw: PlanDraw, count: int, generator: torch.Generator | None
) -> _ZerothOrder:
    """A few perturbations, each shared by many samples, as in the trainer."""
    seed = int(torch.randint(2**62, (), generator=generator))
    perturbations = Perturbations.assign(count, seed, plan.zo_scale, plan.zo_num_perturbations, plan.zo_antithetic)
    steps = perturbed_steps(chain, params, draw.zeroth, perturbations)
    return perturbations.direction, steps, lambda advantage: zeroth_order(advantage, draw.zeroth, perturbations, params)


def _own_directions(
    chain: DenoisingChain, params: Parameters, plan: EstimatorPlan, draw: PlanDraw, count: int, generator: torch.Generator | None
) -> _ZerothOrder:
    """One direction per sample (per pair, if antithetic), and one gradient per sample: A(x_0) / s * sum_i e_i."""
    runner = PerSampleChain(chain)
    blocks = torch.arange(count) // (2 if plan.zo_antithetic else 1)
    sums = {name: torch.zeros(count, *p.shape, dtype=p.dtype) for name, p in params.items()}

    def step_function(step: int, x: Tensor) -> tuple[Tensor, Tensor]:
        touched = draw.zeroth[:, step].to(x)
        perturbed = {}
        for name, p in params.items():
            e = torch.randn(int(blocks.max()) + 1, *p.shape, generator=generator, dtype=p.dtype)
            e = torch.stack([e, -e], 1).flatten(0, 1) if plan.zo_antithetic else e
            e = e * as_rows(touched, e)
            sums[name] += e
            perturbed[name] = p + plan.zo_scale * e
        return runner.transition(step, x, perturbed)

    def gradient(advantage: Tensor) -> dict[str, Tensor]:
        return {name: total * as_rows(advantage / plan.zo_scale, total) for name, total in sums.items()}

    return blocks, step_function, gradient
