"""Plans that are biased are biased by what their closed form says: that is their mean, and the gradient itself is rejected.

With parameters of its own for every step, a step that nothing covers has an estimate of exactly zero.
"""

import dataclasses

import pytest
import torch
from statistics_helpers import assert_biased, assert_unbiased
from toy_problems import NUM_STEPS, LinearProblem, OffsetChain, estimate, run

from rlr_trainer.estimators.plan import EstimatorPlan

T = NUM_STEPS


def preset(name: str, **options) -> EstimatorPlan:
    return EstimatorPlan.from_preset(name, T, **options)


# plan -> how much of each step's share it covers on average
COVERAGE = {
    "truncated to the last 3 steps": (preset("draft", fo_steps=3), [0, 1, 1, 1]),
    "AlignProp, K uniform on 2..3": (preset("alignprop", fo_steps=(2, 3)), [0, 1 / 2, 1, 1]),
    "sub-chain of 2 and no rest": (EstimatorPlan(T, fo_steps=1, ho_length=2), [1 / 2, 1, 1 / 2, 1]),
    "sub-chain with weighted starts and no rest": (
        EstimatorPlan(T, ho_length=2, ho_start_weights=(2.0, 1.0, 1.0)),
        [1 / 2, 3 / 4, 1 / 2, 1 / 4],
    ),
    "first order at half its weight": (EstimatorPlan(T, fo_steps=2, rest_estimator="lr", fo_weight=0.5), [1, 1, 0.5, 0.5]),
    "sub-chain at twice its weight": (
        EstimatorPlan(T, fo_steps=1, ho_length=1, rest_estimator="lr", ho_weight=2.0),
        [4 / 3, 4 / 3, 4 / 3, 1],
    ),
    "a subset of the rest at half its weight": (
        EstimatorPlan(T, fo_steps=2, rest_estimator="lr", rest_num_steps=1, rest_weight=0.5),
        [0.5, 0.5, 1, 1],
    ),
    "control variate and rest at half their weight": (
        EstimatorPlan(T, fo_steps=1, rest_estimator="lr", rest_weight=0.5, control_variate=True),
        [0.5, 0.5, 0.5, 1],
    ),
}


@pytest.mark.parametrize("name", COVERAGE)
def test_the_mean_is_the_sum_of_the_shares_by_coverage(name):
    plan, coverage = COVERAGE[name]
    problem = LinearProblem.make(shared=False)
    target = problem.gradient(coverage)
    result = estimate(problem.chain, problem.reward, plan, 31, target)
    assert_unbiased(result, target)
    assert_biased(result, problem.gradient())
    assert plan.biases()


@pytest.mark.parametrize("fo_steps", [1, 2, 3])
def test_the_parameters_of_uncovered_steps_get_exactly_nothing(fo_steps):
    problem = LinearProblem.make(shared=False)
    result = run(problem.chain, problem.reward, preset("draft", fo_steps=fo_steps), 32, 2**8)
    for step in range(T):
        for kind in ("matrix", "bias"):
            touched = bool((result.per_sample[f"{kind}.{step}"] != 0).any())
            assert touched == (step >= T - fo_steps)


def test_zeroth_order_estimates_the_smoothed_gradient_and_not_the_gradient():
    """The perturbation of the matrices adds scale^2 |x|^2 to the variance of each next latent, which a quadratic reward sees."""
    problem = LinearProblem.make(shared=True, stds=[0.1] * T)
    problem = dataclasses.replace(problem, quadratic=torch.eye(2, dtype=torch.float64))
    plan = preset("es", zo_scale=0.5)
    target = problem.target(plan)
    result = estimate(problem.chain, problem.reward, plan, 33, target)
    assert_unbiased(result, target)
    assert_biased(result, problem.gradient())


def test_rlr_paper_with_a_large_perturbation_is_off_by_the_smoothing():
    problem = LinearProblem.make(shared=False)
    problem = dataclasses.replace(problem, quadratic=torch.eye(2, dtype=torch.float64))
    plan = preset("rlr_paper", zo_scale=0.5)
    target = problem.target(plan)
    result = estimate(problem.chain, problem.reward, plan, 34, target)
    assert_unbiased(result, target)
    assert_biased(result, problem.gradient())


# ---- pathwise through the one-step prediction ----

SQDF = {
    "every step": preset("sqdf"),
    "one step": preset("sqdf", rest_num_steps=1),
    "before first order": preset("sqdf", fo_steps=2),
}


