"""The benchmark's pure functions: costs to a score, and the choice of a learning rate."""

import pytest

from benchmarks import quick
from benchmarks.analysis import best_rate, cost, cost_to, mean_and_error


def curve(*scores, by="judge"):
    """Rows every 4 updates of 32 queries, 10 forward and 3 backward rows per query."""
    return [
        {"update": 4 * i, "queries": 128 * i, "forward": 1280 * i, "backward": 384 * i, "cpu_seconds": 2.0 * i, by: score}
        for i, score in enumerate(scores)
    ]


@pytest.mark.parametrize(("unit", "expected"), [("update", 6), ("queries", 192), ("evaluations", 1.5 * 1664), ("cpu_seconds", 3)])
def test_cost_is_interpolated_in_every_unit(unit, expected):
    assert cost_to(curve(0.0, 0.4, 0.8, 1.0), 0.6, "judge", unit) == pytest.approx(expected)


def test_the_first_crossing_counts():
    assert cost_to(curve(0.0, 0.8, 0.2, 0.8), 0.8, "judge", "update") == 4
    assert cost_to(curve(0.0, 0.2), 0.3, "judge", "update") is None
    assert cost_to(curve(0.5, 0.2), 0.3, "judge", "update") == 0


def test_forward_and_backward_passes_are_evaluations():
    assert cost({"forward": 13.0, "backward": 3.0}, "evaluations") == 16


def test_the_best_rate_is_the_first_to_the_judged_score():
    assert best_rate({1e-3: curve(0.1, 0.2, 0.95), 1e-2: curve(0.1, 0.95, 0.5)}, "digit") == 1e-2
    assert best_rate({1e-3: curve(0.1, 0.2, 0.95), 1e-2: curve(0.1, 0.85, 0.85)}, "digit") == 1e-3
    assert best_rate({1e-3: curve(0.1, 0.2, 0.3), 1e-2: curve(0.1, 0.5, 0.6)}, "digit") == 1e-2


def test_without_a_judged_score_the_mean_reward_decides():
    assert best_rate({1e-3: curve(0, 1, 2, by="reward"), 1e-2: curve(0, 2, 1.5, by="reward")}, "ink") == 1e-2


def test_mean_and_error():
    assert mean_and_error([1.0, 3.0]) == (2.0, 1.0)
    assert mean_and_error([2.0]) == (2.0, None)


def test_the_small_comparison_finds_a_method_that_is_not_ahead():
    def ending(judge, passes):
        rows = [{"judge": 0.1, "queries": 0, "forward": 0, "backward": 0}]
        return [[*rows, {"judge": judge, "queries": 10, "forward": passes * 10, "backward": 0}]]

    curves = {"ddpo": ending(0.2, 20), "rlr_black_box": ending(0.9, 16), "rlr": ending(0.8, 20)}
    assert quick.violations(curves) == []
    assert "rlr went" in quick.violations(curves | {"rlr": ending(0.25, 20)})[0]
    assert "16" not in quick.violations(curves | {"rlr_black_box": ending(0.9, 20)})[0]
    assert len(quick.violations(curves | {"rlr_black_box": ending(0.1, 20)})) == 2


@pytest.mark.slow
def test_small_comparison():
    curves = quick.compare()
    assert quick.violations(curves) == []
