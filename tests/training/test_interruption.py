"""SIGTERM, without a trainer: when it is acted on, and who handles it."""

import os
import signal
from types import SimpleNamespace

import pytest
import torch
from transformers import TrainerControl

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
    with pytest.raises(SystemExit) as leaving, termination.taken(SimpleNamespace(global_step=2)):
        assert not step(termination)
        os.kill(os.getpid(), signal.SIGTERM)
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL  # a second one ends the process at once
        assert not step(termination)
        inside[0] = False
        assert step(termination)
    assert leaving.value.code == 143


def test_a_run_that_has_all_its_updates_stops_inside_the_rollout():
    termination = StopOnTermination(accelerator(), lambda: True)
    with pytest.raises(SystemExit), termination.taken(SimpleNamespace(global_step=9)):
        os.kill(os.getpid(), signal.SIGTERM)
        assert step(termination, updates=9)


def test_all_processes_stop_when_one_received_it():
    assert step(StopOnTermination(accelerator(processes=2, others=1.0)))
    assert not step(StopOnTermination(accelerator(processes=2)))


def test_a_handler_of_the_users_stays():
    before = signal.signal(signal.SIGTERM, handler := lambda number, frame: None)
    try:
        with StopOnTermination(accelerator()).taken(SimpleNamespace(global_step=0)):
            assert signal.getsignal(signal.SIGTERM) is handler
        assert signal.getsignal(signal.SIGTERM) is handler
    finally:
        signal.signal(signal.SIGTERM, before)