@pytest.mark.parametrize("name", SQDF)
def test_sqdf_is_unbiased_where_the_prediction_misses_nothing_that_the_step_can_change(name):
    """The chain predicts E[x_0 | x]. For a linear reward that is the expected reward; for a quadratic one it lacks
    tr(Q Cov(x_0 | x)), which in a linear-Gaussian chain does not depend on x, nor on the step that made x."""
    problem = LinearProblem.make(shared=False)
    target = problem.gradient()
    assert_unbiased(estimate(problem.chain, problem.reward, SQDF[name], 35, target), target)


CUBE = 0.15


def cubic_reward(linear: torch.Tensor):
    return lambda x: x @ linear + CUBE * (x @ linear) ** 3


def cubic_gradients(problem: LinearProblem) -> tuple[dict, dict]:
    """(gradient, what the prediction makes of it) for R = u + k u^3 with u = q . x_0 of mean m and variance V.

    E[R] = m + k (m^3 + 3 m V). Given x_{t+1}, u has mean u_t and variance v_t, the noise still to come, so that
    E[R | x_{t+1}] = R(u_t) + 3 k v_t u_t: the prediction's R(u_t) loses 3 k v_t E[u_t] = 3 k v_t m, whose gradient in step t it misses.
    """
    pairs, q, stds = problem.pairs(), problem.linear, problem.chain.stds
    mean, covariance = problem.chain.start_mean, problem.chain.start_std**2 * torch.eye(2, dtype=torch.float64)
    for (matrix, bias), std in zip(pairs, stds, strict=True):
        mean = matrix @ mean + bias
        covariance = matrix @ covariance @ matrix.mT + std**2 * torch.eye(2, dtype=torch.float64)
    m, v_total = q @ mean, q @ covariance @ q
    leaves = [leaf for pair in pairs for leaf in pair]
    shares = torch.autograd.grad(m + CUBE * (m**3 + 3 * m * v_total), leaves, retain_graph=True)
    mean_shares = torch.autograd.grad(m, leaves)
    to_come, direction = torch.zeros((), dtype=torch.float64), q  # v_t, and q carried back to the output of step t
    missed = [torch.zeros(())] * len(shares)
    for step in range(len(pairs) - 1, -1, -1):
        for index in (2 * step, 2 * step + 1):
            missed[index] = 3 * CUBE * to_come * mean_shares[index]
        to_come = to_come + stds[step] ** 2 * direction @ direction
        direction = pairs[step][0].detach().mT @ direction
    predicted = [share - lost for share, lost in zip(shares, missed, strict=True)]
    ones = [1.0] * len(pairs)
    return problem.fold(shares, ones), problem.fold(predicted, ones)


@pytest.mark.parametrize("name", ["every step", "one step"])
def test_sqdf_misses_what_a_cubic_reward_gains_from_the_noise_to_come(name):
    problem = LinearProblem.make(shared=False)
    gradient, predicted = cubic_gradients(problem)
    reward = cubic_reward(problem.linear)
    result = estimate(problem.chain, reward, SQDF[name], 36, predicted)
    assert_unbiased(result, predicted)
    assert_biased(result, gradient)
    assert SQDF[name].biases()


def test_the_control_variate_is_unbiased_with_the_same_prediction():
    problem = LinearProblem.make(shared=False)
    gradient, _ = cubic_gradients(problem)
    plan = preset("ddpo", control_variate=True)
    assert_unbiased(estimate(problem.chain, cubic_reward(problem.linear), plan, 37, gradient), gradient)


class Understating(OffsetChain):
    """Predicts half of the expected sample."""

    def predict_clean(self, step, x, params):
        return 0.5 * super().predict_clean(step, x, params)


def test_sqdf_inherits_the_scale_of_its_prediction():
    """A linear reward of half the sample has half the gradient, except in the last step, whose output is the sample itself."""
    problem = LinearProblem.make(shared=False)
    chain = Understating(T, 2, stds=problem.chain.stds.tolist(), seed=3)
    problem = dataclasses.replace(problem, chain=chain, quadratic=torch.zeros(2, 2, dtype=torch.float64))
    target = problem.gradient([0.5, 0.5, 0.5, 1.0])
    result = estimate(chain, problem.reward, SQDF["every step"], 38, target)
    assert_unbiased(result, target)
    assert_biased(result, problem.gradient())
