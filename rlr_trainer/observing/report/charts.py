"""Which charts a report has, and their data."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence

import numpy as np
from markupsafe import Markup

from rlr_trainer.observing.hacking import EVAL_REWARD
from rlr_trainer.observing.report.drawing import COLOURS, Series, histogram, line_chart, y_range
from rlr_trainer.observing.report.reading import Floats, Run
from rlr_trainer.observing.report.series import Line, ends, thin, window_size
from rlr_trainer.observing.report.wording import letters, number, shorten

AXES = ("updates", "queries", "seconds")
COLUMNS = {"queries": "reward_queries", "seconds": "seconds"}
WIDE, SMALL = (920, 330), (440, 250)
LOG_RATIO = 50  # values that span more than this get a logarithmic axis, where it suits them
ENOUGH_SAMPLES = 256  # rewards that a distribution is drawn from, if a quarter of the rollouts has so many
MOST_OTHERS = 24

PARTS = {"fo": "first order", "ho": "half order and likelihood ratio", "zo": "zeroth order"}
TITLES = {
    "reward": "Reward",
    "reward_std": "Spread of the rewards in a rollout",
    "eval_reward": "Evaluation reward",
    "fixed/rewards": "Mean reward of the fixed prompts",
    "fixed/diversity": "Diversity of the fixed prompts' pictures",
    "diversity": "Diversity of the training pictures",
    "kl": "KL from the initial model",
    "grad_norm": "Gradient norm",
    "loss": "Loss",
    "ratio/mean": "Mean likelihood ratio",
    "ratio/max_abs_dev": "Largest deviation of a ratio from 1",
    "clip_ratio": "Share of ratios clipped",
    "estimator/subchain_start": "Start of the half-order sub-chain",
    "learning_rate": "Learning rate",
    "samples_dropped": "Samples dropped per rollout",
    "time/sample": "Seconds of sampling per rollout",
    "time/reward": "Seconds of the reward per rollout",
    "time/backward": "Seconds of backward per micro-batch",
}
ESTIMATOR = ("grad_norm", "loss", "ratio/mean", "ratio/max_abs_dev", "clip_ratio", "estimator/subchain_start", "learning_rate")
TIMES = ("time/sample", "time/reward", "time/backward", "samples_dropped")
NO_CHART = {"step", "epoch", "seconds", "reward_queries", "total_flos"}
MAY_BE_LOG = ("norm", "kl", "max_abs_dev", "learning_rate")
STEP_PROFILE = "estimator/step_grad_norm/"


@dataclasses.dataclass(frozen=True)
class Figure:
    """A chart with its title, what is to be known about it, and the swatches of its legend as (colour, text).

    Attributes:
        drawings: axis -> the chart, in one or two sizes (wide and narrow screens); none: no run has that axis.
    """

    title: str
    drawings: dict[str, list[Markup]]
    caption: str = ""
    legend: list[tuple[str, str]] = dataclasses.field(default_factory=list)


class Charts:
    """Makes the figures of some runs. Colour and letter of a run are those of its place in the list."""

    def __init__(self, runs: list[Run]) -> None:
        self.runs = runs
        self._numbers = itertools.count()
        longest = max((float(np.nanmax(s)) for run in runs if (s := run.train.get("seconds")) is not None), default=0.0)
        self._time_unit, unit = next(
            (unit, name) for limit, unit, name in ((600, 1, "s"), (4 * 3600, 60, "min"), (np.inf, 3600, "h")) if longest <= limit
        )
        self._labels = {"updates": "updates", "queries": "reward queries", "seconds": f"training time [{unit}]"}

    @property
    def axes(self) -> dict[str, bool]:
        """Whether any run recorded the axis."""
        known = {axis: any(run.train.get(COLUMNS[axis]) is not None for run in self.runs) for axis in AXES[1:]}
        return {"updates": True} | known

    def reward(self) -> list[Figure]:
        """The reward, wide."""
        return self.figures(["reward"], AXES, sizes=(WIDE, SMALL))

    def rewards(self) -> list[Figure]:
        """Evaluation, fixed prompts, each reward function where there are several, and the spread."""
        functions = self._names(lambda name: name.startswith("rewards/") and name.endswith("/mean"))
        evals = self._names(lambda name: EVAL_REWARD.fullmatch(name) is not None, evals=True)
        parts = self._names(lambda name: "rewards/" in name and name.endswith("/mean"), evals=True)
        several = [names for names in (functions, parts) if len(names) > 1]
        return self.figures([*evals, "fixed/rewards", *itertools.chain(*several), "reward_std"], AXES)

    def drift(self) -> list[Figure]:
        """KL and diversity."""
        return self.figures(["kl", "diversity", "fixed/diversity"])

    def estimator(self) -> list[Figure]:
        """Norms of the parts, the profile over the denoising steps, ratios and the like."""
        return [*self._norms(), *self._profiles(), *self.figures(ESTIMATOR, constants=False)]

    def costs(self) -> list[Figure]:
        """Where the time goes."""
        return self.figures(TIMES, constants=False)

    def others(self) -> list[Figure]:
        """Logged values that no other section shows."""
        known = {*TITLES, *NO_CHART}
        prefixes = ("rewards/", STEP_PROFILE, "eval_rewards/", *(f"estimator/{part}_" for part in PARTS))
        rest = self._names(lambda name: name not in known and not name.startswith(prefixes))
        return self.figures(rest[:MOST_OTHERS], constants=False)

    def distributions(self) -> list[Figure]:
        """One histogram a run, of the rewards before and after, on a common axis."""
        pairs = [(i, before_and_after(run)) for i, run in enumerate(self.runs)]
        known = [(i, before, after) for i, (before, after) in pairs if len(before) and len(after)]
        values = np.concatenate([np.array([]), *(part for _, *both in known for part in both)])
        return [self._distribution(i, before, after, (float(values.min()), float(values.max()))) for i, before, after in known]

    def _distribution(self, i: int, before: Floats, after: Floats, limits: tuple[float, float]) -> Figure:
        name = f"{letters(i)}: {self.runs[i].name}" if len(self.runs) > 1 else "Rewards of single samples"
        texts = [
            f"{len(values):,} samples, mean {number(float(values.mean()))}, median {number(float(np.median(values)))}"
            for values in (before, after)
        ]
        caption = f"Before: {texts[0]}. After: {texts[1]}."
        svg = histogram(before, after, value_range=limits, title=f"Rewards. {caption}", colour=i, identity=self._identity())
        return Figure(name, {"rewards": [svg]}, caption, [("before", "first rollouts"), (f"c{i % COLOURS}", "last rollouts")])

    # ---- figures of single logged values, all runs ----

    def figures(
        self,
        names: Sequence[str],
        axes: tuple[str, ...] = AXES[:1],
        *,
        constants: bool = True,
        sizes: tuple[tuple[int, int], ...] = (SMALL,),
    ) -> list[Figure]:
        """One of each value that any run has; without `constants` none of those that are the same everywhere."""
        found = []
        for name in names:
            values = np.concatenate([points(run, name)[1] for run in self.runs])
            values = values[~np.isnan(values)]
            if len(values) and (constants or np.ptp(values) > 0):
                log = any(part in name for part in MAY_BE_LOG) and _spans(values)
                gaps = sum(table.not_finite.get(name, 0) for run in self.runs for table in (run.train, run.evals))
                lines = {axis: self._series(name, axis) for axis in axes}
                drawings = {axis: [self._draw(_title(name), lines[axis], axis, size, log) for size in sizes] for axis in axes}
                found.append(Figure(_title(name), drawings, _caption(lines[axes[0]], log, gaps)))
        return found

    def _series(self, name: str, axis: str) -> list[Series]:
        dots = name.startswith(("fixed/", "eval_")) or name.endswith("subchain_start")
        joined = not name.endswith("subchain_start")
        found = []
        for i, run in enumerate(self.runs):
            steps, values = points(run, name)
            line = thin(self._x(run, steps, axis), values)
            if line.count:
                found.append(Series(letters(i) if len(self.runs) > 1 else "", i, line, dots, joined))
        return found

    def _x(self, run: Run, steps: Floats, axis: str) -> Floats:
        """Positions on an axis of the values after `steps` updates; NaN where the run did not record it."""
        if axis == "updates":
            return steps
        column = run.train.get(COLUMNS[axis])
        if column is None:
            return np.full(len(steps), np.nan)
        known = ~np.isnan(column)
        x = np.interp(steps, [0.0, *run.train.steps[known]], [0.0, *column[known]])
        return x / self._time_unit if axis == "seconds" else x

    def _draw(self, title: str, lines: list[Series], axis: str, size: tuple[int, int], log: bool) -> Markup:
        if not lines:
            return Markup('<p class="note">Not recorded.</p>')
        label = self._labels.get(axis, axis)
        words = f"{title} against {label}. {_in_words(lines)}"
        return line_chart(lines, title=words, x_label=label, size=size, log=log, identity=self._identity())

    def _identity(self) -> str:
        return f"chart{next(self._numbers)}"

    def _names(self, wanted: Callable[[str], bool], evals: bool = False) -> list[str]:
        tables = [run.evals if evals else run.train for run in self.runs]
        return sorted({name for table in tables for name in table.columns if wanted(name)})

    # ---- the estimator's parts ----

    def _norms(self) -> list[Figure]:
        """One run: all parts in one chart. Several: one chart a part."""
        names = {part: f"estimator/{part}_grad_norm" for part in PARTS}
        run, *others = self.runs
        present = [part for part, name in names.items() if run.train.get(name) is not None]
        if others or not present:
            return self.figures(list(names.values()), constants=False)
        colours = {part: colour for colour, part in enumerate(PARTS)}
        columns = {part: run.train.columns[names[part]] for part in present}
        series = [Series(part.upper(), colours[part], thin(run.train.steps, column)) for part, column in columns.items()]
        title, log = "Gradient norm of the parts", _spans(np.concatenate(list(columns.values())))
        legend = [(f"c{colours[part]}", f"{part.upper()}: {PARTS[part]}") for part in present]
        drawings = {"updates": [self._draw(title, series, "updates", SMALL, log)]}
        return [Figure(title, drawings, _caption(series, log, 0), legend)]

    def _profiles(self) -> Iterator[Figure]:
        """Gradient norm of the single denoising steps, at the start and at the end of a run."""
        for i, run in enumerate(self.runs):
            columns = {name.removeprefix(STEP_PROFILE): c for name, c in run.train.columns.items() if name.startswith(STEP_PROFILE)}
            found = [(int(step), ends(column)) for step, column in columns.items() if step.isdecimal()]
            pairs = sorted(((step, pair) for step, pair in found if pair is not None), key=lambda item: item[0])
            if len(pairs) < 2:
                continue
            steps = np.array([float(step) for step, _ in pairs])
            lines = [np.array([pair[k].value for _, pair in pairs]) for k in (0, 1)]
            series = [
                Series(text, colour, Line(steps, y, steps, y, 1, len(steps)), markers=True)
                for text, colour, y in (("start", 5, lines[0]), ("end", i, lines[1]))
            ]
            title = "Gradient norm of the denoising steps" + (f", {letters(i)}" if len(self.runs) > 1 else "")
            svg = self._draw(title, series, "denoising step (0: the noisiest)", SMALL, _spans(np.concatenate(lines)))
            caption = "Means over the log lines at the start and at the end of the run that have the value."
            yield Figure(title, {"steps": [svg]}, caption)


def points(run: Run, name: str) -> tuple[Floats, Floats]:
    """(updates, values) of a logged value: of training, of evaluations (`eval_...`) or of the fixed prompts (`fixed/...`)."""
    if name == "fixed/diversity":
        values = [(p.step, np.nan if p.diversity is None else p.diversity) for p in run.pictures]
    elif name == "fixed/rewards":
        known = [(p.step, [r for r in p.rewards if r is not None]) for p in run.pictures]
        values = [(step, sum(rewards) / len(rewards)) for step, rewards in known if rewards]
    else:
        table = run.evals if name.startswith("eval_") else run.train
        return table.steps, table.columns.get(name, np.full(len(table), np.nan))
    return np.array([float(step) for step, _ in values]), np.array([value for _, value in values], dtype=np.float64)


def before_and_after(run: Run) -> tuple[Floats, Floats]:
    """Rewards of the first and of the last rollouts: as many as give `ENOUGH_SAMPLES`, a quarter of them at most."""
    known = [rewards[~np.isnan(rewards)] for rewards in run.rollouts]
    rollouts = [rewards for rewards in known if len(rewards)]
    if len(rollouts) < 2:
        return np.array([]), np.array([])
    size = float(np.mean([len(rewards) for rewards in rollouts]))
    number_of = max(1, min(round(ENOUGH_SAMPLES / size), len(rollouts) // 4))
    return np.concatenate(rollouts[:number_of]), np.concatenate(rollouts[-number_of:])


def _caption(lines: list[Series], log: bool, gaps: int) -> str:
    windows = {s.line.window for s in lines if not s.markers}
    bottom, top = y_range(lines, log)
    outside = sum(int(((s.line.raw_y < bottom) | (s.line.raw_y > top)).sum()) for s in lines)
    most = max(windows, default=1)
    texts = [f"Smoothed over {'up to ' if len(windows) > 1 else ''}{most:,} log lines."] if most > 1 else []
    texts += [f"{outside} value{'s' if outside > 1 else ''} outside the axis."] if outside else []
    texts += [f"{gaps} value{'s that are' if gaps > 1 else ' that is'} not finite left out."] if gaps else []
    return " ".join(texts)


def _title(name: str) -> str:
    if name in TITLES:
        return TITLES[name]
    for part, text in PARTS.items():
        if name == f"estimator/{part}_grad_norm":
            return f"Gradient norm, {text}"
    prefix, _, function = name.partition("rewards/")
    if function.endswith("/mean") and prefix in ("", "eval_"):
        return f"Reward {shorten(function.removesuffix('/mean'), 40)}" + (", evaluation" if prefix else "")
    if EVAL_REWARD.fullmatch(name):
        return f"Evaluation reward, {shorten(name.removeprefix('eval_').removesuffix('_reward'), 40)}"
    return shorten(name, 60)


def _spans(values: Floats) -> bool:
    """Whether values call for a logarithmic axis: nearly all positive, over more than `LOG_RATIO`."""
    known = values[~np.isnan(values)]
    positive = known[known > 0]
    if len(positive) < 0.9 * len(known) or not len(positive):
        return False
    low, high = np.quantile(positive, (0.02, 0.98))
    return bool(high > LOG_RATIO * low)


def _in_words(lines: list[Series]) -> str:
    """What a reader who does not see the chart should know of it."""
    parts = []
    for s in lines:
        size = window_size(len(s.line.y))
        first, last = float(s.line.y[:size].mean()), float(s.line.y[-size:].mean())
        parts.append(f"{s.label + ': ' if s.label else ''}from {number(first)} to {number(last)}")
    return "; ".join(parts)
