"""Each known mistake is rejected by the checker that accepts the right estimator, with the same plan and the same samples.

A mutant is a context manager that replaces one public function of the library, wherever it is used. Beside it stand changes that look
like mistakes and are none: the checker must not reject those.
"""

import contextlib
import dataclasses
import functools
from collections.abc import Callable
from contextlib import AbstractContextManager

import pytest
import torch
from statistics_helpers import Biased, Estimate, Underpowered, assert_biased, assert_unbiased
from toy_problems import BATCH, NUM_STEPS, LinearProblem, estimate, group_size, replaced, run

from rlr_trainer.estimators import (
    control_variate,
    leave_one_out,
    likelihood_ratio,
    normalize,
    prediction_critic,
    prediction_pathwise,
    reward_and_gradient,
)
from rlr_trainer.estimators.advantages import ADVANTAGES, Advantages
from rlr_trainer.estimators.chain import PerSampleChain, predict_clean, sample_chain
from rlr_trainer.estimators.plan import EstimatorPlan
from rlr_trainer.estimators.plan_draw import PlanDraw, inverse_inclusion_weights, with_segments

T = NUM_STEPS
Mutant = AbstractContextManager[None]


# ---- what goes wrong ----


@contextlib.contextmanager
def draw_with(change: Callable[[PlanDraw], dict]):
    """Changes the masks and weights of every draw."""
    real = EstimatorPlan.draw

    def draw(self, *args, **options):
        result = real(self, *args, **options)
        return dataclasses.replace(result, **change(result))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EstimatorPlan, "draw", draw)
        yield


@contextlib.contextmanager
def other_starts():
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(EstimatorPlan, "start_probabilities", lambda self: [0.9, 0.1])
        yield


def without_column(values: torch.Tensor, step: int) -> torch.Tensor:
    return torch.where(torch.arange(values.shape[1]) == step, torch.zeros_like(values), values)


def score_with(change: Callable) -> Mutant:
    """Changes the arguments of `likelihood_ratio`: (advantage, x_next, mean, std, old_mean, old_std)."""
    return replaced(likelihood_ratio, lambda *args, **options: likelihood_ratio(*change(*args), **options))


class CutChain:
    """A chain whose steps hide from autograd where their input came from: no adjoint ever arrives."""

    def __init__(self, chain) -> None:
        self.chain, self.num_steps = chain, chain.num_steps
        self.parameters, self.initial, self.predict_clean = chain.parameters, chain.initial, chain.predict_clean

    def transition(self, step, x, params):
        return self.chain.transition(step, x.detach() + 0 * x, params)


def cut_path() -> Mutant:
    return replaced(PerSampleChain, lambda chain: PerSampleChain(CutChain(chain)))


def perturbed_with(change: Callable) -> Mutant:
    """Changes what the perturbed steps do, not what is recorded of them: change(chain, step_function) -> step function."""

    def sample(chain, num_samples, generator, *, step_function, **options):
        return sample_chain(chain, num_samples, generator, step_function=change(chain, step_function), **options)

    return replaced(sample_chain, sample)


def with_the_partner_s_sign(chain, step_function):
    """Samples 2k and 2k + 1 are an antithetic pair."""

    def run_step(step, x):
        partner = torch.arange(len(x)) ^ 1
        mean, std = step_function(step, x[partner])
        return mean[partner], std[partner]

    return run_step


def first_step_unperturbed(chain, step_function):
    def run_step(step, x):
        perturbed = step_function(step, x)
        return perturbed if step else chain.transition(step, x, chain.parameters())

    return run_step


def negated_gradient(*args):
    values, gradient = reward_and_gradient(*args)
    return values, -gradient


def mean_of_batch(rewards, groups, blocks):
    """The sample's own reward is in its baseline; in the control variate's centre too, which is cut into batches by the same function."""
    means = rewards.reshape(-1, BATCH).mean(1).repeat_interleave(BATCH)
    return Advantages(rewards - means, torch.ones_like(rewards))


