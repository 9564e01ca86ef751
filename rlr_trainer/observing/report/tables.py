"""The report's tables: comparison of runs, settings, versions, a diagnosis, a demo's summary."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from rlr_trainer.observing.report import wording
from rlr_trainer.observing.report.facts import Facts, reward_at
from rlr_trainer.observing.report.reading import Run, as_float, hide_secrets
from rlr_trainer.observing.report.series import Mean, ends

NAMES_OF_PLACES = {"output_dir", "logging_dir", "run_name", "overwrite"}  # differ between any two runs
MEGABYTE = 2**20
UNKNOWN = "\N{EN DASH}"


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
    for name, title in (("kl", "KL, end"), ("diversity", "Diversity, start → end")):
        pairs = [None if (column := run.train.get(name)) is None else ends(column) for run in runs]
        if any(pairs):
            rows.append([title, *(_pair_text(pair, name == "kl") for pair in pairs)])
    evals = [None if (column := run.evals.get("eval_reward")) is None else ends(column) for run in runs]
    if any(evals):
        rows.append(["Evaluation, start → end", *(_pair_text(pair, False) for pair in evals)])
    return Table(["", *(wording.letters(i) for i in range(len(runs)))], rows, notes)


def differing_settings(runs: list[Run]) -> Table | None:
    """The options that are not the same in all runs that recorded them, and changed ones that some run does not know; None if fewer
    than two runs recorded any."""
    recorded = [run.options | run.changed for run in runs]
    if sum(bool(options) for options in recorded) < 2:
        return None
    names = sorted({name for options in recorded for name in options} - NAMES_OF_PLACES)
    own = {name for run in runs for name in run.options}
    rows = []
    for name in names:
        cells = [_option_cell(run, options, name, name in own) for run, options in zip(runs, recorded, strict=True)]
        known = {cell for cell in cells if cell != UNKNOWN}
        unique = any(name in run.changed for run in runs) and any(
            options and cell == UNKNOWN for options, cell in zip(recorded, cells, strict=True)
        )
        if len(known) > 1 or unique:
            rows.append([name, *cells])
    notes = [] if rows else ["All recorded options are the same."]
    return Table(["option", *(wording.letters(i) for i in range(len(runs)))], rows, notes)


def _option_cell(run: Run, options: dict[str, Any], name: str, is_own: bool) -> str:
    """Of the options that come from TrainingArguments (not this library's own) a run records those that were changed alone."""
    if name in options:
        return wording.value_text(options[name])
    return UNKNOWN if is_own or not isinstance(run.info.get("changed"), dict) else "default"


def settings(options: dict[str, Any]) -> Table:
    """Options and values, by name."""
    return Table(["option", "value"], [[name, wording.value_text(options[name])] for name in sorted(options)])


def versions(run: Run) -> Table | None:
    """Versions of the packages, device and processes."""
    recorded = run.info.get("versions")
    rows = (
        [[str(name), wording.value_text(value)] for name, value in sorted(recorded.items())] if isinstance(recorded, dict) else []
    )
    for key in ("device", "processes"):
        if run.info.get(key) is not None:
            rows.append([key, wording.value_text(run.info[key])])
    return Table(["package", "version"], rows) if rows else None


def changed_on_resuming(run: Run) -> Table | None:
    """What a resumed run did otherwise than before."""
    rows = []
    for entry in _dicts(run.info.get("resumed")):
        changed = entry.get("changed")
        for name, pair in hide_secrets(changed).items() if isinstance(changed, dict) else ():
            before, now = pair if isinstance(pair, list) and len(pair) == 2 else (pair, pair)
            update = wording.value_text(entry.get("update"))
            rows.append(
                [str(name), *("default" if value is None else wording.value_text(value) for value in (before, now)), update]
            )
    return Table(["setting", "before", "resumed with", "after update"], rows) if rows else None


def diagnosis(run: Run) -> Table | None:
    """The plans that `rlr-trainer diagnose` measured, with its recommendation as notes."""
    found = run.diagnosis or {}
    rows = [_plan_cells(row) for row in _dicts(found.get("rows"))]
    if not rows:
        return None
    recommendation = found.get("recommendation")
    advice = recommendation if isinstance(recommendation, dict) else {}
    notes = [*_texts([advice.get("reason")]), *_texts(advice.get("remarks")), *_texts(found.get("notes"))]
    header = ["plan", "in theory", "bias", "captured", "rel. std", "cos(mean)", "s", "MB", "signal/s", "x yours", "n"]
    return Table(header, rows, notes)


def demo_summary(run: Run) -> Table | None:
    """`summary.json`: what was measured before and after, then the rest."""
    found = run.summary or {}
    pairs = [
        name.removesuffix("_before")
        for name in found
        if name.endswith("_before") and f"{name.removesuffix('_before')}_after" in found
    ]
    rows = [[name, _plain(found[f"{name}_before"]), _plain(found[f"{name}_after"])] for name in pairs]
    rest = [name for name in found if name.removesuffix("_before").removesuffix("_after") not in pairs]
    rows += [[name, "", _plain(found[name])] for name in rest]
    return Table(["", "before", "after"], rows) if rows else None


def dropped_text(facts: Facts) -> str:
    """`12 (0.4 %)`."""
    if facts.dropped is None:
        return "\N{EN DASH}"
    share = f" ({wording.number(100 * facts.dropped_share, 2)} %)" if facts.dropped_share and facts.dropped else ""
    return wording.count(facts.dropped) + share


def _pair_text(pair: tuple[Mean, Mean] | None, last_only: bool) -> str:
    if pair is None:
        return "\N{EN DASH}"
    last = wording.number(pair[1].value)
    return last if last_only else f"{wording.number(pair[0].value)} → {last}"


def _plain(value: Any) -> str:
    return wording.number(value, 4) if isinstance(value, float) else wording.value_text(value)


def _dicts(value: Any) -> list[dict[str, Any]]:
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []


def _texts(value: Any) -> list[str]:
    return [item for item in value if isinstance(item, str)] if isinstance(value, list) else []


def _estimate(value: Any) -> str:
    """An `Estimate` of the diagnosis; a question mark where its error exceeds half of it, as in the diagnosis's own table."""
    value = value if isinstance(value, dict) else {}
    centre, error = as_float(value.get("value")), as_float(value.get("error"))
    if math.isnan(centre):
        return "\N{EN DASH}"
    if math.isnan(error):
        return wording.number(centre) + "?"
    return wording.with_error(Mean(centre, error, 0)) + ("?" if abs(centre) < 2 * error else "")


def _bias(value: Any) -> str:
    value = value if isinstance(value, dict) else {}
    if value.get("verdict") == "reference":
        return "reference"
    if not math.isnan(as_float(value.get("value"))):
        return _estimate(value)
    upper = as_float(value.get("upper"))
    return "?" if math.isnan(upper) else f"< {wording.number(upper, 2)}" + ("?" if value.get("verdict") == "underpowered" else "")


def _plan_cells(row: dict[str, Any]) -> list[str]:
    peak = as_float(row.get("peak_bytes"))
    theory = "unbiased" if not row.get("biases") else "smoothed" if row.get("only_smoothed") else "biased"
    return [
        str(row.get("name")),
        theory,
        _bias(row.get("bias")),
        *(_estimate(row.get(name)) for name in ("captured", "relative_std", "cosine_of_mean")),
        wording.number(as_float(row.get("seconds")), 2),
        wording.number(peak / MEGABYTE, 2),
        _estimate(row.get("signal_per_second")),
        _estimate(row.get("speed")),
        wording.count(as_float(row.get("num_batches"))),
    ]
