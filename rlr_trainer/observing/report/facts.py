"""What a run comes to: start, end, best, cost, and what deserves a look."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import numpy as np

from rlr_trainer.observing.dead_signals import DeadSignals
from rlr_trainer.observing.hacking import WAYS_OUT, HackingSigns
from rlr_trainer.observing.lines import CLOSING
from rlr_trainer.observing.report.reading import Floats, Run, as_list
from rlr_trainer.observing.report.series import Mean, ends, mean_of, window_size
from rlr_trainer.persistence.descriptions import in_words

CLEAR = 2.0  # standard errors that a change must exceed
MANY_DROPPED = 0.05


@dataclasses.dataclass(frozen=True)
class Facts:
    """The key facts of a run; NaN for what is not recorded.

    Attributes:
        start, end: mean reward over the first and the last `window` log lines.
        change: end - start.
        best: the best mean of `window` lines on end, and the update in its middle.
        queries, seconds: totals.
        dropped: samples without a reward; dropped_share: of all samples.
    """

    updates: int
    window: int
    start: Mean
    end: Mean
    change: Mean
    best: float
    best_step: int
    queries: float
    seconds: float
    dropped: float
    dropped_share: float

    @property
    def is_clear(self) -> bool:
        """Whether the change exceeds its noise; False where the noise is not known."""
        return abs(self.change.value) > CLEAR * self.change.error


def facts_of(run: Run) -> Facts:
    """The facts, from the log lines; what was dropped from rewards.jsonl."""
    rewards = run.train.columns["reward"]
    known = ~np.isnan(rewards)
    start, end = ends(rewards)
    window = window_size(int(known.sum()))
    means = np.convolve(rewards[known], np.full(window, 1 / window), mode="valid")
    best = int(means.argmax())
    dropped = float(np.isnan(run.rewards).sum()) if len(run.rewards) else math.nan
    return Facts(
        updates=int(run.train.steps[-1]),
        window=window,
        start=start,
        end=end,
        change=end - start,
        best=float(means[best]),
        best_step=int(run.train.steps[known][best + (window - 1) // 2]),
        queries=_last(run, "reward_queries"),
        seconds=_last(run, "seconds"),
        dropped=dropped,
        dropped_share=dropped / max(1, len(run.rewards)),
    )


def reward_at(run: Run, axis: str, limit: float) -> Mean:
    """Mean reward of the last window of log lines up to `limit` on the axis "reward_queries" or "seconds"; NaN where there are none."""
    rewards: Floats = run.train.columns["reward"]
    x = run.train.columns.get(axis, np.full(len(rewards), np.nan))
    known = ~np.isnan(rewards)
    return mean_of(rewards[known & (x <= limit * (1 + 1e-9))][-window_size(int(known.sum())) :])


def _last(run: Run, name: str) -> float:
    column = run.points(name)[1]
    return float(column[~np.isnan(column)][-1]) if len(column) else math.nan


def _seen(run: Run, signs: DeadSignals | HackingSigns) -> str:
    """What the signs are in a run's log, with the updates."""
    return " ".join(f"At update {line['step']}: {text}." for line in run.lines for text in signs.read(line))


def _pictures_of_rollout(run: Run) -> int | None:
    """Of all processes, as far as run.json says."""
    options = run.info.get("options") or {}
    numbers = [options.get("sample_batch_size"), options.get("sample_num_batches_per_epoch"), run.info.get("processes")]
    return math.prod(number for number in numbers if isinstance(number, int)) if all(isinstance(n, int) for n in numbers) else None


def _of_other_tasks(run: Run) -> str:
    """What resumptions changed of rewards and prompts, in words."""
    told = []
    for entry in filter(_is_object, as_list(run.info.get("resumed"))):
        changed = entry["changed"] if _is_object(entry.get("changed")) else {}
        for name in ("reward_functions", "prompts"):
            before, after = (_described(value) for value in [*as_list(changed.get(name)), None, None][:2])
            if before and after:
                told.append(f"After update {entry.get('update')}: {after} in place of {before}.")
    return " ".join(told)


def _described(value: Any) -> str:
    """The rewards or prompts of run.json."""
    return ", ".join(in_words(one) for one in (value if isinstance(value, list) else [value]) if _is_object(one))


def _is_object(value: Any) -> bool:
    return isinstance(value, dict)


def remarks_of(run: Run, facts: Facts) -> Iterator[tuple[str, str]]:
    """What deserves a look, the gravest first: a title, and what was seen with numbers and a proposal."""
    bad = {name: count for name, count in run.train.not_finite.items() if name in ("reward", "loss", "grad_norm", "kl")}
    if bad:
        last = run.train.steps[~np.isnan(run.train.columns["reward"])][-1]
        early = f"The last finite reward is that of update {last:.0f}: what this page calls the end is there. "
        yield (
            "Values that are not finite",
            f"{', '.join(f'{name} in {count} log lines' for name, count in bad.items())}. {early if last < facts.updates else ''}Lower the "
            "learning rate, or look for a reward that fails or a precision that overflows.",
        )
    if facts.dropped_share > MANY_DROPPED:
        yield (
            "Many samples dropped",
            f"{facts.dropped:,.0f} samples ({100 * facts.dropped_share:.2g} %) had no reward and were left out. If the reward fails on a kind "
            "of picture, the mean no longer speaks for all of them.",
        )
    if not any(CLOSING in line for line in run.lines):
        yield (
            "No closing line",
            f"The run has not logged its end: it is still running, or was stopped after update {facts.updates}. If it saved a "
            "checkpoint, it goes on with --resume (resume_from_checkpoint=True).",
        )
    for note in as_list(run.info.get("reward_notes")):
        yield "A reward's network in training mode", f"{note}."
    if told := _of_other_tasks(run):
        yield "Resumed with another reward or other prompts", f"{told} A curve before and after that is of two tasks."
    dead = DeadSignals(_pictures_of_rollout(run))
    if seen := _seen(run, dead):
        yield "Nothing to learn from", f"{seen} {dead.causes}"
    if seen := _seen(run, HackingSigns()):
        yield "Signs of reward hacking", f"{seen} {WAYS_OUT}."
    if facts.is_clear and facts.change.value < 0:
        fall = Mean(-facts.change.value, facts.change.error)
        text = f"It ended {fall} lower than it began. Try a lower learning rate or more samples per update."
        yield "The reward fell", text
    elif not facts.is_clear and not math.isnan(facts.change.error):
        yield (
            "No clear change of the reward",
            f"The change, {facts.change}, lies within its noise. Train longer, take more samples per update, or let rlr-trainer diagnose "
            "say which estimator has the clearest signal.",
        )
