"""Each known mistake is rejected by the checker that accepts the right estimator, with the same plan and the same samples.

A mutant is a context manager that breaks one place of the library. Beside it stand changes that look like mistakes and are none:
the checker must not reject those.
"""

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Iterator

import pytest
import torch
from statistics_helpers import Biased, Estimate, Underpowered, assert_biased, assert_unbiased
from toy_problems import BATCH, NUM_STEPS, LinearProblem, estimate, group_size, run

import rlr_trainer.estimators.plan as plan_module
from rlr_trainer.estimators import Sweep, sweep
from rlr_trainer.estimators.advantages import ADVANTAGES, Advantages
from rlr_trainer.estimators.chain import predict_clean
from rlr_trainer.estimators.plan import EstimatorPlan
from rlr_trainer.estimators.plan_draw import PlanDraw

gradient_module = sys.modules["rlr_trainer.estimators.gradient"]
T = NUM_STEPS


@contextlib.contextmanager
def replaced(owner: object, name: str, make: Callable) -> Iterator[None]:
    """`owner.name` becomes `make(what it was)`; works for dictionary entries as well."""
    with pytest.MonkeyPatch.context() as patch:
        if isinstance(owner, dict):
            patch.setitem(owner, name, make(owner[name]))
        else:
            patch.setattr(owner, name, make(getattr(owner, name)))
        yield


def mutant_draw(change: Callable[[PlanDraw], dict]):
    """Changes the masks and weights of every draw."""

    def make(real):
        def draw(self, *args, **options):
            result = real(self, *args, **options)
            return dataclasses.replace(result, **change(result))

        return draw

    return replaced(EstimatorPlan, "draw", make)


def column_zeroed(values: torch.Tensor, step: int) -> torch.Tensor:
    values = values.clone()
    values[:, step] = 0
    return values


def mutant_score(change: Callable):
    """Changes the arguments of `likelihood_ratio`: (advantage, x_next, mean, std, old_mean, old_std)."""
    return replaced(sweep, "likelihood_ratio", lambda real: lambda *args, **options: real(*change(*args), **options))


class CutChain:
    """A chain whose steps hide from autograd where their input came from: no adjoint ever arrives."""

    def __init__(self, chain) -> None:
        self.chain, self.num_steps = chain, chain.num_steps
        self.parameters, self.initial, self.predict_clean = chain.parameters, chain.initial, chain.predict_clean

    def transition(self, step, x, params):
        return self.chain.transition(step, x.detach() + 0 * x, params)


def cut_path():
    return replaced(gradient_module, "PerSampleChain", lambda real: lambda chain: real(CutChain(chain)))


def own_reward_in_baseline():
    """The mean of the whole batch; in the control variate's centre too, which is cut into batches by the same function."""

    def mean_of_batch(rewards, groups, blocks):
        means = rewards.reshape(-1, BATCH).mean(1).repeat_interleave(BATCH)
        return Advantages(rewards - means, torch.ones_like(rewards))

    return replaced(sys.modules["toy_problems"], "leave_one_out", lambda real: mean_of_batch)


def partner_in_baseline():
    """A baseline that leaves out the sample, but not the one that shares its noise and its direction."""
    return replaced(
        sys.modules["toy_problems"], "leave_one_out", lambda real: lambda rewards, groups, blocks: real(rewards, groups, None)
    )


def critic_through_parameters():
    """c is differentiated through the parameters of the prediction as well as through its input."""

    def make(real):
        def surrogate(self, step, mean, std, predicted, rollout, draw, feedback, result):
            total = real(self, step, mean, std, predicted, rollout, draw, feedback, result)
            clean = predict_clean(self.chain, step + 1, rollout.latents[step + 1], self.params)
            return total + (draw.score[:, step].to(mean) * feedback.scale * REWARDS[0](clean)).sum()

        return surrogate

    return replaced(Sweep, "_local_surrogate", make)


REWARDS: list[Callable] = []  # the reward of the running test, for the mutant above


def scaled(**options) -> EstimatorPlan:
    return EstimatorPlan(T, **options)


