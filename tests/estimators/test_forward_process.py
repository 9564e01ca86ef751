"""Losses on the forward process: their formulas by hand, where they lead, and the mistakes that must show."""

import dataclasses
import math

import pytest
import torch
from toy_problems import EXACT, derivative, normal, seeded

from rlr_trainer.estimators import forward_process
from rlr_trainer.estimators.forward_process import (
    ForwardProcess,
    Matching,
    advantage_weighted_matching,
    draw_noises,
    matching_log_probability,
    negative_aware_matching,
    old_policy_decay,
    optimality,
    self_normalized_error,
)
from rlr_trainer.estimators.gradient import estimate_gradient
from rlr_trainer.estimators.linear_gaussian import LinearGaussianChain
from rlr_trainer.estimators.plan import EstimatorPlan, PlanError
from rlr_trainer.schedules.interpolant import InterpolantSchedule

# ---- formulas ----


def f64(*values):
    return torch.tensor(values, dtype=torch.float64)


def test_the_matching_loss_of_awm_by_hand():
    output, target = f64([1.0, 3.0], [2.0, 2.0]), f64([1.0, 1.0], [2.0, 2.0])
    found = matching_log_probability(output, target, 0.5)
    expected = [-0.5 * ((2 + 1e-10) ** 0.25 - 1e-10**0.25) / 0.25, 0.0]  # mean squared errors 2 and 0
    torch.testing.assert_close(found, f64(*expected), **EXACT)


def test_the_ratio_of_awm_is_clipped_on_the_side_of_its_advantage():
    advantage, log_ratio = f64(1.0, 1.0, -1.0, -1.0), f64(1.0, -1.0, 1.0, -1.0)
    old = normal(4)
    for clip_range, ratios in ((None, [math.e, 1 / math.e, math.e, 1 / math.e]), (0.5, [1.5, 1 / math.e, math.e, 0.5])):
        surrogate, seen = advantage_weighted_matching(advantage, old + log_ratio, old, clip_range)
        torch.testing.assert_close(surrogate, advantage * f64(*ratios), **EXACT)
        torch.testing.assert_close(seen, log_ratio, **EXACT)


def test_on_policy_awm_is_the_advantage_times_the_matching_loss():
    advantage, target, x = normal(3), normal(3, 5, seed=1), normal(3, 5, seed=2).requires_grad_()
    log_probability = matching_log_probability(x, target, 0.7)
    surrogate, _ = advantage_weighted_matching(advantage, log_probability, log_probability, 1.0)
    (found,) = torch.autograd.grad(surrogate.sum(), x)
    expected = derivative(lambda v: (advantage * matching_log_probability(v, target, 0.7)).sum(), x.detach())
    torch.testing.assert_close(found, expected, **EXACT)


def test_optimality_is_a_clipped_line():
    assert optimality(torch.tensor([-9.0, -5.0, 0.0, 2.5, 5.0, 9.0]), 5.0).tolist() == [0, 0, 0.5, 0.75, 1, 1]


def test_the_error_of_nft_is_normalized_by_itself():
    clean, predicted = torch.zeros(2, 2).double(), torch.tensor([[1.0, -3.0], [0.0, 0.0]]).double()
    torch.testing.assert_close(self_normalized_error(predicted, clean), torch.tensor([2.5, 0.0]).double(), **EXACT)  # 5 / 2
    moved = predicted.clone().requires_grad_()
    self_normalized_error(moved, clean).sum().backward()  # its normalization is constant
    torch.testing.assert_close(moved.grad, torch.tensor([[0.5, -1.5], [0.0, 0.0]]).double(), **EXACT)


def test_nft_by_hand():
    """One entry, error e of a prediction is its magnitude: x_plus = 1.75 and x_minus = 0.25 at beta 1.5."""
    good, new, old, clean = f64(0.75), f64([1.5]), f64([1.0]), f64([0.0])
    found = negative_aware_matching(good, new, old, clean, 1.5)
    torch.testing.assert_close(found, f64(-(0.75 * 1.75 + 0.25 * 0.25) / 1.5), **EXACT)


@pytest.mark.parametrize("beta", [0.1, 1.0, 2.0])
def test_at_the_old_policy_nft_is_the_matching_loss_weighted_by_the_centred_reward(beta):
    good, clean, x = torch.rand(4, generator=seeded(0)).double(), normal(4, 6), normal(4, 6, seed=1).requires_grad_()
    (found,) = torch.autograd.grad(negative_aware_matching(good, x, x.detach(), clean, beta).sum(), x)
    (expected,) = torch.autograd.grad((-(2 * good - 1) * self_normalized_error(x, clean)).sum(), x)
    torch.testing.assert_close(found, expected, **EXACT)


