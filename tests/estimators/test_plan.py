"""Plans cover every step once, draw what they promise, and refuse what cannot be with a message that helps."""

import dataclasses
import itertools
import math
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_problems import seeded, unbiased_plans

from rlr_trainer.estimators.plan import EstimatorPlan, PlanError
from rlr_trainer.estimators.plan_draw import PlanDraw, StartDistribution, inclusion_probabilities, inverse_inclusion_weights
from rlr_trainer.estimators.presets import PRESETS

QUICK = settings(max_examples=75, derandomize=True, deadline=None, database=None)
any_plan = st.integers(1, 7).flatmap(unbiased_plans)


# ---- what a draw covers ----


@QUICK
@given(any_plan, st.booleans(), st.integers(0, 10))
def test_each_step_of_each_sample_is_covered_exactly_once(plan, shared, seed):
    """First order, the sub-chain (pathwise inside, scored at its end) and the rest are disjoint and leave nothing out."""
    draw = plan.draw(5, seeded(seed), shared=shared)
    assert draw.pathwise.shape == (1 if shared else 5, plan.num_steps)
    for row in range(draw.pathwise.shape[0]):
        last_k = int(draw.first_order[row].sum())
        assert plan.fo_range[0] <= last_k <= plan.fo_range[1]
        assert draw.first_order[row].tolist() == [step >= plan.num_steps - last_k for step in range(plan.num_steps)]
        start = int(draw.start[row])
        covered = range(start, start + plan.ho_length) if plan.ho_length else range(0)
        assert (start >= 0) == bool(plan.ho_length)
        assert not covered or covered[-1] < plan.num_steps - last_k
        rest = [step for step in range(plan.num_steps - last_k) if step not in covered]
        scored = [step for step in rest if draw.score[row, step] != 0]
        for step in range(plan.num_steps):
            first_order = bool(draw.first_order[row, step])
            inside, end = step in covered and step != covered[-1], bool(covered) and step == covered[-1]
            assert bool(draw.pathwise[row, step]) == (first_order or inside)
            assert bool(draw.zeroth[row, step]) == (plan.rest_estimator == "zo" and step in rest)
            assert float(draw.prediction[row, step]) == 0
            if end:
                assert float(draw.score[row, step]) == plan.ho_weight
            elif step not in rest or plan.rest_estimator != "lr":
                assert float(draw.score[row, step]) == 0
        if plan.rest_estimator == "lr":
            wanted = len(rest) if plan.rest_num_steps is None else min(plan.rest_num_steps, len(rest))
            assert len(scored) == wanted
            assert all(draw.score[row, step] >= 1 - 1e-6 for step in scored)
            if plan.rest_num_steps is None:
                assert all(float(draw.score[row, step]) == 1 for step in rest)


def test_a_prediction_rest_has_the_weights_of_a_likelihood_ratio_rest():
    options = {"fo_steps": (0, 2), "rest_num_steps": 2, "rest_step_weights": (1.0, 2.0, 3.0, 4.0, 5.0), "rest_weight": 0.5}
    predicted, scored = (EstimatorPlan(5, rest_estimator=rest, **options).draw(9, seeded(1)) for rest in ("prediction", "lr"))
    assert torch.equal(predicted.prediction, scored.score) and scored.score.any()
    assert not predicted.score.any()


def test_weights_of_the_parts_are_in_the_draw():
    plan = EstimatorPlan(
        5, fo_steps=1, ho_length=2, ho_start_weights=(1.0, 0.0, 0.0), rest_estimator="lr", ho_weight=3.0, rest_weight=0.5
    )
    assert plan.draw(1).score.tolist() == [[0, 3.0, 0.5, 0.5, 0]]
    assert not dataclasses.replace(plan, ho_weight=0.0).draw(1).pathwise[:, :4].any()


