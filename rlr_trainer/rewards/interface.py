"""Calling users' reward functions: one or several, checked, combined, with or without a graph.

A reward is a function `(images, prompts, metadata) -> rewards` or `-> (rewards, reward_metadata)`:

- images: float tensor [B, 3, H, W] (videos: [B, F, 3, H, W]) in [0, 1]; has a graph exactly when the plan needs a differentiable reward;
- prompts: tuple of B strings; metadata: tuple of B dicts (whatever the prompt function or the dataset row brought);
- rewards: [B] or [B, 1] tensor, array or list of numbers; None or NaN marks a sample that the reward does not apply to.
"""

from __future__ import annotations

import asyncio
import copy
import dataclasses
import functools
import inspect
import itertools
import logging
import math
import numbers
import traceback
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rlr_trainer.estimators.chain import as_rows, without_autocast
from rlr_trainer.estimators.first_order import NON_DIFFERENTIABLE, NonDifferentiableRewardError
from rlr_trainer.rewards import contract
from rlr_trainer.rewards import values as checks
from rlr_trainer.rewards.calling import Workers, invoke
from rlr_trainer.rewards.frames import FrameReward
from rlr_trainer.rewards.values import RewardError, RewardResult

__all__ = ["RewardCalls", "RewardError", "RewardFunction", "RewardResult", "Rewards"]

logger = logging.getLogger(__name__)

RewardFunction = Callable[[Tensor, tuple[str, ...], tuple[Any, ...]], Any]


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
        TypeError: no function, or something that cannot be called.
        ValueError: another number of weights than functions, a weight that is no finite number, or another `on_error`.
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
        if not self.functions or not all(map(callable, self.functions)):
            raise TypeError(
                f"reward_function={functions!r}: must be a function (images, prompts, metadata) -> rewards, or a list of them; the names of "
                "built-in rewards are the command line's, in Python they are classes and functions of rlr_trainer.rewards"
            )
        self.names = _unique_names(self.functions)
        for name, function in zip(self.names, self.functions, strict=True):
            contract.check_signature(name, function)
        given: Any = [1.0] * len(self.functions) if weights is None else weights
        self.weights: list[float] = list(given) if isinstance(given, list | tuple) else [given]
        finite = all(isinstance(weight, numbers.Real) and math.isfinite(weight) for weight in self.weights)
        if not finite or len(self.weights) != len(self.functions):
            raise ValueError(f"reward_weights={weights}: must be {len(self.functions)} finite numbers, one per reward function")
        if on_error not in ("raise", "skip"):
            raise ValueError(f"on_error={on_error!r}: must be one of raise, skip")
        self.groupwise = [bool(getattr(function, "needs_group", False)) for function in self.functions]
        self.group_size, self.batch_size, self.timeout = group_size, batch_size, timeout
        self.on_error, self.asynchronous, self.workers = on_error, asynchronous, workers
        self.queries, self.failures, self.last_failure = 0, 0, ""

    @property
    def needs_groups(self) -> bool:
        """Whether a function asks for all pictures of a prompt at once."""
        return any(self.groupwise)

    @property
    def of_list(self) -> str:
        """What a message on a reward without a gradient adds where the reward is one of several."""
        if len(self.functions) == 1 or self.asynchronous:
            return ""
        return ". One such reward makes the whole list a black box: the gradient of the others alone would miss its share"

    def without_graph(self) -> str | None:
        """Why these rewards can never have a gradient, or None."""
        if self.asynchronous:
            return "async_rewards=True calls rewards in threads, without a graph; set async_rewards=False"
        for name, function, groupwise in zip(self.names, self.functions, self.groupwise, strict=True):
            if groupwise:
                return f"reward {name!r} is group-wise: a black box, because the plan differentiates each picture with the others fixed"
            if any(map(inspect.iscoroutinefunction, (function, type(function).__call__))):
                return f"reward {name!r} is an async function: a black box; make it a plain function"
            if getattr(function, "black_box", False):
                return f"reward {name!r} is a black box, without a gradient; make it differentiable in its images"
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
            FloatingPointError: images that are not finite; with on_error="skip" those samples are dropped instead.
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

    def count_failure(self, what: str, count: int, error: BaseException) -> None:
        """Takes down a call that failed, and warns of the first few and then ever more rarely."""
        self.failures += 1
        self.last_failure = traceback.format_exception_only(error)[-1].strip()
        if self.failures <= 3 or self.failures & (self.failures - 1) == 0:  # then the 4th, 8th, 16th, ...
            logger.warning(
                "%s failed: %s. Its %d samples are dropped (on_reward_error='skip'; failure number %d of this process)",
                what, self.last_failure, count, self.failures,
            )  # fmt: skip


