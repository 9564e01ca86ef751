"""Formula (8) by hand, and the rule that picks K."""

import math

import pytest

from rlr_trainer.diagnosis.choice import choose_fo_steps, choose_ho_length

# T = 50, B_h = 8 GB, B_z = 0.24 GB: the paper's counts for Stable Diffusion 1.4
PAPER = {"num_steps": 50, "memory_ho": 8.0, "memory_zo": 0.24}


@pytest.mark.parametrize(
    ("budget", "std_ho", "std_zo", "expected"),
    [
        # memory: (24 - 0.24 * 49) / 7.76 = 1.58; noise: 50 * 10 / (2 * 9) - 1 = 26.8
        (24.0, 1.0, 10.0, 1),
        # (40 - 11.76) / 7.76 = 3.64
        (40.0, 1.0, 10.0, 3),
        # (80 - 11.76) / 7.76 = 8.79
        (80.0, 1.0, 10.0, 8),
        # memory allows 126; noise 26.8
        (1000.0, 1.0, 10.0, 26),
        # noise: 50 * 10 / (2 * 2) - 1 = 124, more than the chain has
        (1000.0, 8.0, 10.0, 50),
        # noise: 50 * 1e9 / (2 * 1e9) - 1 = 24: half of the chain when HO has next to no noise
        (1000.0, 1e-6, 1e9, 24),
    ],
)
def test_formula_8_by_hand(budget, std_ho, std_zo, expected):
    assert choose_ho_length(memory_budget=budget, std_ho=std_ho, std_zo=std_zo, **PAPER) == expected


def test_a_budget_of_exactly_h_steps_allows_h():
    # 0.1 * 3 in binary: (0.1 * 9 + 3 * 0.2 - 0.1 * 9) / 0.2 must be 3, not 2.999
    budget = 0.1 * 9 + 3 * (0.3 - 0.1)
    assert choose_ho_length(10, budget, 0.3, 0.1, 1.0, 1.2) == 3


def test_the_result_is_at_least_1_and_at_most_the_chain():
    assert choose_ho_length(50, 0.1, 8.0, 0.24, 1.0, 10.0) == 1  # not even one step fits
    assert choose_ho_length(1, 1e6, 8.0, 0.24, 1.0, 10.0) == 1
    assert choose_ho_length(4, 1e6, 8.0, 0.24, 9.9, 10.0) == 4


def test_a_half_order_step_that_is_no_quieter_is_not_worth_a_second():
    assert choose_ho_length(memory_budget=1e6, std_ho=10.0, std_zo=10.0, **PAPER) == 1
    assert choose_ho_length(memory_budget=1e6, std_ho=11.0, std_zo=10.0, **PAPER) == 1


def test_a_half_order_step_that_takes_no_more_memory_is_limited_by_noise_alone():
    # perturbing all weights of a large network may take more than one backward pass; noise: 10 * 10 / (2 * 9) - 1 = 4.6
    assert choose_ho_length(10, 1.0, 0.2, 0.5, 1.0, 10.0) == 4


@pytest.mark.parametrize("name", ["memory_budget", "memory_ho", "memory_zo", "std_ho", "std_zo"])
@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_numbers_that_cannot_be_are_named(name, value):
    good = {"memory_budget": 40.0, "memory_ho": 8.0, "memory_zo": 0.24, "std_ho": 1.0, "std_zo": 10.0}
    with pytest.raises(ValueError, match=name):
        choose_ho_length(50, **(good | {name: value}))


@pytest.mark.parametrize("steps", [0, -3, 2.5, True, "10"])
def test_a_number_of_steps_that_cannot_be_is_refused(steps):
    with pytest.raises(ValueError, match="num_steps"):
        choose_ho_length(steps, 40.0, 8.0, 0.24, 1.0, 10.0)


def test_k_is_where_the_variance_is_least():
    assert choose_fo_steps([100.0, 90.0, 20.0, 10.0, 30.0]) == 3
    assert choose_fo_steps([1.0, 2.0, 3.0]) == 0


def test_ties_go_to_the_smaller_k():
    assert choose_fo_steps([100.0, 10.9, 10.5, 10.0]) == 1
    assert choose_fo_steps([100.0, 10.9, 10.5, 10.0], tolerance=0.0) == 3
    assert choose_fo_steps([5.0, 5.0, 5.0]) == 0


def test_all_steps_only_if_that_measured_best_and_is_allowed():
    assert choose_fo_steps([9.0, 4.0, 1.0]) == 2
    assert choose_fo_steps([9.0, 4.0, 1.0], max_fo_steps=1) == 1
    assert choose_fo_steps([9.0, 1.0, 4.0]) == 1


def test_times_turn_variance_into_time_to_a_precision():
    assert choose_fo_steps([10.0, 8.0, 7.0], [1.0, 1.0, 2.0]) == 1
    assert choose_fo_steps([10.0, 8.0, 7.0], [1.0, 2.0, 3.0]) == 0


def test_a_k_that_cannot_be_is_passed_over():
    assert choose_fo_steps([math.inf, math.inf, 5.0, 6.0]) == 2
    with pytest.raises(ValueError, match="raise max_fo_steps"):
        choose_fo_steps([math.inf, math.inf, 5.0], max_fo_steps=1)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        ({"total_variance": [1.0]}, "T \\+ 1"),
        ({"total_variance": [1.0, math.nan]}, "variances are 0 or more"),
        ({"total_variance": [1.0, -1.0]}, "variances are 0 or more"),
        ({"total_variance": [1.0, 2.0], "seconds": [1.0]}, "seconds has 1"),
        ({"total_variance": [1.0, 2.0], "seconds": [1.0, 0.0]}, "positive"),
        ({"total_variance": [1.0, 2.0], "max_fo_steps": 2}, "max_fo_steps=2"),
        ({"total_variance": [1.0, 2.0], "tolerance": -0.1}, "tolerance"),
    ],
)
def test_wrong_input_is_named(arguments, match):
    with pytest.raises(ValueError, match=match):
        choose_fo_steps(**arguments)
