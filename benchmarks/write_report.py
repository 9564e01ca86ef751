"""Writes docs/benchmarks.md and its plots from the results alone: `python benchmarks/write_report.py`."""

from __future__ import annotations

import json
import statistics
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

sys.path.insert(0, str(Path(__file__).parent.parent))
from benchmarks.analysis import JUDGED, Curve, cost, cost_to, mean_and_error, score_cell, score_of
from benchmarks.driver import RESULTS, TUNING_SEED
from benchmarks.methods import METHODS

PAGE = Path(__file__).parent.parent / "docs" / "benchmarks.md"
IMAGES = PAGE.parent / "images"
START, END = "<!-- results: made by benchmarks/write_report.py -->\n", "<!-- end of results -->\n"
TITLES = {
    "digit": "The digit asked for (the classifier's probability of a seven), judged by another classifier",
    "ink": "Ink (mean brightness), differentiable",
    "ink_black_box": "Ink as a black box",
    "compressibility": "JPEG compressibility (negative kB), a black box",
    "digit_and_ink": "Two rewards at once: digit + ink",
    "ocr": 'Reading (a text recognizer\'s probability of "7"), a black box, judged by another classifier',
}
UNITS = ("queries", "evaluations", "cpu_seconds")
Runs = dict[str, list[dict[str, Any]]]


def load(model: str, task: str) -> Runs:
    """The reported runs of a task, by method in the order of `METHODS`; a method that ran with several settings has a row for each."""
    found: dict[tuple[str, int, float], list[dict[str, Any]]] = defaultdict(list)
    for path in sorted((RESULTS / model / task).glob("*/*.json")):
        run = json.loads(path.read_text())
        if run["seed"] != TUNING_SEED:
            found[run["method"], run["batch"], run["learning_rate"]].append(run)
    ordered = sorted(found, key=lambda key: (list(METHODS).index(key[0]), *key[1:]))
    several = {method for method, *_ in found if sum(method == other for other, *_ in found) > 1}
    named = {key: f"{key[0]} ({key[1]} pictures, {key[2]:g})" if key[0] in several else key[0] for key in ordered}
    return {named[key]: found[key] for key in ordered}


def goals(task: str, runs: Runs) -> list[tuple[str, str, float]]:
    """(name, column, score) of what costs are measured to: the judged score, or 50 % and 90 % of the way from the start to the best end."""
    if score_of(task) == "judge":
        return [(f"judge {JUDGED:g}", "judge", JUDGED)]
    start = statistics.fmean(run["curve"][0]["reward"] for many in runs.values() for run in many)
    best = max(statistics.fmean(run["curve"][-1]["reward"] for run in many) for many in runs.values())
    return [(f"{share:.0%} of the best", "reward", start + share * (best - start)) for share in (0.5, 0.9)]


def cost_cell(curves: Sequence[Curve], score: float, column: str, unit: str) -> str:
    """Mean and standard error over the seeds; where some never arrive, how many did and their median."""
    costs = [value for value in (cost_to(curve, score, column, unit) for curve in curves) if value is not None]
    if not costs:
        return f"0 of {len(curves)}"
    if len(costs) < len(curves):
        return f"{len(costs)} of {len(curves)}, median {_short(statistics.median(costs))}"
    mean, error = mean_and_error(costs)
    return _short(mean) + ("" if error is None else f" ± {_short(error)}")


def _short(value: float) -> str:
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


