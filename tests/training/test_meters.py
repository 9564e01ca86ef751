"""What is logged of the measurements of many micro-batches, processes and updates."""

import math

import pytest
import torch

from rlr_trainer.training.meters import summarize

pytestmark = pytest.mark.usefixtures("in_temporary_folder")


class Processes:
    """Stands for an accelerator: this process's values, and those of others."""

    device = torch.device("cpu")

    def __init__(self, *others):
        self.others, self.num_processes = others, 1 + len(others)

    def gather(self, tensor):
        return torch.cat([tensor, *(torch.tensor([row], dtype=tensor.dtype) for row in self.others)])


def test_means_and_largest_values_over_processes():
    taken = {"b": [1.0, 2.0], "ratio/max_abs_dev": [0.1, 0.3, 0.2], "a": [5.0]}
    assert summarize(taken, Processes()) == pytest.approx({"a": 5, "b": 1.5, "ratio/max_abs_dev": 0.3})
    found = summarize(taken, Processes([7.0, 0.5, 0.9], [9.0, 1.0, 0.0]))
    assert found == pytest.approx({"a": 7, "b": 1, "ratio/max_abs_dev": 0.9})
    assert summarize({}, Processes()) == {}


def test_nan_is_not_hidden():
    for values in ([math.nan, 1.0], [1.0, math.nan]):
        found = summarize({"a": values, "ratio/max_abs_dev": values}, Processes())
        assert math.isnan(found["a"])
        assert math.isnan(found["ratio/max_abs_dev"])
    assert math.isnan(summarize({"ratio/max_abs_dev": [1.0]}, Processes([math.nan]))["ratio/max_abs_dev"])


def test_the_loss_is_a_mean_over_the_samples_with_a_reward(make_trainer):
    """Also where one micro-batch has all of them and the other none: minus the mean reward."""
    for number, values in enumerate(([[0.5, 1.0], [math.nan] * 2], [[0.5, math.nan], [math.nan, 1.0]])):
        calls = iter(values)
        trainer = make_trainer(
            reward_function=lambda images, prompts, metadata, calls=calls: images.sum((1, 2, 3)) * 0 + torch.tensor(next(calls)),
            estimator="full_bp", sample_num_steps=1, per_device_train_batch_size=2, gradient_accumulation_steps=2, max_steps=1,
            check_reward=False, output_dir=f"run{number}",
        )  # fmt: skip
        trainer.train()
        row = trainer.state.log_history[0]
        assert (row["reward"], row["samples_dropped"]) == (0.75, 2)
        assert row["loss"] == pytest.approx(-0.75)


def test_another_training_begins_with_no_measurements(make_trainer):
    """What the last update of the first one took down, which was not logged, does not belong to the second one's first line."""
    trainer = make_trainer(sample_num_steps=1, max_steps=3, logging_steps=2)
    trainer.train()
    trainer._metrics["of the first"].append(1.0)
    trainer.train()
    (line,) = [row for row in trainer.state.log_history if "loss" in row]
    assert line["step"] == 2
    assert "of the first" not in line