def test_the_old_policy_s_decay():
    """The two schedules of its authors."""
    assert [old_policy_decay(n, 0.0, 0.001, 0.5) for n in (0, 100, 900)] == [0, pytest.approx(0.1), 0.5]
    assert [old_policy_decay(n, 75.0, 0.0075, 0.999) for n in (74, 75, 77, 1000)] == [0, 0, pytest.approx(0.015), 0.999]


def test_noises_are_functions_of_seed_and_step():
    like, seeds = torch.zeros(3, 2, 2), torch.tensor([5, 9, 5])
    first, other = draw_noises(like, seeds, 0), draw_noises(like, seeds, 1)
    assert torch.equal(first[0], first[2])
    assert not torch.equal(first[0], first[1])
    assert not torch.equal(first[0], other[0])
    assert torch.equal(draw_noises(like[:1], seeds[1:2], 1)[0], other[1])


# ---- where a step leads ----

UP, ASIDE = f64(1.0, 0.0), f64(0.0, 1.0)
COUNT, LEVELS = 2**14, (0.9, 0.5, 0.2)
FLOW = InterpolantSchedule(
    LEVELS, tuple(1 - b for b in LEVELS), LEVELS, (0.5, 0.8, 1.0), (0.5, 0.2, 0.0), (0.0,) * 3, prediction_type="flow"
)


def velocity(step, x, weights):
    """Of standard normal data exact, x (B - A) / (A^2 + B^2), but for the weights: a start that is not where matching alone would lead."""
    level = LEVELS[step]
    return x * (2 * level - 1) / (level**2 + (1 - level) ** 2) + 0.5 * ASIDE - weights


def gradients(loss, weights=None, advantage=None):
    """Per-sample gradients [N, 2] of the surrogate, for standard normal samples and the reward x_0 . UP."""
    process = ForwardProcess(loss, (0, 3), 3)
    clean = torch.randn(COUNT, 2, generator=seeded(3), dtype=torch.float64)
    advantage = clean @ UP if advantage is None else advantage(clean @ UP)
    leaves = torch.zeros(COUNT, 2, dtype=torch.float64).requires_grad_()
    matching = Matching(
        process,
        FLOW,
        lambda step, x: velocity(step, x, leaves),
        None,
        lambda surrogate: surrogate.backward() or 1.0,
        limit=5.0,
    )
    matching.run(clean, torch.full((COUNT, 3), 1 / 3), advantage, torch.ones(COUNT), torch.arange(COUNT))
    return leaves.grad


def leads_up(found):
    """Towards the reward by more than 5 standard errors, and nowhere else: by symmetry of the data the mean has no other part."""
    mean, error = found.mean(0), found.std(0) / COUNT**0.5
    return bool(mean[0] > 5 * error[0] and mean[1].abs() < 5 * error[1])


@pytest.mark.parametrize("loss", ["awm", "nft"])
def test_the_expected_step_raises_the_reward(loss):
    found = gradients(loss)
    assert leads_up(found)
    rewards = []
    for weights in (torch.zeros(2).double(), 0.1 * found.mean(0) / found.mean(0).norm()):
        x = torch.randn(COUNT, 2, generator=seeded(4), dtype=torch.float64)
        for step in range(3):
            x, _ = FLOW.transition(step, x, velocity(step, x, weights))
        rewards.append(x @ UP)
    difference = rewards[1] - rewards[0]  # of the same noise
    assert difference.mean() > 5 * difference.std() / COUNT**0.5
    assert difference.mean() > 0.02


@pytest.mark.parametrize("loss", ["awm", "nft"])
@pytest.mark.parametrize("mistake", ["sign", "not centred"])
def test_mistakes_in_the_advantage_show(loss, mistake):
    """Not centred, every sample is matched: the start, which is not the data's own, is left for it."""
    changed = {"sign": lambda a: -a, "not centred": lambda a: a + 2}[mistake]
    assert not leads_up(gradients(loss, advantage=changed))


def test_a_probability_that_is_not_centred_shows(monkeypatch):
    monkeypatch.setattr(forward_process, "optimality", lambda advantage, limit: (advantage / limit).clamp(0, 1))
    assert not leads_up(gradients("nft"))


