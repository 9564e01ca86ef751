"""SIGTERM: a checkpoint, then out. Schedulers and cloud machines send it before they take a machine away."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from transformers import TrainerCallback

logger = logging.getLogger(__name__)

EXIT_TERMINATED = 128 + signal.SIGTERM  # what a shell reports for a process that ended by this signal


class StopOnTermination(TrainerCallback):
    """On SIGTERM, saves a checkpoint at the end of the rollout's updates and stops the training; on a second one the process ends at once.

    It takes the signal only where nothing else has (a handler of the user's, or of a launcher, stays) and gives it back after
    training. All processes of a run agree, at the end of each update, on whether to stop.
    `inside_rollout` says whether updates of the present rollout are still to come, `stopped` whether the signal stopped the training.
    """

    def __init__(self, accelerator: Any, inside_rollout: Callable[[], bool] = lambda: False) -> None:
        self.accelerator, self.inside_rollout = accelerator, inside_rollout
        self.stopped = False
        self._received = False
        self._installed = False
        self._updates = 0  # after which it stopped

    @contextmanager
    def taken(self) -> Iterator[None]:
        """Takes the signal, and gives it back at the end; then leaves, if the training was stopped by it.

        Raises:
            SystemExit: with the exit code of the signal.
        """
        self.stopped = self._received = False
        in_main_thread = threading.current_thread() is threading.main_thread()
        if in_main_thread and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            signal.signal(signal.SIGTERM, self._receive)
            self._installed = True
        try:
            yield
        finally:
            self._give_back()
        if self.stopped:
            logger.warning("stopped after update %d; continue with resume_from_checkpoint=True", self._updates)
            raise SystemExit(EXIT_TERMINATED)

    def _give_back(self) -> None:
        if self._installed:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            self._installed = False

    def _receive(self, number: int, frame: Any) -> None:
        self._received = True
        self._give_back()
        logger.warning(
            "SIGTERM: saving a checkpoint when the updates of this rollout are done, then leaving (once more: leaving at once)"
        )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> Any:
        received = self._received
        if self.accelerator.num_processes > 1:
            flag = torch.tensor(float(received), device=self.accelerator.device)
            received = bool(self.accelerator.reduce(flag, reduction="sum") > 0)
        ends = state.global_step >= state.max_steps  # a run whose last rollout is not used up gets no further
        if received and (ends or not self.inside_rollout()):
            self.stopped, self._updates = True, state.global_step
            control.should_save = True
            control.should_training_stop = True
        return control
