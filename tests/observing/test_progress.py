"""Progress bars."""

import io
import sys

import pytest

from rlr_trainer.observing import progress
from rlr_trainer.observing.progress import RolloutBar


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_the_bar_counts_steps(monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    with RolloutBar(2, 3, disable=False) as bar:
        for _ in range(2):
            for step in range(3):
                bar.step(step)
    assert bar.bar.n == bar.bar.total == 2 * 3
    assert "sampling" in terminal.getvalue()


def test_a_notebook_shows_the_bar(monkeypatch):
    """Its standard error is no terminal."""
    output = io.StringIO()
    monkeypatch.setattr(sys, "stderr", output)
    monkeypatch.setattr(progress, "is_in_notebook", lambda: True)
    with RolloutBar(1, 2, disable=False) as bar:
        bar.step(0)
    assert "sampling" in output.getvalue()


@pytest.mark.parametrize(("terminal", "disable"), [(True, True), (False, False)])
def test_the_bar_is_quiet_when_it_should_be(monkeypatch, terminal, disable):
    output = Terminal() if terminal else io.StringIO()
    monkeypatch.setattr(sys, "stderr", output)
    with RolloutBar(1, 2, disable=disable) as bar:
        bar.step(0)
        bar.step(1)
    assert output.getvalue() == ""


@pytest.mark.medium
def test_a_run_on_a_terminal_shows_both_bars(make_trainer, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    make_trainer(disable_tqdm=False, logging_strategy="no", max_steps=1).train()
    assert "sampling" in terminal.getvalue()
    assert "1/1" in terminal.getvalue()