def test_a_draw_is_reproducible_and_rows_can_be_picked_and_joined():
    plan = EstimatorPlan(6, fo_steps=(0, 3), rest_estimator="lr", rest_num_steps=2)
    names = [field.name for field in dataclasses.fields(PlanDraw)]
    first, again = plan.draw(8, seeded(3)), plan.draw(8, seeded(3))
    assert all(torch.equal(getattr(first, n), getattr(again, n)) for n in names)
    rows = torch.tensor([5, 0])
    joined = PlanDraw.concatenate([first.select(rows), again])
    assert joined.pathwise.shape[0] == 10
    assert all(torch.equal(getattr(joined, n)[:2], getattr(first, n)[rows]) for n in names)
    shared = plan.draw(8, seeded(3), shared=True)
    assert shared.select(rows) is shared
    assert all(getattr(shared.expand(8), n).shape[0] == 8 for n in names)
    assert first.active_steps() == [s for s in range(6) if (first.pathwise[:, s] | (first.score[:, s] != 0)).any()]


# ---- probabilities ----


def assert_frequencies(counts: torch.Tensor, probabilities: torch.Tensor, draws: int) -> None:
    """Counts of a binomial within 5 standard deviations, and exactly 0 or all where nothing else can be."""
    spread = (draws * probabilities * (1 - probabilities)).sqrt()
    assert ((counts - draws * probabilities).abs() <= 5 * spread + 1e-6).all(), (counts / draws, probabilities)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, [1 / 4] * 4),
        ({"ho_start": "grad_norm"}, [1 / 4] * 4),
        ({"ho_start": (1, 2)}, [0, 1 / 2, 1 / 2, 0]),
        ({"ho_start": [3, 3]}, [0, 0, 0, 1]),
        ({"ho_start_weights": (1.0, 0.0, 2.0, 1.0)}, [1 / 4, 0, 1 / 2, 1 / 4]),
        ({"ho_start_weights": [2, 1, 1, 0]}, [1 / 2, 1 / 4, 1 / 4, 0]),
        ({"ho_start_weights": torch.tensor([1.0, 1.0, 1.0, 5.0])}, [1 / 8, 1 / 8, 1 / 8, 5 / 8]),
    ],
    ids=str,
)
def test_starts_are_drawn_as_told(options, expected):
    plan = EstimatorPlan(6, fo_steps=1, ho_length=2, **options)
    assert plan.num_starts == 4
    assert plan.start_probabilities() == pytest.approx(expected)
    counts = torch.bincount(plan.draw(20_000, seeded(1)).start, minlength=4).double()
    assert_frequencies(counts, torch.tensor(expected, dtype=torch.float64), 20_000)
    given = plan.draw(20_000, seeded(1), start_probabilities=[0.1, 0.2, 0.3, 0.4])
    assert_frequencies(torch.bincount(given.start).double(), torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64), 20_000)


@pytest.mark.parametrize(
    ("pair", "as_range", "as_weights"), [((1, 1), [0.0, 1.0], [0.5, 0.5]), ((0, 1), [0.5, 0.5], [0.0, 1.0])], ids=str
)
def test_a_pair_is_a_range_or_two_weights_as_its_option_says(pair, as_range, as_weights):
    """Where there are two starts the numbers alone would not tell them apart."""
    for name, expected in (("ho_start", as_range), ("ho_start_weights", as_weights)):
        for plan in (EstimatorPlan(3, 1, 1, **{name: pair}), EstimatorPlan.from_preset("rlr", 3, fo_steps=1, **{name: list(pair)})):
            assert plan.start_probabilities() == expected


def test_a_random_k_is_uniform_on_its_range():
    draw = EstimatorPlan(6, fo_steps=(1, 4)).draw(20_000, seeded(1))
    counts = torch.bincount(draw.first_order.sum(1), minlength=7).double()
    assert_frequencies(counts, torch.tensor([0, 1, 1, 1, 1, 0, 0], dtype=torch.float64) / 4, 20_000)


