"""SIGTERM and Ctrl-C, without a trainer: when they are acted on, and who handles them."""

import os
import signal
import time
from types import SimpleNamespace

import pytest
import torch
from transformers import TrainerControl

from rlr_trainer.training import interruption
from rlr_trainer.training.interruption import StopOnTermination


def accelerator(processes=1, others=0.0):
    """`others` is what the other processes add to a sum."""
    return SimpleNamespace(num_processes=processes, device=torch.device("cpu"), reduce=lambda flag, reduction: flag + others)


def step(termination, updates=1, max_steps=9):
    state = SimpleNamespace(global_step=updates, max_steps=max_steps)
    control = termination.on_step_end(None, state, TrainerControl())
    assert control.should_save == control.should_training_stop == termination.stopped
    return termination.stopped


def test_the_signal_waits_for_the_end_of_the_rollout_and_ends_the_process():
    inside = [True]
    termination = StopOnTermination(accelerator(), lambda: inside[0])

    def train():
        with termination.taken():
            assert not step(termination)
            os.kill(os.getpid(), signal.SIGTERM)
            assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL  # a second one ends the process at once
            assert not step(termination)
            inside[0] = False
            assert step(termination)

    with pytest.raises(SystemExit) as leaving:
        train()
    assert leaving.value.code == 143


@pytest.fixture
def in_foreground():
    """A program that a shell starts in the background ignores Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("in_foreground")
def test_ctrl_c_saves_as_sigterm_does_and_a_second_one_leaves_at_once(monkeypatch):
    clock = time.monotonic

    def train(times, later=0.0):
        termination = StopOnTermination(accelerator())
        with termination.taken():
            for _ in range(times):
                os.kill(os.getpid(), signal.SIGINT)
                monkeypatch.setattr(interruption.time, "monotonic", lambda: clock() + later)
            assert step(termination)

    for times in (1, 2):  # the second comes from a launcher that passes on what the terminal has sent already
        with pytest.raises(KeyboardInterrupt, match="stopped after update 1, which is saved"):
            train(times)
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    with pytest.raises(KeyboardInterrupt) as leaving:
        train(2, later=60.0)
    assert not str(leaving.value)  # before the update was done
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.usefixtures("in_foreground")
def test_a_signal_after_the_last_update_is_said(caplog):
    with StopOnTermination(accelerator()).taken():
        os.kill(os.getpid(), signal.SIGINT)
    assert "Ctrl-C came after the last update: the training is complete" in caplog.text


def test_a_run_that_has_all_its_updates_stops_inside_the_rollout():
    termination = StopOnTermination(accelerator(), lambda: True)

    def train():
        with termination.taken():
            os.kill(os.getpid(), signal.SIGTERM)
            assert step(termination, updates=9)

    with pytest.raises(SystemExit):
        train()


def test_all_processes_stop_when_one_received_it():
    assert step(StopOnTermination(accelerator(processes=2, others=1.0)))
    assert not step(StopOnTermination(accelerator(processes=2)))


def test_a_handler_of_the_users_stays():
    before = signal.signal(signal.SIGTERM, handler := lambda number, frame: None)
    try:
        with StopOnTermination(accelerator()).taken():
            assert signal.getsignal(signal.SIGTERM) is handler
        assert signal.getsignal(signal.SIGTERM) is handler
    finally:
        signal.signal(signal.SIGTERM, before)
