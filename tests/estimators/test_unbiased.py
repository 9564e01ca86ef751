"""Every plan that claims to be unbiased has the exact gradient as its mean: within 5 standard errors, with the power to tell.

On the linear-Gaussian chain the gradient is known in closed form, also that of the objective that zeroth order smooths. On a
nonlinear chain, whose noise depends on the state and on the parameters, it is a long pathwise average with an error of its own.
"""

import dataclasses

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from statistics_helpers import Estimate, assert_biased, assert_unbiased
from toy_problems import (
    BATCH,
    NUM_STEPS,
    LinearProblem,
    NonlinearChain,
    estimate,
    nonlinear_reference,
    nonlinear_reward,
    pathwise_samples,
    run,
    unbiased_plans,
)

from rlr_trainer.estimators import ControlVariateScale
from rlr_trainer.estimators.plan import EstimatorPlan

T = NUM_STEPS


def plan(preset: str | None = None, **options) -> EstimatorPlan:
    return EstimatorPlan.from_preset(preset, T, **options) if preset else EstimatorPlan(T, **options)


PLANS = {
    "full_bp": plan("full_bp"),
    "ddpo": plan("ddpo"),
    "rlr": plan("rlr"),
    "rlr with K = 1, h = 2": plan("rlr", fo_steps=1, ho_length=2),
    "rlr_paper": plan("rlr_paper", zo_scale=0.1),
    "h = 3 is all that first order leaves": plan(fo_steps=1, ho_length=3),
    "one sub-chain, the whole chain": plan(ho_length=4),
    "starts in a range": plan(ho_length=2, ho_start=(1, 2), rest_estimator="lr"),
    "weighted starts": plan(fo_steps=1, ho_length=1, ho_start_weights=(1.0, 0.0, 3.0), rest_estimator="lr"),
    "two of four steps, weighted": plan(rest_estimator="lr", rest_num_steps=2, rest_step_weights=(1.0, 2.0, 1.0, 4.0)),
    "sub-chain and one weighted step": plan(
        fo_steps=1, ho_length=1, rest_estimator="lr", rest_num_steps=1, rest_step_weights=(1.0, 2.0, 3.0, 1.0)
    ),
    "random K": plan(fo_steps=(0, T), rest_estimator="lr"),
    "random K, one remaining step": plan(fo_steps=(1, 2), rest_estimator="lr", rest_num_steps=1),
    "control variate on everything": plan(fo_steps=1, ho_length=2, rest_estimator="lr", rest_num_steps=1, control_variate=True),
    "zeroth order in single evaluations": plan(fo_steps=1, ho_length=2, rest_estimator="zo", zo_scale=0.4, zo_antithetic=False),
    "zeroth order and control variate": plan(
        fo_steps=1, ho_length=2, rest_estimator="zo", zo_scale=0.4, zo_antithetic=False, control_variate=True
    ),
}


@pytest.mark.parametrize("name", [name for name in PLANS if name != "zeroth order in single evaluations"])
def test_on_the_linear_chain(name):
    """With parameters of its own for every step, so that the share of each shows."""
    problem, chosen = LinearProblem.make(shared=False), PLANS[name]
    target = problem.target(chosen)
    assert_unbiased(estimate(problem.chain, problem.reward, chosen, 1, target), target)


SEGMENTS = {
    "noise in the middle": ([0.0, 0.6, 0.0, 0.5], {}),
    "first order on what follows the noise": ([0.0, 0.6, 0.0, 0.0], {"fo_steps": 1}),
    "one step of two": ([0.0, 0.6, 0.0, 0.5], {"rest_num_steps": 1}),
    "with sub-chains, some ending in silence": ([0.6, 0.0, 0.5, 0.0], {"fo_steps": 1, "ho_length": 2}),
    "with a control variate": ([0.0, 0.6, 0.5, 0.0], {"fo_steps": 1, "control_variate": True}),
}


