"""Prompt sources."""

import pytest

from rlr_trainer.prompts import DatasetPrompts, FunctionPrompts


def rows(count):
    return [{"prompt": f"prompt {i}", "number": i} for i in range(count)]


def test_passes_follow_each_other_without_a_gap_and_each_is_a_permutation():
    source = DatasetPrompts(rows(5), seed=0)
    taken = [row.metadata["number"] for _ in range(5) for row in source.take(3)]
    assert [sorted(taken[i : i + 5]) for i in (0, 5, 10)] == [list(range(5))] * 3
    assert len({tuple(taken[i : i + 5]) for i in (0, 5, 10)}) > 1


def test_order_is_a_function_of_seed_and_position():
    whole = DatasetPrompts(rows(7), seed=3)
    expected = [row.prompt for row in whole.take(20)]
    resumed = DatasetPrompts(rows(7), seed=3)
    resumed.load_state_dict({"taken": 9})
    assert [row.prompt for row in resumed.take(11)] == expected[9:]
    assert [row.prompt for row in DatasetPrompts(rows(7), seed=4).take(20)] != expected
    assert [row.prompt for row in DatasetPrompts(rows(3), 0, shuffle=False).take(4)] == [f"prompt {i}" for i in (0, 1, 2, 0)]


def test_peeking_loses_nothing():
    calls = iter(range(100))
    for source in (FunctionPrompts(lambda: (str(next(calls)), {})), DatasetPrompts(rows(4), 0)):
        ahead = source.peek(3)
        assert source.take(2) == ahead[:2]
        assert source.take(2)[0] == ahead[2]


def test_negative_prompts_of_rows():
    source = DatasetPrompts(
        [{"prompt": "a", "negative_prompt": "blurred"}, {"prompt": "b", "negative_prompt": None}], 0, shuffle=False
    )
    first, second = source.take(2)
    assert first.negative_prompt == "blurred"
    assert second.negative_prompt is None


@pytest.mark.parametrize(
    ("dataset", "error", "message"),
    [
        ([], ValueError, "has no rows"),
        ([{"text": "a"}], ValueError, 'needs "prompt"; rename one'),
        (iter([{"prompt": "a"}]), TypeError, "must have a length"),
    ],
)
def test_datasets_that_cannot_be(dataset, error, message):
    with pytest.raises(error, match=message):
        DatasetPrompts(dataset, 0)


def test_rows_that_cannot_be():
    with pytest.raises(TypeError, match=r"column 'prompt' holds 3 \(int\): must be a string"):
        DatasetPrompts([{"prompt": 3}], 0).take(1)
    with pytest.raises(TypeError, match="column 'negative_prompt' holds 3"):
        DatasetPrompts([{"prompt": "a", "negative_prompt": 3}], 0).take(1)


@pytest.mark.parametrize("returned", ["words", ("words",), (1, {}), None])
def test_functions_that_return_something_else(returned):
    with pytest.raises(TypeError, match=r"must return a pair \(prompt, metadata\)"):
        FunctionPrompts(lambda: returned).take(1)
