"""Signs in a log that nothing can be learnt: no gradient, rewards that are all the same, a reward that never changes.

Each rule is a function of the last log lines. The monitor says them during the training, and the report afterwards, by `DeadSignals`.
Needs nothing but Python.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

PATIENCE = 5  # log lines on end, of updates with a rollout of their own
UNCHANGED = 10  # the same, for the mean reward: it may stay equal by chance for a while
SAME = 1e-6  # of the reward's size: float32 rounds no coarser
BOUND = 1e-4  # from 0 or 1, the ends of most rewards
LEAST_NORM = 1e-8  # Adam's epsilon: entries below it hardly move a weight

Lines = Sequence[Mapping[str, Any]]


def no_gradient(lines: Lines) -> str | None:
    """The norm of the gradient is 0, or too small for Adam, in all of the last `PATIENCE` lines."""
    norms = _last(lines, "grad_norm", PATIENCE)
    if not norms or max(norms) > LEAST_NORM:
        return None
    size = "0" if max(norms) == 0 else f"{max(norms):.2g} at most"
    return f"no gradient: grad_norm was {size} in {PATIENCE} log lines, so the weights do not move"


def equal_rewards(lines: Lines) -> str | None:
    """The pictures of an update have all the same reward, in all of the last `PATIENCE` lines, and no first-order part makes up for it."""
    deviations, rewards = _last(lines, "reward_std", PATIENCE), _last(lines, "reward", PATIENCE)
    if not deviations or not rewards or any(std > SAME * abs(mean) for std, mean in zip(deviations, rewards, strict=True)):
        return None
    if max(_last(lines, "estimator/fo_grad_norm", PATIENCE), default=0.0) > LEAST_NORM:
        return None
    return (
        f"rewards without difference: all pictures of an update had the same reward ({rewards[-1]:.4g} in the last), so that "
        f"reward_std was 0 in {PATIENCE} log lines, and a comparison of pictures says nothing"
    )


def unchanged_reward(lines: Lines) -> str | None:
    """The mean reward stays the same over the last `UNCHANGED` lines, though the pictures are others."""
    rewards = _last(lines, "reward", UNCHANGED)
    if not rewards or max(rewards) - min(rewards) > SAME * max(map(abs, rewards)):
        return None
    return f"the mean reward stays at {rewards[-1]:.4g}: it was the same in {UNCHANGED} log lines, each of other pictures"


def saturated_reward(lines: Lines) -> str | None:
    """All rewards of the last `PATIENCE` lines lie within `BOUND` of 0, or of 1."""
    deviations, rewards = _last(lines, "reward_std", PATIENCE), _last(lines, "reward", PATIENCE)
    for bound in (0, 1):
        if deviations and rewards and all(abs(r - bound) + std < BOUND for r, std in zip(rewards, deviations, strict=True)):
            return (
                f"the reward is at {bound}: {rewards[-1]:.4g} ± {deviations[-1]:.2g} in the last of {PATIENCE} log lines like that"
            )
    return None


RULES = {
    "saturated_reward": saturated_reward,
    "no_gradient": no_gradient,
    "equal_rewards": equal_rewards,
    "unchanged_reward": unchanged_reward,
}


def causes(rewards: Sequence[float], pictures: int | None) -> str:
    """What is behind a dead signal, the likeliest first.

    Args:
        rewards: the last mean rewards.
        pictures: of a rollout, over all processes; None: not known.
    """
    if pictures == 1:
        return (
            "A rollout has one picture, which nothing can be compared with: raise per_device_train_batch_size, "
            "gradient_accumulation_steps or num_images_per_prompt."
        )
    found = []
    if rewards and all(min(abs(reward), abs(reward - 1)) < BOUND for reward in rewards):
        found.append(
            "a probability that is saturated: take its logarithm or logit, or a reward that still tells such pictures apart"
        )
    found += [
        "the reward takes pictures for 0..255, rounds them or makes them whole numbers: they are floats in [0, 1]",
        "the reward does not look at the pictures",
    ]
    return f"What may be behind it: {'; '.join(found)}."


class DeadSignals:
    """Reads the lines of a log one after the other and tells each sign once; docs/troubleshooting.md says what to do.

    Args:
        pictures: of a rollout, over all processes; None: not known.

    Attributes:
        found: rule -> what was seen.
    """

    def __init__(self, pictures: int | None = None) -> None:
        self.pictures = pictures
        self.found: dict[str, str] = {}
        self._lines: list[Mapping[str, Any]] = []

    def read(self, line: Mapping[str, Any]) -> list[str]:
        """Takes the next log line; returns what is seen now for the first time."""
        if "reward" not in line:  # an evaluation, or a further update of one rollout
            return []
        self._lines = [*self._lines, line][-UNCHANGED:]
        new = {rule: text for rule, check in RULES.items() if rule not in self.found and (text := check(self._lines))}
        self.found |= new
        return list(new.values())

    @property
    def causes(self) -> str:
        """See `causes`."""
        return causes(_last(self._lines, "reward", min(PATIENCE, len(self._lines))), self.pictures)


def _last(lines: Lines, name: str, count: int) -> list[float]:
    """The last `count` values of a metric; none where there are fewer, or one is missing or not finite."""
    values = [line.get(name) for line in lines[-count:]]
    numbers = [float(value) for value in values if isinstance(value, int | float) and math.isfinite(value)]
    return numbers if len(numbers) == count else []
