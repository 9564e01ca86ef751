"""What a run comes to: start, end, best, cost, and what deserves a look."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator

import numpy as np

from rlr_trainer.observing.hacking import WAYS_OUT, find_signs
from rlr_trainer.observing.report import wording
from rlr_trainer.observing.report.reading import Floats, Run, as_float
from rlr_trainer.observing.report.series import Mean, ends, mean_of, window_size

CLEAR = 2.0  # standard errors that a change must exceed
MANY_DROPPED = 0.05
HIGH_CLIPPING = 0.3
CLEAR_FALL = 4.0  # the same from the best window, which luck has chosen among many
FALL = 0.1  # of the rise that is lost again


@dataclasses.dataclass(frozen=True)
class Remark:
    """Something to look at: a title, and what was seen with numbers and a proposal."""

    title: str
    text: str


@dataclasses.dataclass(frozen=True)
class Facts:
    """The key facts of a run.

    Attributes:
        start, end: mean reward over the first and the last `window` log lines.
        change: end - start.
        best: the best mean of `window` lines on end, and the update in its middle.
        queries, seconds: totals; None if not recorded.
        dropped: samples without a reward; dropped_share: of all samples. None if not known.
    """

    updates: int
    window: int
    start: Mean
    end: Mean
    change: Mean
    best: float
    best_step: int
    queries: float | None
    seconds: float | None
    dropped: float | None
    dropped_share: float | None


def facts_of(run: Run) -> Facts:
    """The facts, from the log lines; `dropped` from the recorded rewards where they exist."""
    rewards = run.train.columns.get("reward", np.full(len(run.train), np.nan))
    known = ~np.isnan(rewards)
    pair = ends(rewards) or (Mean(math.nan, None, 0), Mean(math.nan, None, 0))
    window = window_size(int(known.sum()))
    best, best_step = _best(run.train.steps[known], rewards[known], window)
    dropped, share = _dropped(run)
    return Facts(
        updates=int(run.train.steps[-1]),
        window=window,
        start=pair[0],
        end=pair[1],
        change=difference(*pair),
        best=best,
        best_step=best_step,
        queries=_last(run.train.get("reward_queries")),
        seconds=_last(run.train.get("seconds")),
        dropped=dropped,
        dropped_share=share,
    )


def difference(first: Mean, last: Mean) -> Mean:
    """`last - first`, errors added in quadrature."""
    error = None if first.error is None or last.error is None else math.hypot(first.error, last.error)
    return Mean(last.value - first.value, error, last.count)


def is_clear(change: Mean) -> bool:
    """Whether a change exceeds its noise; False where the noise is not known."""
    return change.error is not None and abs(change.value) > CLEAR * change.error


def reward_at(run: Run, axis: str, limit: float) -> Mean | None:
    """Mean reward of the last window of log lines up to `limit` on the axis "reward_queries" or "seconds"."""
    x, rewards = run.train.get(axis), run.train.get("reward")
    if x is None or rewards is None:
        return None
    reached = rewards[(x <= limit * (1 + 1e-9)) & ~np.isnan(rewards)]
    if not len(reached):
        return None
    return mean_of(reached[-window_size(int((~np.isnan(rewards)).sum())) :])


def _last(column: Floats | None) -> float | None:
    return None if column is None else float(column[~np.isnan(column)][-1])


def _best(steps: Floats, rewards: Floats, window: int) -> tuple[float, int]:
    if not len(rewards):
        return math.nan, 0
    sums = np.convolve(rewards, np.full(window, 1 / window), mode="valid")
    where = int(sums.argmax())
    return float(sums[where]), int(steps[where + (window - 1) // 2])


def _dropped(run: Run) -> tuple[float | None, float | None]:
    if run.rollouts:
        missing = sum(int(np.isnan(rewards).sum()) for rewards in run.rollouts)
        total = sum(map(len, run.rollouts))
        return missing, missing / total if total else None
    column = run.train.get("samples_dropped")  # per rollout, mean over the log line
    return (None if column is None else float(np.nansum(column))), None


# ---- what deserves a look ----


def remarks_of(run: Run, facts: Facts) -> list[Remark]:
    """Every remark that the run's numbers give reason for, the gravest first."""
    return [*_broken(run, facts), *_hacking(run, facts), *_reward_path(facts), *_clipping(run)]


