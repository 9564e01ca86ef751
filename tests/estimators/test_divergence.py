"""The penalty on the divergence from a reference policy: its formula, and that every plan has the exact gradient of the whole."""

import math

import pytest
import torch
from statistics_helpers import assert_biased, assert_unbiased
from toy_problems import NUM_STEPS, LinearProblem, NonlinearChain, estimate, nonlinear_reward, replaced, seeded

from rlr_trainer.estimators import estimate_gradient
from rlr_trainer.estimators.chain import PerSampleChain
from rlr_trainer.estimators.divergence import gaussian_divergence, leave_one_out_to_go, step_divergences
from rlr_trainer.estimators.plan import EstimatorPlan, PlanError

COEFFICIENT = 0.3
T = NUM_STEPS
PLANS = {
    "full_bp": EstimatorPlan.from_preset("full_bp", T),
    "ddpo": EstimatorPlan.from_preset("ddpo", T),
    "rlr": EstimatorPlan.from_preset("rlr", T),
    "K = 1, h = 2": EstimatorPlan.from_preset("rlr", T, fo_steps=1, ho_length=2),
    "one sub-chain, the whole chain": EstimatorPlan(T, ho_length=4),
    "two of four steps, weighted": EstimatorPlan(T, rest_estimator="lr", rest_num_steps=2, rest_step_weights=(1.0, 2.0, 1.0, 4.0)),
    "random K": EstimatorPlan(T, fo_steps=(0, T), rest_estimator="lr"),
    "control variate": EstimatorPlan.from_preset("ddpo", T, control_variate=True),
}


def reference_of(chain):
    """Other parameters, near the chain's own."""
    g = seeded(77)
    return {name: p + 0.15 * torch.randn(p.shape, generator=g, dtype=p.dtype) for name, p in chain.parameters().items()}


def exact_gradient(problem: LinearProblem, coefficient: float = COEFFICIENT):
    """Of E[R] - w sum_t E[k_t(x_t)], by the moments of x_t: k_t = |D x + d|^2 / (2 std^2) with D, d the differences to the reference."""
    chain, reference = problem.chain, reference_of(problem.chain)
    pairs = problem.pairs()
    mean = chain.start_mean
    covariance = chain.start_std**2 * torch.eye(2, dtype=torch.float64)
    value = problem.expected_reward(pairs, [False] * T, 0.0)
    for step, (matrix, bias) in enumerate(pairs):
        key = 0 if chain.shared else step
        difference = (matrix - reference[f"matrix.{key}"], bias - reference[f"bias.{key}"])
        offset = difference[0] @ mean + difference[1]
        squared = offset @ offset + torch.trace(difference[0] @ covariance @ difference[0].mT)
        value = value - coefficient * squared / (2 * chain.stds[step] ** 2)
        covariance = matrix @ covariance @ matrix.mT + chain.stds[step] ** 2 * torch.eye(2, dtype=torch.float64)
        mean = matrix @ mean + bias
    return problem.fold(torch.autograd.grad(value, [leaf for pair in pairs for leaf in pair]), [1.0] * T)


def test_divergence_of_two_gaussians_is_torchs():
    g = seeded(0)
    mean, other = (torch.randn(5, 3, 2, generator=g, dtype=torch.float64) for _ in range(2))
    std, other_std = (0.2 + torch.rand(5, 3, 2, generator=g, dtype=torch.float64) for _ in range(2))
    normal = torch.distributions.Normal
    expected = torch.distributions.kl_divergence(normal(mean, std), normal(other, other_std)).sum((1, 2))
    torch.testing.assert_close(gaussian_divergence(mean, std, other, other_std), expected)
    assert torch.equal(gaussian_divergence(mean, std, mean, std), torch.zeros(5, dtype=torch.float64))


def test_what_is_left_to_go_leaves_the_sample_itself_out():
    divergences = torch.tensor([[1.0, 2.0, 3.0], [5.0, 0.0, 1.0], [0.0, 1.0, 8.0]])
    expected = torch.tensor([[5.0, 3.0, 0.0], [1.0, 1.0, 0.0], [9.0, 8.0, 0.0]])
    for row in range(3):
        others = expected[[other for other in range(3) if other != row]].mean(0)
        torch.testing.assert_close(leave_one_out_to_go(divergences)[row], expected[row] - others)
    assert torch.equal(leave_one_out_to_go(divergences[:1]), expected[:1])


