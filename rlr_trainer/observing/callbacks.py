"""Callbacks: the event of a rollout, whole updates, the run's files (`run.json`, `metrics.jsonl`, `rewards.jsonl`), and progress bars."""

from __future__ import annotations

import datetime
import json
import logging
import math
import os
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm.auto import tqdm
from transformers import ProgressCallback, TrainerCallback
from transformers.trainer_callback import CallbackHandler
from transformers.utils import is_in_notebook

from rlr_trainer.persistence.checkpoints import CheckpointStore
from rlr_trainer.persistence.run_state import OPTIMIZER_ARGUMENTS

logger = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"
REWARDS_FILE = "rewards.jsonl"
RUN_FILE = "run.json"
RUN_FORMAT = 1
PLACES = {"output_dir", "logging_dir", "run_name", "overwrite", "resume_from_checkpoint"}  # where, not what is computed


class RLRCallback(TrainerCallback):
    """A `TrainerCallback` that also sees every rollout. Plain `TrainerCallback`s work as well; they are not told of rollouts."""

    def on_rollout_end(self, args: Any, state: Any, control: Any, *, rollout: Any, plan: Any, **kwargs: Any) -> Any:
        """Called after a rollout is sampled and scored, before its updates, on every process.

        Args:
            args, state, control: as in every event; `state.global_step` counts the updates before this rollout.
            rollout: `rlr_trainer.rollouts.batches.RolloutSummary`: `pictures` of this process, in sampling batches of [images [B, 3, H, W] in
                [0, 1], prompts, metadata, rewards [B], reward_metadata]; `rewards` [S] and `prompts` of all processes; `metrics`.
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
        self._stop_training = self._stop_epoch = False
        return super().on_train_begin(args, state, control, **about)

    def on_substep_end(self, args: Any, state: Any, control: Any, **about: Any) -> Any:
        control = super().on_substep_end(args, state, control, **about)
        self._stop_training |= control.should_training_stop
        self._stop_epoch |= control.should_epoch_stop
        control.should_training_stop = control.should_epoch_stop = False
        return control

    def on_step_end(self, args: Any, state: Any, control: Any, **about: Any) -> Any:
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


class RunFiles(RLRCallback):
    """Writes `run.json`, `metrics.jsonl` and `rewards.jsonl` to the output folder; a resumed run drops what lies past its checkpoint.

    Checkpoints past it are renamed.

    It starts with the training: an evaluation before must not make the folder look like that of a run.

    Args:
        facts: gives the content of `run.json` that the trainer knows; called when training begins.
    """

    def __init__(self, facts: Callable[[], dict[str, Any]]) -> None:
        self.facts = facts
        self._started: float | None = None
        self._seconds_before = 0.0
        self._rollouts = 0

    @property
    def seconds(self) -> float:
        """Time since training began, evaluations and pictures included, and that of the runs that this one resumes; 0 before."""
        return 0.0 if self._started is None else self._seconds_before + time.perf_counter() - self._started

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        folder, step = Path(args.output_dir), state.global_step
        CheckpointStore(folder).find_best(state)
        if not state.is_world_process_zero:
            return
        folder.mkdir(parents=True, exist_ok=True)
        kept = _keep_lines(folder / METRICS_FILE, lambda row: step > 0 and row["step"] <= step)
        self._seconds_before = max((row["seconds"] for row in kept if row.get("seconds") is not None), default=0.0)
        # a rollout that began at this step comes after the checkpoint
        self._rollouts = len(_keep_lines(folder / REWARDS_FILE, lambda row: row["step"] < step))
        self._started = time.perf_counter()
        self._write_run(folder / RUN_FILE, step)
        CheckpointStore(folder).supersede(step)

    def _write_run(self, path: Path, step: int) -> None:
        now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
        facts = json.loads(json.dumps(self.facts(), default=str))
        run = None
        if step and path.is_file():
            try:
                run = json.loads(path.read_text(encoding="utf-8"))
            except ValueError as error:
                logger.warning("%s is damaged (%s): it is written anew", path, error)
        if not isinstance(run, dict):
            run = {"format": RUN_FORMAT, "started": now} | facts
        if step:
            # a checkpoint before those that earlier runs went on from undoes what they changed
            kept = [entry for entry in run.get("resumed", []) if entry["update"] <= step]
            run["resumed"] = [*kept, {"at": now, "update": step, "changed": _changes(run, kept, facts)}]
        _replace(path, json.dumps(run, indent=2) + "\n")

    def on_rollout_end(self, args: Any, state: Any, control: Any, *, rollout: Any, plan: Any, **kwargs: Any) -> None:
        if self._started is None:
            return
        rewards = [_plain(value) for value in rollout.rewards.tolist()]
        _append(Path(args.output_dir) / REWARDS_FILE, {"rollout": self._rollouts, "step": state.global_step, "rewards": rewards})
        self._rollouts += 1

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if self._started is None or not logs:
            return
        row = {"step": state.global_step, "seconds": round(self.seconds, 3)}
        _append(Path(args.output_dir) / METRICS_FILE, row | {name: _plain(value) for name, value in logs.items()})


def _changes(run: dict[str, Any], resumed: list[dict[str, Any]], facts: dict[str, Any]) -> dict[str, list[Any]]:
    """name -> [value before, value now] of what is not as it was when the run began or was last resumed, and has an effect."""
    before, now = _named(run), _named(facts)
    for entry in resumed:
        before |= {name: after for name, (_, after) in entry["changed"].items()}
    names = sorted((before.keys() | now.keys()) - PLACES - set(OPTIMIZER_ARGUMENTS))
    return {name: [before.get(name), now.get(name)] for name in names if before.get(name) != now.get(name)}


def _named(facts: dict[str, Any]) -> dict[str, Any]:
    single = {name: facts.get(name) for name in ("model", "rewards", "eval_rewards", "plan", "device", "processes")}
    return single | facts["options"] | facts["changed"] | facts["versions"]


def _append(path: Path, row: dict[str, Any]) -> None:
    try:
        with open(path, "a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
    except OSError as error:
        raise _with_path(error, path) from error


def _replace(path: Path, text: str) -> None:
    """Writes a file whole or not at all: a full disk, or a kill, leaves what was there."""
    aside = path.with_name(f"_{path.name}.new")
    try:
        aside.write_text(text, encoding="utf-8")
        os.replace(aside, path)
    except OSError as error:
        aside.unlink(missing_ok=True)
        raise _with_path(error, path) from error


def _with_path(error: OSError, path: Path) -> OSError:
    """The error of a full disk names no file."""
    return OSError(error.errno, f"cannot write {path}: {error.strerror}")


def _keep_lines(path: Path, wanted: Callable[[dict[str, Any]], bool]) -> list[dict[str, Any]]:
    """Rewrites a file of JSON lines with the wanted ones, and returns them. A last line cut off by a crash is dropped."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else ():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    kept = [row for row in rows if wanted(row)]
    _replace(path, "".join(json.dumps(row) + "\n" for row in kept))
    return kept