@contextlib.contextmanager
def first_order_not_scaled():
    def unscaled(rewards, groups, blocks):
        return dataclasses.replace(normalize(rewards), scale=torch.ones_like(rewards))

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(ADVANTAGES, "normalize", unscaled)
        yield


@contextlib.contextmanager
def critic_through_parameters():
    """c is differentiated through the parameters of the prediction as well as through its input."""
    reward, latest = LinearProblem.make(shared=False).reward, {}

    class Watched(PerSampleChain):
        def transition(self, step, x, params):
            latest.update(step=step, params=params)
            return super().transition(step, x, params)

        def predicted(self, x):
            return reward(predict_clean(self, latest["step"] + 1, x, latest["params"]))

    def chain_of(chain):
        latest["chain"] = Watched(chain)
        return latest["chain"]

    def pathwise(gradient, mean, std, noise):
        return prediction_pathwise(gradient, mean, std, noise) + latest["chain"].predicted((mean + std * noise).detach())

    with replaced(PerSampleChain, chain_of), replaced(prediction_pathwise, pathwise):
        yield


# ---- plans, and what goes wrong with them ----

FO_LR = EstimatorPlan(T, fo_steps=2, rest_estimator="lr")
DDPO = EstimatorPlan.from_preset("ddpo", T)
SUB_CHAIN = EstimatorPlan(T, fo_steps=1, ho_length=2, rest_estimator="lr")
ZEROTH = EstimatorPlan(T, fo_steps=1, ho_length=2, rest_estimator="zo", zo_scale=0.1)
SUBSET = EstimatorPlan(T, rest_estimator="lr", rest_num_steps=2, rest_step_weights=(1.0, 2.0, 1.0, 4.0))
CONTROLLED = EstimatorPlan(T, fo_steps=1, rest_estimator="lr", control_variate=True)

SILENT = [0.0, 0.6, 0.0, 0.5]
SEGMENTS = EstimatorPlan(T, rest_estimator="lr", silent_estimator="ho").on_noise(SILENT)

