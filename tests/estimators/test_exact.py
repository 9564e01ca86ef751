"""Whole plans for frozen noise and in float64, against one formula for one sample; what the sweep and `estimate_gradient` promise."""

import contextlib
import dataclasses
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch.distributions import Normal
from toy_problems import EXACT, LinearProblem, NonlinearChain, derivative, nonlinear_reward, normal, seeded, unbiased_plans

from rlr_trainer.estimators import (
    ControlVariate,
    ControlVariateScale,
    Feedback,
    Predictions,
    Sweep,
    control_terms,
    estimate_gradient,
    prediction_critic,
    reward_and_gradient,
)
from rlr_trainer.estimators.chain import PerSampleChain, Rollout, sample_chain
from rlr_trainer.estimators.plan import EstimatorPlan
from rlr_trainer.estimators.plan_draw import PlanDraw
from rlr_trainer.estimators.prediction import leave_one_out_mean
from rlr_trainer.estimators.presets import PRESETS

OF_STEPS = [name for name in PRESETS if "forward" not in PRESETS[name].plan(10)]

NAN = math.nan


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


def controlled(chain, reward, rollout, draw, scale) -> ControlVariate:
    """The control variate's terms of a whole rollout, all of whose samples have a reward."""
    outputs = {step: rollout.latents[step + 1] for step in draw.scored_steps()}
    critic = prediction_critic(chain, chain.parameters(), reward)
    predictions = Predictions.at(critic, outputs, rollout.num_samples, rollout.num_steps)
    there = torch.zeros(rollout.num_samples)
    return control_terms([predictions], [torch.arange(rollout.num_samples)], predictions.values, there, scale)[0]


def swept(chain, reward, rollout, draw, feedback, recompute="recursive", control_scale=None, runner=None, leaves=None, **options):
    """Gradient of the package's sweep, name -> tensor."""
    base = chain.parameters()
    if control_scale is not None:
        feedback = dataclasses.replace(feedback, control=controlled(chain, reward, rollout, draw, control_scale))
    runner = runner or chain
    leaves = leaves or {name: p.detach().clone().requires_grad_() for name, p in base.items()}
    Sweep(
        runner,
        leaves,
        backward=lambda surrogate: surrogate.backward() or 1.0,
        recompute=recompute,
        critic=prediction_critic(runner, leaves, reward),
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
        scale.means[step], scale.counts[step] = torch.tensor([0.5 + 0.3 * step, 1.0]), 2
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


@settings(max_examples=40, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
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


def in_float32(chain: NonlinearChain) -> NonlinearChain:
    chain._parameters = {name: p.float() for name, p in chain.parameters().items()}
    chain.initial = lambda n, generator: torch.randn(n, chain.dim, generator=generator)
    return chain


@settings(max_examples=40, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck))
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


@pytest.mark.parametrize("preset", OF_STEPS)
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


@pytest.mark.parametrize("preset", OF_STEPS)
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
    """NaN for two of eight samples: their gradients are 0, and the mean over eight is that of the six others."""
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
            torch.testing.assert_close(some[parameter][~missing], whole[parameter][~missing] * 8 / 6, **EXACT)
        assert torch.isfinite(some[parameter]).all()


@pytest.mark.parametrize("per_sample", [False, True])
@pytest.mark.parametrize("name", [name for name in WITHOUT_REWARD if name != "control variate"])
def test_the_gradient_is_the_mean_over_the_samples_with_a_reward(name, per_sample):
    """A reward of 0 contributes as little as none, but counts: 5 of 16 are missing."""
    missing = torch.arange(16) % 3 == 1
    results = []
    for nothing in (0.0, NAN):
        reward = lambda x, nothing=nothing: torch.where(missing, nothing, nonlinear_reward(x))  # noqa: E731
        results.append(estimate_gradient(NonlinearChain(), reward, WITHOUT_REWARD[name], 16, seeded(1), per_sample=per_sample))
    counted, dropped = results
    for parameter, g in counted.gradient.items():
        torch.testing.assert_close(dropped.gradient[parameter], g * 16 / 11, **EXACT)


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


@pytest.mark.parametrize("recompute", ["recursive", "graph"])
@pytest.mark.parametrize("reference", [False, True])
def test_a_step_without_noise_that_is_left_out_counts_for_nothing(recompute, reference):
    problem = LinearProblem.make(shared=False, stds=[0.5, 0.4, 0.3, 0.0])
    stds, options = [0.5, 0.4, 0.3, 0.0], {"per_sample": True, "recompute": recompute}
    if reference:
        options |= {"reference": {name: 0.9 * p for name, p in problem.chain.parameters().items()}, "kl_coef": 0.3}
    plan = EstimatorPlan.from_preset("ddpo", 4, silent_estimator="none")
    found = estimate_gradient(problem.chain, problem.reward, plan.on_noise(stds), 16, seeded(0), **options)
    silent = [name for name in found.gradient if name.endswith("3")]
    assert silent and not any(found.gradient[name].any() for name in silent)
    assert all(found.gradient[name].any() for name in found.gradient if name not in silent)
    if not reference:  # a part of weight 0 is another way to leave the share of the last step out
        weightless = EstimatorPlan(4, fo_steps=1, rest_estimator="lr", fo_weight=0.0)
        expected = estimate_gradient(problem.chain, problem.reward, weightless, 16, seeded(0), **options)
        for name, gradient in expected.per_sample.items():
            torch.testing.assert_close(found.per_sample[name], gradient, **EXACT)
    with pytest.raises(ValueError, match="pass plan.on_noise"):
        estimate_gradient(problem.chain, problem.reward, plan, 16)


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
