"""Every formula, for frozen noise and in float64: against one written by hand for one sample, or against central differences."""

import contextlib
import dataclasses
import math
import sys

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.distributions import Normal
from toy_problems import (
    LinearProblem,
    NonlinearChain,
    batches_of,
    nonlinear_reward,
    seeded,
    unbiased_plans,
)

from rlr_trainer.estimators import (
    ControlVariateScale,
    Feedback,
    NonDifferentiableRewardError,
    PerPromptStatistics,
    Perturbations,
    Sweep,
    control_variate,
    estimate_gradient,
    leave_one_out,
    likelihood_ratio,
    no_baseline,
    normalize,
    pathwise,
    perturbed_steps,
    prediction_critic,
    prediction_pathwise,
    reward_and_gradient,
    zeroth_order,
)
from rlr_trainer.estimators.advantages import ADVANTAGES
from rlr_trainer.estimators.chain import PerSampleChain, Rollout, sample_chain
from rlr_trainer.estimators.plan import PRESETS, EstimatorPlan
from rlr_trainer.estimators.plan_draw import PlanDraw
from rlr_trainer.estimators.prediction import FP16_LOSS_SCALE, leave_one_out_mean

gradient_module = sys.modules["rlr_trainer.estimators.gradient"]
NAN = float("nan")
EXACT = {"rtol": 0.0, "atol": 1e-8}


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=seeded(seed), dtype=torch.float64)


def derivative(function, x: torch.Tensor, step: float = 1e-3) -> torch.Tensor:
    """Central differences of fourth order, entry by entry; float64."""
    result = torch.empty_like(x)
    for index in range(x.numel()):
        values = []
        for shift in (-2, -1, 1, 2):
            moved = x.clone()
            moved.view(-1)[index] += shift * step
            values.append(function(moved))
        result.view(-1)[index] = (values[0] - 8 * values[1] + 8 * values[2] - values[3]) / (12 * step)
    return result


# ---- the formulas, one by one ----


def test_pathwise_on_a_linear_step():
    """a . (A x + b + std z): the gradient is a x^T for A, a for b, A^T a for x and sum_i a_i z_i for a trainable std."""
    matrix, bias, x, adjoint, noise = (
        normal(3, 3),
        normal(3, seed=1),
        normal(1, 3, seed=2),
        normal(1, 3, seed=3),
        normal(1, 3, seed=4),
    )
    std = torch.tensor(0.7, dtype=torch.float64)
    leaves = [leaf.requires_grad_() for leaf in (matrix, bias, x, std)]
    pathwise(adjoint, x @ matrix.mT + bias, std, noise).sum().backward()
    expected = [torch.outer(adjoint[0], x[0]), adjoint[0], adjoint @ matrix, (adjoint * noise).sum()]
    for leaf, value in zip(leaves, expected, strict=True):
        torch.testing.assert_close(leaf.grad, value, **EXACT)


def test_pathwise_needs_no_noise():
    mean = normal(2, 3).requires_grad_()
    pathwise(
        torch.ones(2, 3, dtype=torch.float64), mean, torch.zeros((), dtype=torch.float64), normal(2, 3, seed=1)
    ).sum().backward()
    torch.testing.assert_close(mean.grad, torch.ones_like(mean), **EXACT)


def test_likelihood_ratio_on_a_linear_step():
    """A (x' - mean) / std^2 for the mean; A sum_i ((x'_i - mean_i)^2 / std^3 - 1 / std) for the std."""
    mean, x_next, advantage = normal(2, 3), normal(2, 3, seed=1), torch.tensor([1.5, -0.5], dtype=torch.float64)
    std = torch.full((2, 3), 0.7, dtype=torch.float64)
    new_mean, new_std = mean.clone().requires_grad_(), std.clone().requires_grad_()
    for with_std in (False, True):
        new_mean.grad = None
        surrogate, log_ratio = likelihood_ratio(advantage, x_next, new_mean, new_std if with_std else std, mean, std)
        surrogate.sum().backward()
        assert torch.equal(log_ratio, torch.zeros_like(log_ratio))
        torch.testing.assert_close(new_mean.grad, advantage[:, None] * (x_next - mean) / std**2, **EXACT)
    residual = (x_next - mean) ** 2
    torch.testing.assert_close(new_std.grad, advantage[:, None] * (residual / std**3 - 1 / std), **EXACT)


@pytest.mark.parametrize("mean_density", [False, True])
def test_likelihood_ratio_after_an_update_is_importance_weighting(mean_density):
    """Surrogate and log-ratio against torch.distributions, with the mean of the log-density where DDPO takes it."""
    x_next, old_mean, new_mean = normal(4, 2, 3), normal(4, 2, 3, seed=1), normal(4, 2, 3, seed=2)
    std, advantage = torch.tensor(1.3, dtype=torch.float64), normal(4, seed=3)
    surrogate, log_ratio = likelihood_ratio(advantage, x_next, new_mean, std, old_mean, std, mean_density=mean_density)
    each = (Normal(new_mean, std).log_prob(x_next) - Normal(old_mean, std).log_prob(x_next)).flatten(1)
    expected = each.mean(1) if mean_density else each.sum(1)
    torch.testing.assert_close(log_ratio, expected, **EXACT)
    torch.testing.assert_close(surrogate, (6 if mean_density else 1) * advantage * expected.exp(), **EXACT)


def test_the_mean_density_leaves_the_gradient_as_it_is():
    x_next, mean = normal(4, 2, 3), normal(4, 2, 3, seed=1)
    std, advantage = torch.tensor(1.3, dtype=torch.float64), normal(4, seed=3)
    gradients = []
    for mean_density in (False, True):
        leaf = mean.clone().requires_grad_()
        likelihood_ratio(advantage, x_next, leaf, std, mean, std, mean_density=mean_density)[0].sum().backward()
        gradients.append(leaf.grad)
    torch.testing.assert_close(*gradients, **EXACT)


@pytest.mark.parametrize(
    ("advantage", "ratio", "passes"),
    [(1, 1.2, False), (1, 1.05, True), (1, 0.8, True), (-1, 1.2, True), (-1, 0.95, True), (-1, 0.8, False)],
)
def test_clipping_stops_the_gradient_where_the_update_went_far_enough(advantage, ratio, passes):
    """PPO with epsilon = 0.1: min(A r, A clip(r)) is flat where the ratio has already moved the way the advantage wants."""
    std = torch.ones((), dtype=torch.float64)
    old_mean, x_next = torch.zeros(1, 1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64)
    # log r = m - m^2 / 2 for x = 1, std = 1
    mean = torch.full((1, 1), 1 - math.sqrt(1 - 2 * math.log(ratio)), dtype=torch.float64, requires_grad=True)
    weight = torch.tensor([float(advantage)], dtype=torch.float64)
    surrogate, log_ratio = likelihood_ratio(weight, x_next, mean, std, old_mean, std, clip_range=0.1)
    surrogate.sum().backward()
    assert math.isclose(float(log_ratio.exp()), ratio, rel_tol=1e-12)
    limit = min(advantage * ratio, advantage * min(max(ratio, 0.9), 1.1))
    assert math.isclose(float(surrogate.detach()), limit, rel_tol=1e-12)
    expected = advantage * ratio * (1 - mean.detach()) if passes else torch.zeros_like(mean)
    torch.testing.assert_close(mean.grad, expected, **EXACT)


