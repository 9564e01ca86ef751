"""Callbacks: the event of a rollout, and requests that wait for the end of an update or of a rollout."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import CallbackHandler

logger = logging.getLogger(__name__)


class RLRCallback(TrainerCallback):
    """A `TrainerCallback` that also sees every rollout. Plain `TrainerCallback`s work as well; they are not told of rollouts."""

    def on_rollout_end(self, args: Any, state: Any, control: Any, *, rollout: Any, plan: Any, **kwargs: Any) -> Any:
        """Called after a rollout is sampled and scored, before its updates, on every process.

        Args:
            args, state, control: as in every event; `state.global_step` counts the updates before this rollout.
            rollout: `rlr_trainer.rollouts.batches.RolloutSummary`: `pictures` of this process, in sampling batches of [images [B, 3, H, W]
                (videos [B, F, 3, H, W]) in [0, 1], prompts, metadata, rewards [B], reward_metadata]; `rewards` [S] and `prompts` of all
                processes; `metrics`.
            plan: the `EstimatorPlan` in force.
            kwargs: `model`, `optimizer`, `lr_scheduler` and the rest of what Trainer passes to every event.

        Returns:
            None, or a changed `control`; what it asks for is done after the update that this rollout begins with.
        """


class RolloutCallbackHandler(CallbackHandler):
    """Trainer's, with three differences.

    The run's own observers come first, in their order: what callbacks look at (averaged weights, files) is there by then, and the
    trackers, which close when training ends, come after the last pictures. There is the event `on_rollout_end`. And a request to stop
    that comes inside an update, such as one at the end of a rollout, waits for the end of the update: Trainer would stop between two
    micro-batches, whose gradient would be lost.

    Args:
        handler: Trainer's own.
        observers: the run's.
    """

    def __init__(self, handler: CallbackHandler, observers: Sequence[TrainerCallback]) -> None:
        super().__init__(handler.callbacks, handler.model, handler.processing_class, handler.optimizer, handler.lr_scheduler)
        self.observers = list(observers)
        self._stop_training = self._stop_epoch = False

    def call_event(self, event: str, args: Any, state: Any, control: Any, **about: Any) -> Any:
        """Tells the observers and the callbacks that know the event."""
        names = ("model", "processing_class", "optimizer", "lr_scheduler", "train_dataloader", "eval_dataloader")
        about |= {name: getattr(self, name) for name in names}
        for callback in [*self.observers, *self.callbacks]:
            method = getattr(callback, event, None)  # a plain TrainerCallback knows nothing of rollouts
            if method is not None:
                control = method(args, state, control, **about) or control
        return control

    def on_rollout_end(self, args: Any, state: Any, control: Any, *, rollout: Any, plan: Any) -> Any:
        """See `RLRCallback`."""
        return self.call_event("on_rollout_end", args, state, control, rollout=rollout, plan=plan)

    def on_train_begin(self, args: Any, state: Any, control: Any, **about: Any) -> Any:
        """Forgets what another training asked for."""
        self._stop_training = self._stop_epoch = False
        return super().on_train_begin(args, state, control, **about)

    def on_substep_end(self, args: Any, state: Any, control: Any, **about: Any) -> Any:
        """Holds back a request to stop until the update is whole."""
        control = super().on_substep_end(args, state, control, **about)
        self._stop_training |= control.should_training_stop
        self._stop_epoch |= control.should_epoch_stop
        control.should_training_stop = control.should_epoch_stop = False
        return control

    def on_step_end(self, args: Any, state: Any, control: Any, **about: Any) -> Any:
        """Passes on the requests to stop that came inside the update."""
        control = super().on_step_end(args, state, control, **about)
        control.should_training_stop |= self._stop_training
        control.should_epoch_stop |= self._stop_epoch
        self._stop_training = self._stop_epoch = False
        return control


class BetweenRollouts:
    """Requests to save or evaluate that come inside a rollout, until its updates are done: a checkpoint holds no half-used rollout.

    Only a run that stops there for good saves at once; what is left of its rollout is then left out.
    """

    def __init__(self) -> None:
        self._save = self._evaluate = False

    def hold(self, control: Any, inside: bool) -> None:
        """Takes up the requests of `control`, or, outside a rollout, gives back those that were held."""
        stops = control.should_training_stop
        if inside and not stops:
            self._save |= control.should_save
            self._evaluate |= control.should_evaluate
            control.should_save = control.should_evaluate = False
            return
        if inside and (self._save or control.should_save):
            logger.warning("the training stops inside a rollout: a run that goes on from here begins with a new one")
        control.should_save |= self._save
        control.should_evaluate |= self._evaluate
        self._save = self._evaluate = False
