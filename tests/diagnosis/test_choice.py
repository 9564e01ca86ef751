"""Formula (8) by hand, the rule that picks K, and both on the bundled model."""

import math

import pytest

from rlr_trainer.diagnosis import auto_fo_steps, auto_ho_length, choice
from rlr_trainer.diagnosis.choice import choose_fo_steps, choose_ho_length
from rlr_trainer.digits.rewards import ink

# T = 50, B_h = 8 GB, B_z = 0.24 GB: the paper's counts for Stable Diffusion 1.4
PAPER = {"num_steps": 50, "memory_ho": 8.0, "memory_zo": 0.24}


@pytest.mark.parametrize(
    ("budget", "std_ho", "std_zo", "expected"),
    [
        # memory: (24 - 0.24 * 49) / 7.76 = 1.58; noise: 50 * 10 / (2 * 9) - 1 = 26.8
        (24.0, 1.0, 10.0, 1),
        # (40 - 11.76) / 7.76 = 3.64
        (40.0, 1.0, 10.0, 3),
        # memory allows 126; noise 26.8
        (1000.0, 1.0, 10.0, 26),
        # noise: 50 * 10 / (2 * 2) - 1 = 124, more than the chain has
        (1000.0, 8.0, 10.0, 50),
        # noise: 50 * 1e9 / (2 * 1e9) - 1 = 24: half of the chain when HO has next to no noise
        (1000.0, 1e-6, 1e9, 24),
        # not even one step fits
        (0.1, 1.0, 10.0, 1),
        # a half-order step that is no quieter is not worth a second
        (1e6, 10.0, 10.0, 1),
    ],
)
def test_formula_8_by_hand(budget, std_ho, std_zo, expected):
    assert choose_ho_length(memory_budget=budget, std_ho=std_ho, std_zo=std_zo, **PAPER) == expected


def test_a_budget_of_exactly_h_steps_allows_h():
    # 0.1 * 3 in binary: (0.1 * 9 + 3 * 0.2 - 0.1 * 9) / 0.2 must be 3, not 2.999
    assert choose_ho_length(10, 0.1 * 9 + 3 * (0.3 - 0.1), 0.3, 0.1, 1.0, 1.2) == 3


def test_a_half_order_step_that_takes_no_more_memory_is_limited_by_noise_alone():
    # perturbing all weights of a large network may take more than one backward pass; noise: 10 * 10 / (2 * 9) - 1 = 4.6
    assert choose_ho_length(10, 1.0, 0.2, 0.5, 1.0, 10.0) == 4


@pytest.mark.parametrize("value", [0.0, -1.0, math.nan, math.inf])
def test_numbers_that_cannot_be_are_named(value):
    with pytest.raises(ValueError, match=f"memory_budget={value}: must be a positive finite number"):
        choose_ho_length(50, value, 8.0, 0.24, 1.0, 10.0)


@pytest.mark.parametrize(
    ("variances", "max_fo_steps", "expected"),
    [
        ([100.0, 90.0, 20.0, 10.0, 30.0], 4, 3),
        ([100.0, 10.9, 10.5, 10.0], 3, 1),  # within a tenth of the least: the smallest K
        ([9.0, 4.0, 1.0], 2, 2),
        ([9.0, 4.0, 1.0], 1, 1),
        ([math.inf, math.inf, 5.0, 6.0], 2, 2),  # a K that cannot be
    ],
)
def test_k_is_where_the_variance_is_least(variances, max_fo_steps, expected):
    assert choose_fo_steps(variances, max_fo_steps) == expected


@pytest.mark.medium
def test_auto_choices_on_the_bundled_model(make_trainer, monkeypatch):
    given = []
    monkeypatch.setattr(choice, "choose_ho_length", lambda *numbers: given.append(numbers) or choose_ho_length(*numbers))
    trainer = make_trainer(reward_function=ink)
    fo_steps = auto_fo_steps(trainer, num_batches=3)
    assert 1 <= fo_steps <= 2  # the last step's likelihood ratio is by far the noisiest; half of the chain is 2
    assert 1 <= auto_ho_length(trainer, 1.0, fo_steps=fo_steps, num_batches=2) <= 4 - fo_steps
    (numbers,) = given
    assert numbers[:2] == (4, 1e9)  # the budget is in GB, as memory_budget_gb says
    assert numbers[2] > numbers[3] > 1  # a graph holds more than a step without one
    with pytest.raises(ValueError, match="a variance needs two"):
        auto_fo_steps(trainer, num_batches=1)


@pytest.mark.medium
def test_k_where_the_last_steps_add_no_noise_or_the_reward_has_no_gradient(make_trainer):
    def black_box(images, prompts, metadata):
        return images.detach().mean((1, 2, 3))

    assert auto_fo_steps(make_trainer(reward_function=black_box, estimator="ddpo"), num_batches=2) == 0
    assert auto_fo_steps(make_trainer(reward_function=ink, sample_eta=0.0, estimator="full_bp"), num_batches=2) == 4
    with pytest.raises(ValueError, match="sample_eta above 0"):
        auto_fo_steps(make_trainer(reward_function=black_box, sample_eta=0.0, estimator="es", zo_num_perturbations=2))