@pytest.mark.parametrize("clip_range", [1e-4, 1e-9])
def test_clipping_changes_nothing_before_an_update(clip_range):
    """In float32 even where 1 - epsilon is 1."""
    mean, x_next, advantage = torch.randn(4, 6, generator=seeded(0)), torch.randn(4, 6, generator=seeded(1)), normal(4).float()
    gradients = []
    for limit in (None, clip_range):
        leaf = mean.clone().requires_grad_()
        likelihood_ratio(advantage, x_next, leaf, torch.tensor(0.3), mean, torch.tensor(0.3), clip_range=limit)[0].sum().backward()
        gradients.append(leaf.grad)
    assert torch.equal(*gradients)


def test_the_log_ratio_is_exactly_zero_before_an_update_and_precise_after_a_small_one():
    """At Stable Diffusion's size in float32, where the difference of two summed log-densities would be off by 3e-3."""
    shape = (2, 4, 64, 64)
    mean = torch.randn(shape, generator=seeded(0))
    std = torch.tensor(0.02)
    x_next = mean + std * torch.randn(shape, generator=seeded(1))
    advantage = torch.ones(2)
    assert torch.equal(likelihood_ratio(advantage, x_next, mean, std, mean, std)[1], torch.zeros(2))
    assert torch.equal(likelihood_ratio(advantage, x_next, mean, std, mean, std.expand(shape))[1], torch.zeros(2))
    new_mean = mean + 1e-5 * torch.randn(shape, generator=seeded(2))
    wide = [t.double() for t in (new_mean, std, mean, x_next)]
    expected = (Normal(wide[0], wide[1]).log_prob(wide[3]) - Normal(wide[2], wide[1]).log_prob(wide[3])).flatten(1).sum(1)
    for old_std in (std, std.expand(shape)):  # a batch of which some rows were perturbed keeps one std per row
        _, log_ratio = likelihood_ratio(advantage, x_next, new_mean, std, mean, old_std)
        torch.testing.assert_close(log_ratio.double(), expected, rtol=0, atol=2e-5)


def test_reward_and_gradient():
    x = normal(3, 2)
    values, gradient = reward_and_gradient(nonlinear_reward, x)
    torch.testing.assert_close(values, nonlinear_reward(x), **EXACT)
    torch.testing.assert_close(gradient, derivative(lambda y: nonlinear_reward(y).sum(), x), **EXACT)
    assert not values.requires_grad and not x.requires_grad


def test_a_loss_scale_keeps_small_gradients_of_a_part_in_half_precision():
    def reward(x):
        return 3e-8 * x.half().float().sum(1)

    x = torch.ones(2, 3)
    lost, kept = (reward_and_gradient(reward, x, scale)[1] for scale in (1.0, FP16_LOSS_SCALE))
    assert not torch.allclose(lost, torch.full_like(x, 3e-8), rtol=0.5, atol=0)
    torch.testing.assert_close(kept, torch.full_like(x, 3e-8), rtol=2e-3, atol=0)


@pytest.mark.parametrize("kind", ["no graph", "graph of the reward model only"])
def test_a_black_box_reward_is_refused_where_its_gradient_is_needed(kind):
    weight = torch.ones(2, dtype=torch.float64, requires_grad=kind != "no graph")
    with pytest.raises(NonDifferentiableRewardError, match="fo_steps=0"):
        reward_and_gradient(lambda x: x.detach() @ weight, normal(3, 2))


def test_prediction_pathwise_is_the_gradient_of_the_predicted_reward():
    """Of R(x0_hat(mean_theta + std_theta z)) with the prediction's own parameters frozen."""
    chain = NonlinearChain()
    params = chain.parameters()
    x, noise = normal(1, 2), normal(1, 2, seed=1)
    critic = prediction_critic(chain, params, nonlinear_reward)

    def predicted(name: str, value: torch.Tensor) -> float:
        mean, std = chain.transition(1, x, {**params, name: value})
        return float(nonlinear_reward(chain.predict_clean(2, mean + std * noise, params)))

    leaves = {name: p.clone().requires_grad_() for name, p in params.items()}
    mean, std = chain.transition(1, x, leaves)
    _, gradient = critic(2, (mean + std * noise).detach())
    prediction_pathwise(gradient, mean, std, noise).sum().backward()
    for name, p in params.items():
        torch.testing.assert_close(leaves[name].grad, derivative(lambda v, name=name: predicted(name, v), p), **EXACT)


def test_control_variate_and_its_centre():
    advantage, c = normal(5), normal(5, seed=1)
    center = leave_one_out_mean(c)
    for i in range(5):
        others = torch.cat([c[:i], c[i + 1 :]]).mean()
        torch.testing.assert_close(center[i], others, **EXACT)
    torch.testing.assert_close(control_variate(advantage, c, 0.3, center), advantage - 0.3 * (c - center), **EXACT)
    assert torch.equal(leave_one_out_mean(c[:1]), torch.zeros(1, dtype=torch.float64))


def test_the_fitted_scale_is_the_regression_of_the_reward_on_its_prediction():
    scale, decay = ControlVariateScale(3, decay=0.9), 0.9
    batches = [(normal(50, seed=s), normal(50, seed=s + 10)) for s in range(3)]
    batches = [(r + 2 * c, c) for r, c in batches]
    assert scale.scale(1) == 1.0
    covariance = variance = 0.0
    for number, (r, c) in enumerate(batches):
        scale.update(1, r, c)
        new = (float(((r - r.mean()) * (c - c.mean())).mean()), float(((c - c.mean()) ** 2).mean()))
        keep = 0.0 if number == 0 else decay
        covariance, variance = keep * covariance + (1 - keep) * new[0], keep * variance + (1 - keep) * new[1]
        expected = 1.0 if number == 0 else covariance / variance
        assert math.isclose(scale.scale(1), expected, rel_tol=1e-9)
    assert scale.scale(0) == 1.0
    copy = ControlVariateScale(3)
    copy.load_state_dict(scale.state_dict())
    assert copy.scale(1) == scale.scale(1)


# ---- whole plans: one sample at a time, by central differences ----