@pytest.mark.parametrize(
    "weights", [None, (1.0, 1.0, 4.0, 1.0, 1.0), (1.0, 2.0, 3.0, 4.0, 5.0), (9.0, 1.0, 1.0, 1.0, 7.0)], ids=str
)
@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_inclusion_probabilities_are_those_that_the_weights_invert(count, weights):
    """Drawn `count` steps each time, each step as often as 1 over the weight that it gets."""
    draws = 20_000
    eligible = torch.ones(draws, 5, dtype=torch.bool)
    drawn = inverse_inclusion_weights(eligible, count, weights, seeded(2))
    assert ((drawn > 0).sum(1) == count).all()
    probability = inclusion_probabilities(eligible[:1], count, weights)[0]
    assert float(probability.sum()) == pytest.approx(count)
    for step in range(5):
        given_weights = drawn[drawn[:, step] > 0, step]
        assert torch.allclose(given_weights.double(), 1 / probability[step], rtol=1e-6)
    assert_frequencies((drawn > 0).sum(0).double(), probability, draws)


@QUICK
@given(st.lists(st.integers(1, 20), min_size=1, max_size=8), st.data())
def test_inclusion_probabilities_are_proportional_to_the_weights_up_to_one(weights, data):
    size = len(weights)
    eligible = data.draw(st.lists(st.booleans(), min_size=size, max_size=size))
    count = data.draw(st.integers(1, size))
    found = inclusion_probabilities(torch.tensor([eligible]), count, [float(w) for w in weights])[0].tolist()
    total = min(count, sum(eligible))
    assert sum(found) == pytest.approx(total)
    assert all(p == 0 for p, able in zip(found, eligible, strict=True) if not able)
    ratios = [p / w for p, w, able in zip(found, weights, eligible, strict=True) if able and p < 1 - 1e-9]
    assert all(r == pytest.approx(ratios[0]) for r in ratios)
    for p, w, able in zip(found, weights, eligible, strict=True):
        if able and p >= 1 - 1e-9 and ratios:  # certain, because its share would be more than 1
            assert w * ratios[0] >= 1 - 1e-6


def test_a_subset_of_a_long_chain_keeps_its_size():
    """Rounding in a long running sum must not lose or add a step."""
    weights = tuple(1 / (1 + step) for step in range(1000))
    plan = EstimatorPlan(1000, fo_steps=200, rest_estimator="lr", rest_num_steps=7, rest_step_weights=weights)
    assert ((plan.draw(2000, seeded(4)).score > 0).sum(1) == 7).all()


@pytest.mark.parametrize("offset", [1e-9, 0.5, 1 - 1e-9], ids=str)
@pytest.mark.parametrize("weights", [None, (0.1, 0.2, 0.3, 0.7, 0.7, 0.1, 0.1)], ids=str)
def test_no_offset_of_the_comb_loses_a_step_to_rounding(offset, weights, monkeypatch):
    """The running sum of probabilities such as 1/7 or 0.1 misses its whole number by a rounding; the comb must not notice."""
    monkeypatch.setattr(torch, "rand", lambda rows, columns, **options: torch.full((rows, columns), offset, dtype=torch.float64))
    for count in range(1, 8):
        for eligible in ([True] * 7, [True] * 5 + [False] * 2, [False] * 3 + [True] * 4):
            drawn = inverse_inclusion_weights(torch.tensor([eligible]), count, weights, None)
            assert int((drawn > 0).sum()) == min(count, sum(eligible))
            assert not drawn[0][~torch.tensor(eligible)].any()


# ---- start distribution of running norms ----


