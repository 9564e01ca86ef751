"""`estimate_gradient`: the gradient of an expected reward on any chain, with the code that the trainer uses."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from rlr_trainer.estimators.advantages import ADVANTAGES
from rlr_trainer.estimators.chain import DenoisingChain, Parameters, PerSampleChain, Rollout, as_rows, sample_chain
from rlr_trainer.estimators.divergence import Penalty, check_noise, leave_one_out_to_go, step_divergences
from rlr_trainer.estimators.first_order import reward_and_gradient
from rlr_trainer.estimators.plan import EstimatorPlan, PlanError
from rlr_trainer.estimators.plan_draw import PlanDraw
from rlr_trainer.estimators.prediction import ControlVariate, ControlVariateScale, Predictions, control_terms, prediction_critic
from rlr_trainer.estimators.sweep import Feedback, Sweep
from rlr_trainer.estimators.zeroth_order import Perturbations, perturbed_steps, zeroth_order

Reward = Callable[[Tensor], Tensor]  # x_0 [N, ...] -> [N]


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
    reward: Reward,
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
    batch = _sample_and_score(chain, reward, plan, num_samples, generator, own_directions=per_sample)
    valid = float((~torch.isnan(batch.rewards)).float().mean())
    share = (1.0 if per_sample else 1.0 / num_samples) / valid
    feedback = Feedback.of(
        plan,
        ADVANTAGES[advantage](batch.rewards, None, batch.pairs),
        share,
        reward_gradient=batch.reward_gradient,
        penalty=None if reference is None else _penalty(batch, dict(reference), kl_coef * share * valid),
        control=_control(batch, reward, control_scale) if plan.uses_control_variate else None,
    )
    gradient = _differentiate(batch, reward, feedback, recompute, per_sample)
    if batch.directions is not None:
        perturbed = ADVANTAGES[advantage](batch.rewards, None, batch.directions.blocks)
        for name, term in batch.directions.gradient(perturbed.values * share * plan.rest_weight).items():
            gradient[name] = gradient[name] + term
    mean = {name: g.mean(0) for name, g in gradient.items()} if per_sample else gradient
    return GradientEstimate(mean, gradient if per_sample else None, batch.rewards, batch.rollout)


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


class _SharedDirections:
    """A few perturbations of the steps in `zeroth` [N, T], each shared by many samples (of one number in `blocks` [N]), as in the trainer."""

    def __init__(
        self, chain: DenoisingChain, params: Parameters, plan: EstimatorPlan, zeroth: Tensor, generator: torch.Generator | None
    ) -> None:
        seed = int(torch.randint(2**62, (), generator=generator))
        perturbations = Perturbations.assign(len(zeroth), seed, plan.zo_scale, plan.zo_num_perturbations, plan.zo_antithetic)
        self.blocks = perturbations.direction
        self.step = perturbed_steps(chain, params, zeroth, perturbations)
        self.gradient = lambda advantage: zeroth_order(advantage, zeroth, perturbations, params)


class _OwnDirections:
    """One direction per sample (per pair, if antithetic), and one gradient per sample: A(x_0) / s * sum_i e_i."""

    def __init__(
        self, chain: DenoisingChain, params: Parameters, plan: EstimatorPlan, zeroth: Tensor, generator: torch.Generator | None
    ) -> None:
        self.runner, self.params, self.plan, self.zeroth, self.generator = PerSampleChain(chain), params, plan, zeroth, generator
        self.blocks = torch.arange(len(zeroth)) // (2 if plan.zo_antithetic else 1)
        self.sums = {name: torch.zeros(len(zeroth), *p.shape, dtype=p.dtype) for name, p in params.items()}

    def step(self, step: int, x: Tensor) -> tuple[Tensor, Tensor]:
        """A step with perturbed parameters for every sample whose step is zeroth-order; adds the directions up, for the gradient."""
        touched = self.zeroth[:, step].to(x)
        perturbed = {}
        for name, p in self.params.items():
            e = torch.randn(int(self.blocks.max()) + 1, *p.shape, generator=self.generator, dtype=p.dtype)
            e = torch.stack([e, -e], 1).flatten(0, 1) if self.plan.zo_antithetic else e
            e = e * as_rows(touched, e)
            self.sums[name] += e
            perturbed[name] = p + self.plan.zo_scale * e
        return self.runner.transition(step, x, perturbed)

    def gradient(self, advantage: Tensor) -> dict[str, Tensor]:
        """The zeroth-order part of every sample, given the advantages [N]: name -> [N, ...]."""
        return {name: total * as_rows(advantage / self.plan.zo_scale, total) for name, total in self.sums.items()}


@dataclasses.dataclass(frozen=True)
class _Batch:
    """N chains, sampled under a plan and scored."""

    chain: DenoisingChain
    params: Parameters  # without a graph
    plan: EstimatorPlan
    draw: PlanDraw
    pairs: Tensor | None  # int [N], equal where antithetic samples share their noise; None without such pairs
    directions: _SharedDirections | _OwnDirections | None  # of the zeroth-order steps; None without such steps
    rollout: Rollout
    rewards: Tensor  # [N]
    reward_gradient: Tensor | None  # dR/dx_0 [N, ...]; None if the plan needs none


def _sample_and_score(
    chain: DenoisingChain, reward: Reward, plan: EstimatorPlan, count: int, generator: torch.Generator | None, own_directions: bool
) -> _Batch:
    """Draws the plan's choices, then the perturbations, then samples and scores: the generator is used in this order."""
    params = {name: p.detach() for name, p in chain.parameters().items()}
    draw, pairs, directions = plan.draw(count, generator), None, None
    if plan.uses_zeroth_order:
        if plan.zo_antithetic:
            pairs = torch.arange(count) // 2
            draw = draw.select(pairs)  # a pair shares its random choices as well as its noise
        perturb = _OwnDirections if own_directions else _SharedDirections
        directions = perturb(chain, params, plan, draw.zeroth.expand(count, -1), generator)
    step_function = None if directions is None else directions.step
    rollout = sample_chain(chain, count, generator, step_function=step_function, paired=pairs is not None)
    if plan.on_noise([float(std.min()) for std in rollout.stds]) != plan:
        raise PlanError(
            "silent_estimator='none': the choices depend on the steps without noise; pass plan.on_noise(stds), T deviations"
        )
    if plan.needs_differentiable_reward:
        rewards, reward_gradient = reward_and_gradient(reward, rollout.sample)
    else:
        with torch.no_grad():
            rewards, reward_gradient = reward(rollout.sample), None
    if torch.isnan(rewards).all():
        raise ValueError(f"reward: all {count} values are NaN, so there is no gradient to estimate; check the reward")
    return _Batch(chain, params, plan, draw, pairs, directions, rollout, rewards, reward_gradient)


