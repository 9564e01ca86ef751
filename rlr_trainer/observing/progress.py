"""What a run shows while it goes on: a line per log, the reward behind Trainer's progress bar, a bar of a rollout, and what begins."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Iterator
from typing import Any

from tqdm.auto import tqdm
from transformers import PrinterCallback, ProgressCallback, TrainerCallback
from transformers.utils import is_in_notebook

from rlr_trainer.observing.lines import line_of


class _Clock:
    """Seconds per update between log lines; of the first from the beginning of the update, not of the training with its pictures."""

    def __init__(self) -> None:
        self._then: float | None = None
        self._step = 0

    def stop(self) -> None:
        """The next update begins anew."""
        self._then = None

    def on_update(self, step: int) -> None:
        """An update begins, after so many."""
        if self._then is None:
            self._then, self._step = time.perf_counter(), step

    def seconds(self, step: int) -> float | None:
        """Of each update since the last question; None if there was none."""
        before, count, now = self._then, step - self._step, time.perf_counter()
        if before is None or count < 1:
            return None
        self._then, self._step = now, step
        return (now - before) / count


class RewardProgress(ProgressCallback):
    """Trainer's progress bar with the reward behind it, and one line per log instead of a dict.

    Args:
        lines: whether to write the lines.
    """

    def __init__(self, lines: bool = True) -> None:
        super().__init__()
        self.lines = lines
        self._clock = _Clock()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begins the bar where a resumed run stands, and its clock anew."""
        super().on_train_begin(args, state, control, **kwargs)
        if self.training_bar is not None and state.global_step:  # of a resumed run
            self.training_bar.initial = self.training_bar.n = self.current_step = state.global_step
            self.training_bar.refresh()
        self._clock.stop()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._clock.on_update(state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Shows the reward behind the bar, and the line above it."""
        if self.training_bar is None or not logs:
            return
        if "reward" in logs:
            self.training_bar.set_postfix(reward=f"{logs['reward']:.4g}")
        if self.lines:
            self.training_bar.write(_text(self._clock, logs, state))

    def close_bars(self) -> None:
        """Closes the bars of a training that ended by an error; otherwise the next one's bar would stand below them."""
        for bar in (self.prediction_bar, self.training_bar):
            if bar is not None:
                bar.close()
        self.training_bar = self.prediction_bar = None


class RewardPrinter(PrinterCallback):
    """One line per log, in place of Trainer's dict, where there is no progress bar (`disable_tqdm`)."""

    def __init__(self) -> None:
        super().__init__()
        self._clock = _Clock()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._clock.stop()

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._clock.on_update(state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if state.is_world_process_zero and logs:
            tqdm.write(_text(self._clock, logs, state))


def _text(clock: _Clock, logs: dict[str, Any], state: Any) -> str:
    seconds = clock.seconds(state.global_step) if "loss" in logs else None
    return line_of(logs, state.global_step, state.max_steps, seconds)


def in_own_form(callbacks: list[TrainerCallback]) -> list[TrainerCallback]:
    """Callbacks with this library's progress in the place of Trainer's own; those of the user's stay."""
    return [_own_form(callback) for callback in callbacks]


def _own_form(callback: TrainerCallback) -> TrainerCallback:
    if type(callback) is ProgressCallback:
        return RewardProgress()
    if type(callback) is PrinterCallback:
        return RewardPrinter()
    if type(callback).__name__ == "NotebookProgressCallback":  # its module needs IPython
        from rlr_trainer.observing.notebook import RewardTable

        return RewardTable()
    return callback


@contextlib.contextmanager
def bars_closed(callbacks: list[TrainerCallback]) -> Iterator[None]:
    """At its end no bar of a training is left open, however that ended."""
    try:
        yield
    finally:
        for callback in callbacks:
            if hasattr(callback, "close_bars"):
                callback.close_bars()


def shows_progress(disable: bool) -> bool:
    """Whether somebody looks: not when disabled, and not where bars would fill a file (the standard error is no terminal, nor a notebook)."""
    return not disable and (sys.stderr.isatty() or is_in_notebook())


def announce(text: str, disable: bool = False) -> None:
    """Says, where somebody looks, what begins and takes a while."""
    if shows_progress(disable):
        tqdm.write(text, file=sys.stderr)


class RolloutBar:
    """A bar inside Trainer's own while pictures are sampled and scored; quiet where nobody looks.

    Args:
        batches: sampling batches.
        num_steps: denoising steps of each.
        disable: show nothing.
        what: is done.
    """

    def __init__(self, batches: int, num_steps: int, disable: bool, what: str = "sampling") -> None:
        quiet = not shows_progress(disable)
        self.bar = tqdm(total=batches * num_steps, desc=what, leave=False, disable=quiet, position=1)

    def __enter__(self) -> RolloutBar:
        return self

    def __exit__(self, *stopped: object) -> None:
        self.bar.close()

    def step(self, step: int) -> None:
        """A denoising step is done."""
        self.bar.update(1)
