"""Reads a run's folder, whatever of it is there.

The files: `metrics.jsonl` (needed), and where they exist `rewards.jsonl`, `samples/step_*.json` with their pictures, `run.json`
(or `rlr_config.json`), `diagnosis.json` and `summary.json`. Damaged lines and files are left out with a note in `Run.notes`.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

METRICS_FILE = "metrics.jsonl"
LARGEST = 1e100
EVAL_REWARD = re.compile(r"eval_(?:.+_)?reward")  # with the name of the data where there are several
SECRETS = {"token", "password", "secret", "key"}  # words in option names whose values are not shown


class ReportError(ValueError):
    """There is nothing to report on, or nowhere to write it; the message says what to do."""


@dataclasses.dataclass(frozen=True)
class Table:
    """Log lines as columns.

    Attributes:
        steps: [N] updates, increasing.
        columns: name -> [N]; NaN where a line lacks the value or has one that is not finite.
        not_finite: name -> lines in which the value was there but not finite.
    """

    steps: Floats
    columns: dict[str, Floats]
    not_finite: dict[str, int]

    def __len__(self) -> int:
        return len(self.steps)

    def get(self, name: str) -> Floats | None:
        """A column, or None if it has no finite value."""
        column = self.columns.get(name)
        return None if column is None or np.isnan(column).all() else column


@dataclasses.dataclass(frozen=True)
class Rollout:
    """Rewards [S] of one rollout, NaN for dropped samples, and the updates before it."""

    step: int
    rewards: Floats


@dataclasses.dataclass(frozen=True)
class Pictures:
    """The pictures of the fixed prompts after `step` updates. Lists of equal length; a reward may be None."""

    step: int
    prompts: list[str]
    rewards: list[float | None]
    files: list[Path]
    diversity: float | None


@dataclasses.dataclass(frozen=True)
class Run:
    """One run's folder. What is absent is None or empty.

    Attributes:
        name: how the report calls the run.
        train, evals: log lines of the training, and of evaluations.
        closing: the line that Trainer logs at the end.
        rollouts: in order.
        pictures: by step.
        info: `run.json`.
        diagnosis, summary: `diagnosis.json` of `rlr-trainer diagnose`, `summary.json` of the demo.
        notes: what was left out of the report, and why.
    """

    folder: Path
    name: str
    train: Table
    evals: Table
    closing: dict[str, Any] | None = None
    rollouts: list[Rollout] = dataclasses.field(default_factory=list)
    pictures: list[Pictures] = dataclasses.field(default_factory=list)
    info: dict[str, Any] = dataclasses.field(default_factory=dict)
    diagnosis: dict[str, Any] | None = None
    summary: dict[str, Any] | None = None
    notes: list[str] = dataclasses.field(default_factory=list)

    @property
    def options(self) -> dict[str, Any]:
        """Every recorded option, secrets masked."""
        return hide_secrets(_dict(self.info.get("options")))

    @property
    def changed(self) -> dict[str, Any]:
        """The options that differ from their defaults, secrets masked."""
        return hide_secrets(_dict(self.info.get("changed")))


def read_run(folder: Path, name: str | None = None) -> Run:
    """Reads a folder.

    Raises:
        ReportError: it is no folder, or its `metrics.jsonl` is missing or has no line with a finite reward.
    """
    if not folder.is_dir():
        raise ReportError(f"{folder}: no such folder; name the output_dir of a run")
    path = folder / METRICS_FILE
    if not path.is_file():
        raise ReportError(f"{folder}: has no {METRICS_FILE}; name the output_dir of a run that has begun to train")
    notes: list[str] = []
    lines = read_lines(path, notes, _is_log_line)
    train = _table([line for line in lines if "reward" in line], notes)
    if train.get("reward") is None:
        raise ReportError(f"{path}: has no line with a finite reward; a run writes the first after logging_steps updates")
    closing = [line for line in lines if "train_runtime" in line]
    info = _read_object(folder / "run.json", notes)
    if info is None:
        options = _read_object(folder / "rlr_config.json", notes)
        info = {} if options is None else {"options": options}
    return Run(
        folder=folder,
        name=name or folder.resolve().name,
        train=train,
        evals=_table([line for line in lines if "reward" not in line and any(map(EVAL_REWARD.fullmatch, line))], notes),
        closing=closing[-1] if closing else None,
        rollouts=_read_rollouts(folder / "rewards.jsonl", notes),
        pictures=_read_pictures(folder / "samples", notes),
        info=info,
        diagnosis=_read_object(folder / "diagnosis.json", notes),
        summary=_read_object(folder / "summary.json", notes),
        notes=notes,
    )


def read_lines(path: Path, notes: list[str], is_valid: Callable[[Any], bool]) -> list[dict[str, Any]]:
    """The valid objects of a JSON-lines file; a killed run leaves half a line, which is counted in a note."""
    kept, damaged = [], []
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), start=1):
        try:
            value = json.loads(line)
        except (ValueError, RecursionError):
            value = None
        if is_valid(value):
            kept.append(value)
        elif line.strip():
            damaged.append(number)
    if damaged:
        lines = "line" if len(damaged) == 1 else "lines"
        numbers = ", ".join(map(str, damaged[:5])) + (", ..." if len(damaged) > 5 else "")
        notes.append(f"{path.name}: {len(damaged)} damaged {lines} left out (line {numbers}), as a run leaves that is killed.")
    return kept


def as_float(value: Any) -> float:
    """A JSON number as a float; NaN for null, for anything else, and from `LARGEST` on, as good as infinite."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return math.nan
    try:
        number = float(value)
    except OverflowError:
        return math.nan
    return number if abs(number) < LARGEST else math.nan


