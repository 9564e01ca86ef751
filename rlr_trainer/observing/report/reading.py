"""Reads a run's folder, whatever of it is there.

The files: `metrics.jsonl` (needed), and where they exist `rewards.jsonl`, `samples/step_*.json` with their pictures, `run.json`
(or `rlr_config.json`) and `summary.json`. Damaged lines and files are left out with a note in `Run.notes`.
The folder may be someone else's: only plain files inside it are read.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlr_trainer.observing.hacking import EVAL_REWARD

Floats = NDArray[np.float64]

METRICS_FILE = "metrics.jsonl"
LARGEST = 1e100
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
        lines: of metrics.jsonl, as they are.
        train, evals: log lines of the training, and of evaluations.
        closing: the line that Trainer logs at the end.
        rollouts: rewards of each, NaN for dropped samples.
        pictures: by step.
        info: `run.json`.
        summary: `summary.json` of the demo.
        notes: what was left out of the report, and why.
    """

    name: str
    lines: list[dict[str, Any]]
    train: Table
    evals: Table
    closing: dict[str, Any] | None = None
    rollouts: list[Floats] = dataclasses.field(default_factory=list)
    pictures: list[Pictures] = dataclasses.field(default_factory=list)
    info: dict[str, Any] = dataclasses.field(default_factory=dict)
    summary: dict[str, Any] | None = None
    notes: list[str] = dataclasses.field(default_factory=list)

    @property
    def options(self) -> dict[str, Any]:
        """Every recorded option, secrets masked."""
        return hide_secrets(self.info.get("options"))

    @property
    def changed(self) -> dict[str, Any]:
        """The options that differ from their defaults, secrets masked."""
        return hide_secrets(self.info.get("changed"))


def read_run(folder: Path, name: str | None = None) -> Run:
    """Reads a folder.

    Raises:
        ReportError: it is no folder, or its `metrics.jsonl` is missing or has no line with a finite reward.
    """
    if not folder.is_dir():
        raise ReportError(f"{folder}: no such folder; name the output_dir of a run")
    notes: list[str] = []
    lines = _read_lines(folder, METRICS_FILE, notes, _is_log_line)
    if lines is None:
        reason = f" ({notes[0]})" if notes else ""
        raise ReportError(f"{folder}: has no {METRICS_FILE}{reason}; name the output_dir of a run that has begun to train")
    train = _table([line for line in lines if "reward" in line])
    if train.get("reward") is None:
        raise ReportError(
            f"{folder / METRICS_FILE}: has no line with a finite reward; a run writes the first after logging_steps updates"
        )
    closing = [line for line in lines if "train_runtime" in line]
    rollouts = _read_lines(folder, "rewards.jsonl", notes, _is_rollout) or []
    info = _read_object(folder, "run.json", notes)
    if info is None:
        info = {"options": _read_object(folder, "rlr_config.json", notes)}
    return Run(
        name=name or folder.resolve().name,
        lines=lines,
        train=train,
        evals=_table([line for line in lines if "reward" not in line and any(map(EVAL_REWARD.fullmatch, line))]),
        closing=closing[-1] if closing else None,
        rollouts=[floats(line["rewards"]) for line in rollouts],
        pictures=_read_pictures(folder, notes),
        info=info,
        summary=_read_object(folder, "summary.json", notes),
        notes=notes,
    )


def _read(folder: Path, name: str, notes: list[str]) -> str | None:
    """The text of a file; None, with a note unless it is simply absent, where it is no plain file inside the folder."""
    path = folder / name
    if not path.exists():
        return None
    if _inside(folder, folder, name) is None:
        notes.append(f"{name}: left out, it leads outside its folder.")
    elif not path.is_file():
        notes.append(f"{name}: left out, it is no plain file.")
    else:
        return path.read_text(encoding="utf-8", errors="replace")
    return None