@pytest.mark.parametrize("name", PLANS)
def test_unbiased(name):
    problem = LinearProblem.make(shared=False)
    target = exact_gradient(problem)
    options = {"reference": reference_of(problem.chain), "kl_coef": COEFFICIENT}
    result = estimate(problem.chain, problem.reward, PLANS[name], 40, target, **options)
    assert_unbiased(result, target)
    assert_biased(result, exact_gradient(problem, 0.0))


@pytest.mark.parametrize("name", ["ddpo", "K = 1, h = 2"])
def test_the_direct_part_alone_is_not_the_gradient(name):
    """What other trainers do: a mutant that the test of unbiasedness must reject."""
    problem = LinearProblem.make(shared=False)
    options = {"reference": reference_of(problem.chain), "kl_coef": COEFFICIENT}
    target = exact_gradient(problem)
    with replaced(leave_one_out_to_go, torch.zeros_like):  # nothing to go
        result = estimate(problem.chain, problem.reward, PLANS[name], 42, target, num_samples=2**17, **options)
    assert_biased(result, target)


@pytest.mark.parametrize("recompute", ["recursive", "graph"])
def test_full_backpropagation_is_autograd_through_the_chain(recompute):
    """On a chain whose noise depends on the state and the parameters, sample by sample."""
    chain, number = NonlinearChain(), 16
    reference, plan = reference_of(chain), EstimatorPlan.from_preset("full_bp", chain.num_steps)
    result = estimate_gradient(
        chain,
        nonlinear_reward,
        plan,
        number,
        seeded(3),
        per_sample=True,
        recompute=recompute,
        reference=reference,
        kl_coef=COEFFICIENT,
    )
    leaves = {name: p.expand(number, *p.shape).clone().requires_grad_() for name, p in chain.parameters().items()}
    x, total = result.rollout.latents[0], 0.0
    for step in range(chain.num_steps):
        mean, std = PerSampleChain(chain).transition(step, x, leaves)
        total = total - COEFFICIENT * gaussian_divergence(mean, std, *chain.transition(step, x, reference))
        x = mean + std * result.rollout.noises[step]
    expected = torch.autograd.grad((total + nonlinear_reward(x)).sum(), list(leaves.values()))
    for (name, found), wanted in zip(result.per_sample.items(), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=0, atol=1e-10, msg=name)


def test_step_divergences_are_those_of_the_stored_latents():
    chain = NonlinearChain()
    reference = reference_of(chain)
    plan = EstimatorPlan.from_preset("ddpo", chain.num_steps)
    rollout = estimate_gradient(chain, nonlinear_reward, plan, 8, seeded(1)).rollout
    found = step_divergences(rollout, lambda step, x: chain.transition(step, x, reference))
    assert found.shape == (8, chain.num_steps)
    mean, std = chain.transition(2, rollout.latents[2], chain.parameters())
    torch.testing.assert_close(found[:, 2], gaussian_divergence(mean, std, *chain.transition(2, rollout.latents[2], reference)))
    same = step_divergences(rollout, lambda step, x: chain.transition(step, x, chain.parameters()))
    assert torch.equal(same, torch.zeros_like(same))
    assert math.isfinite(float(found.sum()))


def test_zeroth_order_has_no_penalty():
    problem = LinearProblem.make(shared=False)
    with pytest.raises(ValueError, match="reference with a zeroth-order plan"):
        estimate_gradient(
            problem.chain,
            problem.reward,
            EstimatorPlan.from_preset("es", T),
            8,
            seeded(0),
            reference=problem.chain.parameters(),
            kl_coef=1.0,
        )


def test_a_step_without_noise_has_no_penalty():
    problem = LinearProblem.make(shared=False, stds=[0.5] * (T - 1) + [0.0])
    plan = EstimatorPlan.from_preset("full_bp", T)
    with pytest.raises(PlanError, match=f"reference: step {T - 1} of {T} adds no noise"):
        estimate_gradient(problem.chain, problem.reward, plan, 8, seeded(0), reference=problem.chain.parameters(), kl_coef=1.0)