_Batch = tuple[Tensor, tuple[str, ...], tuple[Any, ...]]  # images, prompts, metadata


@dataclasses.dataclass
class _Call:
    """A call of one function for the samples from number `first` to `end`."""

    function: int
    first: int
    images: Tensor
    prompts: tuple[str, ...]
    where: str
    result: Callable[[], tuple[Tensor, Any]]  # makes the call, or waits for it
    values: Tensor = dataclasses.field(init=False)
    notes: Any = None
    failed: bool = False

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
        self._broken: set[int] = set()  # numbers of the samples whose pictures are not finite

    def add(
        self, images: Tensor, prompts: tuple[str, ...], metadata: tuple[Any, ...], *, differentiable: bool = False, where: str = ""
    ) -> None:
        """Begins the calls for one more batch; without `asynchronous` they are done on return."""
        rewards, first = self.rewards, sum(self._sizes)
        reason = rewards.without_graph() if differentiable else None
        if reason is not None:
            raise NonDifferentiableRewardError(
                f"{reason}, or choose a plan that needs no reward gradient: estimator='rlr_black_box'{rewards.of_list}"
            )
        images = self._without_broken(images if differentiable else images.detach(), prompts, where)
        batch = images, prompts, metadata
        rewards.queries += len(prompts)
        self._sizes.append(len(prompts))
        size = rewards.batch_size or len(prompts)
        for number, groupwise in enumerate(rewards.groupwise):
            if not groupwise:
                for start in range(0, len(prompts), size):
                    self._begin(number, first + start, _part(batch, start, start + size), where, differentiable)
        if rewards.needs_groups:
            self._waiting.append(batch)
            self._begin_groups(where)

    def _without_broken(self, images: Tensor, prompts: tuple[str, ...], where: str) -> Tensor:
        """Pictures that are finite: with "skip" a black one stands for one that is not, and whatever reward it gets is dropped."""
        first, finite = sum(self._sizes), checks.finite_rows(images)
        if finite.all():
            return images
        try:
            checks.check_finite(images, prompts, where)
        except FloatingPointError as error:
            if self.on_error == "raise":
                raise
            self.rewards.count_failure("the decoder", int((~finite).sum()), error)
        self._broken.update(first + row for row in torch.nonzero(~finite).flatten().tolist())
        return torch.where(as_rows(finite, images) > 0, images, 0.0)

    def _begin_groups(self, where: str) -> None:
        images, prompts, metadata = zip(*self._waiting, strict=True)
        waiting: _Batch = torch.cat(images), sum(prompts, ()), sum(metadata, ())
        count, size = len(waiting[1]), self.rewards.group_size
        first, whole = sum(self._sizes) - count, count // size * size
        for start in range(0, whole, size):
            group = _part(waiting, start, start + size)
            members = set(range(first + start, first + start + size))
            if self._broken & members:  # the others would be compared with a picture that is not there
                self._broken |= members
            if len(set(group[1])) > 1:
                raise RewardError(
                    f"a group-wise reward compares {size} pictures (num_images_per_prompt) of one prompt, but got different prompts "
                    f"({checks.place(where, group[1])}); it cannot score them, as evaluate() samples them"
                )
            for number, groupwise in enumerate(self.rewards.groupwise):
                if groupwise:
                    self._begin(number, first + start, group, where, False)
        self._waiting = [_part(waiting, whole, count)] if whole < count else []

    def _begin(self, number: int, first: int, batch: _Batch, where: str, differentiable: bool) -> None:
        rewards, name = self.rewards, self.rewards.names[number]
        images, prompts, metadata = batch
        rows = tuple(copy.copy(row) if isinstance(row, dict) else row for row in metadata)
        function = rewards.functions[number]
        if isinstance(function, FrameReward):  # its frames are drawn here: a thread may come to it at any time
            function = function.drawn(images)
        work = functools.partial(self._ask, name, function, (images, prompts, rows), differentiable)
        result = work if self._workers is None else self._workers.submit(work).result
        self._calls.append(_Call(number, first, images, prompts, where, result))
        if self._workers is None:
            self._take(self._calls[-1])

    def _ask(self, name: str, function: RewardFunction, batch: _Batch, differentiable: bool) -> tuple[Tensor, Any]:
        """What a reward returns for a batch: checked values [B], and its notes. With `asynchronous` a worker's thread runs it."""
        images, prompts, rows = batch
        # as in training everywhere: a diagnosis calls from within autocast, and a thread with a time limit leaves it
        with without_autocast(images.device), torch.set_grad_enabled(differentiable):
            own = images.clone()
            origin = checks.graph_node(own)
            values, notes = checks.split_returned(invoke(name, function, (own, prompts, rows), self.rewards.timeout))
            values = checks.check_values(name, values, len(prompts), images.device)
        if differentiable and not checks.depends_on(values, origin):
            raise NonDifferentiableRewardError(f"reward {name!r}: {NON_DIFFERENTIABLE}{self.rewards.of_list}")
        return values, notes

    def _take(self, call: _Call) -> None:
        """Takes what a call returns; NaN for one that failed, if such are skipped."""
        name = self.rewards.names[call.function]
        try:
            call.values, call.notes = call.result()
        except NonDifferentiableRewardError:
            raise
        except (Exception, asyncio.CancelledError) as error:
            if self.on_error == "raise":
                if contract.needs_plain_pictures(error):
                    raise NonDifferentiableRewardError(f"reward {name!r}: {NON_DIFFERENTIABLE}{self.rewards.of_list}") from error
                known = isinstance(error, RewardError) and str(error).startswith(f"reward {name!r}")
                said = str(error) if known else f"reward {name!r} raised {type(error).__name__}: {error}{contract.hint(error)}"
                raise RewardError(f"{said} ({checks.place(call.where, call.prompts)})") from error
            self.rewards.count_failure(f"reward {name!r}", len(call.prompts), error)
            call.failed = True
            call.values = torch.nan + 0.0 * call.images.float().flatten(1).sum(1)  # with a graph, if the others have one

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
        for call in self._calls if self._workers is not None else ():
            self._take(call)
        rows: list[list[Tensor]] = [[] for _ in self.rewards.functions]
        for call in self._calls:  # of each function in the order of the samples
            rows[call.function].append(call.values)
        values = torch.stack([torch.cat(row) for row in rows])
        failed = torch.zeros(values.shape[1], dtype=torch.bool, device=values.device)
        for call in self._calls:
            failed[call.first : call.end] |= call.failed
        broken = torch.tensor([number in self._broken for number in range(values.shape[1])], device=values.device)
        values, failed = torch.where(broken, torch.nan, values), failed | broken
        ends = list(itertools.accumulate(self._sizes))
        results = [self._result(values, failed, end - size, end) for size, end in zip(self._sizes, ends, strict=True)]
        self._calls, self._sizes, self._broken = [], [], set()
        return results

    def _result(self, values: Tensor, failed: Tensor, first: int, end: int) -> RewardResult:
        """Of one batch. What a call of several batches (a group's) returned beside its values counts to the batch where it ends."""
        ended = [call for call in self._calls if first < call.end <= end]
        notes: dict[str, Any] = {}
        for number, name in enumerate(self.rewards.names):
            calls = [call for call in ended if call.function == number]
            notes[name] = checks.merge_notes([call.notes for call in calls], [len(call.prompts) for call in calls]) if calls else {}
        total = self.rewards.combine(values[:, first:end], failed[first:end])
        return RewardResult(total, values[:, first:end], notes, errors=sum(call.failed for call in ended))

    def close(self) -> None:
        """Drops calls that have not begun; those that have, end by themselves."""
        if self._workers is not None:
            self._workers.close()
            self._workers = None


def _part(batch: _Batch, start: int, stop: int) -> _Batch:
    images, prompts, metadata = batch
    return images[start:stop], prompts[start:stop], metadata[start:stop]


def _unique_names(functions: Sequence[RewardFunction]) -> list[str]:
    own = [getattr(function, "__name__", None) or type(function).__name__ for function in functions]
    names: list[str] = []
    for name in own:
        numbered = (f"{name}_{number}" for number in itertools.count(2) if f"{name}_{number}" not in own)
        names.append(next(unique for unique in itertools.chain([name], numbered) if unique not in names))
    return names
