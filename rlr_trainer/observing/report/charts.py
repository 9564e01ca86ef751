"""Which charts a report has, and their data."""

from __future__ import annotations

import dataclasses
import re

import numpy as np
from markupsafe import Markup

from rlr_trainer.observing.report.drawing import Series, line_chart, y_range
from rlr_trainer.observing.report.reading import Floats, Run
from rlr_trainer.observing.report.series import letters, shorten, spans_decades, thin
from rlr_trainer.persistence.metric_names import EVAL_LOSS, EVAL_REWARD

AXES = {"updates": "updates", "queries": "reward_queries", "seconds": "seconds"}  # axis -> the column that holds it
WIDE, SMALL = (920, 330), (440, 250)
MOST_CHARTS = 24  # of a section

# Heading -> the values below it; a value stands in the first section that matches. The reward itself has a section of its own.
REWARDS, OTHERS = "Rewards in detail", "Other logged values"
SECTIONS = {
    REWARDS: rf"{EVAL_REWARD.pattern}|fixed/rewards|(eval_)?rewards/.+/mean|reward_std",
    "KL, diversity and motion": rf"kl|(fixed/)?(diversity|motion)|{EVAL_LOSS.pattern}",
    "Estimator": r"grad_norm|estimator/\w+|loss|ratio/.+|clip_ratio|learning_rate",
    "Time and losses of samples": r"time/.+|samples_dropped",
}
NO_CHART = re.compile(
    r"reward|rewards/.+/std|eval_.+|estimator/step_grad_norm/.+|epoch|seconds|reward_queries|total_flos", re.DOTALL
)
DOTS = re.compile(r"fixed/.+|eval_.+|estimator/subchain_start", re.DOTALL)
MAY_BE_LOG = re.compile(r".*(norm|kl|max_abs_dev|learning_rate).*", re.DOTALL)


@dataclasses.dataclass(frozen=True)
class Figure:
    """A chart with its title and what is to be known about it; axis -> its drawings, in one or two sizes (wide and narrow screens)."""

    title: str
    drawings: dict[str, list[Markup]]
    caption: str


def recorded_axes(runs: list[Run]) -> set[str]:
    """The axes that any run recorded."""
    return {axis for axis, column in AXES.items() if axis == "updates" or any(column in run.train.columns for run in runs)}


def reward_figure(runs: list[Run]) -> Figure:
    """The reward against every axis, wide."""
    return _figure(runs, "reward", tuple(AXES), (WIDE, SMALL))


def section_figures(runs: list[Run]) -> dict[str, list[Figure]]:
    """Heading -> charts of what any run logged, without values that are the same everywhere."""
    names = {name for run in runs for name in run.names}
    for prefix in ("rewards/", "eval_rewards/"):  # of a single reward function, the mean is the reward
        functions = {name for name in names if name.startswith(prefix) and name.endswith("/mean")}
        names -= functions if len(functions) == 1 else set()
    sections: dict[str, list[Figure]] = {heading: [] for heading in (*SECTIONS, OTHERS)}
    for name in sorted(names):
        heading = _heading(name)
        values = np.concatenate([run.points(name)[1] for run in runs])
        if heading is not None and np.nanmax(values) > np.nanmin(values) and len(sections[heading]) < MOST_CHARTS:
            axes = tuple(AXES) if heading == REWARDS else ("updates",)
            sections[heading].append(_figure(runs, name, axes, (SMALL,)))
    return {heading: figures for heading, figures in sections.items() if figures}


def _heading(name: str) -> str | None:
    found = [heading for heading, pattern in SECTIONS.items() if re.fullmatch(pattern, name, re.DOTALL)]
    return found[0] if found else None if NO_CHART.fullmatch(name) else OTHERS


def _figure(runs: list[Run], name: str, axes: tuple[str, ...], sizes: tuple[tuple[int, int], ...]) -> Figure:
    values = np.concatenate([run.points(name)[1] for run in runs])
    log = bool(MAY_BE_LOG.fullmatch(name)) and spans_decades(values[~np.isnan(values)])
    drawings = {axis: [_draw(runs, name, axis, size, log) for size in sizes] for axis in axes}
    return Figure(shorten(name, 60), drawings, _caption(_series(runs, name, "updates", 1), log))


def _draw(runs: list[Run], name: str, axis: str, size: tuple[int, int], log: bool) -> Markup:
    label, scale = _scale(runs, axis)
    lines = _series(runs, name, axis, scale)
    if not lines:
        return Markup('<p class="note">Not recorded.</p>')
    title, identity = f"{shorten(name, 60)} against {label}", f"{name} {axis} {size}"
    return line_chart(lines, title=title, x_label=label, size=size, log=log, identity=identity)


def _scale(runs: list[Run], axis: str) -> tuple[str, float]:
    """Label of an axis, and how many of its column's units one of its own is."""
    if axis != "seconds":
        return {"updates": "updates", "queries": "reward queries"}[axis], 1
    longest = max((float(np.nanmax(run.train.columns["seconds"])) for run in runs if "seconds" in run.train.columns), default=0.0)
    unit, scale = ("s", 1) if longest <= 600 else ("min", 60) if longest <= 4 * 3600 else ("h", 3600)
    return f"training time [{unit}]", scale


def _series(runs: list[Run], name: str, axis: str, scale: float) -> list[Series]:
    found = []
    for i, run in enumerate(runs):
        steps, values = run.points(name)
        line = thin(_x(run, steps, axis) / scale, values)
        if len(line.x):
            found.append(Series(letters(i) if len(runs) > 1 else "", i, line, bool(DOTS.fullmatch(name))))
    return found


def _x(run: Run, steps: Floats, axis: str) -> Floats:
    """Positions on an axis of the values after `steps` updates; NaN where the run did not record it."""
    if axis == "updates":
        return steps
    column = run.train.columns.get(AXES[axis])
    if column is None:
        return np.full(len(steps), np.nan)
    known = ~np.isnan(column)
    return np.interp(steps, [0.0, *run.train.steps[known]], [0.0, *column[known]])


def _caption(lines: list[Series], log: bool) -> str:
    window = max((s.line.window for s in lines if not s.markers), default=1)
    bottom, top = y_range(lines, log)
    outside = sum(int(((s.line.raw_y < bottom) | (s.line.raw_y > top)).sum()) for s in lines)
    texts = [f"Smoothed over up to {window:,} log lines."] if window > 1 else []
    return " ".join(texts + ([f"Values outside the axis: {outside}."] if outside else []))
