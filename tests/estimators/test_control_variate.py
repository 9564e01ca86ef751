"""The control variate of a rollout: its terms are made once, and stay right in any micro-batch and after an update."""

import dataclasses
import math

import pytest
import torch
from statistics_helpers import Estimate, assert_biased, assert_unbiased
from toy_problems import (
    EXACT,
    NUM_SAMPLES,
    SEED_SHIFT,
    LinearProblem,
    NonlinearChain,
    derivative,
    nonlinear_reward,
    normal,
    replaced,
    seeded,
)

from rlr_trainer.estimators import (
    ControlVariate,
    ControlVariateScale,
    Feedback,
    NonDifferentiableRewardError,
    Predictions,
    Sweep,
    control_terms,
    estimate_gradient,
    likelihood_ratio,
    prediction_critic,
    prediction_pathwise,
)
from rlr_trainer.estimators.chain import PerSampleChain, sample_chain
from rlr_trainer.estimators.plan import EstimatorPlan

NAN = math.nan


def fitted(num_steps: int, factor: float = 0.7) -> ControlVariateScale:
    scale = ControlVariateScale(num_steps)
    scale.means[:], scale.counts[:] = torch.tensor([factor, 1.0]), 2
    return scale


def terms_of(chain, reward, rollout, draw, scale) -> ControlVariate:
    """By the parameters that sampled, centred over the whole rollout."""
    outputs = {step: rollout.latents[step + 1] for step in draw.scored_steps()}
    predictions = Predictions.at(
        prediction_critic(chain, chain.parameters(), reward), outputs, rollout.num_samples, chain.num_steps
    )
    rewards, everyone = reward(rollout.sample), torch.arange(rollout.num_samples)
    return control_terms([predictions], [everyone], predictions.values, rewards, scale)[0]


def swept(chain, leaves, rollout, draw, feedback, **options) -> dict[str, torch.Tensor]:
    Sweep(chain, leaves, lambda surrogate: surrogate.backward() or 1.0, **options).run(rollout, draw, feedback)
    return {name: p.grad for name, p in leaves.items()}


def feedback_of(rollout, reward, control: ControlVariate) -> Feedback:
    rewards = reward(rollout.sample)
    return Feedback(rewards - 0.2, torch.zeros_like(rollout.sample), torch.ones_like(rewards), control)


@pytest.mark.parametrize("plan", [EstimatorPlan.from_preset("ddpo", 4), EstimatorPlan(4, 1, 2, rest_estimator="lr")], ids=str)
def test_the_gradient_of_an_update_does_not_depend_on_its_micro_batches(plan):
    """Eight samples at once, as four and four, in pairs, and one by one."""
    chain = NonlinearChain()
    rollout, draw = sample_chain(chain, 8, seeded(1)), plan.draw(8, seeded(2))
    feedback = feedback_of(rollout, nonlinear_reward, terms_of(chain, nonlinear_reward, rollout, draw, fitted(4)))
    found = {}
    for size in (8, 4, 2, 1):
        leaves = {name: p.clone().requires_grad_() for name, p in chain.parameters().items()}
        for rows in torch.arange(8).split(size):
            names = ("advantage", "reward_gradient", "scale")
            own = {name: getattr(feedback, name)[rows] for name in names} | {"control": feedback.control.select(rows)}
            swept(chain, leaves, rollout.select(rows), draw.select(rows), dataclasses.replace(feedback, **own))
        found[size] = {name: p.grad for name, p in leaves.items()}
    for size in (4, 2, 1):
        for name, gradient in found[8].items():
            torch.testing.assert_close(found[size][name], gradient, rtol=0, atol=1e-12)


@pytest.mark.parametrize("clip_range", [None, 0.02])
def test_after_an_update_both_parts_are_weighted_by_the_ratio(clip_range):
    """By central differences at moved parameters: A' min(ratio, clipped) and, where that is not clipped, ratio * alpha <g, x(theta)>."""
    chain, plan = NonlinearChain(), EstimatorPlan.from_preset("ddpo", 4)
    rollout, draw = sample_chain(chain, 6, seeded(1)), plan.draw(6)
    control = terms_of(chain, nonlinear_reward, rollout, draw, fitted(4))
    feedback = feedback_of(rollout, nonlinear_reward, control)
    moved = {name: p + 0.01 * normal(*p.shape, seed=7) for name, p in chain.parameters().items()}
    shut = []

    def surrogate(params) -> float:
        total = 0.0
        for step in range(4):
            x, old = rollout.latents[step + 1], (rollout.means[step], rollout.stds[step])
            advantage = feedback.advantage - control.baseline[:, step]
            mean, std = chain.transition(step, rollout.latents[step], params)
            value, _ = likelihood_ratio(advantage, x, mean, std, *old, clip_range=clip_range)
            here, spread = chain.transition(step, rollout.latents[step], moved)
            ratio = likelihood_ratio(advantage, x, here, spread, *old)[1].exp()
            if clip_range is not None:
                out = ((advantage > 0) & (ratio > 1 + clip_range)) | ((advantage < 0) & (ratio < 1 - clip_range))
                shut.append(bool(out.any()))
                ratio = torch.where(out, 0.0, ratio)
            total += float((value + ratio * (control.gradients[step] * (mean + std * (x - here) / spread)).sum(1)).sum())
        return total

    leaves = {name: p.clone().requires_grad_() for name, p in moved.items()}
    found = swept(chain, leaves, rollout, draw, feedback, clip_range=clip_range)
    for name, p in moved.items():
        expected = derivative(lambda v, name=name: surrogate({**moved, name: v}), p, step=1e-5)
        torch.testing.assert_close(found[name], expected, rtol=0, atol=1e-7)
    assert any(shut) == (clip_range is not None)