def one_sample_value(chain, reward, rollout, draw: PlanDraw, row: int, params, frozen, terms) -> float:
    """The sum that a plan differentiates, for one sample with its noise frozen; read it beside algorithm.md, section 2.

    `terms`: advantage, scale and, per step, the centre of c and the factor on it.
    """
    steps = chain.num_steps

    def latent(step):
        return rollout.latents[step][row : row + 1]

    def output(step, x):
        return chain.transition(step, x, params)

    def carried(step, x):
        mean, std = output(step, x)
        return mean + std * rollout.noises[step][row : row + 1]

    def predicted_reward(step, x):
        return float(reward(x if step == steps else chain.predict_clean(step, x, frozen)))

    value = 0.0
    first_order = [step for step in range(steps) if draw.first_order[row, step]]
    if first_order:
        x = latent(first_order[0])
        for step in first_order:
            x = carried(step, x)
        value += terms["scale"] * float(reward(x))
    for end in range(steps):
        weight, predicted = float(draw.score[row, end]), float(draw.prediction[row, end])
        start = end  # of the sub-chain that ends here; a single step otherwise
        while start > 0 and draw.pathwise[row, start - 1] and not draw.first_order[row, start - 1]:
            start -= 1
        x = latent(start)
        for step in range(start, end):
            x = carried(step, x)
        if predicted:
            value += predicted * terms["scale"] * predicted_reward(end + 1, carried(end, x))
        if weight:
            advantage = terms["advantage"]
            if terms["alpha"] is not None:
                c = predicted_reward(end + 1, latent(end + 1))
                advantage = advantage - terms["alpha"][end] * (c - terms["center"][end]) * terms["scale"]
                value += weight * terms["alpha"][end] * terms["scale"] * predicted_reward(end + 1, carried(end, x))
            mean, std = output(end, x)
            value += weight * advantage * float(Normal(mean, std).log_prob(latent(end + 1)).sum())
    return value


def swept(chain, reward, rollout, draw, feedback, recompute="recursive", control_scale=None, runner=None, leaves=None, **options):
    """Gradient of the package's sweep, name -> tensor."""
    base = chain.parameters()
    runner = runner or chain
    leaves = leaves or {name: p.detach().clone().requires_grad_() for name, p in base.items()}
    Sweep(
        runner,
        leaves,
        backward=lambda surrogate: surrogate.backward() or 1.0,
        recompute=recompute,
        critic=prediction_critic(runner, leaves, reward),
        control_scale=control_scale,
        **options,
    ).run(rollout, draw, feedback)
    return {name: torch.zeros_like(p) if p.grad is None else p.grad for name, p in leaves.items()}


def feedback_of(chain, reward, rollout, seed: int = 0) -> Feedback:
    """Advantages and scales that differ from sample to sample, to see each in its place."""
    rewards, gradient = reward_and_gradient(reward, rollout.sample)
    scale = 1 + 0.3 * normal(len(rewards), seed=seed).abs().to(rewards)
    return Feedback((rewards - 0.2) * scale, gradient * scale[:, None], scale)


def fitted_scale(num_steps: int) -> ControlVariateScale:
    scale = ControlVariateScale(num_steps)
    for step in range(num_steps):
        scale.moments[step], scale.updates[step] = torch.tensor([0.5 + 0.3 * step, 1.0]), 2
    return scale


@st.composite
def plans_with_biased_ones(draw) -> EstimatorPlan:
    """Unbiased plans, and the same with another rest and other weights."""
    plan = draw(unbiased_plans(4))
    changes = {"ho_weight": draw(st.sampled_from([1.0, 0.5]))}
    if plan.rest_estimator == "lr":
        changes["rest_estimator"] = draw(st.sampled_from(["lr", "prediction"]))
        changes["rest_weight"] = draw(st.sampled_from([1.0, 2.0]))
        if changes["rest_estimator"] == "prediction" and not plan.ho_length:
            changes["control_variate"] = False
    return dataclasses.replace(plan, **changes)


@settings(max_examples=60, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(plans_with_biased_ones(), st.booleans(), st.booleans())
def test_any_plan_is_its_one_sample_formula(plan, linear, graph):
    chain, reward = NonlinearChain(), nonlinear_reward
    if linear:
        problem = LinearProblem.make(shared=False)
        chain, reward = problem.chain, problem.reward
    rollout = sample_chain(chain, 3, seeded(1))
    draw = plan.draw(3, seeded(2))
    feedback = feedback_of(chain, reward, rollout)
    alpha = fitted_scale(4) if plan.control_variate else None
    runner = PerSampleChain(chain)
    frozen = {name: p.detach() for name, p in chain.parameters().items()}
    leaves = {name: p.expand(3, *p.shape).clone().requires_grad_() for name, p in frozen.items()}
    recompute = "graph" if graph else "recursive"
    found = swept(chain, reward, rollout, draw, feedback, recompute, alpha, runner, leaves)
    critic = prediction_critic(chain, frozen, reward)
    centers = [leave_one_out_mean(critic(step + 1, rollout.latents[step + 1])[0]) for step in range(4)]
    row = 1
    terms = {
        "advantage": float(feedback.advantage[row]),
        "scale": float(feedback.scale[row]),
        "center": [float(center[row]) for center in centers],
        "alpha": None if alpha is None else [alpha.scale(step) for step in range(4)],
    }
    for name, p in frozen.items():
        expected = derivative(
            lambda v, name=name: one_sample_value(chain, reward, rollout, draw, row, {**frozen, name: v}, frozen, terms),
            p,
        )
        torch.testing.assert_close(found[name][row], expected, **EXACT)


@pytest.mark.parametrize("length", [1, 2, 3, 4])
def test_a_sub_chain_of_any_length_by_hand(length):
    """A (x' - mean) / std^2 at the end, carried back by the transposed matrices, times the input of each step."""
    problem = LinearProblem.make(shared=False)
    chain = problem.chain
    plan = EstimatorPlan(4, ho_length=length)
    rollout = sample_chain(chain, 1, seeded(1))
    draw = plan.draw(1, seeded(3))
    start, end = int(draw.start), int(draw.start) + length - 1
    feedback = feedback_of(chain, problem.reward, rollout)
    found = swept(chain, problem.reward, rollout, draw, feedback)
    adjoint = feedback.advantage[0] * rollout.noises[end][0] / chain.stds[end]
    expected = {name: torch.zeros_like(p) for name, p in chain.parameters().items()}
    for step in range(end, start - 1, -1):
        expected[f"bias.{step}"] = adjoint
        expected[f"matrix.{step}"] = torch.outer(adjoint, rollout.latents[step][0])
        adjoint = chain.parameters()[f"matrix.{step}"].mT @ adjoint
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, **EXACT)