@pytest.mark.parametrize("name", SEGMENTS)
def test_half_order_segments_cover_steps_without_noise(name):
    stds, options = SEGMENTS[name]
    problem = LinearProblem.make(shared=False, stds=stds)
    chosen = plan(rest_estimator="lr", silent_estimator="ho", **options).on_noise(stds)
    target = problem.target(chosen)
    assert_unbiased(estimate(problem.chain, problem.reward, chosen, 1, target), target)


@pytest.mark.parametrize("name", [name for name, chosen in PLANS.items() if not chosen.uses_zeroth_order])
def test_on_the_nonlinear_chain(name):
    """All steps share their parameters, as in a network."""
    target = nonlinear_reference()
    assert_unbiased(estimate(NonlinearChain(), nonlinear_reward, PLANS[name], 2, target), target)


@pytest.mark.medium
def test_zeroth_order_on_the_nonlinear_chain():
    """With h = T - K - 1 one step is left for zeroth order at either end of the sub-chain; the reference averages over both."""
    chain = NonlinearChain()
    chosen = dataclasses.replace(PLANS["zeroth order in single evaluations"], zo_scale=0.3)
    references = [nonlinear_reference((False, False, True, False), 0.3), nonlinear_reference((True, False, False, False), 0.3)]
    target = Estimate(
        (references[0].mean + references[1].mean) / 2,
        (references[0].covariance + references[1].covariance) / 4,
        references[0].slices,
    )
    assert_unbiased(estimate(chain, nonlinear_reward, chosen, 3, target), target)


@pytest.mark.parametrize(
    ("shared", "num_steps", "options"),
    [(False, T, {"zo_scale": 0.05}), (True, 2, {"zo_scale": 0.5, "zo_antithetic": False})],
    ids=["antithetic", "single evaluations"],
)
@pytest.mark.medium
def test_evolution_strategies_on_a_nearly_deterministic_chain(shared, num_steps, options):
    """Zeroth order on every step has the noise of 6 T directions; with little noise of the chain's own it can be seen through."""
    problem = LinearProblem.make(shared, num_steps, stds=[0.1] * num_steps)
    chosen = EstimatorPlan.from_preset("es", num_steps, **options)
    target = problem.target(chosen)
    assert_unbiased(estimate(problem.chain, problem.reward, chosen, 4, target), target)


SHARP = 0.05  # relative bias of the whole gradient that may go unseen, and twice that of a step's share
ZEROTH_ORDER = {
    "antithetic": plan("es", zo_scale=0.05),
    "single evaluations": plan("es", zo_scale=0.5, zo_antithetic=False),
    "beside first and half order": plan("rlr_paper", zo_scale=0.1),
    "in single evaluations beside the others": PLANS["zeroth order in single evaluations"],
}


@pytest.mark.parametrize("name", ZEROTH_ORDER)
@pytest.mark.medium
def test_zeroth_order_to_a_twentieth(name):
    """The variance of P directions is at least (P + 1) / N of the gradient's square. What comes on top is taken away: the chain's own
    noise is small and common to a pair, the chain short, and of the reward its known mean is left out, which moves no gradient."""
    chosen = ZEROTH_ORDER[name]
    steps = 2 if chosen.num_rest_steps == T else T
    chosen = dataclasses.replace(chosen, num_steps=steps)
    problem = LinearProblem.make(shared=False, num_steps=steps, stds=[0.1 if steps == 2 else 0.45] * steps)
    target, mean = problem.target(chosen), problem.expected_reward(problem.pairs(), [steps == 2] * steps, chosen.zo_scale).detach()
    limits = {"allowed": SHARP, "allowed_in_one_tensor": 2 * SHARP}
    found = estimate(problem.chain, lambda x: problem.reward(x) - mean, chosen, 14, target, allowed=SHARP)
    assert_unbiased(found, target, **limits)
    assert_biased(found.times(1 - 2 * SHARP), target, **limits)


@pytest.mark.parametrize("name", ["ddpo", "rlr with K = 1, h = 2", "rlr_paper", "control variate on everything"])
def test_leave_one_out_in_batches_of_four(name):
    problem, chosen = LinearProblem.make(shared=False), PLANS[name]
    target = problem.target(chosen)
    result = estimate(problem.chain, problem.reward, chosen, 5, target, advantage="leave_one_out")
    assert_unbiased(result, target)