def test_the_start_distribution_is_a_softmax_of_running_norms_over_their_mean():
    distribution = StartDistribution(3, decay=0.5, temperature=2.0)
    assert distribution.probabilities() == pytest.approx([1 / 3] * 3)
    distribution.update(0, 4.0)
    distribution.update(0, 8.0)  # 0.5 * 4 + 0.5 * 8 = 6
    distribution.update(2, 2.0)
    logits = [6 / 4 / 2, 1 / 2, 2 / 4 / 2]  # the start that was never seen counts as the mean
    total = sum(math.exp(logit) for logit in logits)
    assert distribution.probabilities() == pytest.approx([math.exp(logit) / total for logit in logits])


def test_the_start_distribution_stays_uniform_on_norms_of_zero_and_survives_saving():
    distribution = StartDistribution(3)
    distribution.update(1, 0.0)
    assert distribution.probabilities() == [1 / 3] * 3
    distribution.update(2, 3.0)
    seen = distribution.probabilities()
    for overflowed in (math.inf, math.nan):  # an update of fp16 that the optimizer skips
        distribution.update(2, overflowed)
    assert distribution.probabilities() == seen
    copy = StartDistribution(3)
    copy.load_state_dict(distribution.state_dict())
    for each in (copy, distribution):
        each.update(2, 1.0)
    assert copy.probabilities() == distribution.probabilities()
    assert sum(copy.probabilities()) == pytest.approx(1)


# ---- presets ----


OF_STEPS = [name for name in PRESETS if "forward" not in PRESETS[name].plan(10)]  # the others: test_forward_process.py


@pytest.mark.parametrize("name", OF_STEPS)
def test_presets_fit_any_chain(name):
    for num_steps in (1, 2, 3, 10, 1000):
        draw = EstimatorPlan.from_preset(name, num_steps).draw(2, seeded(0))
        touched = draw.pathwise | (draw.score != 0) | (draw.prediction != 0) | draw.zeroth
        assert touched.shape == (2, num_steps)
        assert touched.all() or name in ("draft", "alignprop"), "every step has an estimator"


def test_presets_are_the_points_of_the_design_space_that_the_table_names():
    plans = {name: EstimatorPlan.from_preset(name, 10) for name in OF_STEPS}
    assert {name: (plan.fo_steps, plan.ho_length, plan.rest_estimator) for name, plan in plans.items()} == {
        "rlr": (3, 1, "lr"),
        "rlr_black_box": (0, 0, "lr"),
        "rlr_paper": (1, 2, "zo"),
        "ddpo": (0, 0, "lr"),
        "flow_grpo": (0, 0, "lr"),
        "mixgrpo": (0, 0, "lr"),
        "draft": (1, 0, "none"),
        "alignprop": ((1, 10), 0, "none"),
        "full_bp": (10, 0, "none"),
        "sqdf": (0, 0, "prediction"),
        "es": (0, 0, "zo"),
    }
    assert all(plan.fo_weight == plan.ho_weight == plan.rest_weight == 1 for plan in plans.values())


def test_options_replace_a_preset_s_own_and_none_leaves_it():
    plan = EstimatorPlan.from_preset("rlr", 10, fo_steps=2, ho_length=None, rest_num_steps=3, control_variate=True)
    assert (plan.fo_steps, plan.ho_length, plan.rest_num_steps, plan.control_variate) == (2, 1, 3, True)
    assert EstimatorPlan.from_preset("rlr_paper", 10, fo_steps=9).ho_length == 1, "a preset's sub-chain shrinks to what is left"
    assert EstimatorPlan.from_preset("rlr_paper", 10, fo_steps=10).ho_length == 0
    assert EstimatorPlan.from_preset("alignprop", 10, fo_steps=[2, 5]).fo_range == (2, 5)


def test_a_plan_is_a_value():
    """Equal, hashable and frozen, also when its options came as lists or tensors."""
    from_list = EstimatorPlan(6, ho_length=2, ho_start=[0, 2], rest_estimator="lr", rest_num_steps=1, rest_step_weights=[1.0] * 6)
    from_tuple = EstimatorPlan(6, ho_length=2, ho_start=(0, 2), rest_estimator="lr", rest_num_steps=1, rest_step_weights=(1.0,) * 6)
    assert from_list == from_tuple and hash(from_list) == hash(from_tuple)
    with pytest.raises(dataclasses.FrozenInstanceError):
        from_list.fo_steps = 1


