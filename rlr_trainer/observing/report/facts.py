"""What a run comes to: start, end, best, cost, and what deserves a look."""

from __future__ import annotations

import dataclasses
import math

import numpy as np

from rlr_trainer.observing.report import wording
from rlr_trainer.observing.report.reading import EVAL_REWARD, Floats, Run
from rlr_trainer.observing.report.series import Mean, ends, mean_of, window_size

CLEAR = 2.0  # standard errors that a change must exceed
MANY_DROPPED = 0.05
HIGH_CLIPPING = 0.3
DIVERSITY_LEFT = 0.7
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
        missing = sum(int(np.isnan(rollout.rewards).sum()) for rollout in run.rollouts)
        total = sum(len(rollout.rewards) for rollout in run.rollouts)
        return missing, missing / total if total else None
    column = run.train.get("samples_dropped")  # per rollout, mean over the log line
    return (None if column is None else float(np.nansum(column))), None


# ---- what deserves a look ----


def remarks_of(run: Run, facts: Facts) -> list[Remark]:
    """Every remark that the run's numbers give reason for, the gravest first."""
    found = [*_broken(run, facts), *_hacking(run, facts), *_reward_path(facts), *_steps(run, facts)]
    return [remark for remark in found if remark is not None]


def _broken(run: Run, facts: Facts) -> list[Remark | None]:
    bad = {name: count for name, count in run.train.not_finite.items() if name in ("reward", "loss", "grad_norm", "kl")}
    last = run.train.steps[~np.isnan(run.train.columns["reward"])][-1] if "reward" in bad else facts.updates
    ends_early = f"The last finite reward is that of update {last:.0f}: what this page calls the end is there. "
    share, share_text = facts.dropped_share, wording.number(100 * (facts.dropped_share or 0), 2)
    return [
        Remark(
            "Values that are not finite",
            f"{', '.join(f'{name} in {count} log lines' for name, count in bad.items())}. {ends_early if last < facts.updates else ''}Lower the "
            "learning rate, or look for a reward that fails or a precision that overflows.",
        )
        if bad
        else None,
        Remark(
            "Many samples dropped",
            f"{wording.count(facts.dropped)} samples ({share_text} %) had no reward and were left out. If the reward fails on a kind of "
            "picture, the mean no longer speaks for all of them.",
        )
        if share is not None and share > MANY_DROPPED
        else None,
        Remark(
            "No closing line",
            f"The run has not logged its end: it is still running, or was stopped after update {facts.updates}. If it saved a "
            "checkpoint, it goes on with --resume (resume_from_checkpoint=True).",
        )
        if run.closing is None
        else None,
    ]


def _hacking(run: Run, facts: Facts) -> list[Remark | None]:
    """Signs that the reward rose at the cost of what it stands for."""
    if not (is_clear(facts.change) and facts.change.value > 0):
        return []
    found: list[Remark | None] = []
    diversity = ends(run.train.columns.get("diversity", np.array([])))
    if diversity is None and len(run.pictures) > 1:
        known = [p.diversity for p in run.pictures if p.diversity is not None]
        diversity = (Mean(known[0], None, 1), Mean(known[-1], None, 1)) if len(known) > 1 else None
    if diversity is not None and diversity[1].value < DIVERSITY_LEFT * diversity[0].value:
        found.append(
            Remark(
                "The reward rose while diversity fell",
                f"Diversity went {_from_to(*diversity)}: the pictures have become "
                "more alike. Compare the pictures below; stop earlier, or hold the model back with kl_coef.",
            )
        )
    evals = {name: ends(column) for name, column in run.evals.columns.items() if EVAL_REWARD.fullmatch(name)}
    worse = {name: pair for name, pair in evals.items() if pair is not None and pair[1].value <= pair[0].value}
    if worse and len(run.evals) > 1:
        found.append(
            Remark(
                "The reward rose in training, not in evaluation",
                f"{', '.join(f'{name} went {_from_to(*pair)}' for name, pair in worse.items())}: what was learned does not carry over to the "
                "evaluation.",
            )
        )
    judged = [(run.summary or {}).get(f"judge_{when}") for when in ("before", "after")]
    if all(isinstance(value, int | float) for value in judged) and judged[1] < judged[0]:  # type: ignore[operator]
        found.append(
            Remark(
                "The reward rose, the independent judge's score fell",
                f"From {wording.number(judged[0])} to {wording.number(judged[1])}: the model has learned to please the reward alone.",
            )
        )
    return found


def _reward_path(facts: Facts) -> list[Remark | None]:
    rise, lost = facts.best - facts.start.value, facts.best - facts.end.value
    noise = facts.change.error or 0.0
    fell_back = facts.change.error is not None and lost > max(CLEAR_FALL * noise, FALL * rise) and facts.best_step < facts.updates
    unclear = facts.change.error is not None and not is_clear(facts.change)
    return [
        Remark(
            "The reward fell",
            f"It ended {wording.with_error(Mean(-facts.change.value, facts.change.error, 0))} lower than it began. "
            "Try a lower learning rate or more samples per update.",
        )
        if is_clear(facts.change) and facts.change.value < 0
        else None,
        Remark(
            "The reward fell at the end",
            f"Its best mean was {wording.number(facts.best)} around update {facts.best_step}; it ended at {wording.with_error(facts.end)}. An "
            "earlier checkpoint may be the better model; a lower learning rate or a decaying one keeps what was gained.",
        )
        if fell_back and not (is_clear(facts.change) and facts.change.value < 0)
        else None,
        Remark(
            "No clear change of the reward",
            f"The change, {wording.with_error(facts.change)}, lies within its noise. Train longer, take more samples per update, or let "
            "rlr-trainer diagnose say which estimator has the clearest signal.",
        )
        if unclear and not fell_back
        else None,
    ]


def _steps(run: Run, facts: Facts) -> list[Remark | None]:
    clipped = run.train.get("clip_ratio")
    late = None if clipped is None else mean_of(clipped[len(clipped) // 2 :])
    return [
        Remark(
            "Many ratios clipped",
            f"In the second half of the run {wording.number(100 * late.value, 2)} % of the ratios lay outside the clip range, and their samples "
            "no longer pushed. Lower learning_rate or num_inner_epochs.",
        )
        if late is not None and late.value > HIGH_CLIPPING
        else None,
        _kl_warning(run, facts),
    ]


def _kl_warning(run: Run, facts: Facts) -> Remark | None:
    """KL that doubles over the second half of a run which gains less than a tenth of its reward there."""
    kl, rewards = run.train.get("kl"), run.train.get("reward")
    if kl is None or rewards is None or len(kl) < 8:
        return None
    size = window_size(len(kl))
    middle = slice(len(kl) // 2 - size // 2, len(kl) // 2 - size // 2 + size)
    before, reward_before, pair = mean_of(kl[middle]), mean_of(rewards[middle]), ends(kl)
    if before is None or reward_before is None or pair is None:
        return None
    gain, total = facts.end.value - reward_before.value, abs(facts.change.value)
    if pair[1].value <= 2 * max(before.value, 0) or pair[1].value <= 0 or gain >= FALL * total:
        return None
    return Remark(
        "KL grew without reward",
        f"In the second half of the run KL went {_from_to(before, pair[1])} while the reward "
        f"changed by {wording.number(gain)}: the model moves away from where it began for nothing. Stop earlier, or raise kl_coef.",
    )


def _from_to(first: Mean, last: Mean) -> str:
    return f"from {wording.number(first.value)} to {wording.number(last.value)}"
