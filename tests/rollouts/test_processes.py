"""How a process of a distributed run leaves."""

import json
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from programs import environment

import rlr_trainer.training.trainer

WORKER = Path(__file__).parents[1] / "gloo_exit_worker.py"
PAIRS = 8


def ends(folder, mode):
    (folder / mode).mkdir()
    command = [sys.executable, str(WORKER), str(folder / mode), mode]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, env=environment(), check=True)
    return json.loads(done.stdout)


@pytest.mark.slow
def test_operations_that_gloo_has_not_let_go_of_abort_no_process(tmp_path):
    """A pair of which nobody waits ends well in about one of three cases, so eight do in one of several thousand."""
    assert ends(tmp_path, "waiting") == [[0, 0]] * PAIRS
    assert any(-signal.SIGABRT in pair for pair in ends(tmp_path, "leaving at once"))


def test_a_trainer_has_its_process_wait(make_trainer, monkeypatch):
    calls = []
    monkeypatch.setattr(rlr_trainer.training.trainer, "let_gloo_finish_at_exit", lambda: calls.append(True))
    make_trainer()
    assert calls == [True]