# ---- what a plan says of itself ----


@pytest.mark.parametrize(
    ("plan", "differentiable", "prediction", "zeroth", "scored"),
    [
        (EstimatorPlan(4, fo_steps=4), True, False, False, []),
        (EstimatorPlan(4, rest_estimator="lr"), False, False, False, [0, 1, 2, 3]),
        (EstimatorPlan(4, rest_estimator="lr", control_variate=True), True, True, False, [0, 1, 2, 3]),
        (EstimatorPlan(4, rest_estimator="prediction"), True, True, False, []),
        (EstimatorPlan(4, rest_estimator="zo"), False, False, True, []),
        (EstimatorPlan(4, fo_steps=1, ho_length=2, rest_estimator="zo"), True, False, True, [1, 2]),
        (EstimatorPlan(4, fo_steps=1, ho_length=3, rest_estimator="zo"), True, False, False, [2]),
        (EstimatorPlan(4, fo_steps=1, ho_length=3, rest_estimator="lr"), True, False, False, [2]),
        (EstimatorPlan(5, fo_steps=1, ho_length=3, rest_estimator="lr"), True, False, False, [0, 2, 3]),
        (EstimatorPlan(4, ho_length=2, ho_start=(0, 1)), False, False, False, [1, 2]),
        (EstimatorPlan(4, fo_steps=1, ho_length=1, ho_start_weights=(0.0, 1.0, 0.0)), True, False, False, [1]),
        (EstimatorPlan(4, fo_steps=(1, 3), rest_estimator="lr"), True, False, False, [0, 1, 2]),
        (EstimatorPlan(4, fo_steps=(0, 0), rest_estimator="zo"), False, False, True, []),
    ],
    ids=str,
)
def test_what_a_plan_needs(plan, differentiable, prediction, zeroth, scored):
    assert plan.needs_differentiable_reward == differentiable
    assert plan.uses_prediction == prediction
    assert plan.uses_zeroth_order == zeroth
    assert plan.scored_steps() == scored


@QUICK
@given(any_plan, st.integers(0, 5))
def test_scored_steps_are_those_that_a_draw_can_score(plan, seed):
    draw = plan.draw(200, seeded(seed))
    seen = {step for step in range(plan.num_steps) if (draw.score[:, step] != 0).any()}
    assert seen <= set(plan.scored_steps())
    assert plan.uses_zeroth_order == bool(draw.zeroth.any())


def test_noise_is_asked_for_where_it_is_scored_and_nowhere_else():
    stds = [1.0, 0.5, 0.2, 0.0]
    EstimatorPlan(4, fo_steps=1, ho_length=2, rest_estimator="lr").on_noise(stds)
    for silent in ({"fo_steps": 4}, {"rest_estimator": "zo"}, {"rest_estimator": "prediction"}):
        EstimatorPlan(4, **silent).on_noise([0.0] * 4)
    EstimatorPlan(5, fo_steps=1, ho_length=2, ho_start_weights=(1.0, 0.0, 0.0)).on_noise([0.0, 1.0, 0.0, 0.0, 0.0])
    with pytest.raises(PlanError, match=r"step 3 of 4 adds no noise \(std = 0.0\).*sample_eta above 0.*fo_steps >= 1"):
        EstimatorPlan(4, rest_estimator="lr").on_noise(stds)
    with pytest.raises(PlanError, match="step 1 of 4 .*fo_steps >= 3"):
        EstimatorPlan(4, ho_length=2).on_noise([1.0, 0.0, 0.0, 0.0])
    with pytest.raises(PlanError, match="step 0"):
        EstimatorPlan(4, rest_estimator="lr").on_noise([float("nan")] * 4)


