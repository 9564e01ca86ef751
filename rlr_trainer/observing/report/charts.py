"""Which charts a report has, and their data."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator

import numpy as np
from markupsafe import Markup

from rlr_trainer.observing.report.reading import EVAL_REWARD, Floats, Run
from rlr_trainer.observing.report.series import Line, ends, thin, window_size
from rlr_trainer.observing.report.svg import Drawing, Series, histogram, line_chart
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
class Variant:
    """A chart on one x axis, for wide and (if set) for narrow screens; None: no run has that axis."""

    axis: str
    wide: Markup | None
    narrow: Markup | None


@dataclasses.dataclass(frozen=True)
class Figure:
    """A chart with its title, what is to be known about it, and the swatches of its legend as (colour, text)."""

    title: str
    variants: list[Variant]
    caption: str = ""
    legend: list[tuple[str, str]] = dataclasses.field(default_factory=list)


class Charts:
    """Makes the figures of some runs. Colour and letter of a run are those of its place in the list."""

    def __init__(self, runs: list[Run]) -> None:
        self.runs = runs
        self._numbers = itertools.count()
        longest = max((float(np.nanmax(s)) for run in runs if (s := run.train.get("seconds")) is not None), default=0.0)
        self.time_unit, self.time_name = next(
            (unit, name) for limit, unit, name in ((600, 1, "s"), (4 * 3600, 60, "min"), (np.inf, 3600, "h")) if longest <= limit
        )

    @property
    def axes(self) -> dict[str, bool]:
        """Whether any run recorded the axis."""
        known = {axis: any(run.train.get(COLUMNS[axis]) is not None for run in self.runs) for axis in AXES[1:]}
        return {"updates": True} | known

    def reward(self) -> Figure:
        """The reward, wide."""
        figure = self.figure("reward", wide=True)
        assert figure is not None, "a run without rewards is not read"
        return figure

    def rewards(self) -> list[Figure]:
        """Evaluation, fixed prompts, each reward function where there are several, and the spread."""
        functions = self._names(lambda name: name.startswith("rewards/") and name.endswith("/mean"))
        evals = self._names(lambda name: EVAL_REWARD.fullmatch(name) is not None, evals=True)
        parts = self._names(lambda name: "rewards/" in name and name.endswith("/mean"), evals=True)
        return self._figures(
            [*evals, "fixed/rewards", *(functions if len(functions) > 1 else []), *(parts if len(parts) > 1 else []), "reward_std"]
        )

    def drift(self) -> list[Figure]:
        """KL and diversity."""
        return self._figures(["kl", "diversity", "fixed/diversity"])

    def estimator(self) -> list[Figure]:
        """Norms of the parts, the profile over the denoising steps, ratios and the like."""
        return [*self._norms(), *self._profiles(), *self._figures(ESTIMATOR, constants=False)]

    def costs(self) -> list[Figure]:
        """Where the time goes."""
        return self._figures(TIMES, constants=False)

    def others(self) -> list[Figure]:
        """Logged values that no other section shows."""
        known = {*TITLES, *NO_CHART}
        prefixes = ("rewards/", STEP_PROFILE, "eval_rewards/", *(f"estimator/{part}_" for part in PARTS))
        rest = self._names(lambda name: name not in known and not name.startswith(prefixes))
        return self._figures(rest[:MOST_OTHERS], constants=False)

    def constants(self, run: Run) -> list[tuple[str, float]]:
        """(name, value) of what never changed in a run and therefore has no chart (unless another run has one)."""
        names = [*ESTIMATOR, *TIMES, "estimator/fo_grad_norm", "estimator/ho_grad_norm", "estimator/zo_grad_norm"]
        columns = [(name, run.train.get(name)) for name in names]
        found = [(name, column[~np.isnan(column)]) for name, column in columns if column is not None]
        return [(_title(name), float(values[0])) for name, values in found if len(values) > 1 and np.ptp(values) == 0]

    def distributions(self) -> list[Figure]:
        """One histogram a run, of the rewards before and after, on a common axis."""
        pairs = [(i, before_and_after(run)) for i, run in enumerate(self.runs)]
        known = [(i, before, after) for i, (before, after) in pairs if len(before) and len(after)]
        if not known:
            return []
        everything = np.concatenate([values for _, *both in known for values in both])
        limits = (float(everything.min()), float(everything.max()))
        figures = []
        for i, before, after in known:
            name = f"{letters(i)}: {self.runs[i].name}" if len(self.runs) > 1 else "Rewards of single samples"
            title = f"Distribution of rewards before ({number(float(before.mean()))} on average) and after ({number(float(after.mean()))})"
            drawing = histogram(before, after, value_range=limits, title=title, x_label="reward", colour=i)
            caption = (
                f"Before: {len(before):,} samples, mean {number(float(before.mean()))}, median {number(float(np.median(before)))}. "
                f"After: {len(after):,} samples, mean {number(float(after.mean()))}, median {number(float(np.median(after)))}."
            )
            legend = [("before", "first rollouts"), (f"c{i % 8}", "last rollouts")]
            figures.append(Figure(name, [Variant("any", drawing.svg, None)], caption, legend))
        return figures

    # ---- a figure of one logged value, all runs ----

    def _figures(self, names: list[str] | tuple[str, ...], constants: bool = True) -> list[Figure]:
        return [figure for name in names if (figure := self.figure(name, constants=constants)) is not None]

    def figure(self, name: str, wide: bool = False, constants: bool = True) -> Figure | None:
        """A value of all runs that have it; None if there is none, or if it is the same everywhere and `constants` is false."""
        values = [points(run, name)[1] for run in self.runs]
        known = [v[~np.isnan(v)] for v in values if not np.isnan(v).all()]
        if not known or (not constants and np.ptp(np.concatenate(known)) == 0):
            return None
        several = len(self.runs) > 1
        make = {axis: self._series(name, axis, several) for axis in AXES}
        log = any(part in name for part in MAY_BE_LOG) and _spans(np.concatenate(known))
        gaps = (
            0
            if name.startswith("fixed/")
            else sum(table.not_finite.get(name, 0) for run in self.runs for table in (run.train, run.evals))
        )
        return self._assemble(_title(name), make, log, wide, gaps)

    def _series(self, name: str, axis: str, several: bool) -> list[Series]:
        found = []
        for i, run in enumerate(self.runs):
            steps, values = points(run, name)
            line = thin(self._x(run, steps, axis), values)
            if line.count:
                markers = name.startswith(("fixed/", "eval_")) or name.endswith("subchain_start")
                joined = not name.endswith("subchain_start")
                found.append(Series(letters(i) if several else "", i, line, markers, joined))
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
        return x / self.time_unit if axis == "seconds" else x

    def _assemble(self, title: str, series: dict[str, list[Series]], log: bool, wide: bool = False, gaps: int = 0) -> Figure:
        labels = {"updates": "updates", "queries": "reward queries", "seconds": f"training time [{self.time_name}]"}
        variants, outside = [], 0
        windows = {s.line.window for s in series["updates"] if not s.markers}
        for axis, lines in series.items():
            if not lines:
                variants.append(Variant(axis, None, None))
                continue
            drawings = [
                self._draw(
                    lines, title=f"{title} against {labels[axis]}. {_in_words(lines)}", x_label=labels[axis], size=size, log=log
                )
                for size in ((WIDE, SMALL) if wide else (SMALL,))
            ]
            if axis == "updates":
                outside = drawings[0].outside
            variants.append(Variant(axis, drawings[0].svg, drawings[1].svg if wide else None))
        most = max(windows, default=1)
        caption = [f"Smoothed over {'up to ' if len(windows) > 1 else ''}{most:,} log lines."] if most > 1 else []
        caption += [f"{outside} value{'s' if outside > 1 else ''} outside the axis."] if outside else []
        caption += [f"{gaps} value{'s that are' if gaps > 1 else ' that is'} not finite left out."] if gaps else []
        return Figure(title, variants, " ".join(caption))

    def _draw(self, lines: list[Series], *, title: str, x_label: str, size: tuple[int, int], log: bool) -> Drawing:
        return line_chart(lines, title=title, x_label=x_label, size=size, log=log, identity=f"clip{next(self._numbers)}")

    def _names(self, wanted: Callable[[str], bool], evals: bool = False) -> list[str]:
        tables = [run.evals if evals else run.train for run in self.runs]
        return sorted({name for table in tables for name in table.columns if wanted(name)})

    # ---- the estimator's parts ----

    def _norms(self) -> Iterator[Figure]:
        """One run: all parts in one chart. Several: one chart a part."""
        present = [part for part in PARTS if any(run.train.get(f"estimator/{part}_grad_norm") is not None for run in self.runs)]
        if len(self.runs) > 1:
            yield from self._figures([f"estimator/{part}_grad_norm" for part in present], constants=False)
            return
        run = self.runs[0]
        columns = {part: run.train.columns[f"estimator/{part}_grad_norm"] for part in present}
        if not columns:
            return
        log = _spans(np.concatenate(list(columns.values())))
        series: dict[str, list[Series]] = {}
        for axis in AXES:
            lines = [(part, thin(self._x(run, run.train.steps, axis), column)) for part, column in columns.items()]
            series[axis] = [Series(part.upper(), list(PARTS).index(part), line) for part, line in lines if line.count]
        figure = self._assemble("Gradient norm of the parts", series, log)
        legend = [(f"c{list(PARTS).index(part)}", f"{part.upper()}: {PARTS[part]}") for part in present]
        yield dataclasses.replace(figure, legend=legend)

    def _profiles(self) -> Iterator[Figure]:
        """Gradient norm of the single denoising steps, at the start and at the end of a run."""
        for i, run in enumerate(self.runs):
            numbered = sorted(
                (int(step), column)
                for name, column in run.train.columns.items()
                if (step := name.removeprefix(STEP_PROFILE)) != name and step.isdigit()
            )
            pairs = [(step, pair) for step, column in numbered if (pair := ends(column)) is not None]
            if len(pairs) < 2:
                continue
            steps = np.array([float(step) for step, _ in pairs])
            lines = [np.array([pair[k].value for _, pair in pairs]) for k in (0, 1)]
            series = [
                Series(text, colour, Line(steps, y, steps, y, 1, len(steps)), markers=True)
                for text, colour, y in (("start", 5, lines[0]), ("end", i, lines[1]))
            ]
            title = "Gradient norm of the denoising steps" + (f", {letters(i)}" if len(self.runs) > 1 else "")
            label = "denoising step (0: the noisiest)"
            drawing = self._draw(series, title=title, x_label=label, size=SMALL, log=_spans(np.concatenate(lines)))
            caption = "Means over the log lines at the start and at the end of the run that have the value."
            yield Figure(title, [Variant("any", drawing.svg, None)], caption)


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
    rollouts = [rollout.rewards[~np.isnan(rollout.rewards)] for rollout in run.rollouts]
    rollouts = [rewards for rewards in rollouts if len(rewards)]
    if len(rollouts) < 2:
        return np.array([]), np.array([])
    size = float(np.mean([len(rewards) for rewards in rollouts]))
    number_of = max(1, min(round(ENOUGH_SAMPLES / size), len(rollouts) // 4))
    return np.concatenate(rollouts[:number_of]), np.concatenate(rollouts[-number_of:])


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