def _penalty(batch: _Batch, reference: Parameters, weight: float) -> Penalty:
    """The divergence from the policy of the parameters `reference`; every sample has the same weight, rewarded or not."""
    silent = batch.plan.silent_steps
    stds = [1.0 if step in silent else float(std.min()) for step, std in enumerate(batch.rollout.stds)]
    check_noise(stds, "reference", "give every step noise, leave reference unset, or set silent_estimator='none'")

    def step_of_reference(step: int, x: Tensor) -> tuple[Tensor, Tensor]:
        return batch.chain.transition(step, x, reference)

    to_go = leave_one_out_to_go(step_divergences(batch.rollout, step_of_reference))
    return Penalty(step_of_reference, torch.full_like(batch.rewards, weight), to_go)


def _control(batch: _Batch, reward: Reward, scale: ControlVariateScale | None) -> ControlVariate:
    """The control variate on the scored steps, centred over the batch."""
    critic, everyone = prediction_critic(batch.chain, batch.params, reward), torch.arange(len(batch.rewards))
    outputs = {step: batch.rollout.latents[step + 1] for step in batch.draw.scored_steps()}
    predictions = Predictions.at(critic, outputs, len(everyone), batch.plan.num_steps)
    scale = scale or ControlVariateScale(batch.plan.num_steps)
    (control,) = control_terms([predictions], [everyone], predictions.values, batch.rewards, scale, batch.pairs)
    return control


def _differentiate(batch: _Batch, reward: Reward, feedback: Feedback, recompute: str, per_sample: bool) -> dict[str, Tensor]:
    """Sweeps back along the chains: the gradient of each parameter, summed over the samples or, with `per_sample`, [N, ...]."""
    count = len(batch.rewards)
    runner: DenoisingChain = PerSampleChain(batch.chain) if per_sample else batch.chain
    copies = {name: p.expand(count, *p.shape) if per_sample else p for name, p in batch.params.items()}
    leaves = {name: p.clone().requires_grad_(True) for name, p in copies.items()}
    sweep = Sweep.of_plan(batch.plan, runner, leaves, _plain_backward, reward, recompute=recompute)
    sweep.run(batch.rollout, batch.draw, feedback)
    return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in leaves.items()}


def _plain_backward(surrogate: Tensor) -> float:
    surrogate.backward()
    return 1.0
