"""Warnings during the training when the log shows signs of reward hacking. On by default."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from transformers import TrainerCallback

from rlr_trainer.observing.hacking import WAYS_OUT, HackingSigns

logger = logging.getLogger(__name__)


class RewardHackingMonitor(TrainerCallback):
    """Warns of each sign of `HackingSigns` once.

    It reads the log, and on resuming the log of the run so far, whose warnings it repeats.
    `trainer.remove_callback(RewardHackingMonitor)` removes it.
    """

    def __init__(self) -> None:
        self._signs = HackingSigns()

    @property
    def warnings(self) -> dict[str, str]:
        """rule -> text of the warnings so far."""
        return self._signs.found

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._signs = HackingSigns()
        for line in state.log_history if state.global_step > 0 else ():
            self._read(line, line.get("step"), state)

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        self._read(logs or {}, state.global_step, state)

    def _read(self, line: Mapping[str, Any], step: int | None, state: Any) -> None:
        for text in self._signs.read(line):
            if state.is_world_process_zero:
                logger.warning("after %s updates: %s. %s", step, text, WAYS_OUT)