def hide_secrets(options: dict[str, Any]) -> dict[str, Any]:
    """Options with the values of tokens and passwords masked."""
    return {name: "(hidden)" if value and _is_secret(name) else value for name, value in options.items()}


def _is_secret(name: str) -> bool:
    return not SECRETS.isdisjoint(name.lower().split("_"))


def _dict(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _is_step(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**53


def _is_log_line(value: Any) -> bool:
    return isinstance(value, dict) and _is_step(value.get("step"))


def _is_rollout(value: Any) -> bool:
    return _is_log_line(value) and isinstance(value.get("rewards"), list)


def _table(lines: list[dict[str, Any]], notes: list[str]) -> Table:
    by_step: dict[int, dict[str, Any]] = {}
    repeated = 0
    for line in lines:  # several lines of one update are several evaluations
        known = by_step.setdefault(line["step"], {})
        repeated += any(name == "reward" or EVAL_REWARD.fullmatch(name) is not None for name in known.keys() & line.keys())
        known.update(line)
    if repeated:
        notes.append(f"{METRICS_FILE}: {repeated} lines repeat an update; the last of each counts.")
    ordered = [by_step[step] for step in sorted(by_step)]
    columns: dict[str, Floats] = {}
    not_finite: dict[str, int] = {}
    for row, line in enumerate(ordered):
        for name, value in line.items():
            number = as_float(value)
            if math.isnan(number):
                if value is None or (isinstance(value, int | float) and not isinstance(value, bool)):
                    not_finite[name] = not_finite.get(name, 0) + 1
                continue
            if name not in columns:
                columns[name] = np.full(len(ordered), np.nan)
            columns[name][row] = number
    return Table(np.array(sorted(by_step), dtype=np.float64), columns, not_finite)


def _read_object(path: Path, notes: list[str]) -> dict[str, Any] | None:
    if not path.is_file():
        return None
    try:
        value = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except (ValueError, RecursionError) as error:
        notes.append(f"{path.name}: left out, it is no JSON ({error}).")
        return None
    if not isinstance(value, dict):
        notes.append(f"{path.name}: left out, it holds no object.")
        return None
    return value


def _read_rollouts(path: Path, notes: list[str]) -> list[Rollout]:
    if not path.is_file():
        return []
    lines = sorted(read_lines(path, notes, _is_rollout), key=lambda line: line["step"])
    return [Rollout(line["step"], floats(line["rewards"])) for line in lines]


def floats(values: Iterable[Any]) -> Floats:
    """JSON numbers as an array, NaN for null."""
    return np.array([as_float(value) for value in values], dtype=np.float64)


def _read_pictures(folder: Path, notes: list[str]) -> list[Pictures]:
    found = []
    for path in sorted(folder.glob("step_*.json")):
        line = _read_object(path, notes)
        if line is None:
            continue
        if not _is_log_line(line):
            notes.append(f"samples/{path.name}: left out, it has no step.")
            continue
        prompts, rewards = [str(p) for p in _list(line.get("prompts"))], _list(line.get("rewards"))
        files = [_inside(folder, name) for name in _list(line.get("files"))]
        if None in files:
            notes.append(f"samples/{path.name}: it names files outside its folder; they are left out.")
        count = min(len(files), len(prompts))
        numbers = [as_float(value) for value in rewards[:count]] + [math.nan] * (count - len(rewards))
        kept = [row for row in range(count) if files[row] is not None]
        diversity = as_float(line.get("diversity"))
        found.append(
            Pictures(
                step=line["step"],
                prompts=[prompts[row] for row in kept],
                rewards=[None if math.isnan(numbers[row]) else numbers[row] for row in kept],
                files=[file for file in files if file is not None][: len(kept)],
                diversity=None if math.isnan(diversity) else diversity,
            )
        )
    return sorted(found, key=lambda pictures: pictures.step)


def _inside(folder: Path, name: Any) -> Path | None:
    """The file of that name below `folder`; None for a name that leads out of it."""
    if not isinstance(name, str) or "\0" in name:
        return None
    path = (folder / name).resolve()
    return path if path.is_relative_to(folder.resolve()) else None
