"""The claims about variance, as ratios with a standard error over blocks: each holds by at least five of them.

The chain has the shape of a real one: its noise falls along the way. Where a claim turns around under another condition, the
turned claim stands beside it.
"""

import itertools
import math

import pytest
import torch
from statistics_helpers import LIMIT, Ratio, flatten, variance_ratio
from toy_problems import LinearProblem, OffsetChain, group_size, run, seeded

from rlr_trainer.estimators.plan import EstimatorPlan

T = 6
NUM_SAMPLES = 2**16
FALLING = torch.linspace(1.0, 0.2, T).tolist()
RISING = FALLING[::-1]


def compared(
    problem: LinearProblem, plan: EstimatorPlan, other: EstimatorPlan, reward=None, advantages: tuple[str, str] = ("none", "none")
) -> Ratio:
    """Variance of `plan` over that of `other`."""
    samples, groups = [], []
    for number, (chosen, advantage) in enumerate(zip((plan, other), advantages, strict=True)):
        result = run(problem.chain, reward or problem.reward, chosen, 40 + number, NUM_SAMPLES, advantage=advantage)
        samples.append(result.per_sample)
        groups.append(group_size(chosen, advantage))
    return variance_ratio(*samples, groups=tuple(groups))


def likelihood_ratios(fo_steps: int = 0, ho_length: int = 0, **options) -> EstimatorPlan:
    return EstimatorPlan(T, fo_steps=fo_steps, ho_length=ho_length, rest_estimator="lr", **options)


# ---- length of the sub-chain ----


def test_longer_sub_chains_have_more_variance_where_the_noise_falls():
    """Only the last of h noises is scored, by 1 / std of the smallest, and h Jacobians add up in shared parameters."""
    problem = LinearProblem.make(shared=True, num_steps=T, stds=FALLING)
    for shorter, longer in itertools.pairwise([1, 2, 4, T]):
        compared(problem, likelihood_ratios(ho_length=longer), likelihood_ratios(ho_length=shorter)).assert_above(1.0)
    own = LinearProblem.make(
        shared=False, num_steps=T, stds=FALLING
    )  # where no Jacobians add up, the whole chain against single steps
    compared(own, likelihood_ratios(ho_length=T), likelihood_ratios()).assert_above(1.0)


def test_longer_sub_chains_have_less_variance_where_the_noise_rises():
    """The share of step t costs 1 / std_t^2 when its own noise is scored, |J|^2 / std_end^2 when the last one is."""
    for shared in (False, True):
        problem = LinearProblem.make(shared, num_steps=T, stds=RISING)
        compared(problem, likelihood_ratios(ho_length=T), likelihood_ratios()).assert_below(1.0)


# ---- first order at the low-noise end ----


def test_first_order_at_the_low_noise_end_cuts_the_variance_of_likelihood_ratios():
    """More than its share of the steps: the first of 6 steps removes half of it."""
    problem = LinearProblem.make(shared=True, num_steps=T, stds=FALLING)
    compared(problem, likelihood_ratios(1), likelihood_ratios()).assert_below(0.6)
    compared(problem, likelihood_ratios(2), likelihood_ratios(1)).assert_below(0.7)
    compared(problem, EstimatorPlan(T, fo_steps=T), likelihood_ratios(2)).assert_below(0.2)


def test_the_variance_of_a_step_s_likelihood_ratio_grows_as_one_over_its_noise_squared():
    """Of the first step's share, while the later noise keeps the reward's spread as it is."""
    variances = []
    for std in (0.05, 0.1):
        problem = LinearProblem.make(shared=False, num_steps=2, stds=[std, 1.0])
        samples = run(problem.chain, problem.reward, EstimatorPlan(2, fo_steps=1, rest_estimator="lr"), 42, NUM_SAMPLES).per_sample
        variances.append(flatten({name: samples[name] for name in ("matrix.0", "bias.0")}))
    ratio = variance_ratio(*variances)
    assert abs(ratio.value - 4) < LIMIT * ratio.error + 0.1  # the share of this noise in the reward's own spread
    assert LIMIT * ratio.error < 1


# ---- baselines and control variates ----


def test_the_control_variate_reduces_variance():
    problem = LinearProblem.make(shared=True, num_steps=T, stds=FALLING)
    compared(problem, likelihood_ratios(control_variate=True), likelihood_ratios()).assert_below(0.6)
    compared(problem, likelihood_ratios(2, control_variate=True), likelihood_ratios(2)).assert_below(1.0)


