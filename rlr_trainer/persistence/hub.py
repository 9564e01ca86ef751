"""Uploads to the hub: while training goes on, and of its result."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable
from typing import Any

from transformers.trainer_utils import HubStrategy

from rlr_trainer.rollouts.processes import Processes

logger = logging.getLogger(__name__)


class HubUploads:
    """What a trainer uploads. Trainer does it in the background, one push at a time.

    `behind` says whether the last save was not pushed, because the push before it still went on.
    """

    def __init__(self, trainer: Any, processes: Processes) -> None:
        self.trainer, self.processes = trainer, processes
        self.behind = False

    def at_save(self, push: Callable[[], None]) -> None:
        """Uploads the trained weights, with Trainer's `push`, unless the run uploads at its end alone or the last push still goes on."""
        args = self.trainer.args
        if args.hub_strategy == HubStrategy.END:
            return
        push_before = getattr(self.trainer, "push_in_progress", None)
        goes_on = push_before is not None and not push_before.is_done()
        self.behind = self.processes.of_main(goes_on and not args.hub_always_push)
        if self.behind:  # Trainer leaves this one out, and the push that goes on reads the files in output_dir
            return
        self.warn_of_failures()
        self.trainer.save_model(args.output_dir, _internal_call=True)
        push()

    def at_end(self) -> None:
        """Uploads the result of a training, where the options ask for it and no push has done it."""
        args = self.trainer.args
        if args.push_to_hub and (args.hub_strategy == HubStrategy.END or self.behind):
            self.trainer.push_to_hub()

    def push(self, upload: Callable[..., Any], repo_id: str | None, private: bool | None, commit_message: str, **how: Any) -> Any:
        """The trained weights and the model card, to `repo_id` or the repository of the options, by Trainer's `upload`.

        What fails on the way is logged, not raised: a finished training must not end with an error because of its upload.
        """
        trainer = self.trainer
        if repo_id is not None and re.search(r"\s", repo_id):  # Trainer's first argument is the commit message
            commit_message, repo_id = repo_id, None
        if private is not None:
            trainer.args.hub_private_repo = private
        try:
            if repo_id is not None:
                if trainer.is_world_process_zero():
                    trainer._finish_current_push()
                trainer.args.hub_model_id = repo_id  # without an owner the hub takes that of the token
                trainer.hub_model_id = None  # Trainer then makes the repository
            return upload(commit_message, **how)
        except Exception as error:  # the hub's client raises kinds of its own
            logger.error(
                "the upload to %s failed: %s: %s. The weights are in %s: `hf upload %s %s` uploads them",
                repo_id or trainer.args.hub_model_id or "the hub",
                type(error).__name__,
                error,
                trainer.args.output_dir,
                repo_id or trainer.args.hub_model_id or "OWNER/NAME",
                trainer.args.output_dir,
            )
            return None

    def warn_of_failures(self) -> None:
        """Trainer starts uploads in the background and never asks how they ended."""
        push = getattr(self.trainer, "push_in_progress", None)
        if push is None or not push.is_done():
            return
        for job in push.jobs:
            try:
                job.result()
            except Exception as error:  # the hub's client raises kinds of its own
                logger.warning("an upload to %s failed: %s: %s", self.trainer.hub_model_id, type(error).__name__, error)
        self.trainer.push_in_progress = None