def test_steps_without_noise_are_left_out_where_that_is_asked_for():
    plan = EstimatorPlan.from_preset("ddpo", 5, silent_estimator="none", rest_num_steps=2).on_noise([1.0, 0.0, 0.5, 0.2, 0.0])
    assert (plan.scored_steps(), plan.silent_steps) == ([0, 2, 3], (1, 4))
    assert "steps 1, 4 without noise left out" in str(plan) and "silent_estimator='none'" in plan.biases()[0]
    score = plan.draw(3000, seeded(0)).score
    assert not score[:, [1, 4]].any() and ((score > 0).sum(1) == 2).all()
    torch.testing.assert_close(score.mean(0)[[0, 2, 3]], torch.ones(3), rtol=0, atol=0.1)  # 6 standard errors
    chain = EstimatorPlan(4, ho_length=2, rest_estimator="lr", silent_estimator="none").on_noise([1.0, 1.0, 0.0, 1.0])
    draw = chain.draw(300, seeded(1))
    silent = draw.start == 1  # the sub-chain 1, 2 would end at the silent step: nothing flows back through it
    assert silent.any() and not draw.pathwise[silent].any() and not draw.score[silent][:, 2].any()
    assert draw.score[silent][:, [0, 1, 3]].all()  # they are of the rest
    assert draw.pathwise[draw.start == 0][:, 0].all()
    with pytest.raises(PlanError, match="no step of the chain adds noise"):
        EstimatorPlan.from_preset("ddpo", 3, silent_estimator="none").on_noise([0.0] * 3)
    with pytest.raises(PlanError, match="silent_estimator='fo': must be 'none'"):
        EstimatorPlan.from_preset("ddpo", 3, silent_estimator="fo")


def test_segments_reach_back_from_a_step_with_noise():
    def draw(stds, **options):
        plan = EstimatorPlan(6, rest_estimator="lr", silent_estimator="ho", **options).on_noise(stds)
        return plan, plan.draw(200, seeded(0))

    plan, found = draw([0.0, 1.0, 0.0, 0.0, 1.0, 0.0], fo_steps=1)
    assert (found.score != 0).int()[0].tolist() == [0, 1, 0, 0, 1, 0]
    assert found.pathwise.int()[0].tolist() == [1, 0, 1, 1, 0, 1]
    assert plan.biases() == [] and "steps 0, 2, 3 without noise covered by half-order segments" in str(plan)
    _, found = draw([1.0, 0.0, 0.0, 1.0, 0.0, 0.0], fo_steps=1)  # what follows the last noise lengthens the first-order tail
    assert found.pathwise.int()[0].tolist() == [0, 1, 1, 0, 1, 1]
    _, found = draw([0.0, 1.0, 0.0, 1.0, 0.0, 1.0], rest_num_steps=1)  # a segment is visited with the step at its end
    first = found.score[:, 1] != 0
    assert first.any() and not first.all()
    assert torch.equal(found.pathwise[:, 0], first) and torch.equal(found.pathwise[:, 2], found.score[:, 3] != 0)
    _, found = draw([0.0, 1.0, 1.0, 0.0, 1.0, 1.0], ho_length=2, ho_start=(1, 1))
    assert found.pathwise.int()[0].tolist() == [1, 1, 0, 1, 0, 0]  # 0 reaches into the sub-chain 1, 2
    with pytest.raises(PlanError, match="the last step, 5, adds no noise.*fo_steps to 1 or more"):
        draw([1.0, 1.0, 1.0, 1.0, 1.0, 0.0])
    with pytest.raises(PlanError, match="silent_estimator='ho': segments end at likelihood-ratio steps, but rest_estimator='zo'"):
        EstimatorPlan(4, fo_steps=1, rest_estimator="zo", silent_estimator="ho")