def table(task: str, runs: Runs) -> list[str]:
    """One row per method: costs to the goals, and how the runs end."""
    aims, judged = goals(task, runs), score_of(task) == "judge"
    header = ["method", "rate", "pictures per update", "updates", "seeds"]
    header += [f"{unit.replace('cpu_', 'CPU ')} to {name}" for name, _, _ in aims for unit in UNITS]
    header += ["reward", "judge", "Frechet", "diversity"]
    lines = ["| " + " | ".join(header) + " |", "|" + "---|" * len(header)]
    for method, many in runs.items():
        curves = [run["curve"] for run in many]
        first = many[0]
        cells = [f"`{method}`", f"{first['learning_rate']:g}", str(first["batch"]), str(first["updates"]), str(len(many))]
        cells += [cost_cell(curves, score, column, unit) for _, column, score in aims for unit in UNITS]
        ends = ["reward", *(["judge", "frechet"] if judged else []), "diversity"]
        by_name = {column: score_cell([curve[-1][column] for curve in curves]) for column in ends}
        cells += [by_name.get(column, "") for column in ("reward", "judge", "frechet", "diversity")]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def ratios(task: str, runs: Runs, against: str) -> list[str]:
    """How many times the cost of the best method another one takes, where all seeds of both arrive."""
    (name, column, score), *_ = goals(task, runs)[-1:]
    said = []
    for method, many in runs.items():
        if method == against or against not in runs:
            continue
        parts = []
        for unit in UNITS[:2]:
            mine, theirs = ([cost_to(run["curve"], score, column, unit) for run in group] for group in (runs[against], many))
            if None in mine:
                continue
            # a seed that never arrives counts with its whole budget: then the ratio is a lower bound
            filled = [cost(run["curve"][-1], unit) if value is None else value for value, run in zip(theirs, many, strict=True)]
            factor = statistics.fmean(filled) / statistics.fmean(mine)
            error = factor * sum((e / m) ** 2 for m, e in (_pair(mine), _pair(filled))) ** 0.5
            missing = theirs.count(None)
            note = f" or more ({missing} of {len(theirs)} seeds never arrive)" if missing else f" ± {error:.2f}"
            parts.append(f"{factor:.2f}{note} times the {unit}")
        if parts:
            said.append(f"- `{method}` needs {' and '.join(parts)} of `{against}` to {name}.")
    return said


def _pair(values: Sequence[float]) -> tuple[float, float]:
    mean, error = mean_and_error(values)
    return mean, error or 0.0


def plot(model: str, task: str, runs: Runs) -> str:
    """Mean curves with the range of the seeds, against queries and network evaluations; returns the file's name."""
    column = score_of(task)
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    for axes, unit in zip(figure.subplots(1, 2, sharey=True), UNITS[:2], strict=True):
        for method, many in runs.items():
            curves = [run["curve"][:-1] for run in many]
            x = [row["queries"] if unit == "queries" else row["forward"] + row["backward"] for row in curves[0]]
            values = [[row[column] for row in rows] for rows in zip(*curves, strict=True)]
            (line,) = axes.plot(x, [statistics.fmean(v) for v in values], label=method)
            axes.fill_between(x, [min(v) for v in values], [max(v) for v in values], color=line.get_color(), alpha=0.15)
        axes.set(xlabel={"queries": "reward queries", "evaluations": "network evaluations"}[unit])
        axes.grid(alpha=0.3)
    figure.axes[0].set(ylabel=column)
    figure.axes[0].legend(fontsize=7)
    figure.suptitle(f"{model}: {task}, mean and range over the seeds", fontsize=10)
    name = f"benchmark-{model}-{task}.png"
    figure.savefig(IMAGES / name, dpi=90)
    return name


def long_runs() -> list[str]:
    """Scores of the runs that go on after they have arrived, each third of the way; empty without one."""
    rows = []
    for path in sorted(RESULTS.glob("*/*/*/long/*.json")):
        run = json.loads(path.read_text())
        for third in (1, 2, 3):
            queries = third * run["updates"] * run["batch"] // 3
            row = next(row for row in run["curve"] if row["queries"] == queries)
            scores = f"{row['reward']:.3f} | {row['judge']:.3f} | {row['frechet']:.0f} | {row['diversity']:.1f}"
            rows.append(
                f"| {run['model']} | `{run['method']}` | {run['learning_rate']:g} | {run['seed']} | {queries:,} | {scores} |"
            )
    if not rows:
        return []
    head = ["model", "method", "rate", "seed", "queries", "reward", "judge", "Frechet", "diversity"]
    return ["### Long runs: the digit asked for", "", "| " + " | ".join(head) + " |", "|---" * len(head) + "|", *rows, ""]


def results() -> str:
    """All tables."""
    lines: list[str] = []
    for model in sorted(path.name for path in RESULTS.iterdir() if path.is_dir()):
        for task in TITLES:
            runs = load(model, task)
            if len(runs) < 2:
                continue
            lines += [f"### {model}: {TITLES[task]}", "", *table(task, runs), ""]
            best = next(name for name in runs if name.startswith("rlr"))  # the black-box plan, with the fewest pictures per update
            lines += [*ratios(task, runs, best), ""]
            lines += [f"![{task} on {model}](images/{plot(model, task, runs)})", ""]
    return "\n".join(lines + long_runs())


def write_between(page: Path, start: str, results: str) -> None:
    """Replaces what stands on a page between the line `start` and `END`."""
    before, rest = page.read_text().split(start)
    page.write_text(before + start + "\n" + results + "\n" + END + rest.split(END)[1])


def main() -> None:
    write_between(PAGE, START, results())


if __name__ == "__main__":
    main()