MUTANTS: dict[str, tuple[EstimatorPlan, str, Callable[[], Mutant]]] = {
    "the first step is dropped": (FO_LR, "none", lambda: draw_with(lambda d: {"score": without_column(d.score, 0)})),
    "the earliest first-order step is dropped": (
        FO_LR,
        "none",
        lambda: draw_with(lambda d: {"pathwise": without_column(d.pathwise, T - 2)}),
    ),
    "a step is covered twice": (
        SUB_CHAIN,
        "none",
        lambda: draw_with(lambda d: {"score": torch.where(d.pathwise & ~d.first_order, 1.0, d.score)}),
    ),
    "likelihood ratio on a first-order step too": (
        FO_LR,
        "none",
        lambda: draw_with(lambda d: {"score": torch.where(d.first_order, 1.0, d.score)}),
    ),
    "the path through the sub-chain is cut": (EstimatorPlan(T, ho_length=2, rest_estimator="lr"), "none", cut_path),
    "the path through the whole chain is cut": (EstimatorPlan.from_preset("full_bp", T), "none", cut_path),
    "half-order segments do not reach back": (SEGMENTS, "none", lambda: replaced(with_segments, lambda pathwise, *args: pathwise)),
    "half-order segments reach over steps with noise": (
        SEGMENTS,
        "none",
        lambda: replaced(with_segments, lambda pathwise, *args: with_segments(pathwise, args[0], [0, 1, 2])),
    ),
    "score divided by std instead of its square": (
        SUB_CHAIN,
        "none",
        lambda: score_with(lambda a, x, m, s, om, os: (a, x, m, s.sqrt(), om, os.sqrt())),
    ),
    "the sign of the score": (SUB_CHAIN, "none", lambda: score_with(lambda a, *rest: (-a, *rest))),
    "the sign of the perturbation": (ZEROTH, "none", lambda: perturbed_with(with_the_partner_s_sign)),
    "a step of zeroth order is run without its perturbation": (ZEROTH, "none", lambda: perturbed_with(first_step_unperturbed)),
    "the sign of the reward's gradient": (FO_LR, "none", lambda: replaced(reward_and_gradient, negated_gradient)),
    "inclusion probabilities forgotten": (
        SUBSET,
        "none",
        lambda: replaced(inverse_inclusion_weights, lambda *args: (inverse_inclusion_weights(*args) > 0).float() * 2),  # T / count
    ),
    "the baseline contains the sample": (DDPO, "leave_one_out", lambda: replaced(leave_one_out, mean_of_batch)),
    "the baseline of a zeroth-order sample contains its partner": (
        ZEROTH,
        "leave_one_out",
        lambda: replaced(leave_one_out, lambda rewards, groups, blocks: leave_one_out(rewards, groups, None)),
    ),
    "first order not divided by the rewards' std": (FO_LR, "normalize", first_order_not_scaled),
    "the control variate is not added back": (
        CONTROLLED,
        "none",
        lambda: replaced(prediction_pathwise, lambda g, *args: prediction_pathwise(0 * g, *args)),
    ),
    "the control variate is added back without being subtracted": (
        CONTROLLED,
        "none",
        lambda: replaced(control_variate, lambda value, *args: 0 * value),
    ),
    "the control variate is differentiated through the parameters": (CONTROLLED, "none", critic_through_parameters),
    "the centre of the control variate contains the sample": (CONTROLLED, "none", lambda: replaced(leave_one_out, mean_of_batch)),
}
# A factor on one part, which a plan can be asked for: too little of each, and zeroth order not divided by its scale.
MISWEIGHTED = {
    "fo_weight": (SUB_CHAIN, 0.75),
    "ho_weight": (SUB_CHAIN, 0.75),
    "rest_weight": (EstimatorPlan(T, fo_steps=1, ho_length=1, rest_estimator="lr"), 0.75),
    "rest_weight of zeroth order": (ZEROTH, ZEROTH.zo_scale),
}
HARMLESS: dict[str, tuple[EstimatorPlan, Callable[[], Mutant]]] = {
    "starts drawn from another distribution than the plan's": (SUB_CHAIN, other_starts),
    "a baseline of no sense, as long as it is not the sample's own": (DDPO, lambda: score_with(lambda a, *rest: (a + 0.5, *rest))),
    "a prediction of no sense as control variate": (
        CONTROLLED,
        lambda: replaced(
            prediction_critic, lambda chain, params, *rest: prediction_critic(chain, params, lambda x: torch.sin(x).sum(1))
        ),
    ),
}


def problem_of(chosen: EstimatorPlan) -> LinearProblem:
    return LinearProblem.make(shared=False, stds=SILENT if chosen.silent_steps else None)


def measured(chosen: EstimatorPlan, advantage: str = "none", num_samples: int | None = None) -> Estimate:
    problem = problem_of(chosen)
    if advantage != "normalize":
        target = problem.target(chosen)
        return estimate(problem.chain, problem.reward, chosen, 21, target, num_samples, advantage=advantage)
    result = run(problem.chain, problem.reward, chosen, 21, advantage=advantage)
    spread = float(result.rewards.std(correction=0))
    return Estimate.of(result.per_sample, group_size(chosen, advantage)).times(spread)


@functools.cache
def accepted(chosen: EstimatorPlan, advantage: str = "none") -> tuple[Estimate, dict[str, torch.Tensor]]:
    """(estimate, exact gradient) of a right estimator, which the checker must accept."""
    target = problem_of(chosen).target(chosen)
    right = measured(chosen, advantage)
    assert_unbiased(right, target)
    return right, target


