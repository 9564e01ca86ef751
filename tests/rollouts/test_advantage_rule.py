"""How the rewards of a rollout become advantages."""

import math

import pytest
import torch

from rlr_trainer.estimators.advantages import PerPromptStatistics
from rlr_trainer.rollouts.advantage_rule import AdvantageRule

REWARDS = torch.tensor([1.0, 2.0, 3.0, 5.0])
PARTS, PROMPTS = REWARDS[:, None], ("a", "a", "b", "b")


def values(rule, rewards=REWARDS, parts=PARTS, **how):
    advantages, factors = rule.of_rollout(rewards, parts, PROMPTS, **how)
    return advantages.values.tolist(), advantages.scale.tolist(), factors


def test_of_all_samples_or_of_those_of_a_prompt():
    assert values(AdvantageRule("none")) == ([1, 2, 3, 5], [1] * 4, None)
    assert values(AdvantageRule("leave_one_out"))[0] == pytest.approx([-7 / 3, -1, 1 / 3, 3])
    assert values(AdvantageRule("leave_one_out", group_size=2))[0] == [-1, 1, -2, 2]
    assert values(AdvantageRule("normalize", limit=1.0))[0] == pytest.approx([-1, -0.5071, 0.1690, 1], abs=1e-4)


def test_pairs_leave_each_other_out():
    assert values(AdvantageRule("leave_one_out"), paired=True)[0] == [1 - 4, 2 - 4, 3 - 1.5, 5 - 1.5]


def test_a_prompt_s_own_statistics():
    rule = AdvantageRule("per_prompt", statistics=PerPromptStatistics(16, 2))
    assert values(rule)[0] == pytest.approx([-1, 1, -1, 1], abs=1e-4)
    assert set(rule.statistics.buffers) == {"a", "b"}


def test_every_reward_by_itself():
    """Normalized, then summed; a sample without the sum counts in neither."""
    parts = torch.stack([REWARDS, -10 * REWARDS], 1)
    rule = AdvantageRule("normalize", separately=True, names=("x", "y"), weights=(2.0, 1.0))
    found, _, factors = values(rule, 2 * parts[:, 0] + parts[:, 1], parts)
    assert found == pytest.approx([-1.1832, -0.5071, 0.1690, 1.5213], abs=1e-4)  # 2 - 1 times the normalized reward
    assert factors[0, 0] / factors[0, 1] == pytest.approx(2 * 10, rel=1e-4)
    there = torch.tensor([1.0, 2.0, math.nan, 5.0])
    found, scale, _ = values(rule, there, parts)
    assert (found[2], scale[2]) == (0, 0)


def test_samples_that_share_a_direction_are_left_out_of_each_other_s_baseline():
    usual, direction = torch.zeros(4), torch.tensor([0, 1, 0, 1])
    rule = AdvantageRule("leave_one_out")
    assert rule.of_directions(REWARDS, direction, usual).tolist() == [1 - 3.5, 2 - 2, 3 - 3.5, 5 - 2]
    own = AdvantageRule("per_prompt", statistics=PerPromptStatistics(16, 2))
    assert torch.equal(own.of_directions(REWARDS, direction, usual), usual)
