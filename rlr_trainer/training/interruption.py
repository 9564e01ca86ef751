"""SIGTERM and Ctrl-C: a checkpoint, then out. Schedulers and cloud machines send SIGTERM before they take a machine away."""

from __future__ import annotations

import logging
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import TrainerCallback

logger = logging.getLogger(__name__)

EXIT_TERMINATED = 128 + signal.SIGTERM  # what a shell reports for a process that ended by this signal
AGAIN = 2.0  # seconds: a launcher passes on the Ctrl-C that its processes have already got from the terminal
NAMES = {signal.SIGTERM: "SIGTERM", signal.SIGINT: "Ctrl-C"}


class StopOnTermination(TrainerCallback):
    """On SIGTERM or Ctrl-C, saves a checkpoint at the end of the rollout's updates and stops the training; on a second one it ends at once.

    It takes a signal only where nothing else has (a handler of the user's, or of a launcher, stays) and gives it back after
    training. All processes of a run agree, at the end of each update, on whether to stop.
    `inside_rollout` says whether updates of the present rollout are still to come, `stopped` whether a signal stopped the training.
    """

    def __init__(self, accelerator: Any, inside_rollout: Callable[[], bool] = lambda: False) -> None:
        self.accelerator, self.inside_rollout = accelerator, inside_rollout
        self.stopped = False
        self._received: int | None = None  # a signal's number
        self._when = 0.0
        self._installed: dict[int, Any] = {}  # signal -> the handler before
        self._updates = 0  # after which it stopped

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Takes the signals, and gives them back at the end; then leaves, if the training was stopped by one.

        Raises:
            SystemExit: with the exit code of SIGTERM. KeyboardInterrupt: after Ctrl-C.
        """
        self.stopped, self._received = False, None
        if threading.current_thread() is threading.main_thread():
            for number, usual in ((signal.SIGTERM, signal.SIG_DFL), (signal.SIGINT, signal.default_int_handler)):
                if signal.getsignal(number) is usual:
                    self._installed[number] = signal.signal(number, self._receive)
        try:
            yield
        finally:
            self._give_back()
        if self.stopped:
            said = f"stopped after update {self._updates}, which is saved; continue with resume_from_checkpoint=True"
            if self._received == signal.SIGINT:
                raise KeyboardInterrupt(said)
            logger.warning("%s", said)
            raise SystemExit(EXIT_TERMINATED)
        if self._received is not None:
            logger.warning("%s came after the last update: the training is complete", NAMES[signal.Signals(self._received)])

    def _give_back(self, *numbers: int) -> None:
        for number in numbers or tuple(self._installed):
            if number in self._installed:
                signal.signal(number, self._installed.pop(number))

    def _receive(self, number: int, frame: Any) -> None:
        if self._received is not None:
            if number == self._received and time.monotonic() - self._when < AGAIN:
                return
            self._give_back()
            os.kill(os.getpid(), number)  # does at once what it usually does
            return
        self._received, self._when = number, time.monotonic()
        self._give_back(signal.SIGTERM)
        logger.warning(
            "%s: saving a checkpoint when the updates of this rollout are done, then leaving (once more: leaving at once)",
            NAMES[signal.Signals(number)],
        )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        """Asks for a checkpoint and the end, once a process has got a signal and no update of the rollout is left to do."""
        received = self._agreed()
        ends = state.global_step >= state.max_steps  # a run whose last rollout is not used up gets no further
        if received is not None and (ends or not self.inside_rollout()):
            self._received = received
            self.stopped, self._updates = True, state.global_step
            control.should_save = True
            control.should_training_stop = True
        return control

    def _agreed(self) -> int | None:
        """The signal that a process received, the same on all: SIGTERM before Ctrl-C."""
        if self.accelerator.num_processes == 1:
            return self._received
        flags = torch.tensor([float(self._received == number) for number in NAMES], device=self.accelerator.device)
        counts = self.accelerator.reduce(flags, reduction="sum")
        return next((number for number, count in zip(NAMES, counts.tolist(), strict=True) if count > 0), None)
