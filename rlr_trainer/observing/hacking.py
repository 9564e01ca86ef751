"""Signs of reward hacking in a log: the reward rises at the cost of what it stands for. Needs nothing but Python.

The monitor warns of them during the training, and the report shows them afterwards; both read the same lines with `HackingSigns`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from statistics import fmean, variance
from typing import Any

from rlr_trainer.persistence.metric_names import EVAL_LOSS, EVAL_REWARD

DIVERSITY_LINES = 5  # first and last ones, whose means are compared
DIVERSITY_FRACTION = 0.4
# KL: two windows that follow each other are compared, once the policy has left the reference: a KL that grows with the square of the
# number of updates, as in an undisturbed start, no longer doubles from window to window by then.
KL_WINDOW = 10
KL_FIRST_LINE = 50
KL_FACTOR = 2.0
KL_STANDARD_ERRORS = 2.0  # by which the reward must have risen to justify it
EVAL_PATIENCE = 2  # consecutive evaluations below the best, or the first
EVAL_DROP = 0.25  # by so many standard deviations of single rewards; the training reward must have risen as clearly

LOSSES = {"diversity": "pictures of one prompt", "motion": "neighbouring frames of a video"}  # metric -> what differs

WAYS_OUT = (
    "Look at the pictures in samples/. What helps: stop at an earlier checkpoint, raise kl_coef, lower learning_rate, add a second reward "
    "for what is lost, evaluate with a reward that is not trained on (eval_reward_function)"
)


class HackingSigns:
    """Reads the lines of a log one after the other and tells each sign once; docs/evaluation.md explains the rules.

    - diversity: pictures of one prompt differ less than `DIVERSITY_FRACTION` of what they did at first, while the reward rose;
    - motion: the frames of a video do, likewise; both also in `EVAL_PATIENCE` evaluations, against the first;
    - kl: it doubled from one window of `KL_WINDOW` log lines to the next, while the reward did not rise;
    - evaluation: the evaluation reward fell `EVAL_PATIENCE` times below its best, while the training reward rose.

    Attributes:
        found: rule -> what was seen.
    """

    def __init__(self) -> None:
        self.found: dict[str, str] = {}
        # per log line (value, reward)
        self._values: dict[str, list[tuple[float, float]]] = {"diversity": [], "motion": [], "kl": []}
        self._since_evaluation: list[float] = []  # training rewards
        self._first_reward: float | None = None
        self._reward_std = 0.0
        self._evaluations: dict[str, list[tuple[float, float, float | None]]] = {}  # (reward, its std, training reward)
        self._evaluated: dict[str, list[tuple[float, float | None]]] = {}  # (value of one of LOSSES, training reward)

    def read(self, line: Mapping[str, Any]) -> list[str]:
        """Takes the next log line; returns what is seen now for the first time."""
        self._take(line)
        rules: dict[str, Callable[[], str | None]] = {rule: partial(self._check_loss, rule) for rule in LOSSES}
        rules |= {"kl": self._check_kl, "evaluation": self._check_evaluations}
        new = {rule: text for rule, check in rules.items() if rule not in self.found and (text := check())}
        self.found |= new
        return list(new.values())

    def _take(self, line: Mapping[str, Any]) -> None:
        numbers = {name: float(v) for name, v in line.items() if isinstance(v, int | float) and math.isfinite(v)}
        if "reward" in numbers:
            reward = numbers["reward"]
            self._first_reward = reward if self._first_reward is None else self._first_reward
            self._since_evaluation.append(reward)
            self._reward_std = numbers.get("reward_std") or self._reward_std
            for name, kept in self._values.items():
                if name in numbers:
                    kept.append((numbers[name], reward))
        evaluations = [name for name in line if EVAL_REWARD.fullmatch(name)]
        for name in (name for name in evaluations if name in numbers):
            self._evaluations.setdefault(name, []).append((numbers[name], numbers.get(f"{name}_std", 0.0), self._trained()))
        for name in filter(EVAL_LOSS.fullmatch, numbers):
            self._evaluated.setdefault(name, []).append((numbers[name], self._trained()))
        if evaluations and "reward" not in line:
            self._since_evaluation = self._since_evaluation[-1:]  # several datasets are evaluated one after the other

    def _trained(self) -> float | None:
        """The training reward since the last evaluation."""
        return fmean(self._since_evaluation) if self._since_evaluation else self._first_reward

    def _check_loss(self, metric: str) -> str | None:
        for name, before, reward_before, now, reward_now in self._first_and_last(metric):
            if now < DIVERSITY_FRACTION * before and reward_now > reward_before:
                return (
                    f"loss of {metric}: {LOSSES[metric]} differ by {now:.3g} now and by {before:.3g} at first (metric {name}), while the "
                    f"reward went from {reward_before:.4g} to {reward_now:.4g}"
                )
        return None

    def _first_and_last(self, metric: str) -> Iterator[tuple[str, float, float, float, float]]:
        """(name in the log, first value and training reward, last ones) of a metric in the training lines and in the evaluations."""
        values = self._values[metric]
        if len(values) >= 2 * DIVERSITY_LINES:
            ends = values[:DIVERSITY_LINES], values[-DIVERSITY_LINES:]
            first, last = ([fmean(column) for column in zip(*end, strict=True)] for end in ends)
            yield metric, first[0], first[1], last[0], last[1]
        for name in (name for name in self._evaluated if name.endswith(metric)):
            history = self._evaluated[name]
            (before, reward_before), (_, reward_now) = history[0], history[-1]
            reward_before = self._first_reward if reward_before is None else reward_before  # None: evaluated before the training
            if len(history) > EVAL_PATIENCE and reward_before is not None and reward_now is not None:
                yield name, before, reward_before, max(value for value, _ in history[-EVAL_PATIENCE:]), reward_now

    def _check_kl(self) -> str | None:
        if len(self._values["kl"]) < KL_FIRST_LINE:
            return None
        kl_before, rewards_before = zip(*self._values["kl"][-2 * KL_WINDOW : -KL_WINDOW], strict=True)
        kl_after, rewards_after = zip(*self._values["kl"][-KL_WINDOW:], strict=True)
        rise = fmean(rewards_after) - fmean(rewards_before)
        error = math.sqrt((variance(rewards_before) + variance(rewards_after)) / KL_WINDOW)
        if fmean(kl_after) <= KL_FACTOR * max(fmean(kl_before), 0.0) or rise > KL_STANDARD_ERRORS * error:
            return None
        return (
            f"the model moves away from the reference without gain: kl went from {fmean(kl_before):.3g} to {fmean(kl_after):.3g} within "
            f"{KL_WINDOW} log lines, the reward from {fmean(rewards_before):.4g} to {fmean(rewards_after):.4g}"
        )

    def _check_evaluations(self) -> str | None:
        for name, history in self._evaluations.items():
            if len(history) <= EVAL_PATIENCE:
                continue
            best, spread, trained_then = max(history[:-EVAL_PATIENCE], key=lambda entry: entry[0])
            recent = history[-EVAL_PATIENCE:]
            trained_now = recent[-1][2]
            then = self._first_reward if trained_then is None else trained_then
            if spread == 0 or trained_now is None or then is None:
                continue
            below = all(value < best - EVAL_DROP * spread for value, _, _ in recent)
            if below and trained_now > then + EVAL_DROP * self._reward_std:
                return (
                    f"the training reward rises while the evaluation reward falls: {name} was {best:.4g} and is {recent[-1][0]:.4g}, the "
                    f"training reward went from {then:.4g} to {trained_now:.4g}"
                )
        return None
