"""Baselines and normalization, against formulas written sample by sample."""

import math

import pytest
import torch
import toy_problems
from hypothesis import given, settings
from hypothesis import strategies as st
from toy_problems import EXACT, batches_of, normal

from rlr_trainer.estimators import PerPromptStatistics, leave_one_out, no_baseline, normalize
from rlr_trainer.estimators.advantages import ADVANTAGES
from rlr_trainer.estimators.prediction import leave_one_out_mean

NAN = math.nan


def one_by_one(rewards: list[float], groups: list[int], blocks: list[int]) -> list[float]:
    values = []
    for i, reward in enumerate(rewards):
        there = [j for j, r in enumerate(rewards) if blocks[j] != blocks[i] and not math.isnan(r)]
        others = [rewards[j] for j in there if groups[j] == groups[i]] or [rewards[j] for j in there]
        baseline = sum(others) / len(others) if others else 0.0
        values.append(0.0 if math.isnan(reward) else reward - baseline)
    return values


reward_lists = st.lists(st.one_of(st.integers(-80, 80).map(lambda k: k / 8), st.just(NAN)), min_size=1, max_size=9)


@settings(max_examples=100, derandomize=True, deadline=None, database=None)
@given(reward_lists, st.data())
def test_leave_one_out_is_the_mean_of_the_others(rewards, data):
    size = len(rewards)
    groups, blocks = (data.draw(st.lists(st.integers(0, 2), min_size=size, max_size=size)) for _ in range(2))
    tensor = torch.tensor(rewards, dtype=torch.float64)
    alone = list(range(size))
    for given_groups, given_blocks in ((None, None), (groups, None), (None, blocks), (groups, blocks)):
        as_tensors = [None if given is None else torch.tensor(given) for given in (given_groups, given_blocks)]
        result = leave_one_out(tensor, *as_tensors)
        expected = one_by_one(rewards, given_groups or [0] * size, given_blocks or alone)
        torch.testing.assert_close(result.values, torch.tensor(expected, dtype=torch.float64), **EXACT)
        assert torch.equal(result.scale, (~torch.isnan(tensor)).double())


def test_the_batches_of_these_tests_are_batches():
    """`batches_of` (toy_problems) gives what separate calls give, for baselines and for the centre of c."""
    rewards, blocks = normal(2048), torch.arange(2048) // 2
    separate = torch.cat([leave_one_out(rows).values for rows in rewards.split(4)])
    paired = torch.cat([leave_one_out(r, None, b).values for r, b in zip(rewards.split(4), blocks.split(4), strict=True)])
    centers = torch.cat([leave_one_out_mean(rows) for rows in rewards.split(4)])
    with batches_of(4):
        torch.testing.assert_close(ADVANTAGES["leave_one_out"](rewards, None, None).values, separate, **EXACT)
        torch.testing.assert_close(ADVANTAGES["leave_one_out"](rewards, None, blocks).values, paired, **EXACT)
        torch.testing.assert_close(toy_problems.leave_one_out_mean(rewards), centers, **EXACT)
    assert ADVANTAGES["leave_one_out"] is leave_one_out


def test_no_baseline_keeps_the_reward():
    result = no_baseline(torch.tensor([1.5, NAN, -2.0]))
    assert result.values.tolist() == [1.5, 0.0, -2.0] and result.scale.tolist() == [1.0, 0.0, 1.0]


def test_normalize_is_the_z_score_of_the_rewards_that_are_there():
    rewards = normal(7)
    rewards[2] = NAN
    there = rewards[~torch.isnan(rewards)]
    std = there.std(correction=0)
    result = normalize(rewards)
    expected = torch.where(torch.isnan(rewards), 0.0, (rewards - there.mean()) / std)
    torch.testing.assert_close(result.values, expected, rtol=1e-7, atol=1e-7)
    torch.testing.assert_close(result.scale, torch.where(torch.isnan(rewards), 0.0, 1 / std), rtol=1e-7, atol=1e-7)


def test_clipping_advantages_leaves_the_scale():
    result = normalize(torch.tensor([0.0, 0.0, 0.0, 100.0]))
    clipped = result.clip(1.0)
    assert clipped.values.tolist() == [max(-1.0, min(1.0, v)) for v in result.values.tolist()]
    assert torch.equal(clipped.scale, result.scale)