def test_it_stays_unbiased_after_an_update():
    """The first step's share, exactly, at other parameters of that step than those that sampled; not so without the ratio."""
    problem, size = LinearProblem.make(shared=False), 2 * NUM_SAMPLES
    problem = dataclasses.replace(problem, quadratic=torch.eye(2, dtype=torch.float64))  # c's slope has to change with the latent
    chain, plan = problem.chain, EstimatorPlan(4, fo_steps=3, rest_estimator="lr")
    rollout, draw = sample_chain(chain, size, seeded(5 + SEED_SHIFT)), plan.draw(size)
    draw = dataclasses.replace(draw, pathwise=torch.zeros_like(draw.pathwise), first_order=torch.zeros_like(draw.first_order))
    feedback = feedback_of(rollout, problem.reward, terms_of(chain, problem.reward, rollout, draw, fitted(4, 1.5)))
    moved = {name: p + 0.2 * normal(*p.shape, seed=3) * name.endswith("0") for name, p in chain.parameters().items()}
    chain._parameters = moved
    target = {name: g for name, g in problem.gradient().items() if name.endswith("0")}

    def measured() -> Estimate:
        leaves = {name: p.expand(size, *p.shape).clone().requires_grad_() for name, p in moved.items()}
        found = swept(PerSampleChain(chain), leaves, rollout, draw, feedback)
        return Estimate.of({name: found[name] for name in target})

    assert_unbiased(measured(), target)
    ratio_of = {}

    def keep(*args, **options):
        surrogate, log_ratio = likelihood_ratio(*args, **options)
        ratio_of["present"] = log_ratio.exp()[:, None]
        return surrogate, log_ratio

    with (
        replaced(likelihood_ratio, keep),
        replaced(prediction_pathwise, lambda g, *rest: prediction_pathwise(g / ratio_of["present"], *rest)),
    ):
        assert_biased(measured(), target)


def test_terms_are_of_the_whole_rollout():
    """Two batches that ask at different steps; one sample has no reward, two share their noise."""
    values = torch.tensor([[1.0, NAN], [2.0, NAN], [4.0, 1.0], [9.0, 5.0]])
    parts = [
        Predictions(values[:2], {0: torch.ones(2, 3)}),
        Predictions(values[2:], {0: torch.ones(2, 3), 1: torch.full((2, 3), 2.0)}),
    ]
    rewards, blocks = torch.tensor([0.0, 0.0, 0.0, NAN]), torch.tensor([0, 0, 1, 1])
    places = torch.arange(4).split(2)
    first, second = control_terms(parts, places, values, rewards, fitted(2, 0.5), blocks)
    assert first.baseline.tolist() == [[0.5 * (1 - 4), 0], [0.5 * (2 - 4), 0]]
    assert second.baseline.tolist() == [[0.5 * (4 - 1.5), 0.5 * 1], [0, 0]]  # with nobody to compare with: a centre of 0
    assert second.gradients[1].tolist() == [[1.0] * 3, [0.0] * 3]
    whole = ControlVariate.concatenate([first, second])
    torch.testing.assert_close(whole.baseline, torch.cat([first.baseline, second.baseline]), **EXACT)
    assert whole.gradients[1].tolist() == [[0.0] * 3, [0.0] * 3, [1.0] * 3, [0.0] * 3]
    assert whole.select(torch.tensor([2])).gradients[1].tolist() == [[1.0] * 3]


@pytest.mark.parametrize(("name", "kind"), [("values", "predicted reward"), ("gradients", "gradient of the predicted reward")])
def test_a_prediction_that_is_not_finite_names_its_step(name, kind):
    values, gradient = torch.ones(2, 4), torch.ones(2, 3)
    (values if name == "values" else gradient)[0, 2] = NAN
    rewards, places = torch.zeros(2), [torch.arange(2)]
    with pytest.raises(FloatingPointError, match=f"step 2: the {kind} is not finite for 1 of 2 samples"):
        control_terms([Predictions(values, {2: gradient})], places, values, rewards, fitted(4))
    rewards[0] = NAN  # dropped, so it does not matter
    (terms,) = control_terms([Predictions(values, {2: gradient})], places, values, rewards, fitted(4))
    assert torch.isfinite(terms.baseline).all() and torch.isfinite(terms.gradients[2]).all()


def test_a_reward_that_jumps_is_refused_although_it_has_a_graph():
    """Its gradient is 0 wherever it is defined: the part that is added back would be missing, and the estimate wrong."""

    def jumps(x):
        return 0 * x.sum(1) + (x > 0).double().sum(1)

    plan = EstimatorPlan.from_preset("ddpo", 4, control_variate=True)
    with pytest.raises(NonDifferentiableRewardError, match="continuous and differentiable in the picture"):
        estimate_gradient(NonlinearChain(), jumps, plan, 16, seeded(0))
    estimate_gradient(NonlinearChain(), lambda x: 0 * x.sum(1), plan, 16, seeded(0))  # equal everywhere: nothing to explain