@pytest.mark.parametrize("name", MUTANTS)
def test_the_right_estimator_is_accepted_and_the_mutant_rejected(name):
    chosen, advantage, mutant = MUTANTS[name]
    right, target = accepted(chosen, advantage)
    with mutant():
        wrong = measured(chosen, advantage, right.num_samples)
    assert_biased(wrong, target)


@pytest.mark.parametrize("name", MISWEIGHTED)
def test_a_part_of_another_weight_is_rejected(name):
    chosen, weight = MISWEIGHTED[name]
    right, target = accepted(chosen)
    assert_biased(measured(dataclasses.replace(chosen, **{name.split()[0]: weight}), "none", right.num_samples), target)


@pytest.mark.parametrize("chosen", [FO_LR, SUB_CHAIN, ZEROTH, SUBSET, CONTROLLED], ids=str)
def test_nine_tenths_of_the_gradient_are_rejected(chosen):
    right, target = accepted(chosen)
    assert_biased(right.times(0.9), target)


@pytest.mark.parametrize("name", HARMLESS)
def test_what_only_looks_like_a_mistake_is_accepted(name):
    chosen, change = HARMLESS[name]
    with change():
        result = measured(chosen)
    assert_unbiased(result, LinearProblem.make(shared=False).target(chosen))


# ---- the checker itself ----


def test_too_few_samples_are_called_underpowered():
    problem = LinearProblem.make(shared=False)
    few = Estimate.of(run(problem.chain, problem.reward, DDPO, 1, 2**10).per_sample)
    with pytest.raises(Underpowered, match="could hide"):
        assert_unbiased(few, problem.gradient())


def test_a_gradient_of_zero_does_not_pass_for_want_of_noise():
    problem = LinearProblem.make(shared=False)
    nothing = {name: torch.zeros(8, *p.shape, dtype=p.dtype) for name, p in problem.chain.parameters().items()}
    with pytest.raises(Biased):
        assert_unbiased(Estimate.of(nothing), problem.gradient())


def test_a_nan_does_not_pass():
    samples = {"p": torch.randn(64, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)) * 1e-3 + 1}
    assert_unbiased(Estimate.of(samples), {"p": torch.ones(2)})
    samples["p"][3, 1] = float("nan")
    with pytest.raises(Biased, match="not finite"):
        assert_unbiased(Estimate.of(samples), {"p": torch.ones(2)})


def test_exact_and_constant_entries_count_as_equal():
    """A gradient that is zero by construction (a step that nothing covers) has no spread to compare with."""
    rows = torch.randn(2**12, 1, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * 0.1 + 1
    samples = {"p": torch.cat([rows, torch.zeros(2**12, 1, dtype=torch.float64)], 1)}
    assert_unbiased(Estimate.of(samples), {"p": torch.tensor([1.0, 0.0])})
    samples["p"][:, 1] = 1e-6
    with pytest.raises(Biased, match=r"p\[1\]"):
        assert_unbiased(Estimate.of(samples), {"p": torch.tensor([1.0, 0.0])})


def test_a_bias_of_the_detectable_size_is_seen_in_some_entry_whatever_its_direction():
    """The guarantee behind `detectable`, for random biases of twice that length (so that chance cannot hide them)."""
    generator = torch.Generator().manual_seed(2)
    exact = {"p": torch.ones(20, dtype=torch.float64)}
    spread = torch.linspace(0.2, 3.0, 20, dtype=torch.float64)
    samples = exact["p"] + spread * torch.randn(2**14, 20, generator=generator, dtype=torch.float64)
    estimate_ = Estimate.of({"p": samples})
    length = 2 * 5 * estimate_.standard_error.norm()
    for _ in range(100):
        bias = torch.randn(20, generator=generator, dtype=torch.float64)
        moved = dataclasses.replace(estimate_, mean=estimate_.mean + length * bias / bias.norm())
        assert_biased(moved, exact)