def _plain(value: Any) -> Any:
    """JSON has no NaN: it is written as null."""
    if isinstance(value, Tensor):
        value = value.item()
    return None if isinstance(value, float) and not math.isfinite(value) else value


class RewardProgress(ProgressCallback):
    """Trainer's progress bar with the reward behind it, in place of a printed line per log."""

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if self.training_bar is not None and logs and "reward" in logs:
            self.training_bar.set_postfix(reward=f"{logs['reward']:.3f}")


class RolloutBar:
    """A bar inside Trainer's own while a rollout is sampled and scored; quiet when disabled, and where it would fill a file.

    That is, when the standard error is no terminal, unless this is a notebook.

    It counts denoising steps, and one more per sampling batch for decoding and reward; its label says which of the two goes on.

    Args:
        batches: sampling batches of the rollout.
        num_steps: denoising steps of each.
        disable: show nothing.
    """

    def __init__(self, batches: int, num_steps: int, disable: bool) -> None:
        self.num_steps = num_steps
        quiet = disable or not (sys.stderr.isatty() or is_in_notebook())
        self.bar = tqdm(total=batches * (num_steps + 1), desc="sampling", leave=False, disable=quiet, position=1)
        self._scoring = False

    def __enter__(self) -> RolloutBar:
        return self

    def __exit__(self, *stopped: object) -> None:
        if stopped[0] is None and self._scoring:
            self.bar.update(1)
        self.bar.close()

    def step(self, step: int) -> None:
        """A denoising step is done; after the last one of a batch the reward's turn has come."""
        if self._scoring:
            self.bar.update(1)
            self.bar.set_description("sampling")
        self._scoring = step == self.num_steps - 1
        if self._scoring:
            self.bar.set_description("rewards")
        self.bar.update(1)
