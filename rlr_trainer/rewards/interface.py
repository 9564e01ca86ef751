"""Calling users' reward functions: one or several, checked, combined, with or without a graph.

A reward is a function `(images, prompts, metadata) -> rewards` or `-> (rewards, reward_metadata)`:

- images: float tensor [B, 3, H, W] in [0, 1]; has a graph exactly when the plan needs a differentiable reward;
- prompts: tuple of B strings; metadata: tuple of B dicts (whatever the prompt function or the dataset row brought);
- rewards: [B] or [B, 1] tensor, array or list of numbers; None or NaN marks a sample that the reward does not apply to.

It may be an `async def`, and it may be marked `groupwise` to see all pictures of one prompt at once. B is that of the sampling batch,
or `reward_batch_size`, or the group's.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
import math
import numbers
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Any

import torch
from torch import Tensor

from rlr_trainer.estimators.first_order import NON_DIFFERENTIABLE, NonDifferentiableRewardError
from rlr_trainer.rewards.calling import Workers, invoke, is_coroutine_function, is_groupwise, settle
from rlr_trainer.rewards.values import (
    RewardError,
    RewardResult,
    check_finite,
    check_values,
    depends_on,
    graph_node,
    merge_notes,
    split_returned,
)

__all__ = ["RewardCalls", "RewardError", "RewardFunction", "RewardResult", "Rewards"]

logger = logging.getLogger(__name__)

RewardFunction = Callable[[Tensor, tuple[str, ...], tuple[Any, ...]], Any]
SHOWN_PROMPTS = 3  # that messages name
ON_ERROR_NAMES = ("raise", "skip")


class Rewards:
    """One or several reward functions behind one call.

    Args:
        functions: a callable or a list of them.
        weights: one per function; None means 1 each.
        group_size: pictures of one prompt, for `groupwise` functions.
        batch_size: pictures per call; None takes the batch as it comes.
        timeout: seconds per call, or None.
        on_error: "raise", or "skip" to go on without the samples of a call that failed.
        asynchronous: make the calls in threads; only for rewards that need no graph.
        workers: calls at a time, if asynchronous.

    Attributes:
        names: of the functions, made unique.
        queries: pictures scored so far; each counts once, however many functions or calls there are.
        failures: calls that failed so far, with on_error="skip".
        last_failure: what the last of them raised, in one line.

    Raises:
        TypeError: something that cannot be called.
        ValueError: no function, another number of weights than functions, or a weight that is no finite number.
    """

    def __init__(
        self,
        functions: RewardFunction | Sequence[RewardFunction],
        weights: Sequence[float] | None = None,
        *,
        group_size: int = 1,
        batch_size: int | None = None,
        timeout: float | None = None,
        on_error: str = "raise",
        asynchronous: bool = False,
        workers: int = 1,
    ) -> None:
        self.functions: list[Any] = list(functions) if isinstance(functions, list | tuple) else [functions]
        if not self.functions:
            raise ValueError("reward_function=[]: needs at least one reward function")
        for function in self.functions:
            if not callable(function):
                raise TypeError(
                    f"reward_function={function!r}: must be a function (images, prompts, metadata) -> rewards, or a list of them"
                )
        self.weights = [1.0] * len(self.functions) if weights is None else list(weights)
        if len(self.weights) != len(self.functions):
            raise ValueError(f"reward_weights has {len(self.weights)} entries for {len(self.functions)} reward functions")
        if not all(isinstance(weight, numbers.Real) and math.isfinite(weight) for weight in self.weights):
            raise ValueError(f"reward_weights={self.weights}: must be finite numbers")
        if on_error not in ON_ERROR_NAMES:
            raise ValueError(f"on_error={on_error!r}: must be one of {', '.join(ON_ERROR_NAMES)}")
        self.names = _unique_names(self.functions)
        self.group_size, self.batch_size, self.timeout = group_size, batch_size, timeout
        self.on_error, self.asynchronous, self.workers = on_error, asynchronous, workers
        self.queries = 0
        self.failures = 0
        self.last_failure = ""

    @property
    def needs_groups(self) -> bool:
        """Whether a function asks for all pictures of a prompt at once."""
        return any(is_groupwise(function) for function in self.functions)

    def without_graph(self) -> str | None:
        """Why these rewards can never have a gradient, or None."""
        if self.asynchronous:
            return "async_rewards=True calls rewards in threads, without a graph; set async_rewards=False"
        for name, function in zip(self.names, self.functions, strict=True):
            if is_groupwise(function):
                return f"reward {name!r} is group-wise: a black box, because the plan differentiates each picture with the others fixed"
            if is_coroutine_function(function):
                return f"reward {name!r} is an async function: a black box; make it a plain function"
        return None

    def __call__(
        self, images: Tensor, prompts: tuple[str, ...], metadata: tuple[Any, ...], *, differentiable: bool, where: str = ""
    ) -> RewardResult:
        """Scores one batch, which holds whole groups if a function is group-wise.

        Args:
            where: what the batch is, for messages.

        Raises:
            RewardError: a function failed, took too long, or returned a wrong length, shape or type; names it and the prompts.
            NonDifferentiableRewardError: `differentiable` and a reward without a graph from the images; names it.
            FloatingPointError: images that are not finite.
        """
        calls = RewardCalls(self)
        try:
            calls.add(images, prompts, metadata, differentiable=differentiable, where=where)
            return calls.finish()[0]
        finally:
            calls.close()

    def combine(self, values: Tensor, failed: Tensor) -> Tensor:
        """Weighted sum over the rewards that apply, [K, B] -> [B]; NaN where none does, or where `failed` (bool [B]).

        A reward of weight 0 is only logged: where no other applies, the sum is NaN, too.
        """
        weighted = torch.stack([weight * value for weight, value in zip(self.weights, values, strict=True)])
        applies = ~torch.isnan(weighted)
        total = torch.where(applies, weighted, 0.0).sum(0)
        counts = [bool(weight) or not any(self.weights) for weight in self.weights]
        return torch.where(applies[counts].any(0) & ~failed, total, torch.nan)

    def count_failure(self, name: str, count: int, error: Exception) -> None:
        """Takes down a call that failed, and warns of the first few and then ever more rarely."""
        self.failures += 1
        self.last_failure = traceback.format_exception_only(error)[-1].strip()
        if self.failures <= 3 or self.failures & (self.failures - 1) == 0:  # then the 4th, 8th, 16th, ...
            logger.warning(
                "reward %r failed: %s. Its %d samples are dropped (on_reward_error='skip'; failure number %d of this process)",
                name, self.last_failure, count, self.failures,
            )  # fmt: skip


_Batch = tuple[Tensor, tuple[str, ...], tuple[Any, ...]]  # images, prompts, metadata


@dataclasses.dataclass
class _Call:
    """A call of one function, begun or done: for the samples from number `first` on, in the order in which they were added."""

    function: int
    first: int
    batch: _Batch
    where: str
    future: Future[tuple[Tensor, Any]]
    values: Tensor | None = None
    notes: Any = None
    failed: bool = False

    @property
    def prompts(self) -> tuple[str, ...]:
        return self.batch[1]

    @property
    def end(self) -> int:
        return self.first + len(self.prompts)


class RewardCalls:
    """The calls for consecutive batches: `add` begins them, `finish` gives the results batch by batch, in the order of adding.

    The results do not depend on timing. A group-wise function is called when its group is complete, which may take several batches.
    Every call gets pictures and metadata dicts of its own, so a function may edit them in place, add keys and remove some; what
    the dicts hold is not copied.

    Args:
        rewards: the functions and how to call them.
        on_error: in place of theirs.
    """

    def __init__(self, rewards: Rewards, on_error: str | None = None) -> None:
        self.rewards = rewards
        self.on_error = on_error or rewards.on_error
        self._workers = Workers(rewards.workers) if rewards.asynchronous else None
        self._calls: list[_Call] = []
        self._sizes: list[int] = []
        self._waiting: list[_Batch] = []  # pictures of a group that is not complete

    def add(
        self,
        images: Tensor,
        prompts: tuple[str, ...],
        metadata: tuple[Any, ...],
        *,
        differentiable: bool = False,
        where: str = "",
    ) -> None:
        """Begins the calls for one more batch; without `asynchronous` they are done on return."""
        rewards, first = self.rewards, sum(self._sizes)
        reason = rewards.without_graph() if differentiable else None
        if reason is not None:
            raise NonDifferentiableRewardError(f"{reason}, or choose a plan that needs no reward gradient: estimator='ddpo'")
        check_finite(images, prompts, where)
        batch = images if differentiable else images.detach(), prompts, metadata
        rewards.queries += len(prompts)
        self._sizes.append(len(prompts))
        size = rewards.batch_size or len(prompts)
        for number, function in enumerate(rewards.functions):
            if not is_groupwise(function):
                for start in range(0, len(prompts), size):
                    self._begin(number, first + start, _part(batch, start, start + size), where, differentiable)
        if rewards.needs_groups:
            self._add_to_groups(batch, where)

    def _add_to_groups(self, batch: _Batch, where: str) -> None:
        parts = [*self._waiting, batch]
        waiting = (
            torch.cat([part[0] for part in parts]),
            tuple(prompt for part in parts for prompt in part[1]),
            tuple(row for part in parts for row in part[2]),
        )
        count, size = len(waiting[1]), self.rewards.group_size
        first, whole = sum(self._sizes) - count, count // size * size
        for start in range(0, whole, size):
            group = _part(waiting, start, start + size)
            if len(set(group[1])) > 1:
                raise RewardError(
                    f"a group-wise reward compares {size} pictures (num_images_per_prompt) of one prompt, but got the prompts "
                    f"{_shown(group[1])}; it cannot score pictures of different prompts, as evaluate() samples them"
                )
            for number, function in enumerate(self.rewards.functions):
                if is_groupwise(function):
                    self._begin(number, first + start, group, where, False)
        self._waiting = [_part(waiting, whole, count)] if whole < count else []

    def _begin(self, number: int, first: int, batch: _Batch, where: str, differentiable: bool) -> None:
        rewards, name = self.rewards, self.rewards.names[number]
        images, prompts, metadata = batch
        rows = tuple(copy.copy(row) if isinstance(row, dict) else row for row in metadata)

        def work() -> tuple[Tensor, Any]:
            # as in training everywhere: a diagnosis calls from within autocast, and a thread with a time limit leaves it
            with torch.autocast(images.device.type, enabled=False), torch.set_grad_enabled(differentiable):
                own = images.clone()
                origin = graph_node(own)
                values, notes = split_returned(invoke(name, rewards.functions[number], (own, prompts, rows), rewards.timeout))
                values = check_values(name, values, len(prompts), images.device)
            if differentiable and not depends_on(values, origin):
                raise NonDifferentiableRewardError(f"reward {name!r}: {NON_DIFFERENTIABLE}")
            return values, notes

        call = _Call(number, first, batch, where, Future() if self._workers is None else self._workers.submit(work))
        self._calls.append(call)
        if self._workers is None:
            settle(call.future, work)
            self._read(call)

    def _read(self, call: _Call) -> None:
        """Waits for a call and takes its values; NaN for one that failed, if such are skipped."""
        if call.values is not None:
            return
        name = self.rewards.names[call.function]
        try:
            call.values, call.notes = call.future.result()
        except NonDifferentiableRewardError:
            raise
        except Exception as error:
            if self.on_error == "raise":
                raise _explain(error, name, call) from error
            self.rewards.count_failure(name, len(call.prompts), error)
            call.failed = True
            # 0 * images: with a graph, if the others have one
            call.values = torch.nan + 0.0 * call.batch[0].float().flatten(1).sum(1)

    def finish(self) -> list[RewardResult]:
        """Waits for all calls; the results of the batches, in the order in which they were added.

        Raises:
            RewardError: the first call that failed, in the order of adding; or a group that is not complete.
        """
        if self._waiting:
            raise RewardError(
                f"a group-wise reward needs whole groups of num_images_per_prompt={self.rewards.group_size} pictures of one prompt; "
                f"{len(self._waiting[0][1])} are left over"
            )
        for call in self._calls:
            self._read(call)
        rows: list[list[Tensor]] = [[] for _ in self.rewards.functions]
        for call in self._calls:  # of each function in the order of the samples
            assert call.values is not None
            rows[call.function].append(call.values)
        values = torch.stack([torch.cat(row) for row in rows])
        failed = torch.zeros(values.shape[1], dtype=torch.bool, device=values.device)
        for call in self._calls:
            failed[call.first : call.end] |= call.failed
        results, first = [], 0
        for size in self._sizes:
            results.append(self._result(values[:, first : first + size], failed[first : first + size], first))
            first += size
        self._calls, self._sizes = [], []
        return results

    def _result(self, values: Tensor, failed: Tensor, first: int) -> RewardResult:
        """Of one batch. What a call of several batches (a group's) returned beside its values counts to the batch where it ends."""
        rewards = self.rewards
        ended = [call for call in self._calls if first < call.end <= first + values.shape[1]]
        notes: dict[str, Any] = {}
        for number, name in enumerate(rewards.names):
            calls = [call for call in ended if call.function == number]
            notes[name] = merge_notes([call.notes for call in calls], [len(call.prompts) for call in calls]) if calls else {}
        return RewardResult(rewards.combine(values, failed), values, notes, errors=sum(call.failed for call in ended))

    def close(self) -> None:
        """Drops calls that have not begun; those that have, end by themselves."""
        if self._workers is not None:
            self._workers.close()
            self._workers = None


def _part(batch: _Batch, start: int, stop: int) -> _Batch:
    images, prompts, metadata = batch
    return images[start:stop], prompts[start:stop], metadata[start:stop]


def _explain(error: Exception, name: str, call: _Call) -> RewardError:
    """The error with the place where it happened."""
    place = f"{f'in {call.where}, ' if call.where else ''}on {len(call.prompts)} prompts: {_shown(call.prompts)}"
    if isinstance(error, RewardError) and str(error).startswith(f"reward {name!r}"):
        return RewardError(f"{error} ({place})")
    return RewardError(f"reward {name!r} raised {type(error).__name__}: {error} ({place})")


def _shown(prompts: Sequence[str]) -> str:
    """The first few prompts, and how many more."""
    shown = ", ".join(f"{prompt!r:.80}" for prompt in prompts[:SHOWN_PROMPTS])
    return f"{shown} and {len(prompts) - SHOWN_PROMPTS} more" if len(prompts) > SHOWN_PROMPTS else shown


def _unique_names(functions: Sequence[RewardFunction]) -> list[str]:
    own = [getattr(function, "__name__", None) or type(function).__name__ for function in functions]
    names: list[str] = []
    for name in own:
        unique, number = name, 1
        while unique in names or (number > 1 and unique in own):
            number += 1
            unique = f"{name}_{number}"
        names.append(unique)
    return names