def test_both_implicit_policies_are_needed(monkeypatch):
    """Positive samples alone: a mistake in r is a mistake in what is matched."""
    whole = negative_aware_matching

    def positive(good, predicted, old_predicted, clean, beta):
        return (
            whole(good, predicted, old_predicted, clean, beta)
            + (1 - good) * self_normalized_error((1 + beta) * old_predicted - beta * predicted, clean) / beta
        )

    monkeypatch.setattr(forward_process, "negative_aware_matching", positive)
    assert not leads_up(gradients("nft"))


# ---- plans ----


def test_the_published_settings():
    awm, nft = (EstimatorPlan.from_preset(name, 14).forward for name in ("awm", "nft"))
    assert awm == ForwardProcess("awm", (1, 12), 6)
    assert nft == ForwardProcess("nft", (0, 14), 13, beta=1.0, decay=(0.0, 0.001, 0.5))


@pytest.mark.parametrize("name", ["awm", "nft"])
@pytest.mark.parametrize("num_steps", [1, 2, 3, 10, 50])
def test_the_levels_of_a_draw(name, num_steps):
    plan = EstimatorPlan.from_preset(name, num_steps).on_noise([0.0] * num_steps)
    first, end = plan.forward.steps
    draw = plan.draw(5, seeded(1))
    assert ((draw.forward != 0).sum(1) == plan.forward.times).all()
    assert not draw.forward[:, :first].any() and not draw.forward[:, end:].any()
    torch.testing.assert_close(draw.forward.sum(1), torch.ones(5))
    assert not draw.active_steps()
    assert not plan.scored_steps() and not plan.needs_differentiable_reward and plan.biases()


def test_every_level_is_as_likely_as_the_others():
    plan = EstimatorPlan.from_preset("awm", 10, forward_times=3)
    mean = plan.draw(20_000, seeded(2)).forward.mean(0)
    expected = torch.tensor([0.0, *[1 / 8] * 8, 0.0])
    error = (3 / 8 * 5 / 8 / 20_000) ** 0.5 / 3
    assert ((mean - expected).abs() < 5 * error).all()


@pytest.mark.parametrize(
    ("preset", "options", "message"),
    [
        ("awm", {"fo_steps": 2}, r"fo_steps=2: has no effect with estimator='awm', a loss on the forward process"),
        ("nft", {"ho_length": 1}, r"ho_length=1: has no effect with estimator='nft'"),
        ("awm", {"control_variate": True}, r"control_variate=True: has no effect"),
        ("nft", {"rest_num_steps": 2}, r"rest_num_steps=2: has no effect"),
        ("awm", {"silent_estimator": "none"}, r"silent_estimator='none': has no effect"),
        ("awm", {"forward_times": 9}, r"forward_times=9: must be a whole number from 1 to 8"),
        ("awm", {"nft_beta": 1.0}, r"nft_beta=1.0: is of estimator='nft'"),
        ("nft", {"nft_beta": 0.0}, r"nft_beta=0.0: must be a positive number"),
        ("nft", {"old_policy_decay": [0, 0.1]}, r"old_policy_decay=\[0, 0.1\]: must be three numbers"),
        ("nft", {"old_policy_decay": [0, 0.1, 1]}, r"the limit below 1"),
        ("ddpo", {"forward_times": 4}, r"forward_times=4: is of losses on the forward process, which estimator='ddpo' has not"),
    ],
)
def test_options_that_would_be_ignored_are_refused(preset, options, message):
    with pytest.raises(PlanError, match=message):
        EstimatorPlan.from_preset(preset, 10, **options)


def test_options_are_taken():
    plan = EstimatorPlan.from_preset("nft", 10, forward_times=4, nft_beta=0.1, old_policy_decay=[75, 0.0075, 0.999])
    assert plan.forward == ForwardProcess("nft", (0, 10), 4, beta=0.1, decay=(75, 0.0075, 0.999))
    assert hash(plan) == hash(dataclasses.replace(plan))
    assert "at 4 of the noise levels of steps 0 to 9, beta 0.1" in str(plan)


def test_a_bare_chain_has_no_forward_process():
    with pytest.raises(PlanError, match="estimate_gradient with a loss on the forward process"):
        estimate_gradient(LinearGaussianChain(4, 2), lambda x: x.sum(1), EstimatorPlan.from_preset("awm", 4), 8)
