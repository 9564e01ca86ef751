"""Uploads to the hub while training goes on."""

from __future__ import annotations

import logging
from pathlib import Path

from transformers.trainer_utils import HubStrategy

from rlr_trainer.rollouts.processes import of_main_process
from rlr_trainer.training.config import RLRConfig
from rlr_trainer.training.trl import compat

logger = logging.getLogger(__name__)


class PushingTrainer(compat.BaseTrainer):
    """The part of `RLRTrainer` that uploads at a save. Trainer does it in the background, one push at a time."""

    args: RLRConfig
    _writing_to: Path | None = None  # where a checkpoint is being written
    _push_is_behind = False  # whether the last save was not pushed, because the push before it still went on

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._writing_to is not None:  # a push reads the folder while training goes on: it must have its name by then
            return
        if self.args.hub_strategy == HubStrategy.END:
            return
        self._push_is_behind = of_main_process(self._push_goes_on() and not self.args.hub_always_push, self.accelerator)
        if self._push_is_behind:  # Trainer leaves this one out, and the push that goes on reads the files in output_dir
            return
        self._warn_of_failed_pushes()
        self.save_model(self.args.output_dir, _internal_call=True)
        super()._push_from_checkpoint(checkpoint_folder)

    def _push_goes_on(self) -> bool:
        push = getattr(self, "push_in_progress", None)
        return push is not None and not push.is_done()

    def _finish_current_push(self) -> None:
        super()._finish_current_push()
        self._warn_of_failed_pushes()

    def _warn_of_failed_pushes(self) -> None:
        """Trainer starts uploads in the background and never asks how they ended."""
        push = getattr(self, "push_in_progress", None)
        if push is None or not push.is_done():
            return
        for job in push.jobs:
            try:
                job.result()
            except Exception as error:  # the hub's client raises kinds of its own
                logger.warning("an upload to %s failed: %s: %s", self.hub_model_id, type(error).__name__, error)
        self.push_in_progress = None