FO_LR = scaled(fo_steps=2, rest_estimator="lr")
SUB_CHAIN = scaled(fo_steps=1, ho_length=2, rest_estimator="lr")
ZEROTH = scaled(fo_steps=1, ho_length=2, rest_estimator="zo", zo_scale=0.1)
SUBSET = scaled(rest_estimator="lr", rest_num_steps=2, rest_step_weights=(1.0, 2.0, 1.0, 4.0))
CONTROLLED = scaled(fo_steps=1, rest_estimator="lr", control_variate=True)

# name -> (plan, advantage, mutant)
MUTANTS = {
    "the first step is dropped": (
        FO_LR,
        "none",
        lambda: mutant_draw(lambda d: {"score": column_zeroed(d.score, 0)}),
    ),
    "the earliest first-order step is dropped": (
        FO_LR,
        "none",
        lambda: mutant_draw(lambda d: {"pathwise": column_zeroed(d.pathwise, T - 2)}),
    ),
    "zeroth order forgets a step that it perturbed": (
        ZEROTH,
        "none",
        lambda: replaced(
            gradient_module._PerSampleZerothOrder,
            "step_function",
            lambda real: lambda self, step, x: _unrecorded(real, self, step, x),
        ),
    ),
    "a step is covered twice": (
        SUB_CHAIN,
        "none",
        lambda: mutant_draw(lambda d: {"score": torch.where(d.pathwise & ~d.first_order, 1.0, d.score)}),
    ),
    "likelihood ratio on a first-order step too": (
        FO_LR,
        "none",
        lambda: mutant_draw(lambda d: {"score": torch.where(d.first_order, 1.0, d.score)}),
    ),
    "the path through the sub-chain is cut": (scaled(ho_length=2, rest_estimator="lr"), "none", cut_path),
    "the first-order adjoint is cut": (FO_LR, "none", cut_path),
    "the path through the whole chain is cut": (EstimatorPlan.from_preset("full_bp", T), "none", cut_path),
    "score divided by std instead of its square": (
        SUB_CHAIN,
        "none",
        lambda: mutant_score(lambda a, x, m, s, om, os: (a, x, m, s.sqrt(), om, os.sqrt())),
    ),
    "score divided by the fourth power of std": (
        SUB_CHAIN,
        "none",
        lambda: mutant_score(lambda a, x, m, s, om, os: (a, x, m, s**2, om, os**2)),
    ),
    "the sign of the score": (SUB_CHAIN, "none", lambda: mutant_score(lambda a, *rest: (-a, *rest))),
    "the sign of the perturbation": (
        ZEROTH,
        "none",
        lambda: replaced(
            gradient_module._PerSampleZerothOrder, "gradient", lambda real: lambda self, advantage: real(self, -advantage)
        ),
    ),
    "zeroth order not divided by its scale": (
        ZEROTH,
        "none",
        lambda: replaced(
            gradient_module._PerSampleZerothOrder,
            "gradient",
            lambda real: lambda self, advantage: real(self, advantage * self.plan.zo_scale),
        ),
    ),
    "the sign of the reward's gradient": (
        FO_LR,
        "none",
        lambda: replaced(gradient_module, "reward_and_gradient", lambda real: lambda *args: _negated_gradient(real(*args))),
    ),
    "inclusion probabilities forgotten": (
        SUBSET,
        "none",
        lambda: replaced(
            plan_module,
            "inverse_inclusion_weights",
            lambda real: lambda *args: (real(*args) > 0).float() * 2,  # T / count
        ),
    ),
    "the baseline contains the sample": (EstimatorPlan.from_preset("ddpo", T), "leave_one_out", own_reward_in_baseline),
    "the baseline of a zeroth-order sample contains its partner": (ZEROTH, "leave_one_out", partner_in_baseline),
    "first order not divided by the rewards' std": (
        FO_LR,
        "normalize",
        lambda: replaced(
            ADVANTAGES, "normalize", lambda real: lambda *args: dataclasses.replace(real(*args), scale=torch.ones_like(args[0]))
        ),
    ),
    "the control variate is not added back": (
        CONTROLLED,
        "none",
        lambda: replaced(sweep, "prediction_pathwise", lambda real: lambda g, *args: real(0 * g, *args)),
    ),
    "the control variate is added back without being subtracted": (
        CONTROLLED,
        "none",
        lambda: replaced(sweep, "control_variate", lambda real: lambda advantage, *args: advantage),
    ),
    "the control variate is differentiated through the parameters": (CONTROLLED, "none", critic_through_parameters),
    "the centre of the control variate contains the sample": (
        CONTROLLED,
        "none",
        own_reward_in_baseline,
    ),
}