def _broken(run: Run, facts: Facts) -> Iterator[Remark]:
    bad = {name: count for name, count in run.train.not_finite.items() if name in ("reward", "loss", "grad_norm", "kl")}
    if bad:
        last = run.train.steps[~np.isnan(run.train.columns["reward"])][-1]
        ends_early = f"The last finite reward is that of update {last:.0f}: what this page calls the end is there. "
        yield Remark(
            "Values that are not finite",
            f"{', '.join(f'{name} in {count} log lines' for name, count in bad.items())}. {ends_early if last < facts.updates else ''}Lower the "
            "learning rate, or look for a reward that fails or a precision that overflows.",
        )
    if facts.dropped_share is not None and facts.dropped_share > MANY_DROPPED:
        yield Remark(
            "Many samples dropped",
            f"{wording.count(facts.dropped)} samples ({wording.number(100 * facts.dropped_share, 2)} %) had no reward and were left out. If the "
            "reward fails on a kind of picture, the mean no longer speaks for all of them.",
        )
    if run.closing is None:
        yield Remark(
            "No closing line",
            f"The run has not logged its end: it is still running, or was stopped after update {facts.updates}. If it saved a "
            "checkpoint, it goes on with --resume (resume_from_checkpoint=True).",
        )


def _hacking(run: Run, facts: Facts) -> Iterator[Remark]:
    """What the monitor warns of during the training, and the judge of the demo."""
    signs = [f"At update {line['step']}: {text}." for line, text in find_signs(run.lines)]
    if signs:
        yield Remark("Signs of reward hacking", f"{' '.join(signs)} {WAYS_OUT}.")
    before, after = (as_float((run.summary or {}).get(f"judge_{when}")) for when in ("before", "after"))
    if after < before and is_clear(facts.change) and facts.change.value > 0:
        yield Remark(
            "The reward rose, the independent judge's score fell",
            f"From {wording.number(before)} to {wording.number(after)}: the model has learned to please the reward alone.",
        )


def _reward_path(facts: Facts) -> Iterator[Remark]:
    if facts.change.error is None:
        return
    rise, lost = facts.best - facts.start.value, facts.best - facts.end.value
    if is_clear(facts.change) and facts.change.value < 0:
        yield Remark(
            "The reward fell",
            f"It ended {wording.with_error(Mean(-facts.change.value, facts.change.error, 0))} lower than it began. "
            "Try a lower learning rate or more samples per update.",
        )
    elif lost > max(CLEAR_FALL * facts.change.error, FALL * rise) and facts.best_step < facts.updates:
        yield Remark(
            "The reward fell at the end",
            f"Its best mean was {wording.number(facts.best)} around update {facts.best_step}; it ended at {wording.with_error(facts.end)}. An "
            "earlier checkpoint may be the better model; a lower learning rate or a decaying one keeps what was gained.",
        )
    elif not is_clear(facts.change):
        yield Remark(
            "No clear change of the reward",
            f"The change, {wording.with_error(facts.change)}, lies within its noise. Train longer, take more samples per update, or let "
            "rlr-trainer diagnose say which estimator has the clearest signal.",
        )


def _clipping(run: Run) -> Iterator[Remark]:
    clipped = run.train.get("clip_ratio")
    late = None if clipped is None else mean_of(clipped[len(clipped) // 2 :])
    if late is not None and late.value > HIGH_CLIPPING:
        yield Remark(
            "Many ratios clipped",
            f"In the second half of the run {wording.number(100 * late.value, 2)} % of the ratios lay outside the clip range, and their samples "
            "no longer pushed. Lower learning_rate or num_inner_epochs.",
        )
