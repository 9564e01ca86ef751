"""The run's files: `run.json`, `metrics.jsonl` and `rewards.jsonl`."""

from __future__ import annotations

import datetime
import json
import logging
import math
import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from rlr_trainer.observing.callbacks import RLRCallback
from rlr_trainer.observing.lines import CLOSING
from rlr_trainer.persistence.checkpoints import CheckpointStore
from rlr_trainer.persistence.run_state import OPTIMIZER_ARGUMENTS

logger = logging.getLogger(__name__)

METRICS_FILE = "metrics.jsonl"
REWARDS_FILE = "rewards.jsonl"
RUN_FILE = "run.json"
RUN_FORMAT = 1
RECORDED = ("model", "rewards", "reward_functions", "eval_rewards", "prompts", "plan", "device", "processes")
PLACES = {"output_dir", "logging_dir", "run_name", "overwrite", "resume_from_checkpoint"}  # where, not what is computed


class RunFiles(RLRCallback):
    """Writes `run.json`, `metrics.jsonl` and `rewards.jsonl` to the output folder, from the beginning of the training on.

    A resumed run drops the lines past its checkpoint, and the closing lines of the runs before; checkpoints past it are renamed. An
    evaluation before the training must not make the folder look like that of a run.

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
        """Begins the files; those of a resumed run lose what lies past its checkpoint, and its time goes on from what they say."""
        folder, step = Path(args.output_dir), state.global_step
        CheckpointStore(folder).find_best(state)
        if not state.is_world_process_zero:
            return
        folder.mkdir(parents=True, exist_ok=True)
        kept = _keep_lines(folder / METRICS_FILE, lambda row: step > 0 and row["step"] <= step and CLOSING not in row)
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
        """Adds the rewards of a rollout to `rewards.jsonl`; none before the training, whose files are not begun."""
        if self._started is None:
            return
        rewards = [_plain(value) for value in rollout.rewards.tolist()]
        _append(Path(args.output_dir) / REWARDS_FILE, {"rollout": self._rollouts, "step": state.global_step, "rewards": rewards})
        self._rollouts += 1

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, Any] | None = None, **kwargs: Any) -> None:
        """Adds a log line to `metrics.jsonl`, with the time since the run began."""
        if self._started is None or not logs:
            return
        row = {"step": state.global_step, "seconds": round(self.seconds, 3)}
        row |= {name: _plain(value) for name, value in logs.items()}
        row.pop("train_loss", None)  # Trainer averages it over this call of train() alone: a resumed run would have another
        _append(Path(args.output_dir) / METRICS_FILE, row)


def _changes(run: dict[str, Any], resumed: list[dict[str, Any]], facts: dict[str, Any]) -> dict[str, list[Any]]:
    """name -> [value before, value now] of what is not as it was when the run began or was last resumed, and has an effect."""
    before, now = _named(run), _named(facts)
    for entry in resumed:
        before |= {name: after for name, (_, after) in entry["changed"].items()}
    names = sorted((before.keys() | now.keys()) - PLACES - set(OPTIMIZER_ARGUMENTS))
    return {name: [before.get(name), now.get(name)] for name in names if before.get(name) != now.get(name)}


def _named(facts: dict[str, Any]) -> dict[str, Any]:
    single = {name: facts.get(name) for name in RECORDED}
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
