"""Warnings during the training when the log shows signs of reward hacking, or that nothing is learnt. On by default."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from transformers import TrainerCallback

from rlr_trainer.observing.dead_signals import DeadSignals
from rlr_trainer.observing.hacking import WAYS_OUT, HackingSigns

logger = logging.getLogger(__name__)


class _LogMonitor(TrainerCallback):
    """Warns of each sign once. It reads the log, and on resuming the log of the run so far, whose warnings it repeats."""

    def __init__(self) -> None:
        self._signs: Any = self._begin()

    def _begin(self) -> Any:
        raise NotImplementedError

    def _ways_out(self) -> str:
        raise NotImplementedError

    @property
    def warnings(self) -> dict[str, str]:
        """rule -> text of the warnings so far."""
        return self._signs.found

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Reads the log of the run so far, which is empty but for a resumed run."""
        self._signs = self._begin()
        for line in state.log_history if state.global_step > 0 else ():
            self._read(line, line.get("step"), state)

    def on_log(self, args: Any, state: Any, control: Any, logs: Mapping[str, Any] | None = None, **kwargs: Any) -> None:
        self._read(logs or {}, state.global_step, state)

    def _read(self, line: Mapping[str, Any], step: int | None, state: Any) -> None:
        new = self._signs.read(line)
        if new and state.is_world_process_zero:
            logger.warning("after %s updates: %s. %s", step, "; ".join(new), self._ways_out())


class RewardHackingMonitor(_LogMonitor):
    """Warns of each sign of `HackingSigns` once. `trainer.remove_callback(RewardHackingMonitor)` removes it."""

    def _begin(self) -> HackingSigns:
        return HackingSigns()

    def _ways_out(self) -> str:
        return WAYS_OUT


class DeadSignalMonitor(_LogMonitor):
    """Warns of each sign of `DeadSignals` once. `trainer.remove_callback(DeadSignalMonitor)` removes it.

    Args:
        pictures: of a rollout, over all processes; None: not known.
    """

    def __init__(self, pictures: int | None = None) -> None:
        self.pictures = pictures
        super().__init__()

    def _begin(self) -> DeadSignals:
        return DeadSignals(self.pictures)

    def _ways_out(self) -> str:
        return self._signs.causes
