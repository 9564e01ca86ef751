"""Reads a run's folder, whatever of it is there.

The files: `metrics.jsonl` (needed), and where they exist `rewards.jsonl`, `samples/step_*.json` with their pictures, `run.json`
and `summary.json`. Damaged lines and files are left out with a note in `Run.notes`.
The folder may be someone else's: only plain files inside it are read.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlr_trainer.persistence.metric_names import EVAL_REWARD

Floats = NDArray[np.float64]

LARGEST = 1e100
SECRETS = {"token", "password", "secret", "key"}  # words in option names whose values are not shown


class ReportError(ValueError):
    """There is nothing to report on, or nowhere to write it; the message says what to do."""


@dataclasses.dataclass(frozen=True)
class Table:
    """Log lines as columns.

    Attributes:
        steps: [N] updates, increasing.
        columns: name -> [N]; NaN where a line lacks the value or has one that is not finite. At least one is finite.
        not_finite: name -> lines in which the value was there but not finite.
    """

    steps: Floats
    columns: dict[str, Floats]
    not_finite: dict[str, int]


@dataclasses.dataclass(frozen=True)
class Pictures:
    """The pictures of the fixed prompts after `step` updates: (prompt, reward or NaN, file or None where it cannot be read)."""

    step: int
    rows: list[tuple[str, float, Path | None]]


@dataclasses.dataclass(frozen=True)
class Run:
    """One run's folder. What is absent is empty.

    Attributes:
        name: how the report calls the run.
        lines: of metrics.jsonl, as they are.
        train, evals, fixed: values by update: of the training, of evaluations, and of the fixed prompts' pictures.
        rewards: of all samples, NaN for dropped ones.
        pictures: by step.
        info: `run.json`; "options" and "changed" are dicts with secrets masked.
        summary: `summary.json` of the demo.
        notes: what was left out of the report, and why.
    """

    name: str
    lines: list[dict[str, Any]]
    train: Table
    evals: Table
    fixed: Table
    rewards: Floats
    pictures: list[Pictures]
    info: dict[str, Any]
    summary: dict[str, Any]
    notes: list[str]

    @property
    def names(self) -> set[str]:
        """Of all logged values."""
        return {name for table in (self.train, self.evals, self.fixed) for name in table.columns}

    def points(self, name: str) -> tuple[Floats, Floats]:
        """(updates, values) of a logged value; empty where there are none."""
        found = [(table.steps, table.columns[name]) for table in (self.train, self.evals, self.fixed) if name in table.columns]
        return found[0] if found else (np.array([]), np.array([]))


def read_run(folder: Path, name: str | None = None) -> Run:
    """Reads a folder.

    Raises:
        ReportError: it is no folder, or its `metrics.jsonl` is missing or has no line with a finite reward.
    """
    if not folder.is_dir():
        raise ReportError(f"{folder}: no such folder; name the output_dir of a run")
    notes: list[str] = []
    lines = _read_lines(folder, "metrics.jsonl", notes)
    train = _table([line for line in lines if "reward" in line])
    if "reward" not in train.columns:
        raise ReportError(
            f"{folder}: has no metrics.jsonl with a finite reward; name the output_dir of a run that has logged (every logging_steps "
            f"updates). {' '.join(notes)}"
        )
    info = _read_object(folder, "run.json", notes) or {}
    sets = _read_sets(folder, notes)
    return Run(
        name=name or folder.resolve().name,
        lines=lines,
        train=train,
        evals=_table([line for line in lines if "reward" not in line and any(map(EVAL_REWARD.fullmatch, line))]),
        fixed=_table(
            [
                {"step": line["step"], "fixed/rewards": line["mean"]}
                | {f"fixed/{metric}": line.get(metric) for metric in ("diversity", "motion")}
                for line in sets
            ]
        ),
        rewards=floats([reward for line in _read_lines(folder, "rewards.jsonl", notes) for reward in as_list(line.get("rewards"))]),
        pictures=[Pictures(line["step"], line["rows"]) for line in sets],
        info=info | {key: hide_secrets(info.get(key)) for key in ("options", "changed")},
        summary=_read_object(folder, "summary.json", notes) or {},
        notes=notes,
    )


def _plain_file(root: Path, name: Any) -> Path | None:
    """The file of that name if it is a plain one inside `root`; links are followed first."""
    if not isinstance(name, str) or "\0" in name:
        return None
    path = os.path.realpath(root / name)  # unlike Path.resolve, links in a circle are no error
    return Path(path) if Path(path).is_relative_to(os.path.realpath(root)) and os.path.isfile(path) else None


def _read(folder: Path, name: str, notes: list[str]) -> str:
    """The text of a file; empty, with a note unless it is simply absent, where it is no plain file inside the folder."""
    path = _plain_file(folder, name)
    if path is None and os.path.lexists(folder / name):
        notes.append(f"{name}: left out, it is no plain file inside the folder.")
    return "" if path is None else path.read_text(encoding="utf-8", errors="replace")


def _parse(text: str) -> dict[str, Any] | None:
    """A JSON object; None for anything else."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None