@pytest.mark.parametrize(
    ("plan", "reasons"),
    [
        (EstimatorPlan(4, fo_steps=4), []),
        (EstimatorPlan(4, rest_estimator="lr"), []),
        (EstimatorPlan(4, fo_steps=1, ho_length=2, rest_estimator="lr", rest_num_steps=1, control_variate=True), []),
        (EstimatorPlan(4, ho_length=4), []),
        (EstimatorPlan(4, fo_steps=(1, 4)), ["leaves 3 of 4 steps"]),
        (EstimatorPlan(4, fo_steps=1, ho_length=2), ["leaves 1 of 4 steps"]),
        (EstimatorPlan(4, rest_estimator="prediction"), ["one-step prediction"]),
        (EstimatorPlan(4, rest_estimator="zo", zo_scale=0.25), ["zo_scale=0.25"]),
        (EstimatorPlan(4, fo_steps=4, fo_weight=0.5, ho_weight=2.0, rest_weight=2.0), ["fo_weight=0.5"]),
        (
            EstimatorPlan(4, fo_steps=1, ho_length=1, rest_estimator="zo", fo_weight=2.0, ho_weight=0.0, rest_weight=0.1),
            ["zo_scale", "fo_weight=2", "ho_weight=0", "rest_weight=0.1"],
        ),
    ],
    ids=str,
)
def test_the_reasons_for_a_bias_are_named(plan, reasons):
    found = plan.biases()
    assert len(found) == len(reasons), found
    for text, part in zip(found, reasons, strict=True):
        assert part in text


# ---- refusals: option, value, rule and the way out ----

ONES = (1.0,) * 4
SUB_CHAIN, LR, ONE_STEP = {"ho_length": 1}, {"rest_estimator": "lr"}, {"rest_estimator": "lr", "rest_num_steps": 1}
# (other options of a plan of 4 steps, option, values, what the message says after "option=value: ")
REFUSED = [
    ({}, "num_steps", [0, -1, 4.0, None], "must be a whole number: a chain has at least one step"),
    ({}, "fo_steps", [2.0, math.nan, True, (1, 2, 3), (0.5, 2), "3"], "K must be a whole number, or a pair (low, high)"),
    ({}, "fo_steps", [5, -1, (3, 2), (0, 5)], "K must lie between 0 and the number of steps, 4; .*low <= high"),
    (SUB_CHAIN, "fo_steps", [(1, 2)], "a random K needs ho_length=0, but it is 1"),
    ({"fo_steps": 2}, "ho_length", [3, -1, 2.0, None], "h must be a whole number .* = 4 - 2 = 2; shorten it or lower fo_steps"),
    (SUB_CHAIN, "ho_start", ["late", (0.5, 2), (1, 1, 1), (), 2], "must be .*[first, last].*weights.*ho_start_weights"),
    (SUB_CHAIN, "ho_start", [(2, 1), (0, 4), (-1, 2)], "starts lie within 0..3, .*num_steps=4, fo_steps=0, ho_length=1"),
    ({}, "ho_start", [(0, 1)], "has no effect without a sub-chain; set ho_length to at least 1"),
    ({}, "ho_start_weights", [ONES], "has no effect without a sub-chain; set ho_length to at least 1"),
    (SUB_CHAIN, "ho_start_weights", [ONES[1:], (), 1.0, "1"], "must be .*per admissible start, 4 of them .*a range is ho_start"),
    (SUB_CHAIN, "ho_start_weights", [(*ONES[1:], w) for w in (-1.0, math.inf, math.nan)], "must be one non-negative number"),
    (SUB_CHAIN, "ho_start_weights", [(0.0,) * 4], "must be .*not all 0"),
    (SUB_CHAIN | {"ho_start_weights": ONES}, "ho_start", ["grad_norm", (0, 1)], "ho_start_weights is set.*leave one of them unset"),
    ({}, "rest_estimator", ["ppo"], "must be one of ('lr', 'zo', 'prediction', 'none')"),
    ({}, "rest_num_steps", [1], "has no effect with rest_estimator='none'; use 'lr'"),
    ({"rest_estimator": "zo"}, "rest_step_weights", [ONES], "has no effect with rest_estimator='zo'; use 'lr'"),
    (
        LR | {"fo_steps": 2},
        "rest_num_steps",
        [0, 3, 1.5],
        "must lie between 1 and the number of remaining steps, 2; unset visits all",
    ),
    (LR, "rest_step_weights", [ONES], "has no effect when every step is visited; set rest_num_steps"),
    (
        ONE_STEP,
        "rest_step_weights",
        [ONES[1:], (*ONES[1:], 0.0), (*ONES[1:], math.inf)],
        "must be one positive finite weight per step, 4",
    ),
    ({"fo_steps": 2}, "control_variate", [True], "no step has a likelihood ratio; use rest_estimator='lr'"),
    ({}, "fo_weight", [math.nan], "must be a finite number (1 is the gradient)"),
    ({}, "ho_weight", [math.inf], "must be a finite number"),
    ({}, "rest_weight", [-math.inf], "must be a finite number"),
    ({}, "zo_scale", [0.0, -1.0, math.inf, math.nan], "the perturbation scale must be a positive number, for instance 0.01"),
    ({}, "zo_num_perturbations", [2.5, 0], "must be a whole number, at least 1 per batch"),
]