@pytest.mark.parametrize("fo_steps", [1, 2, 3, 4])
def test_first_order_over_any_number_of_steps_by_hand(fo_steps):
    """dR/dx_0 = 2 Q x_0 + q, carried back by the transposed matrices."""
    problem = LinearProblem.make(shared=False)
    chain = problem.chain
    rollout = sample_chain(chain, 1, seeded(1))
    draw = EstimatorPlan(4, fo_steps=fo_steps).draw(1)
    adjoint = 2 * problem.quadratic @ rollout.sample[0] + problem.linear
    feedback = Feedback(torch.zeros(1, dtype=torch.float64), reward_and_gradient(problem.reward, rollout.sample)[1])
    found = swept(chain, problem.reward, rollout, draw, feedback)
    for step in range(3, -1, -1):
        covered = step >= 4 - fo_steps
        torch.testing.assert_close(found[f"bias.{step}"], adjoint * covered, **EXACT)
        torch.testing.assert_close(found[f"matrix.{step}"], torch.outer(adjoint, rollout.latents[step][0]) * covered, **EXACT)
        adjoint = chain.parameters()[f"matrix.{step}"].mT @ adjoint


def in_float32(chain: NonlinearChain) -> NonlinearChain:
    chain._parameters = {name: p.float() for name, p in chain.parameters().items()}
    chain.initial = lambda n, generator: torch.randn(n, chain.dim, generator=generator)
    return chain


@settings(max_examples=80, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(st.integers(1, 6).flatmap(lambda t: st.tuples(st.just(t), unbiased_plans(t))), st.booleans(), st.booleans())
def test_recursive_and_graph_give_the_same_gradient(sized_plan, narrow, shared):
    num_steps, plan = sized_plan
    chain = NonlinearChain(num_steps)
    if narrow:
        chain = in_float32(chain)
    rollout = sample_chain(chain, 8, seeded(num_steps))
    draw = plan.draw(8, seeded(5), shared=shared)
    feedback = feedback_of(chain, nonlinear_reward, rollout)
    alpha = ControlVariateScale(num_steps) if plan.control_variate else None
    recursive, graph = (swept(chain, nonlinear_reward, rollout, draw, feedback, mode, alpha) for mode in ("recursive", "graph"))
    size = math.sqrt(sum(float((g**2).sum()) for g in graph.values()))
    for name, g in graph.items():
        assert float((recursive[name] - g).norm()) <= (1e-5 if narrow else 1e-10) * max(size, 1.0)


def test_the_sum_over_samples_is_the_per_sample_gradients_sum():
    """With the same generator, `per_sample` changes what is returned and nothing else (zeroth order aside)."""
    chain = NonlinearChain()
    for plan in (EstimatorPlan.from_preset("rlr", 4, ho_length=2), EstimatorPlan.from_preset("sqdf", 4, rest_num_steps=2)):
        results = [estimate_gradient(chain, nonlinear_reward, plan, 6, seeded(3), per_sample=p) for p in (True, False)]
        assert results[1].per_sample is None
        for name, g in results[1].gradient.items():
            torch.testing.assert_close(results[0].gradient[name], g, **EXACT)
            torch.testing.assert_close(results[0].per_sample[name].mean(0), g, **EXACT)


def test_a_batch_in_two_halves_adds_up_to_the_whole():
    """Gradient accumulation: rows of rollout, draw and feedback selected together."""
    chain = NonlinearChain()
    plan = EstimatorPlan.from_preset("rlr", 4, ho_length=2)
    rollout, draw = sample_chain(chain, 6, seeded(1)), plan.draw(6, seeded(2))
    feedback = feedback_of(chain, nonlinear_reward, rollout)
    whole = swept(chain, nonlinear_reward, rollout, draw, feedback)
    halves = []
    for rows in (torch.tensor([0, 3, 5]), torch.tensor([1, 2, 4])):
        part = Feedback(feedback.advantage[rows], feedback.reward_gradient[rows], feedback.scale[rows])
        halves.append(swept(chain, nonlinear_reward, rollout.select(rows), draw.select(rows), part))
    for name, g in whole.items():
        torch.testing.assert_close(halves[0][name] + halves[1][name], g, **EXACT)


def test_a_shared_draw_is_the_same_draw_for_every_sample():
    chain, plan = NonlinearChain(), EstimatorPlan.from_preset("rlr", 4, ho_length=2, fo_steps=1)
    rollout, draw = sample_chain(chain, 6, seeded(1)), plan.draw(6, seeded(2), shared=True)
    feedback = feedback_of(chain, nonlinear_reward, rollout)
    shared, expanded = (swept(chain, nonlinear_reward, rollout, d, feedback) for d in (draw, draw.expand(6)))
    for name, g in shared.items():
        torch.testing.assert_close(expanded[name], g, **EXACT)


@pytest.mark.parametrize("recompute", ["recursive", "graph"])
@pytest.mark.parametrize("factor", [-1.0, 1024.0])
def test_a_factor_of_the_backward_pass_does_not_enter_the_adjoints(recompute, factor):
    """A sign turned for a minimizer, or a loss scale: the gradient is multiplied by it once, however long the path."""
    chain, plan = NonlinearChain(), EstimatorPlan.from_preset("full_bp", 4)
    rollout, draw = sample_chain(chain, 4, seeded(1)), plan.draw(4)
    feedback = feedback_of(chain, nonlinear_reward, rollout)
    plain = swept(chain, nonlinear_reward, rollout, draw, feedback, recompute)
    leaves = {name: p.clone().requires_grad_() for name, p in chain.parameters().items()}

    def backward(surrogate: torch.Tensor) -> float:
        (factor * surrogate).backward()
        return factor

    Sweep(chain, leaves, backward, recompute=recompute).run(rollout, draw, feedback)
    for name, g in plain.items():
        torch.testing.assert_close(leaves[name].grad / factor, g, **EXACT)


def test_scopes_are_announced_from_the_sample_back():
    """A distributed wrapper synchronizes in the last scope only; a meter sees every differentiated step once."""
    chain, plan = NonlinearChain(6), EstimatorPlan(6, fo_steps=2, ho_length=2, ho_start_weights=(1.0, 0.0, 0.0))
    rollout, draw = sample_chain(chain, 4, seeded(1)), plan.draw(4)
    feedback = feedback_of(chain, nonlinear_reward, rollout)
    for recompute, expected in (("recursive", [[5], [4], [1], [0]]), ("graph", [[4, 5], [0, 1]])):
        scopes = []

        def scope(steps, is_last, scopes=scopes):
            scopes.append((list(steps), is_last))
            return contextlib.nullcontext()

        swept(chain, nonlinear_reward, rollout, draw, feedback, recompute, scope=scope)
        assert [steps for steps, _ in scopes] == expected
        assert [is_last for _, is_last in scopes] == [False] * (len(expected) - 1) + [True]


def test_a_part_of_weight_zero_contributes_nothing_and_breaks_nothing():
    chain = NonlinearChain()
    rollout = sample_chain(chain, 4, seeded(1))
    feedback = feedback_of(chain, nonlinear_reward, rollout)
    for recompute in ("recursive", "graph"):
        with_part = EstimatorPlan(4, fo_steps=1, ho_length=2, ho_weight=0.0).draw(4, seeded(2), shared=True)
        without = EstimatorPlan(4, fo_steps=1).draw(4, seeded(2), shared=True)
        found, expected = (swept(chain, nonlinear_reward, rollout, d, feedback, recompute) for d in (with_part, without))
        for name, g in expected.items():
            torch.testing.assert_close(found[name], g, **EXACT)


@pytest.mark.parametrize("clip_range", [None, 0.05])
def test_single_steps_after_an_update_are_weighted_by_importance(clip_range):
    """The second inner epoch: A min(ratio, clipped ratio) under moved parameters, by central differences."""
    chain = NonlinearChain()
    base = chain.parameters()
    rollout, draw = sample_chain(chain, 3, seeded(1)), EstimatorPlan.from_preset("ddpo", 4).draw(3)
    feedback = feedback_of(chain, nonlinear_reward, rollout)
    moved = {name: p + 0.01 * normal(*p.shape, seed=7) for name, p in base.items()}

    def surrogate(params) -> float:
        total = 0.0
        for step in range(4):
            mean, std = chain.transition(step, rollout.latents[step], params)
            x = rollout.latents[step + 1]
            log_ratio = Normal(mean, std).log_prob(x) - Normal(rollout.means[step], rollout.stds[step]).log_prob(x)
            ratio = log_ratio.sum(1).exp()
            clipped = ratio if clip_range is None else ratio.clamp(1 - clip_range, 1 + clip_range)
            total += float(torch.minimum(feedback.advantage * ratio, feedback.advantage * clipped).sum())
        return total

    leaves = {name: p.clone().requires_grad_() for name, p in moved.items()}
    found = swept(chain, nonlinear_reward, rollout, draw, feedback, leaves=leaves, clip_range=clip_range)
    for name, p in moved.items():
        expected = derivative(lambda v, name=name: surrogate({**moved, name: v}), p, step=1e-5)
        torch.testing.assert_close(found[name], expected, rtol=0, atol=1e-7)


# ---- zeroth order ----


def directions_of(perturbations: Perturbations, params, step: int, row: int) -> dict[str, torch.Tensor]:
    """s * sign * e of one sample, as the difference of the parameters that it ran with."""
    moved = perturbations.perturb(params, step, int(perturbations.direction[row]), float(perturbations.sign[row]))
    return {name: moved[name] - params[name] for name in params}


@pytest.mark.parametrize("antithetic", [False, True])
def test_zeroth_order_by_hand(antithetic):
    """sum over samples of A / s^2 times what was added to the parameters in the steps of its set C."""
    chain, scale = NonlinearChain(), 0.3
    params = chain.parameters()
    perturbations = Perturbations.assign(8, seed=5, scale=scale, num_directions=2, antithetic=antithetic)
    zeroth = torch.rand(8, 4, generator=seeded(1)) < 0.5
    advantage = normal(8)
    expected = {name: torch.zeros_like(p) for name, p in params.items()}
    for row in range(8):
        for step in range(4):
            if zeroth[row, step]:
                for name, moved in directions_of(perturbations, params, step, row).items():
                    expected[name] += advantage[row] * moved / scale**2
    found = zeroth_order(advantage, zeroth, perturbations, params)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, **EXACT)
    shared = zeroth_order(advantage, zeroth[:1], perturbations, params)
    expanded = zeroth_order(advantage, zeroth[:1].expand(8, 4), perturbations, params)
    for name in params:
        assert torch.equal(shared[name], expanded[name])