@pytest.mark.parametrize("name", ["leave_one_out", "normalize", "per_prompt"])
def test_equal_rewards_say_nothing(name):
    """Advantages of rewards that are all the same are 0, to the rounding of the reward; not the rounding scaled up to 1."""
    for value in (0.0, 0.1, 10.1, 1000.1, -3e5):
        for size in (2, 7, 64):
            rewards = torch.full((size,), value)
            if name == "per_prompt":
                result = PerPromptStatistics(buffer_size=100, min_count=1).update(["a"] * size, rewards)
            else:
                result = ADVANTAGES[name](rewards, None, None)
            assert float(result.values.abs().max()) <= 1e-5 * abs(value), (value, size)


@pytest.mark.parametrize("name", ADVANTAGES)
def test_integer_rewards_are_rewards(name):
    whole = torch.tensor([3, 1, 0, 7])
    as_integers, as_floats = ADVANTAGES[name](whole, None, None), ADVANTAGES[name](whole.float(), None, None)
    assert as_integers.values.dtype == as_integers.scale.dtype == torch.float32
    assert torch.equal(as_integers.values, as_floats.values)
    assert torch.equal(as_integers.scale, as_floats.scale)


@pytest.mark.parametrize("name", ADVANTAGES)
def test_a_batch_without_any_reward_has_no_advantage(name):
    result = ADVANTAGES[name](torch.tensor([NAN, NAN]), None, None)
    assert result.values.tolist() == result.scale.tolist() == [0.0, 0.0]


def test_per_prompt_statistics_that_can_never_be_used_are_said(caplog):
    PerPromptStatistics(buffer_size=8, min_count=8)
    assert not caplog.records
    PerPromptStatistics(buffer_size=8, min_count=9)
    assert "per_prompt_min_count=9 is more than per_prompt_buffer_size=8" in caplog.text


def test_per_prompt_statistics_by_hand():
    """Buffers keep the newest rewards; a prompt with too few is normalized by the batch; the new rewards count at once."""
    statistics = PerPromptStatistics(buffer_size=3, min_count=2)
    first = torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64)
    result = statistics.update(["a", "a", "b"], first)
    own, batch = first[:2], first
    expected = [
        (1 - own.mean()) / own.std(correction=0),
        (2 - own.mean()) / own.std(correction=0),
        (5 - batch.mean()) / batch.std(correction=0),
    ]
    torch.testing.assert_close(result.values, torch.stack(expected), rtol=1e-7, atol=0)
    second = torch.tensor([3.0, 7.0, NAN], dtype=torch.float64)
    result = statistics.update(["a", "a", "b"], second)
    kept = torch.tensor([2.0, 3.0, 7.0], dtype=torch.float64)  # 1.0 has left the buffer of "a"
    torch.testing.assert_close(result.values[:2], (second[:2] - kept.mean()) / kept.std(correction=0), rtol=1e-7, atol=0)
    torch.testing.assert_close(result.scale[:2], (1 / kept.std(correction=0)).expand(2), rtol=1e-7, atol=0)
    assert result.values[2] == result.scale[2] == 0
    copy = PerPromptStatistics(buffer_size=3, min_count=2)
    copy.load_state_dict(statistics.state_dict())
    third = torch.tensor([4.0, 4.0], dtype=torch.float64)
    torch.testing.assert_close(copy.update(["a", "b"], third).values, statistics.update(["a", "b"], third).values, **EXACT)


def test_statistics_of_the_prompts_not_seen_for_the_longest_time_are_forgotten(monkeypatch):
    """They would grow with every new prompt, in memory and in checkpoints."""
    monkeypatch.setattr("rlr_trainer.estimators.advantages.MOST_PROMPTS", 2)
    statistics = PerPromptStatistics(4, 1)
    for prompts in (["a", "b"], ["a", "c"]):
        statistics.update(prompts, torch.tensor([1.0, 2.0]))
    assert statistics.state_dict() == {"a": [1.0, 1.0], "c": [2.0]}
    resumed = PerPromptStatistics(4, 1)
    resumed.load_state_dict(statistics.state_dict())
    resumed.update(["d"], torch.tensor([3.0]))
    assert list(resumed.buffers) == ["c", "d"]