@pytest.mark.parametrize("name", ["rlr", "control variate on everything"])
def test_normalized_advantages_estimate_the_gradient_over_the_reward_s_spread(name):
    """All parts are divided by the same std, that of a batch so large that the sample's own share in it does not show."""
    problem, chosen = LinearProblem.make(shared=False), PLANS[name]
    target = problem.target(chosen)
    parts = []
    for seed in range(2):
        result = run(problem.chain, problem.reward, chosen, 600 + seed, advantage="normalize")
        scaled = {name: g * result.rewards.std(correction=0) for name, g in result.per_sample.items()}
        parts.append(Estimate.of(scaled, BATCH))
    assert_unbiased(Estimate.pool(parts), target)


def test_first_order_covers_a_step_without_noise():
    problem = LinearProblem.make(shared=False, stds=[0.9, 0.8, 0.7, 0.0])
    chosen = EstimatorPlan(T, fo_steps=1, ho_length=1, rest_estimator="lr")
    target = problem.target(chosen)
    assert_unbiased(estimate(problem.chain, problem.reward, chosen, 7, target), target)


def test_a_control_variate_scaled_by_earlier_batches():
    """Any factor will do, as long as it does not see the batch: also one that a wrong prediction needs."""
    problem, chosen = LinearProblem.make(shared=False), PLANS["control variate on everything"]
    scale = ControlVariateScale(T)
    generator = torch.Generator().manual_seed(0)
    for step in range(T - 1):
        for _ in range(2):
            values = torch.full((64, T), torch.nan)
            values[:, step] = torch.randn(64, generator=generator)
            scale.update((0.3 - step) * values[:, step], values)
    assert scale.scale(0) != 1 and scale.scale(2) < 0
    target = problem.target(chosen)
    assert_unbiased(estimate(problem.chain, problem.reward, chosen, 8, target, control_scale=scale), target)


def test_a_control_variate_beside_antithetic_pairs():
    problem = LinearProblem.make(shared=False)
    chosen = plan(fo_steps=1, ho_length=2, rest_estimator="zo", zo_scale=0.1, control_variate=True)
    target = problem.target(chosen)
    assert_unbiased(estimate(problem.chain, problem.reward, chosen, 9, target), target)


# ---- any plan ----


QUIET_CHAIN = [0.45] * T  # the chain's own noise only adds to zeroth order's


def check_any_plan(chosen: EstimatorPlan, shared: bool, advantage: str) -> None:
    problem = LinearProblem.make(shared, stds=QUIET_CHAIN if chosen.uses_zeroth_order else None)
    target = problem.target(chosen)
    assert_unbiased(estimate(problem.chain, problem.reward, chosen, 11, target, advantage=advantage), target)


ADVANTAGE_CHOICE = st.sampled_from(["none", "leave_one_out"])


@settings(max_examples=10, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(unbiased_plans(), st.booleans(), ADVANTAGE_CHOICE)
def test_any_plan(chosen, shared, advantage):
    check_any_plan(chosen, shared, advantage)


@pytest.mark.slow
@settings(max_examples=120, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(unbiased_plans(), st.booleans(), ADVANTAGE_CHOICE)
def test_any_of_many_plans(chosen, shared, advantage):
    check_any_plan(chosen, shared, advantage)


# ---- the references ----


@pytest.mark.parametrize("scale", [0.0, 0.3])
def test_the_closed_form_of_the_smoothed_objective(scale):
    """The closed form that zeroth order is held against, by pathwise gradients under perturbed parameters."""
    problem, perturbed = LinearProblem.make(shared=False), (True, False, True, False)
    target = problem.gradient(perturbed=perturbed, scale=scale)
    samples = pathwise_samples(problem.chain, problem.reward, 2**17, 13, perturbed, scale)
    assert_unbiased(Estimate.of(samples), target)
