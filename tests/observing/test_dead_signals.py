"""Signs that nothing can be learnt: the rules, and what the monitor and the report say of them."""

import pytest
import torch
from torch import nn

from rlr_trainer.observing.dead_signals import DeadSignals, causes, equal_rewards, no_gradient, saturated_reward, unchanged_reward
from rlr_trainer.rewards.training_mode import layers_in_training_mode, warning_of


def lines(count=12, **series):
    """Log lines; a series is a number, or a function of the line."""
    healthy = {"reward": lambda n: 0.3 + 0.01 * n, "reward_std": 0.1, "grad_norm": 0.2}
    named = healthy | series
    return [{name: value(n) if callable(value) else value for name, value in named.items()} for n in range(count)]


RULES = (no_gradient, equal_rewards, unchanged_reward, saturated_reward)


@pytest.mark.parametrize(
    ("rule", "series"),
    [
        (no_gradient, {"grad_norm": 0.0}),
        (no_gradient, {"grad_norm": 2e-9}),
        (equal_rewards, {"reward_std": 0.0}),
        (equal_rewards, {"reward_std": 3e-8}),  # rounding
        (unchanged_reward, {"reward": 0.25}),
        (saturated_reward, {"reward": lambda n: 1e-9 * (n + 1), "reward_std": 2e-9}),  # as of pictures taken for 0..255
        (saturated_reward, {"reward": lambda n: 1 - 1e-6 * n, "reward_std": 1e-5}),
    ],
)
def test_each_rule_sees_its_sign_alone(rule, series):
    assert [one for one in RULES if one(lines(**series))] == [rule]
    assert not rule(lines(4, **series))  # too early to tell


@pytest.mark.parametrize(
    "series",
    [
        {},
        {"grad_norm": lambda n: 0.0 if n % 5 else 0.1},  # now and then
        {"reward_std": lambda n: 0.0 if n % 5 else 0.1},
        {"reward_std": 0.0, "estimator/fo_grad_norm": 0.2},  # the reward's own gradient needs no comparison
        {"reward": lambda n: 2e-4 * (n + 1), "reward_std": 1e-4, "grad_norm": 1e-6},  # small, but alive
        {"reward": lambda n: 1 - 1e-6 * n, "reward_std": 0.01},
        {"grad_norm": None, "reward_std": float("nan")},  # not measured
    ],
)
def test_a_run_that_learns_is_not_disturbed(series):
    assert not [rule for rule in RULES if rule(lines(**series))]


def test_a_sign_is_told_once_and_evaluations_are_passed_over():
    signs = DeadSignals(pictures=1)
    told = [text for line in lines(grad_norm=0.0) for text in (*signs.read({"eval_reward": 0.0}), *signs.read(line))]
    assert len(told) == len(signs.found) == 1
    assert "one picture" in signs.causes


def test_causes_fit_the_run():
    assert "one picture" in causes([0.5], 1) and "one picture" not in causes([0.5], 4)
    assert "saturated" in causes([1.0, 0.99999], 4) and "saturated" not in causes([0.5], 4)
    assert "0..255" in causes([0.5], 4)


def test_layers_of_a_reward_in_training_mode_are_seen():
    net = nn.Sequential(nn.Conv2d(3, 2, 3), nn.BatchNorm2d(2), nn.Dropout(0.5), nn.Dropout(0.0))
    pictures = torch.rand(2, 3, 8, 8)
    with layers_in_training_mode() as found:
        net(pictures)
    assert set(found) == {"BatchNorm2d", "Dropout"}
    text = warning_of(found, "smile")
    assert text.startswith("reward smile: its network is in training mode") and "running statistics move" in text
    with layers_in_training_mode() as found:
        net.eval()(pictures)
    assert not found
    with layers_in_training_mode([net.train()]) as found:  # the policy's, or the decoder's
        net(pictures)
    assert not found
    moved = net[1].num_batches_tracked.clone()
    net(pictures)
    with layers_in_training_mode() as found:
        pass
    assert not found and net[1].num_batches_tracked == moved + 1


@pytest.mark.medium
def test_a_dead_run_is_told_of_and_reported(make_trainer, caplog, tmp_path):
    """A black box that takes pictures for 0..255, with a network in training mode."""
    from rlr_trainer.observing.report import write_report

    net = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(3 * 32 * 32))

    def rounds(images, prompts, metadata):
        net(images)
        return images.to(torch.uint8).float().mean(dim=(1, 2, 3)) * 0 + 0.5

    make_trainer(estimator="ddpo", sample_num_steps=2, per_device_train_batch_size=2, max_steps=5, reward_function=rounds).train()
    said = caplog.text
    assert "its network is in training mode (BatchNorm1d" in said and said.count("training mode") == 1
    assert "after 5 updates: no gradient: grad_norm was 0 in 5 log lines" in said and "0..255" in said
    page = write_report([tmp_path / "run"], tmp_path / "report.html").read_text()
    assert "Nothing to learn from" in page and "A reward&#39;s network in training mode" in page