def _read_lines(folder: Path, name: str, notes: list[str], is_valid: Callable[[Any], bool]) -> list[dict[str, Any]] | None:
    """The valid objects of a JSON-lines file; a killed run leaves half a line, which is counted in a note. None without a file."""
    text = _read(folder, name, notes)
    if text is None:
        return None
    kept, damaged = [], []
    for number, line in enumerate(text.splitlines(), start=1):
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
        notes.append(f"{name}: {len(damaged)} damaged {lines} left out (line {numbers}), as a run leaves that is killed.")
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


def _is_not_finite(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool) and math.isnan(as_float(value)))


def hide_secrets(options: Any) -> dict[str, Any]:
    """Options with the values of tokens and passwords masked; none for what is no object."""
    return {
        name: "(hidden)" if value and not SECRETS.isdisjoint(name.lower().split("_")) else value
        for name, value in (options.items() if isinstance(options, dict) else ())
    }


def _list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _is_log_line(value: Any) -> bool:
    step = value.get("step") if isinstance(value, dict) else None
    return isinstance(step, int) and not isinstance(step, bool) and 0 <= step < 2**53


def _is_rollout(value: Any) -> bool:
    return _is_log_line(value) and isinstance(value.get("rewards"), list)


def _table(lines: list[dict[str, Any]]) -> Table:
    by_step: dict[int, dict[str, Any]] = {}
    for line in sorted(lines, key=lambda line: line["step"]):  # several lines of one update are several evaluations
        by_step.setdefault(line["step"], {}).update(line)
    rows = list(by_step.values())
    names = sorted({name for row in rows for name in row})
    values = {name: [row.get(name, "absent") for row in rows] for name in names}
    columns = {name: floats(column) for name, column in values.items()}
    bad = {name: [_is_not_finite(value) for value in column].count(True) for name, column in values.items()}
    known = {name: column for name, column in columns.items() if not np.isnan(column).all()}
    return Table(np.array(sorted(by_step), dtype=np.float64), known, {name: count for name, count in bad.items() if count})


def _read_object(folder: Path, name: str, notes: list[str]) -> dict[str, Any] | None:
    text = _read(folder, name, notes)
    if text is None:
        return None
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        notes.append(f"{name}: left out, it is no JSON ({error}).")
        return None
    if not isinstance(value, dict):
        notes.append(f"{name}: left out, it holds no object.")
        return None
    return value


def floats(values: Iterable[Any]) -> Floats:
    """JSON numbers as an array, NaN for null."""
    return np.array([as_float(value) for value in values], dtype=np.float64)


def _read_pictures(folder: Path, notes: list[str]) -> list[Pictures]:
    found = []
    for name in sorted(f"samples/{path.name}" for path in (folder / "samples").glob("step_*.json")):
        line = _read_object(folder, name, notes)
        if line is None:
            continue
        if not _is_log_line(line):
            notes.append(f"{name}: left out, it has no step.")
            continue
        prompts, names = _list(line.get("prompts")), _list(line.get("files"))
        rewards = itertools.chain(_list(line.get("rewards")), itertools.repeat(None))
        rows = [
            (str(prompt), _known(reward), _inside(folder, folder / "samples", file))
            for prompt, reward, file in zip(prompts, rewards, names, strict=False)
        ]
        kept = [(prompt, reward, file) for prompt, reward, file in rows if file is not None]
        if len(kept) < len(rows):
            notes.append(f"{name}: it names files outside its folder; they are left out.")
        found.append(
            Pictures(
                step=line["step"],
                prompts=[prompt for prompt, _, _ in kept],
                rewards=[reward for _, reward, _ in kept],
                files=[file for _, _, file in kept],
                diversity=_known(line.get("diversity")),
            )
        )
    return sorted(found, key=lambda pictures: pictures.step)


def _known(value: Any) -> float | None:
    number = as_float(value)
    return None if math.isnan(number) else number


def _inside(root: Path, folder: Path, name: Any) -> Path | None:
    """The file of that name in `folder`; None for a name or a link that leads out of `root`."""
    if not isinstance(name, str) or "\0" in name:
        return None
    path = Path(os.path.realpath(folder / name))  # unlike Path.resolve, links in a circle are no error
    return path if path.is_relative_to(os.path.realpath(root)) else None
