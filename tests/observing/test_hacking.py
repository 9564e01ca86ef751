"""Warnings of reward hacking."""

import logging
import math
from types import SimpleNamespace

import pytest

from rlr_trainer.cli import main
from rlr_trainer.observing import monitor
from rlr_trainer.observing.monitor import RewardHackingMonitor


def watch(rows):
    """What the monitor says of a log, and after which line."""
    watcher, found = RewardHackingMonitor(), {}
    state = SimpleNamespace(global_step=0, is_world_process_zero=True, log_history=[])
    watcher.on_train_begin(None, state, None)
    for number, row in enumerate(rows):
        state.global_step = number + 1
        watcher.on_log(None, state, None, logs=row)
        for rule in watcher.warnings.keys() - found.keys():
            found[rule] = number
    return found


def curve(count, **series):
    return [{name: function(n / count) for name, function in series.items()} for n in range(count)]


def test_loss_of_diversity_while_the_reward_rises(caplog):
    collapse = curve(40, reward=lambda t: t, diversity=lambda t: 0.3 * (1 - t))
    with caplog.at_level(logging.WARNING, logger=monitor.__name__):
        assert set(watch(collapse)) == {"diversity"}
    (message,) = [entry.getMessage() for entry in caplog.records]  # once
    assert "loss of diversity" in message
    assert "raise kl_coef" in message
    assert not watch(curve(40, reward=lambda t: -t, diversity=lambda t: 0.3 * (1 - t)))  # the reward does not rise
    assert not watch(curve(40, reward=lambda t: t, diversity=lambda t: 0.3 - 0.12 * t))  # as in the demo
    assert not watch(curve(40, reward=lambda t: t))


def test_loss_of_motion_while_the_reward_rises(caplog):
    freezing = curve(40, reward=lambda t: t, motion=lambda t: 0.05 * (1 - t), diversity=lambda t: 0.3)
    with caplog.at_level(logging.WARNING, logger=monitor.__name__):
        assert set(watch(freezing)) == {"motion"}
    (message,) = [entry.getMessage() for entry in caplog.records]
    assert "loss of motion: neighbouring frames of a video differ by" in message and "0.0475 at first (metric motion)" in message
    assert not watch(curve(40, reward=lambda t: -t, motion=lambda t: 0.05 * (1 - t)))  # the reward does not rise
    assert not watch(curve(40, reward=lambda t: t, motion=lambda t: 0.05 + t))


def test_losses_that_evaluations_show():
    """The training pictures have a prompt each, so that only evaluations tell how much those of one prompt differ."""

    def rows(name, value, reward):
        yield {name: value(0), "eval_reward": 0.5}
        for n in range(12):
            yield {"reward": reward(n / 12)}
            if n % 4 == 3:
                yield {name: value((n + 1) / 12), "eval_reward": 0.5}

    assert watch(rows("eval_diversity", lambda t: 0.3 * (1 - t), lambda t: t)) == {"diversity": 15}  # the two last are below
    assert set(watch(rows("eval_animals_motion", lambda t: 0.1 * (1 - t), lambda t: t))) == {"motion"}
    assert not watch(rows("eval_diversity", lambda t: 0.3 * (1 - t), lambda t: -t))
    assert not watch(rows("eval_diversity", lambda t: 0.3 - 0.15 * t, lambda t: t))
    assert not watch(rows("eval_diversity", lambda t: 0.01 if t == 1 else 0.3, lambda t: t))  # one evaluation alone


def test_kl_that_grows_without_gain():
    runaway = curve(100, reward=lambda t: 0.5, kl=lambda t: math.exp(10 * t))
    assert set(watch(runaway)) == {"kl"}
    assert not watch(curve(100, reward=lambda t: t, kl=lambda t: math.exp(10 * t)))  # it gains
    assert not watch(curve(100, reward=lambda t: 0.5, kl=lambda t: t**2))  # the way every run starts
    assert not watch(runaway[:40])  # too early to tell


def test_training_reward_up_and_evaluation_reward_down():
    def rows(evaluation):
        for n in range(20):
            yield {"reward": n / 20, "reward_std": 0.2}
            if n % 4 == 3:
                yield {"eval_reward": evaluation(n / 20), "eval_reward_std": 0.2}

    assert set(watch(rows(lambda t: 0.5 - t / 2))) == {"evaluation"}
    assert not watch(rows(lambda t: t))
    assert not watch(rows(lambda t: 0.5 - t / 100))  # within the noise
    assert not watch(rows(lambda t: 0.1 if 0.5 < t < 0.6 else t))  # one bad evaluation


def test_a_run_that_resumes_remembers_its_beginning():
    rows = [row | {"step": n} for n, row in enumerate(curve(40, reward=lambda t: t, diversity=lambda t: 0.3 * (1 - t)))]
    watcher = RewardHackingMonitor()
    state = SimpleNamespace(global_step=30, is_world_process_zero=True, log_history=rows[:30])
    watcher.on_train_begin(None, state, None)
    watcher.on_log(None, state, None, logs=rows[30])
    assert set(watcher.warnings) == {"diversity"}


@pytest.mark.slow
@pytest.mark.usefixtures("in_temporary_folder")
def test_a_collapse_is_found_and_a_healthy_run_is_not_disturbed(capsys, caplog):
    with caplog.at_level(logging.WARNING, logger=monitor.__name__):
        assert main(["demo", "--output_dir", "healthy", "--quiet", "--max_steps", "12"]) == 0
        assert not [entry for entry in caplog.records if "loss of" in entry.getMessage()]
        assert (
            main(["demo", "--output_dir", "white", "--quiet", "--reward", "ink", "--estimator", "full_bp", "--max_steps", "12"])
            == 0
        )
        (entry,) = [entry for entry in caplog.records if "loss of" in entry.getMessage()]
        assert "loss of diversity" in entry.getMessage()