def as_pattern(text: str) -> str:
    """The text itself, with `.*` standing for anything."""
    return ".*".join(re.escape(part) for part in text.split(".*"))


@pytest.mark.parametrize(("options", "name", "values", "rule"), REFUSED, ids=[f"{row[1]}{row[3][:30]}" for row in REFUSED])
def test_what_cannot_be_is_refused(options, name, values, rule):
    for value in values:
        with pytest.raises(PlanError, match="^" + as_pattern(f"{name}={value!r}: {rule}")):
            EstimatorPlan(**{"num_steps": 4, **options, name: value})


def test_presets_refuse_unknown_names_and_options():
    with pytest.raises(PlanError, match=r"estimator='ppo': unknown; choose one of rlr, rlr_black_box, rlr_paper"):
        EstimatorPlan.from_preset("ppo", 4)
    with pytest.raises(PlanError, match=r"unknown plan option fo_step; the options are .*fo_steps"):
        EstimatorPlan.from_preset("rlr", 4, fo_step=2)
    with pytest.raises(PlanError, match="num_steps=0: must be a whole number"):
        EstimatorPlan.from_preset("rlr", 0)
    with pytest.raises(PlanError, match="ho_length=4"):
        EstimatorPlan.from_preset("rlr", 4, ho_length=4)
    with pytest.raises(PlanError, match="fo_steps='3': K must be a whole number"):
        EstimatorPlan.from_preset("rlr", 4, fo_steps="3")
    with pytest.raises(PlanError, match="estimates no step: set fo_steps, ho_length or rest_estimator"):
        EstimatorPlan.from_preset("draft", 4, fo_steps=0)


def test_every_plan_that_is_accepted_can_be_drawn():
    """All combinations of a small chain: whatever passes the checks also works."""
    accepted = 0
    lengths = itertools.product([0, 1, 2, (0, 2)], [0, 1, 2], ["none", "lr", "zo", "prediction"], [None, 1, 2], [False, True])
    for fo_steps, ho_length, rest, count, control in lengths:
        try:
            plan = EstimatorPlan(3, fo_steps, ho_length, rest_estimator=rest, rest_num_steps=count, control_variate=control)
        except PlanError:
            continue
        accepted += 1
        for shared in (False, True):
            draw = plan.draw(3, seeded(0), shared=shared)
            assert torch.isfinite(draw.score).all() and torch.isfinite(draw.prediction).all()
        plan.biases()
        plan.scored_steps()
    assert accepted > 50
