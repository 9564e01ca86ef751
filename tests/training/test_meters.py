"""What is logged of the measurements of many micro-batches, processes and updates."""

import math

import pytest
import torch

from rlr_trainer.training.meters import MetricsLog


class Processes:
    """This process's values, and those of others."""

    def __init__(self, *others):
        self.others, self.count = others, 1 + len(others)

    def gather(self, tensor):
        return torch.cat([tensor, *(torch.tensor([row], dtype=tensor.dtype) for row in self.others)])


def taken(values, *others):
    """What is logged of name -> values."""
    log = MetricsLog()
    for number in range(max(map(len, values.values()), default=0)):
        log.add({name: column[number] for name, column in values.items() if number < len(column)})
    found = log.take(Processes(*others))
    assert log.take(Processes()) == {}  # begins anew
    return found


def test_means_and_largest_values_over_processes():
    values = {"b": [1.0, 2.0], "ratio/max_abs_dev": [0.1, 0.3, 0.2], "a": [5.0]}
    assert taken(values) == pytest.approx({"a": 5, "b": 1.5, "ratio/max_abs_dev": 0.3})
    assert taken(values, [7.0, 0.5, 0.9], [9.0, 1.0, 0.0]) == pytest.approx({"a": 7, "b": 1, "ratio/max_abs_dev": 0.9})
    assert taken({}) == {}


def test_nan_is_not_hidden():
    for values in ([math.nan, 1.0], [1.0, math.nan]):
        assert all(math.isnan(value) for value in taken({"a": values, "ratio/max_abs_dev": values}).values())
    assert math.isnan(taken({"ratio/max_abs_dev": [1.0]}, [math.nan])["ratio/max_abs_dev"])


def test_a_checkpoint_keeps_them():
    log, other = MetricsLog(), MetricsLog()
    log.add({"a": 1.0})
    other.load_state_dict(log.state_dict())
    other.add({"a": 2.0})
    assert (log.values, other.values) == ({"a": [1.0]}, {"a": [1.0, 2.0]})
