"""The report's tables: comparison of runs, settings, versions."""

from __future__ import annotations

import dataclasses
from typing import Any

from rlr_trainer.observing.report import wording
from rlr_trainer.observing.report.facts import Facts, reward_at
from rlr_trainer.observing.report.reading import Floats, Run, hide_secrets
from rlr_trainer.observing.report.series import ends
from rlr_trainer.observing.report.wording import UNKNOWN

NAMES_OF_PLACES = {"output_dir", "logging_dir", "run_name", "overwrite"}  # differ between any two runs


@dataclasses.dataclass(frozen=True)
class Table:
    """Cells as text. The first column holds the rows' names."""

    header: list[str]
    rows: list[list[str]]
    notes: list[str] = dataclasses.field(default_factory=list)


def comparison(runs: list[Run], facts: list[Facts]) -> Table:
    """Key facts, one column a run; the rewards at equal queries and at equal time among them."""
    rows = [
        ["Reward, start", *(wording.with_error(f.start) for f in facts)],
        ["Reward, end", *(wording.with_error(f.end) for f in facts)],
        ["Best mean", *(f"{wording.number(f.best)} at {f.best_step}" for f in facts)],
    ]
    notes = [
        "Start, end and best: means over a tenth of the log lines (5 to 50 lines), ± one standard error.",
    ]
    for axis, totals, text in (
        ("reward_queries", [f.queries for f in facts], lambda value: f"{wording.count(value)} queries"),
        ("seconds", [f.seconds for f in facts], wording.duration),
    ):
        known = [total for total in totals if total is not None]
        if len(known) < 2:
            continue
        for share in (0.5, 1.0):
            limit = share * min(known)
            rows.append([f"Reward after {text(limit)}", *(wording.with_error(reward_at(run, axis, limit)) for run in runs)])
    rows += [
        ["Updates", *(wording.count(f.updates) for f in facts)],
        ["Reward queries", *(wording.count(f.queries) for f in facts)],
        ["Training time", *(wording.duration(f.seconds) for f in facts)],
        ["Samples dropped", *(dropped_text(f) for f in facts)],
    ]
    for name, title in (("kl", "KL"), ("diversity", "Diversity"), ("eval_reward", "Evaluation")):
        columns = [(run.evals if name == "eval_reward" else run.train).get(name) for run in runs]
        if any(column is not None for column in columns):
            rows.append([f"{title}, start → end", *(_pair_text(column) for column in columns)])
    return Table(["", *(wording.letters(i) for i in range(len(runs)))], rows, notes)


def differing_settings(runs: list[Run]) -> Table | None:
    """The options that are not the same in all runs that recorded them, and changed ones that some run does not know; None if fewer
    than two runs recorded any."""
    recorded = [run.options | run.changed for run in runs]
    if sum(bool(options) for options in recorded) < 2:
        return None
    own = {name for run in runs for name in run.options}
    rows = []
    for name in sorted({name for options in recorded for name in options} - NAMES_OF_PLACES):
        cells = [_option_cell(run, options, name, name in own) for run, options in zip(runs, recorded, strict=True)]
        known = {cell for cell in cells if cell != UNKNOWN}
        unknown_to_some = any(options and cell == UNKNOWN for options, cell in zip(recorded, cells, strict=True))
        if len(known) > 1 or (unknown_to_some and any(name in run.changed for run in runs)):
            rows.append([name, *cells])
    notes = [] if rows else ["All recorded options are the same."]
    return Table(["option", *(wording.letters(i) for i in range(len(runs)))], rows, notes)


def _option_cell(run: Run, options: dict[str, Any], name: str, is_own: bool) -> str:
    """Of the options that come from TrainingArguments (not this library's own) a run records those that were changed alone."""
    if name in options:
        return wording.value_text(options[name])
    return UNKNOWN if is_own or not isinstance(run.info.get("changed"), dict) else "default"


def settings(options: dict[str, Any]) -> Table | None:
    """Options and values, by name."""
    rows = [[name, wording.value_text(options[name])] for name in sorted(options)]
    return Table(["option", "value"], rows) if rows else None


def versions(run: Run) -> Table | None:
    """Versions of the packages, device and processes."""
    recorded = run.info.get("versions")
    known = dict(sorted(recorded.items())) if isinstance(recorded, dict) else {}
    known |= {name: run.info[name] for name in ("device", "processes") if run.info.get(name) is not None}
    return Table(["package", "version"], [[name, wording.value_text(value)] for name, value in known.items()]) if known else None


def changed_on_resuming(run: Run) -> Table | None:
    """What a resumed run did otherwise than before."""
    rows = []
    resumed = run.info.get("resumed")
    for entry in resumed if isinstance(resumed, list) else ():
        for name, pair in hide_secrets(entry["changed"]).items() if isinstance(entry, dict) and "changed" in entry else ():
            before, now = pair if isinstance(pair, list) and len(pair) == 2 else (pair, pair)
            update = wording.value_text(entry.get("update"))
            rows.append(
                [str(name), *("default" if value is None else wording.value_text(value) for value in (before, now)), update]
            )
    return Table(["setting", "before", "resumed with", "after update"], rows) if rows else None


def dropped_text(facts: Facts) -> str:
    """`12 (0.4 %)`."""
    if facts.dropped is None:
        return UNKNOWN
    share = f" ({wording.number(100 * facts.dropped_share, 2)} %)" if facts.dropped_share and facts.dropped else ""
    return wording.count(facts.dropped) + share


def _pair_text(column: Floats | None) -> str:
    pair = None if column is None else ends(column)
    return UNKNOWN if pair is None else f"{wording.number(pair[0].value)} → {wording.number(pair[1].value)}"
