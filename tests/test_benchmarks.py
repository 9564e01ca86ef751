"""The benchmark's pure functions: costs to a score, the choice of a learning rate, tables; and its tasks of clips."""

import json

import pytest
import torch

from benchmarks import paper_table, quick
from benchmarks.analysis import best_rate, cost, cost_to, mean_and_error
from benchmarks.clip_tasks import CLIP_TASKS, measure_clips
from benchmarks.driver import TUNING_SEED


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
    """With the first of its two seeds, which takes half of the time."""
    curves = quick.compare(quick.SEEDS[:1])
    assert quick.violations(curves) == []


# ------------------------------------------------------------------------------------------------- the paper's table


@pytest.fixture
def results(tmp_path, monkeypatch):
    """A folder of results with two seeds of one method on two tasks, a tuning seed, and a run at another rate."""
    monkeypatch.setattr(paper_table, "RESULTS", tmp_path)

    def write(task, method, seed, rate, start, end):
        row = dict.fromkeys(("reward", "judge", "frechet"), 0.0)
        path = tmp_path / "digits" / task / method / f"batch16-lr{rate:g}-seed{seed}.json"
        path.parent.mkdir(parents=True, exist_ok=True)
        rows = [row | {"reward": start}, row | {"reward": end}]
        path.write_text(json.dumps({"seed": seed, "learning_rate": rate, "batch": 16, "curve": rows}))

    for seed, end in ((0, 0.25), (1, 0.75), (TUNING_SEED, 9.0)):
        write("digit", "rlr", seed, 5e-3, 0.125, end)
    write("digit", "rlr", 2, 1e-2, 0.125, 9.0)
    write("ink_black_box", "rlr_black_box", 0, 5e-3, 0.3125, 0.5)


def test_the_papers_table_has_the_ends_of_reported_runs_at_the_tables_rate(results):
    rows = {line.split("|")[1].strip(): [cell.strip() for cell in line.split("|")[2:-1]] for line in paper_table.table("digits")}
    titles = rows[""]
    reward, ink = titles.index("digit: reward"), titles.index("ink: reward")
    assert (rows["base"][reward], rows["base"][ink]) == ("0.125", "0.312")
    assert rows["our default with the reward's gradient"][1:3] == ["2/0", "0.5 ± 0.2"]
    assert rows["our default for black boxes"][ink] == "0.5"  # from the task without a gradient
    assert rows["DRaFT-1"][1] == "0/0" and rows["DRaFT-1"][reward] == ""


def test_clips_are_measured_by_the_judge_and_by_their_motion():
    task = CLIP_TASKS["digit_and_direction"]
    square = torch.zeros(2, 9, 3, 32, 32)
    for frame in range(9):
        left = 4 + 3 * frame // 2
        square[0, frame, :, 12:20, left : left + 8] = 1  # one moves to the right by 1 or 2 pixels, the other stands
        square[1, frame, :, 12:20, 12:20] = 1
    numbers = measure_clips(square, task, task.reward())
    moved, stood = (measure_clips(square[[i, i]], task, task.reward()) for i in (0, 1))
    assert moved["motion"] == pytest.approx(2 * 8 * 12 / 8 / 1024) and stood["motion"] == 0 and stood["diversity"] == 0
    assert moved["direction"] == 1
    for name in ("reward", "judge", "direction", "motion"):
        assert numbers[name] == pytest.approx((moved[name] + stood[name]) / 2, abs=1e-6)


def test_vader_scores_random_frames_and_the_judged_reward_all():
    for task in CLIP_TASKS.values():
        clips = torch.rand(2, 9, 3, 32, 32, requires_grad=True)
        every, some = task.reward(), task.reward(3)
        prompts, metadata = ("a handwritten digit moving",) * 2, ({},) * 2
        assert torch.equal(every(clips, prompts, metadata), every(clips, prompts, metadata))
        drawn = torch.stack([some(clips, prompts, metadata) for _ in range(8)])
        assert len(drawn.unique(dim=0)) > 1