def test_directions_are_remade_from_the_seed():
    """Same seed, step and direction: bit-identical, in any order; another of the three: another direction."""
    params = {"a": torch.zeros(50, 4), "b": torch.zeros(3, dtype=torch.bfloat16)}
    make = lambda seed, step, direction: Perturbations.assign(4, seed, 0.1, 2, False).directions(params, step, direction)  # noqa: E731
    first = make(1, 2, 0)
    make(1, 0, 0)
    again = make(1, 2, 0)
    assert all(torch.equal(first[name], again[name]) for name in params)
    assert first["b"].dtype == torch.bfloat16
    for other in (make(2, 2, 0), make(1, 3, 0), make(1, 2, 1)):
        assert abs(float(torch.corrcoef(torch.stack([first["a"].flatten(), other["a"].flatten()]))[0, 1])) < 5 / 200**0.5


def test_a_batch_is_shared_out_evenly():
    plain = Perturbations.assign(12, 0, 0.1, 3, False)
    assert plain.direction.tolist() == [0] * 4 + [1] * 4 + [2] * 4 and plain.sign.tolist() == [1.0] * 12
    paired = Perturbations.assign(12, 0, 0.1, 3, True)
    assert paired.direction.tolist() == plain.direction.tolist()
    assert paired.sign.tolist() == [1.0, -1.0] * 6
    groups = paired.groups()
    assert sorted(torch.cat([rows for rows, _, _ in groups]).tolist()) == list(range(12))
    for rows, direction, sign in groups:
        assert set(paired.direction[rows].tolist()) == {direction} and set(paired.sign[rows].tolist()) == {sign}
    picked = paired.select(torch.tensor([3, 8]))
    assert picked.direction.tolist() == [0, 2] and picked.sign.tolist() == [-1.0, 1.0]
    for size, antithetic in ((10, False), (9, True)):
        with pytest.raises(ValueError, match=f"but the batch has {size} samples; use a batch that is a multiple of"):
            Perturbations.assign(size, 0, 0.1, 3, antithetic)


@pytest.mark.parametrize("antithetic", [False, True])
def test_antithetic_pairs_run_with_opposite_perturbations_on_the_same_noise(antithetic):
    """Every sample's path, replayed alone with its own perturbed parameters."""
    chain = NonlinearChain()
    params = chain.parameters()
    perturbations = Perturbations.assign(8, 5, 0.3, 2, antithetic)
    zeroth = torch.rand(8, 4, generator=seeded(1)) < 0.5
    rollout = sample_chain(
        chain, 8, seeded(2), step_function=perturbed_steps(chain, params, zeroth, perturbations), paired=antithetic
    )
    for row in range(8):
        x = rollout.latents[0][row : row + 1]
        for step in range(4):
            own = params
            if zeroth[row, step]:
                own = {n: params[n] + d for n, d in directions_of(perturbations, params, step, row).items()}
            mean, std = chain.transition(step, x, own)
            torch.testing.assert_close(rollout.means[step][row : row + 1], mean, **EXACT)
            torch.testing.assert_close(rollout.stds[step][row : row + 1], std, **EXACT)
            x = mean + std * rollout.noises[step][row : row + 1]
        torch.testing.assert_close(rollout.sample[row : row + 1], x, **EXACT)
    if antithetic:
        for tensors in (rollout.noises, rollout.latents[:1]):
            assert all(torch.equal(t[0::2], t[1::2]) for t in tensors)
        first, second = (directions_of(perturbations, params, 0, row) for row in (0, 1))
        assert all(torch.allclose(first[name], -second[name], atol=1e-15) for name in params)


@dataclasses.dataclass(frozen=True)
class RecordedPerturbations(Perturbations):
    """Perturbations whose directions are looked up instead of being drawn."""

    table: dict = dataclasses.field(default_factory=dict)

    def directions(self, params, step, direction):
        return {name: self.table[step][name][direction] for name in params}