def _unrecorded(real, self, step, x):
    """Perturbs as before, but keeps no record of what step 0 got."""
    if step != 0:
        return real(self, step, x)
    before = {name: total.clone() for name, total in self.sums.items()}
    result = real(self, step, x)
    self.sums = before
    return result


def _negated_gradient(values_and_gradient):
    values, gradient = values_and_gradient
    return values, -gradient


def measured(chosen: EstimatorPlan, advantage: str, target, num_samples: int | None = None) -> Estimate:
    problem = LinearProblem.make(shared=False)
    REWARDS[:] = [problem.reward]
    if advantage != "normalize":
        return estimate(problem.chain, problem.reward, chosen, 21, target, num_samples, advantage=advantage)
    result = run(problem.chain, problem.reward, chosen, 21, advantage=advantage)
    spread = float(result.rewards.std(correction=0))
    return Estimate.of(result.per_sample, group_size(chosen, advantage)).times(spread)


@pytest.mark.parametrize("name", MUTANTS)
def test_the_right_estimator_is_accepted_and_the_mutant_rejected(name):
    chosen, advantage, mutant = MUTANTS[name]
    target = LinearProblem.make(shared=False).target(chosen)
    right = measured(chosen, advantage, target)
    assert_unbiased(right, target)
    with mutant():
        wrong = measured(chosen, advantage, target, right.num_samples)
    assert_biased(wrong, target)


@pytest.mark.parametrize(
    "chosen", [FO_LR, SUB_CHAIN, ZEROTH, SUBSET, CONTROLLED], ids=lambda p: f"K{p.fo_steps}h{p.ho_length}{p.rest_estimator}"
)
def test_nine_tenths_of_the_gradient_are_rejected(chosen):
    target = LinearProblem.make(shared=False).target(chosen)
    right = measured(chosen, "none", target)
    assert_unbiased(right, target)
    assert_biased(right.times(0.9), target)


@pytest.mark.parametrize("weight", ["fo_weight", "ho_weight", "rest_weight"])
def test_a_part_at_three_quarters_of_its_weight_is_rejected(weight):
    chosen = scaled(fo_steps=1, ho_length=1, rest_estimator="lr")
    target = LinearProblem.make(shared=False).target(chosen)
    assert_unbiased(measured(chosen, "none", target), target)
    assert_biased(measured(dataclasses.replace(chosen, **{weight: 0.75}), "none", target), target)


HARMLESS = {
    "starts drawn from another distribution than the plan's": (
        SUB_CHAIN,
        lambda: replaced(EstimatorPlan, "start_probabilities", lambda real: lambda self: [0.9, 0.1]),
    ),
    "a baseline of no sense, as long as it is not the sample's own": (
        EstimatorPlan.from_preset("ddpo", T),
        lambda: mutant_score(lambda a, *rest: (a + 0.5, *rest)),
    ),
    "a prediction of no sense as control variate": (
        CONTROLLED,
        lambda: replaced(
            gradient_module,
            "prediction_critic",
            lambda real: lambda chain, params, reward: real(chain, params, lambda x: torch.sin(x).sum(1)),
        ),
    ),
}


@pytest.mark.parametrize("name", HARMLESS)
def test_what_only_looks_like_a_mistake_is_accepted(name):
    chosen, change = HARMLESS[name]
    target = LinearProblem.make(shared=False).target(chosen)
    with change():
        result = measured(chosen, "none", target)
    assert_unbiased(result, target)


# ---- the checker itself ----


def test_too_few_samples_are_called_underpowered():
    problem = LinearProblem.make(shared=False)
    chosen = EstimatorPlan.from_preset("ddpo", T)
    few = Estimate.of(run(problem.chain, problem.reward, chosen, 1, 2**10).per_sample)
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
