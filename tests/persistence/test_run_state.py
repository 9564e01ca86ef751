"""The state of a run beside weights and optimizer, without a trainer; what a resumed run may change."""

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch

from rlr_trainer.persistence.checkpoints import CheckpointError
from rlr_trainer.persistence.run_state import (
    STATE_FILE,
    Part,
    RunState,
    check_changes,
    compare,
    follow_schedule,
    load_generators_of_main_process,
    load_safely,
)


def kept(state, into=None):
    """A part that has a state, and takes down what it is given."""
    return Part(lambda: state, (into if into is not None else []).append)


def run_state(parts, **settings):
    return RunState(parts, lambda: json.dumps(settings))


def test_parts_are_taken_up_in_their_order(tmp_path):
    state = {"numbers": (1, 2.5, None), "tensor": torch.arange(3)}
    run_state({"first": kept(state), "second": kept([1]), "third": kept("gone")}).save(tmp_path)
    loaded = []
    run_state({"second": kept(None, loaded), "first": kept(None, loaded), "new": kept(None, loaded)}).load(tmp_path, False)
    assert loaded[0] == [1]
    assert loaded[1]["numbers"] == state["numbers"]
    assert torch.equal(loaded[1]["tensor"], state["tensor"])
    assert len(loaded) == 2


def test_a_part_that_is_not_plain_data_is_said_at_once_and_when_it_is_loaded(tmp_path, caplog):
    run_state({"prompts": kept({"drawn": [object()]}), "plan": kept({})}).save(tmp_path)
    assert "this checkpoint cannot be resumed: the state of its prompts" in caplog.text
    loaded = []
    with pytest.raises(CheckpointError, match="the state of its prompts could not be stored"):
        run_state({"plan": kept({}, loaded)}).load(tmp_path, False)
    assert not loaded


def test_what_is_no_state_of_a_run_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match=rf"{STATE_FILE} is missing: .*save_only_model=True"):
        run_state({}).load(tmp_path, False)
    torch.save({"rollouts_done": 3}, tmp_path / STATE_FILE)
    with pytest.raises(CheckpointError, match=rf"{STATE_FILE} is not of this version"):
        run_state({}).load(tmp_path, False)
    (tmp_path / STATE_FILE).write_bytes(b"damaged")
    with pytest.raises(CheckpointError, match=rf"{STATE_FILE} cannot be read"):
        load_safely(tmp_path / STATE_FILE)


@pytest.mark.parametrize(
    ("changes", "given_optimizer", "said"),
    [
        ({"max_steps": (1, 2), "num_log_images": (0, 1)}, False, "resuming run with other options: max_steps=1 -> 2"),
        ({"reward_function": (["a"], ["a", "b"])}, False, "with other options: reward_function=['a'] -> ['a', 'b']"),
        ({"learning_rate": (0.1, 0.2)}, False, "learning_rate=0.1 -> 0.2 has no effect"),
        ({"learning_rate": (0.1, 0.2)}, True, "with other options: learning_rate=0.1 -> 0.2"),
        ({"optim": ("adamw_torch", "adamw_torch_fused")}, False, "with other options: optim="),
        ({"optim": ("adamw_torch", "sgd")}, True, "with other options: optim="),
        ({"num_log_images": (0, 1)}, False, ""),
    ],
)
def test_changed_options_are_said(changes, given_optimizer, said, caplog):
    check_changes(Path("run"), changes, given_optimizer)
    assert len(caplog.records) == bool(said)
    assert said in caplog.text
    assert "num_log_images" not in caplog.text


@pytest.mark.parametrize(("name", "before", "now"), [("optim", "adamw_torch", "sgd"), ("use_lora", True, False)])
def test_weights_and_optimizer_of_another_kind_are_refused(name, before, now):
    with pytest.raises(CheckpointError, match=f"with {name}={before!r} -> {now!r}: .*; set {name}={before!r}"):
        check_changes(Path("run"), {name: (before, now)}, False)


def test_settings_are_compared_by_their_names():
    before, now = json.dumps({"a": 1, "b": [2.0], "gone": 3}), json.dumps({"a": 1, "b": [2.5], "new": 4})
    assert compare(before, now) == {"b": ([2.0], [2.5]), "new": (None, 4)}


def test_the_rate_is_that_of_the_present_schedule():
    """A shorter run would have gone on with a rate of 0 from its end."""
    parameter = torch.nn.Parameter(torch.zeros(1))

    def schedule(updates):
        optimizer = torch.optim.SGD([parameter], lr=1.0)
        return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: max(0.0, 1 - step / updates))

    short, longer = schedule(2), schedule(4)
    for _ in range(2):
        short.optimizer.step()
        short.step()
    longer.optimizer.load_state_dict(short.optimizer.state_dict())
    longer.load_state_dict(short.state_dict())
    follow_schedule(longer)
    assert longer.optimizer.param_groups[0]["lr"] == longer.get_last_lr()[0] == 0.5


@pytest.mark.parametrize(("saved", "process", "processes"), [("rng_state.pth", 1, 2), ("rng_state_0.pth", 0, 1)])
def test_generators_of_another_number_of_processes(tmp_path, saved, process, processes):
    def draw():
        return random.random(), np.random.random(), float(torch.rand(()))

    state = {"python": random.getstate(), "numpy": np.random.get_state(), "cpu": torch.get_rng_state()}
    torch.save(state, tmp_path / saved)
    expected = draw()
    load_generators_of_main_process(tmp_path, process, processes)
    assert draw() == expected