def _read_object(folder: Path, name: str, notes: list[str]) -> dict[str, Any] | None:
    text = _read(folder, name, notes)
    value = _parse(text)
    if text and value is None:
        notes.append(f"{name}: left out, it is no JSON object.")
    return value


def _read_lines(folder: Path, name: str, notes: list[str]) -> list[dict[str, Any]]:
    """The objects of a JSON-lines file that have a step; a killed run leaves half a line, which is counted in a note."""
    parsed = [_parse(line) for line in _read(folder, name, notes).splitlines() if line.strip()]
    kept = [value for value in parsed if value is not None and _has_step(value)]
    if len(kept) < len(parsed):
        notes.append(f"{name}: {len(parsed) - len(kept)} damaged lines left out, as a run leaves that is killed.")
    return kept


def _read_sets(folder: Path, notes: list[str]) -> list[dict[str, Any]]:
    """The records of the fixed prompts' pictures, by step; "rows" as in `Pictures`, "mean" of the rewards."""
    sets = []
    for name in sorted(f"samples/{path.name}" for path in (folder / "samples").glob("step_*.json")):
        line = _read_object(folder, name, notes)
        if line is not None and not _has_step(line):
            notes.append(f"{name}: left out, it has no step.")
        elif line is not None:
            prompts, files = as_list(line.get("prompts")), as_list(line.get("files"))
            rewards = floats([*as_list(line.get("rewards")), *(None for _ in files)])[: len(files)]
            paths = [_plain_file(folder, f"samples/{file}") for file in files]
            rows = [(str(prompt), float(r), path) for prompt, r, path in zip(prompts, rewards, paths, strict=False)]
            known = rewards[~np.isnan(rewards)]
            sets.append(line | {"rows": rows, "mean": float(known.mean()) if len(known) else None})
    return sorted(sets, key=lambda line: line["step"])


def _has_step(line: dict[str, Any]) -> bool:
    return isinstance(line.get("step"), int) and 0 <= line["step"] < 2**53


def _table(lines: list[dict[str, Any]]) -> Table:
    by_step: dict[int, dict[str, Any]] = {}
    for line in sorted(lines, key=lambda line: line["step"]):  # several lines of one update are several evaluations
        by_step.setdefault(line["step"], {}).update(line)
    rows = list(by_step.values())
    names = sorted({name for row in rows for name in row} - {"step"})
    columns = {name: floats([row.get(name) for row in rows]) for name in names}
    bad = {
        name: sum(name in row and math.isnan(x) for row, x in zip(rows, column, strict=True)) for name, column in columns.items()
    }
    known = {name: column for name, column in columns.items() if not np.isnan(column).all()}
    return Table(np.array(list(by_step), dtype=np.float64), known, {name: count for name, count in bad.items() if count})


def floats(values: list[Any]) -> Floats:
    """JSON numbers as an array; NaN for null, for anything else, and from `LARGEST` on, as good as infinite."""
    numbers = [float(v) if isinstance(v, int | float) and abs(v) < LARGEST else math.nan for v in values]
    return np.array(numbers, dtype=np.float64)


def as_list(value: Any) -> list[Any]:
    """The value, or an empty list for what is none."""
    return value if isinstance(value, list) else []


def hide_secrets(options: Any) -> dict[str, Any]:
    """Options with the values of tokens and passwords masked; none for what is no object."""
    return {
        name: "(hidden)" if value and not SECRETS.isdisjoint(name.lower().split("_")) else value
        for name, value in (options.items() if isinstance(options, dict) else ())
    }
