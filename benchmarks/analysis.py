"""What curves say: costs to a score, and learning rates. Pure functions of the rows that `one_run.py` writes."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

Curve = Sequence[dict[str, float]]
JUDGED = 0.9  # the score to reach where pictures should show a digit
JUDGED_TASKS = ("digit", "ocr")  # those whose reward asks for a digit and nothing else
EVALUATIONS = ("forward", "backward")


def cost(row: dict[str, float], unit: str) -> float:
    """Cost of training up to a row; unit: update, queries, evaluations (forward and backward rows of the denoiser) or cpu_seconds."""
    return sum(row[name] for name in EVALUATIONS) if unit == "evaluations" else row[unit]


def cost_to(curve: Curve, score: float, by: str, unit: str) -> float | None:
    """Cost at which the curve first reaches a score, linear between two evaluations; None if it never does.

    Rows are in the order of training. A curve that starts at or above the score costs nothing.
    """
    before = None
    for row in curve:
        if row[by] >= score:
            if before is None:
                return 0.0
            share = (score - before[by]) / (row[by] - before[by])
            return cost(before, unit) + share * (cost(row, unit) - cost(before, unit))
        before = row
    return None


def score_of(task: str) -> str:
    """The column by which a task is decided: the judge where pictures should show a digit and nothing else counts, the reward elsewhere."""
    return "judge" if task in JUDGED_TASKS else "reward"


def best_rate(curves: dict[float, Curve], task: str) -> float:
    """The learning rate with the fewest queries to the judged score; if none reaches it or there is none, the highest mean score.

    The mean is over the curve after the start, so that a rate that learns early and stays counts more than one that spikes at the end.
    """
    by = score_of(task)
    if by == "judge":
        reached = {rate: cost_to(curve, JUDGED, by, "queries") for rate, curve in curves.items()}
        arrived = {rate: value for rate, value in reached.items() if value is not None}
        if arrived:
            return min(arrived, key=lambda rate: arrived[rate])
    return max(curves, key=lambda rate: statistics.fmean(row[by] for row in curves[rate][1:]))


def mean_and_error(values: Sequence[float]) -> tuple[float, float | None]:
    """Mean and its standard error; no error for a single value."""
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else None
    return statistics.fmean(values), error


def score_cell(values: Sequence[float]) -> str:
    """Of a table: mean and standard error of scores; empty without any."""
    if not values:
        return ""
    mean, error = mean_and_error(values)
    return f"{mean:.3g}" + ("" if error is None else f" ± {error:.1g}")