@pytest.mark.parametrize("antithetic", [False, True])
def test_grouped_and_per_sample_zeroth_order_agree_on_the_same_directions(antithetic):
    """The trainer's code (few directions, remade from seeds) and `per_sample=True` (one for each), on one set of directions."""
    chain, num_samples = NonlinearChain(), 8
    params = {name: p.detach() for name, p in chain.parameters().items()}
    plan = EstimatorPlan(4, fo_steps=1, ho_length=1, rest_estimator="zo", zo_scale=0.3, zo_antithetic=antithetic)
    blocks = torch.arange(num_samples) // (2 if antithetic else 1)
    draw = plan.draw(num_samples, seeded(1)).select(blocks)
    per_sample = gradient_module._PerSampleZerothOrder(chain, params, plan, draw, num_samples, seeded(2))
    table: dict[int, dict[str, torch.Tensor]] = {}

    def recording(step, x):
        before = {name: total.clone() for name, total in per_sample.sums.items()}
        result = per_sample.step_function(step, x)
        every = 2 if antithetic else 1
        table[step] = {name: (per_sample.sums[name] - before[name])[::every] for name in params}
        return result

    rollout = sample_chain(chain, num_samples, seeded(3), step_function=recording, paired=antithetic)
    assert torch.equal(per_sample.blocks, blocks)
    sign = 1.0 - 2.0 * (torch.arange(num_samples) % 2) if antithetic else torch.ones(num_samples)
    grouped = RecordedPerturbations(0, blocks, sign, plan.zo_scale, table)
    step_function = perturbed_steps(chain, params, draw.zeroth, grouped)
    replay = sample_chain(chain, num_samples, seeded(3), step_function=step_function, paired=antithetic)
    torch.testing.assert_close(replay.sample, rollout.sample, **EXACT)
    advantage = normal(num_samples)
    apart = per_sample.gradient(advantage)
    together = zeroth_order(advantage, draw.zeroth, grouped, params)
    for name in params:
        torch.testing.assert_close(apart[name].sum(0), together[name], **EXACT)
        assert float(together[name].norm()) > 0


def test_zeroth_order_of_the_estimate_is_built_from_its_own_rollout():
    """`estimate_gradient` without per-sample gradients: with no first-order or half-order part, A e / s averaged by hand."""
    chain = NonlinearChain()
    plan = EstimatorPlan.from_preset("es", 4, zo_scale=0.3, zo_num_perturbations=2)
    result = estimate_gradient(chain, nonlinear_reward, plan, 8, seeded(4), advantage="leave_one_out")
    drawn = seeded(4)
    plan.draw(8, drawn)
    seed = int(torch.randint(2**62, (), generator=drawn))
    perturbations = Perturbations.assign(8, seed, 0.3, 2, True)
    advantage = leave_one_out(result.rewards, blocks=perturbations.direction).values
    expected = zeroth_order(advantage / 8, torch.ones(1, 4, dtype=torch.bool), perturbations, chain.parameters())
    for name, g in expected.items():
        torch.testing.assert_close(result.gradient[name], g, **EXACT)


@pytest.mark.parametrize("per_sample", [False, True])
def test_the_weight_of_the_rest_multiplies_zeroth_order(per_sample):
    chain = NonlinearChain()
    full, half = (
        estimate_gradient(
            chain,
            nonlinear_reward,
            EstimatorPlan.from_preset("es", 4, zo_scale=0.3, rest_weight=weight),
            8,
            seeded(4),
            per_sample=per_sample,
        )
        for weight in (1.0, 0.5)
    )
    for name, g in full.gradient.items():
        torch.testing.assert_close(half.gradient[name], 0.5 * g, **EXACT)


