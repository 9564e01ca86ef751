"""Noise windows that change from rollout to rollout."""

from collections import Counter

import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler

from rlr_trainer.estimators.chain import seeded_generator
from rlr_trainer.rollouts.batches import WINDOW
from rlr_trainer.schedules import NoiseWindows, SamplerOptions, make_schedule, window_positions


@pytest.mark.parametrize(
    ("arguments", "positions"),
    [
        ((3, 0, 4), [(0, 2), (1, 3), (2, 4)]),
        ((2, 3, 8, 2), [(3, 4), (5, 6), (7, 8)]),
        ((2, 0, 4, 3), [(0, 1), (3, 4)]),
        ((4, 0, 3), [(0, 3)]),
        ((1, 9, 9), [(9, 9)]),
    ],
)
def test_positions(arguments, positions):
    assert window_positions(*arguments) == positions


def windows(kind, positions, rollouts=1, num_steps=6):
    scheduler = FlowMatchEulerDiscreteScheduler()
    made = (make_schedule(scheduler, SamplerOptions(num_steps, sampler="flow_sde", noise_steps=p)) for p in positions)
    return NoiseWindows(kind, tuple(made), rollouts)


def noisy_steps(schedule):
    return [step for step, std in enumerate(schedule.stds) if std > 0]


def test_a_progressive_window_moves_and_begins_again():
    made = windows("progressive", [(0, 1), (2, 3), (4, 5)], rollouts=2)
    found = [noisy_steps(made.of_rollout(number, torch.Generator())) for number in range(8)]
    assert found == [[0, 1], [0, 1], [2, 3], [2, 3], [4, 5], [4, 5], [0, 1], [0, 1]]


def test_a_random_window_is_uniform_and_a_function_of_seed_and_rollout():
    made = windows("random", window_positions(3, 0, 5))

    def draw(seed, number):
        return noisy_steps(made.of_rollout(number, seeded_generator(seed, WINDOW, number)))

    drawn = [draw(0, number) for number in range(4000)]
    assert drawn == [draw(0, number) for number in range(4000)] != [draw(1, number) for number in range(4000)]
    counts = Counter(window[0] for window in drawn)
    assert counts.keys() == {0, 1, 2, 3} and all(window == list(range(window[0], window[0] + 3)) for window in drawn)
    error = (4000 * 0.25 * 0.75) ** 0.5
    assert all(abs(count - 1000) < 5 * error for count in counts.values())