@pytest.mark.parametrize(
    "plan",
    [likelihood_ratios(), likelihood_ratios(1, 2), EstimatorPlan(T, rest_estimator="zo", zo_scale=0.3, zo_antithetic=False)],
    ids=["likelihood ratio", "sub-chain", "zeroth order"],
)
def test_leave_one_out_pays_for_rewards_with_a_large_mean(plan):
    """A reward moved by 10 standard deviations; a baseline of even 3 others takes all but a part of that away."""
    problem = LinearProblem.make(shared=True, num_steps=T, stds=FALLING)
    spread = float(run(problem.chain, problem.reward, plan, 1, 2**12).rewards.std())
    moved = lambda x: problem.reward(x) + 10 * spread  # noqa: E731
    compared(problem, plan, plan, moved, ("leave_one_out", "none")).assert_below(0.2)


# ---- zeroth order ----


class Overparametrized(OffsetChain):
    """The same chain with every parameter the sum of `copies` parameters over sqrt(copies).

    The same Gaussian perturbation of the chain and the same length of the gradient, whatever `copies` is: only the number of
    trainable parameters differs.
    """

    def __init__(self, copies: int, **options) -> None:
        super().__init__(2, 2, **options)
        self.copies = copies
        self._parameters = {name: torch.stack([p / math.sqrt(copies)] * copies) for name, p in super().parameters().items()}

    def transition(self, step, x, params):
        return super().transition(step, x, {name: p.sum(0) / math.sqrt(self.copies) for name, p in params.items()})


def variance_with(copies: int, plan: EstimatorPlan) -> torch.Tensor:
    chain = Overparametrized(copies, stds=[0.6, 0.3], seed=3)
    reward = LinearProblem.make(shared=False).reward
    return flatten(run(chain, reward, plan, 43 + copies, 2**14).per_sample, group_size(plan))


def test_zeroth_order_pays_for_every_parameter():
    """Eight times as many trainable parameters for the same chain: eight times the variance, of the same gradient."""
    plan = EstimatorPlan(2, rest_estimator="zo", zo_scale=0.2, zo_antithetic=False)
    ratio = variance_ratio(variance_with(8, plan), variance_with(1, plan))
    ratio.assert_above(6.0)
    ratio.assert_below(10.0)


@pytest.mark.parametrize(
    "plan", [EstimatorPlan(2, rest_estimator="lr"), EstimatorPlan(2, fo_steps=2)], ids=["likelihood ratio", "first order"]
)
def test_the_others_pay_nothing_for_more_parameters(plan):
    ratio = variance_ratio(variance_with(8, plan), variance_with(1, plan))
    ratio.assert_above(0.7)
    ratio.assert_below(1.4)


def test_antithetic_perturbations_reduce_variance():
    """Per sample drawn, and the more the smaller the scale: the reward's own size cancels within a pair."""
    problem = LinearProblem.make(shared=False, num_steps=T, stds=FALLING)
    for scale, bound in ((0.1, 0.3), (0.01, 0.01)):
        both, single = (EstimatorPlan(T, rest_estimator="zo", zo_scale=scale, zo_antithetic=a) for a in (True, False))
        compared(problem, both, single).assert_below(bound)


def test_zeroth_order_has_more_variance_than_a_sub_chain_over_the_same_steps():
    """The comparison that the paper makes: FO(1) + HO(2) + rest, the rest by zeroth order or by likelihood ratios."""
    problem = LinearProblem.make(shared=False, num_steps=T, stds=FALLING)
    zeroth = EstimatorPlan(T, fo_steps=1, ho_length=2, rest_estimator="zo", zo_scale=0.05)
    compared(problem, zeroth, likelihood_ratios(1, 2)).assert_above(1.5)


def test_a_subset_of_steps_costs_variance_and_weights_that_fit_cost_less():
    problem = LinearProblem.make(shared=False, num_steps=T, stds=FALLING)
    one = likelihood_ratios(rest_num_steps=1)
    compared(problem, one, likelihood_ratios()).assert_above(1.5)
    aimed = likelihood_ratios(rest_num_steps=1, rest_step_weights=tuple(1 / std for std in FALLING))
    compared(problem, aimed, one).assert_below(1.0)


# ---- the ratio itself ----


def test_the_ratio_and_its_error_are_right_for_known_variances():
    """Rows of variance 3 and 2: 1.5 within its error, which is that of two chi-squared variables."""
    inside = 0
    for seed in range(40):
        g = seeded(seed)
        rows = [scale * torch.randn(2**12, 5, generator=g, dtype=torch.float64) for scale in (3**0.5, 2**0.5)]
        ratio = variance_ratio(*rows)
        expected_error = 1.5 * math.sqrt(2 * 2 / (5 * 2**12))
        assert 0.6 < ratio.error / expected_error < 1.6
        inside += abs(ratio.value - 1.5) < 2 * ratio.error
    assert inside >= 32  # 38 expected; fewer than 32 once in 40,000 runs