@pytest.mark.parametrize("per_sample", [False, True])
def test_an_antithetic_pair_shares_its_choices_and_is_left_out_of_its_baseline_together(per_sample, monkeypatch):
    """What reaches the sweep: the same K, start and subset for both, and advantages against the other pairs."""
    seen = {}

    def run(self, rollout, draw, feedback):
        seen.update(draw=draw, feedback=feedback)

    monkeypatch.setattr(Sweep, "run", run)
    chain, plan = NonlinearChain(), EstimatorPlan.from_preset("rlr_paper", 4)
    for seed in range(5):
        result = estimate_gradient(
            chain, nonlinear_reward, plan, 16, seeded(seed), per_sample=per_sample, advantage="leave_one_out"
        )
        draw = seen["draw"]
        for name in ("start", "pathwise", "score", "zeroth"):
            rows = getattr(draw, name)
            assert torch.equal(rows[0::2], rows[1::2])
        assert len(draw.start.unique()) == 2, "pairs choose apart from each other"
        expected = leave_one_out(result.rewards, blocks=torch.arange(16) // 2).values
        share = 1 if per_sample else 1 / 16
        torch.testing.assert_close(seen["feedback"].advantage, expected * share, **EXACT)


# ---- advantages ----


def one_by_one(rewards: list[float], groups: list[int], blocks: list[int]) -> list[float]:
    values = []
    for i, reward in enumerate(rewards):
        there = [j for j, r in enumerate(rewards) if blocks[j] != blocks[i] and not math.isnan(r)]
        others = [rewards[j] for j in there if groups[j] == groups[i]] or [rewards[j] for j in there]
        baseline = sum(others) / len(others) if others else 0.0
        values.append(0.0 if math.isnan(reward) else reward - baseline)
    return values


reward_lists = st.lists(st.one_of(st.integers(-80, 80).map(lambda k: k / 8), st.just(NAN)), min_size=1, max_size=9)


@settings(max_examples=100, derandomize=True, deadline=None, database=None)
@given(reward_lists, st.data())
def test_leave_one_out_is_the_mean_of_the_others(rewards, data):
    size = len(rewards)
    groups, blocks = (data.draw(st.lists(st.integers(0, 2), min_size=size, max_size=size)) for _ in range(2))
    tensor = torch.tensor(rewards, dtype=torch.float64)
    alone = list(range(size))
    for given_groups, given_blocks in ((None, None), (groups, None), (None, blocks), (groups, blocks)):
        as_tensors = [None if given is None else torch.tensor(given) for given in (given_groups, given_blocks)]
        result = leave_one_out(tensor, *as_tensors)
        expected = one_by_one(rewards, given_groups or [0] * size, given_blocks or alone)
        torch.testing.assert_close(result.values, torch.tensor(expected, dtype=torch.float64), **EXACT)
        assert torch.equal(result.scale, (~torch.isnan(tensor)).double())


def test_a_group_with_nobody_to_compare_with_has_the_other_groups_as_its_baseline():
    """A sample whose group was dropped, or shares its randomness, must not enter with its whole reward, 20 times an advantage."""
    rewards, groups = torch.tensor([20.0, NAN, 21.0, 23.0]), torch.tensor([0, 0, 1, 1])
    assert leave_one_out(rewards, groups).values.tolist() == [-2.0, 0.0, -2.0, 2.0]
    pairs = torch.tensor([20.0, 21.0, 23.0, 23.0])  # antithetic pairs that are their groups: nobody else in either
    assert leave_one_out(pairs, groups, groups).values.tolist() == [-3.0, -2.0, 2.5, 2.5]


def test_the_batches_of_these_tests_are_batches():
    """`batches_of` (toy_problems) gives what separate calls give, for baselines and for the centre of c."""
    rewards, blocks = normal(2048), torch.arange(2048) // 2
    separate = torch.cat([leave_one_out(rows).values for rows in rewards.split(4)])
    paired = torch.cat([leave_one_out(r, None, b).values for r, b in zip(rewards.split(4), blocks.split(4), strict=True)])
    centers = torch.cat([leave_one_out_mean(rows) for rows in rewards.split(4)])
    with batches_of(4):
        torch.testing.assert_close(ADVANTAGES["leave_one_out"](rewards, None, None).values, separate, **EXACT)
        torch.testing.assert_close(ADVANTAGES["leave_one_out"](rewards, None, blocks).values, paired, **EXACT)
        from rlr_trainer.estimators import sweep

        torch.testing.assert_close(sweep.leave_one_out_mean(rewards), centers, **EXACT)
    assert ADVANTAGES["leave_one_out"] is leave_one_out


def test_no_baseline_keeps_the_reward():
    result = no_baseline(torch.tensor([1.5, NAN, -2.0]))
    assert result.values.tolist() == [1.5, 0.0, -2.0] and result.scale.tolist() == [1.0, 0.0, 1.0]


def test_normalize_is_the_z_score_of_the_rewards_that_are_there():
    rewards = normal(7)
    rewards[2] = NAN
    there = rewards[~torch.isnan(rewards)]
    std = there.std(correction=0)
    result = normalize(rewards)
    expected = torch.where(torch.isnan(rewards), 0.0, (rewards - there.mean()) / std)
    torch.testing.assert_close(result.values, expected, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(result.scale, torch.where(torch.isnan(rewards), 0.0, 1 / std), rtol=1e-7, atol=1e-7)


def test_clipping_advantages_leaves_the_scale():
    result = normalize(torch.tensor([0.0, 0.0, 0.0, 100.0]))
    clipped = result.clip(1.0)
    assert clipped.values.tolist() == [max(-1.0, min(1.0, v)) for v in result.values.tolist()]
    assert torch.equal(clipped.scale, result.scale)


@pytest.mark.parametrize("name", ["leave_one_out", "normalize", "per_prompt"])
def test_equal_rewards_say_nothing(name):
    """Advantages of rewards that are all the same are 0, to the rounding of the reward; not the rounding scaled up to 1."""
    for value in (0.0, 0.1, 10.1, 1000.1, -3e5):
        for size in (2, 7, 64):
            rewards = torch.full((size,), value)
            if name == "per_prompt":
                result = PerPromptStatistics(buffer_size=100, min_count=1).update(["a"] * size, rewards)
            else:
                result = ADVANTAGES[name](rewards, None, None)
            assert float(result.values.abs().max()) <= 1e-5 * abs(value), (value, size)


@pytest.mark.parametrize("name", ADVANTAGES)
def test_integer_rewards_are_rewards(name):
    whole = torch.tensor([3, 1, 0, 7])
    as_integers, as_floats = ADVANTAGES[name](whole, None, None), ADVANTAGES[name](whole.float(), None, None)
    assert as_integers.values.dtype == as_integers.scale.dtype == torch.float32
    assert torch.equal(as_integers.values, as_floats.values)
    assert torch.equal(as_integers.scale, as_floats.scale)


@pytest.mark.parametrize("name", ADVANTAGES)
def test_a_batch_without_any_reward_has_no_advantage(name):
    result = ADVANTAGES[name](torch.tensor([NAN, NAN]), None, None)
    assert result.values.tolist() == result.scale.tolist() == [0.0, 0.0]


def test_per_prompt_statistics_that_can_never_be_used_are_said(caplog):
    PerPromptStatistics(buffer_size=8, min_count=8)
    assert not caplog.records
    PerPromptStatistics(buffer_size=8, min_count=9)
    assert "per_prompt_min_count=9 is more than per_prompt_buffer_size=8" in caplog.text


def test_per_prompt_statistics_by_hand():
    """Buffers keep the newest rewards; a prompt with too few is normalized by the batch; the new rewards count at once."""
    statistics = PerPromptStatistics(buffer_size=3, min_count=2)
    first = torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64)
    result = statistics.update(["a", "a", "b"], first)
    own, batch = first[:2], first
    expected = [
        (1 - own.mean()) / own.std(correction=0),
        (2 - own.mean()) / own.std(correction=0),
        (5 - batch.mean()) / batch.std(correction=0),
    ]
    torch.testing.assert_close(result.values, torch.stack(expected), rtol=1e-7, atol=0)
    second = torch.tensor([3.0, 7.0, NAN], dtype=torch.float64)
    result = statistics.update(["a", "a", "b"], second)
    kept = torch.tensor([2.0, 3.0, 7.0], dtype=torch.float64)  # 1.0 has left the buffer of "a"
    torch.testing.assert_close(result.values[:2], (second[:2] - kept.mean()) / kept.std(correction=0), rtol=1e-7, atol=0)
    torch.testing.assert_close(result.scale[:2], (1 / kept.std(correction=0)).expand(2), rtol=1e-7, atol=0)
    assert result.values[2] == result.scale[2] == 0
    copy = PerPromptStatistics(buffer_size=3, min_count=2)
    copy.load_state_dict(statistics.state_dict())
    third = torch.tensor([4.0, 4.0], dtype=torch.float64)
    torch.testing.assert_close(copy.update(["a", "b"], third).values, statistics.update(["a", "b"], third).values, **EXACT)


# ---- what must stay as it was ----


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("recompute", ["recursive", "graph"])
def test_the_ratio_is_one_before_an_update_and_the_rollout_is_left_alone(preset, recompute):
    chain = in_float32(NonlinearChain(5))
    plan = EstimatorPlan.from_preset(preset, 5)
    rollout, draw = sample_chain(chain, 4, seeded(1)), plan.draw(4, seeded(2))
    stored = {f.name: [t.clone() for t in getattr(rollout, f.name)] for f in dataclasses.fields(Rollout)}
    leaves = {name: p.clone().requires_grad_() for name, p in chain.parameters().items()}
    result = Sweep(
        chain,
        leaves,
        lambda surrogate: surrogate.backward() or 1.0,
        recompute=recompute,
        critic=prediction_critic(chain, leaves, nonlinear_reward),
    ).run(rollout, draw, feedback_of(chain, nonlinear_reward, rollout))
    assert set(result.log_ratios) == {step for step in range(5) if (draw.score[:, step] != 0).any()}
    for log_ratio in result.log_ratios.values():
        assert torch.equal(log_ratio, torch.zeros(4))
    for name, tensors in stored.items():
        for kept, now in zip(tensors, getattr(rollout, name), strict=True):
            assert torch.equal(kept, now) and not now.requires_grad and now.grad is None


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("per_sample", [False, True])
def test_the_chain_s_own_parameters_and_their_grad_are_left_alone(preset, per_sample):
    chain = NonlinearChain()
    chain._parameters = {name: torch.nn.Parameter(p) for name, p in chain.parameters().items()}
    before = {name: p.detach().clone() for name, p in chain.parameters().items()}
    chain.parameters()["in"].grad = torch.full_like(before["in"], 7.0)
    result = estimate_gradient(chain, nonlinear_reward, EstimatorPlan.from_preset(preset, 4), 8, seeded(0), per_sample=per_sample)
    assert any(g.abs().sum() > 0 for g in result.gradient.values())
    for name, p in chain.parameters().items():
        assert torch.equal(p.detach(), before[name])
        if name == "in":
            assert torch.equal(p.grad, torch.full_like(p, 7.0))
        else:
            assert p.grad is None


# ---- samples without a reward ----

WITHOUT_REWARD = {
    "first order": EstimatorPlan(4, fo_steps=2, rest_estimator="lr"),
    "likelihood ratio": EstimatorPlan.from_preset("ddpo", 4),
    "control variate": EstimatorPlan.from_preset("ddpo", 4, control_variate=True),
    "prediction": EstimatorPlan.from_preset("sqdf", 4),
    "zeroth order": EstimatorPlan.from_preset("es", 4),
}


@pytest.mark.parametrize("name", WITHOUT_REWARD)
@pytest.mark.parametrize("kind", ["constant", "with a gradient of NaN"])
def test_a_sample_without_a_reward_contributes_nothing(name, kind):
    """NaN for two of eight samples: their gradients are 0 and the others' are what they were."""
    missing = torch.tensor([False, True, False, False, False, False, True, False])

    def reward(x):
        nothing = torch.full_like(x[:, 0], NAN)
        if kind != "constant":
            nothing = (0 * x[:, 0] + torch.where(missing, -1.0, 1.0)).sqrt()
        return torch.where(missing, nothing, nonlinear_reward(x))

    plan, chain = WITHOUT_REWARD[name], NonlinearChain()
    whole, some = (estimate_gradient(chain, r, plan, 8, seeded(1), per_sample=True).per_sample for r in (nonlinear_reward, reward))
    for parameter in whole:
        assert torch.equal(some[parameter][missing], torch.zeros_like(some[parameter][missing]))
        if name != "control variate":  # there the others' centre changes with the two that are gone
            torch.testing.assert_close(some[parameter][~missing], whole[parameter][~missing], **EXACT)
        assert torch.isfinite(some[parameter]).all()


def test_the_fitted_scale_leaves_out_samples_without_a_reward():
    rewards, c = normal(50), normal(50, seed=1)
    there = torch.arange(50) != 7
    with_nan, without = ControlVariateScale(1), ControlVariateScale(1)
    for _ in range(2):
        with_nan.update(0, torch.where(there, rewards + c, NAN), c)
        without.update(0, (rewards + c)[there], c[there])
    assert math.isclose(with_nan.scale(0), without.scale(0), rel_tol=1e-9)
    assert without.scale(0) != 1


# ---- refusals ----


def test_the_sweep_says_what_it_lacks():
    chain = NonlinearChain()
    rollout = sample_chain(chain, 2, seeded(0))
    leaves = {name: p.clone().requires_grad_() for name, p in chain.parameters().items()}
    bare = Sweep(chain, leaves, lambda surrogate: surrogate.backward() or 1.0)
    advantage = torch.ones(2, dtype=torch.float64)
    with pytest.raises(ValueError, match="reward_gradient is None"):
        bare.run(rollout, EstimatorPlan(4, fo_steps=1).draw(2), Feedback(advantage))
    with pytest.raises(ValueError, match="critic"):
        bare.run(rollout, EstimatorPlan.from_preset("sqdf", 4).draw(2), Feedback(advantage))
    with pytest.raises(ValueError, match="recompute='backwards': must be one of"):
        dataclasses.replace(bare, recompute="backwards").run(rollout, EstimatorPlan(4).draw(2), Feedback(advantage))


def test_an_adjoint_that_overflows_names_its_step():
    chain = NonlinearChain()
    rollout = sample_chain(chain, 2, seeded(0))
    gradient = torch.full((2, 2), float("inf"), dtype=torch.float64)
    with pytest.raises(FloatingPointError, match=r"step 3: the adjoint, shape \(2, 2\)"):
        swept(chain, nonlinear_reward, rollout, EstimatorPlan(4, fo_steps=2).draw(2), Feedback(gradient[:, 0], gradient))


def test_a_predicted_reward_without_a_finite_gradient_names_its_step():
    """An infinite slope at a clean sample that the chain predicts, not at one that it makes."""
    chain = NonlinearChain()
    rollout = sample_chain(chain, 2, seeded(0))
    target = chain.predict_clean(1, rollout.latents[1], chain.parameters())

    def reward(x):
        return (x - target).abs().sqrt().sum(1)

    ones = torch.ones(2, dtype=torch.float64)
    with pytest.raises(FloatingPointError, match=r"step 0: the gradient of the predicted reward is not finite for 2 of 2"):
        swept(chain, reward, rollout, EstimatorPlan.from_preset("sqdf", 4).draw(2), Feedback(ones, scale=ones))


def test_estimate_gradient_refuses_what_cannot_be():
    chain = NonlinearChain()
    with pytest.raises(ValueError, match=r"plan.num_steps=3 but the chain has 4 steps"):
        estimate_gradient(chain, nonlinear_reward, EstimatorPlan(3, fo_steps=1), 4)
    with pytest.raises(ValueError, match="advantage='mean': must be one of none, leave_one_out, normalize"):
        estimate_gradient(chain, nonlinear_reward, EstimatorPlan(4, fo_steps=1), 4, advantage="mean")
    quiet = LinearProblem.make(shared=True, stds=[0.5, 0.5, 0.5, 0.0])
    with pytest.raises(ValueError, match="step 3 of 4 adds no noise"):
        estimate_gradient(quiet.chain, quiet.reward, EstimatorPlan.from_preset("ddpo", 4), 4)
    without = LinearProblem.make(shared=True).chain
    without.predict_clean = None
    with pytest.raises(TypeError, match="no predict_clean"):
        estimate_gradient(without, quiet.reward, EstimatorPlan.from_preset("sqdf", 4), 4)
    with pytest.raises(ValueError, match="zo_num_perturbations=4 with zo_antithetic=True"):
        estimate_gradient(chain, nonlinear_reward, EstimatorPlan.from_preset("es", 4), 12)
