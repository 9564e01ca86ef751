"""Every formula by itself, in float64: against one written by hand for one sample, or against central differences."""

import math

import pytest
import torch
from torch.distributions import Normal
from toy_problems import EXACT, derivative, nonlinear_reward, normal, seeded

from rlr_trainer.estimators import (
    ControlVariateScale,
    NonDifferentiableRewardError,
    control_variate,
    likelihood_ratio,
    pathwise,
    reward_and_gradient,
)
from rlr_trainer.estimators.prediction import FP16_LOSS_SCALE, leave_one_out_mean


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


def test_control_variate_and_its_centre():
    c = normal(5, seed=1)
    center = leave_one_out_mean(c)
    for i in range(5):
        others = torch.cat([c[:i], c[i + 1 :]]).mean()
        torch.testing.assert_close(center[i], others, **EXACT)
    torch.testing.assert_close(control_variate(c, 0.3, center), 0.3 * (c - center), **EXACT)
    assert torch.equal(leave_one_out_mean(c[:1]), torch.zeros(1, dtype=torch.float64))


def test_the_fitted_scale_is_the_regression_of_the_reward_on_its_prediction():
    scale, decay = ControlVariateScale(3, decay=0.9), 0.9
    batches = [(normal(50, seed=s), normal(50, seed=s + 10)) for s in range(3)]
    batches = [(r + 2 * c, c) for r, c in batches]
    assert scale.scale(1) == 1.0
    covariance = variance = 0.0
    for number, (r, c) in enumerate(batches):
        missing = torch.tensor([math.nan], dtype=torch.float64)
        values = torch.full((52, 3), math.nan, dtype=torch.float64)  # of the step in the middle alone
        values[:, 1] = torch.cat([c, c[:1], missing])
        scale.update(torch.cat([r, missing, r[:1]]), values)  # the last two samples are left out
        new = (float(((r - r.mean()) * (c - c.mean())).mean()), float(((c - c.mean()) ** 2).mean()))
        keep = 0.0 if number == 0 else decay
        covariance, variance = keep * covariance + (1 - keep) * new[0], keep * variance + (1 - keep) * new[1]
        expected = 1.0 if number == 0 else covariance / variance
        assert math.isclose(scale.scale(1), expected, rel_tol=1e-9)
    assert scale.scale(0) == 1.0
    copy = ControlVariateScale(3)
    copy.load_state_dict(scale.state_dict())
    assert copy.scale(1) == scale.scale(1)
