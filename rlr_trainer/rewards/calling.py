"""In which thread, and for how long, a reward function runs: time limits, coroutines, and calls beside the sampling.

Python threads cannot be stopped. All threads here are daemons: one that hangs keeps its memory until the program ends, but does
not keep the program from ending (those of `concurrent.futures` would).
"""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import queue
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import CancelledError, Future, wait
from typing import Any

import torch

from rlr_trainer.rewards.values import RewardError

# What a reward may raise to end the program; passed on from any thread as it is.
STOPPING = (KeyboardInterrupt, SystemExit)


class RewardTimeoutError(RewardError):
    """A reward did not return in time."""


def groupwise(function: Any) -> Any:
    """Marks a reward that compares the pictures of one prompt: ranking, pairwise preference, diversity.

    It is called with all `num_images_per_prompt` pictures of one prompt at once, `(images [G, 3, H, W], prompts, metadata)`, prompts and
    metadata of length G, however the samples were divided into batches. It returns G numbers. The function itself is returned.
    A class does the same with the attribute `needs_group = True`.

    Raises:
        TypeError: a callable that takes no attribute, such as a bound method: wrap it in a function.
    """
    try:
        function.needs_group = True
    except AttributeError as error:
        raise TypeError(
            f"groupwise cannot mark {function!r}: wrap it in a function, def reward(images, prompts, metadata)"
        ) from error
    return function


def is_groupwise(function: Any) -> bool:
    """Whether a reward asks for the pictures of one prompt at once."""
    return bool(getattr(function, "needs_group", False))


def is_coroutine_function(function: Any) -> bool:
    """Whether a reward is an `async def`, or an object whose `__call__` is one."""
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(type(function).__call__)


def invoke(name: str, function: Callable[..., Any], arguments: tuple[Any, ...], timeout: float | None) -> Any:
    """Calls a reward and waits for it; a coroutine runs in the event loop that all coroutines of the process share.

    Args:
        name: for the message.
        timeout: seconds, or None. With a limit the function runs in a thread of its own, in the caller's grad mode.

    Raises:
        RewardTimeoutError: it did not return in time.
    """

    def call() -> Any:
        returned = function(*arguments)
        if isinstance(returned, tuple):  # DDPOTrainer's asynchronous rewards had to be futures
            return tuple(part.result() if isinstance(part, Future) else part for part in returned)
        return returned

    returned = call() if timeout is None else _within(name, _in_thread(call), timeout)
    if not inspect.isawaitable(returned):
        return returned
    future = asyncio.run_coroutine_threadsafe(_outcome(returned), _event_loop())
    try:
        value, stop = _within(name, future, timeout)
    finally:
        future.cancel()  # after a time limit, or an interrupt, the coroutine ends; done ones do not care
    if stop is not None:
        raise stop
    return value


def _within(name: str, future: Future[Any], timeout: float | None) -> Any:
    if not wait([future], timeout).done:
        raise RewardTimeoutError(
            f"reward {name!r} did not return within reward_timeout={timeout:g} seconds (a thread that hangs cannot be stopped: it goes on "
            "until the program ends); raise reward_timeout, lower reward_batch_size, or drop such samples with on_reward_error='skip'"
        )
    return future.result()


async def _outcome(awaitable: Awaitable[Any]) -> tuple[Any, BaseException | None]:
    """The value, or what is to stop the program: raised here it would stop the event loop instead."""
    try:
        return await awaitable, None
    except STOPPING as stop:
        return None, stop


def settle(future: Future[Any], work: Callable[[], Any]) -> None:
    """Does the work and puts its result, or what it raised, into the future."""
    try:
        future.set_result(work())
    except asyncio.CancelledError as error:  # no `Exception`: unheard of, it would end the thread and leave the caller waiting
        future.set_exception(CancelledError(*error.args))
    except (Exception, *STOPPING) as error:
        future.set_exception(error)


def _in_thread(work: Callable[[], Any]) -> Future[Any]:
    future: Future[Any] = Future()
    prepare, context = _same_device_and_mode(), contextvars.copy_context()

    def run() -> None:
        prepare()
        settle(future, lambda: context.run(work))

    threading.Thread(target=run, name="rlr-reward", daemon=True).start()
    return future


def _same_device_and_mode() -> Callable[[], None]:
    """Gives another thread the grad mode and the CUDA device of this one; PyTorch keeps both per thread."""
    grad_enabled = torch.is_grad_enabled()
    device = torch.cuda.current_device() if torch.cuda.is_initialized() else None

    def prepare() -> None:
        torch.set_grad_enabled(grad_enabled)
        if device is not None:
            torch.cuda.set_device(device)

    return prepare


_loops: list[asyncio.AbstractEventLoop] = []
_loops_lock = threading.Lock()


def _event_loop() -> asyncio.AbstractEventLoop:
    """One loop for the whole process, so that a reward may keep a connection or a session from call to call."""
    with _loops_lock:
        if not _loops:
            loop = asyncio.new_event_loop()

            def run() -> None:
                torch.set_grad_enabled(False)
                loop.run_forever()

            threading.Thread(target=run, name="rlr-reward-coroutines", daemon=True).start()
            _loops.append(loop)
        return _loops[0]


class Workers:
    """A number of daemon threads that do work in the order in which it was handed in."""

    def __init__(self, count: int) -> None:
        self._queue: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = queue.SimpleQueue()
        self._handed_in: list[Future[Any]] = []
        self._count = count
        prepare = _same_device_and_mode()
        for _ in range(count):
            threading.Thread(target=self._work, args=(prepare,), name="rlr-reward-worker", daemon=True).start()

    def submit(self, work: Callable[[], Any]) -> Future[Any]:
        """Hands in work; its result comes through the future."""
        future: Future[Any] = Future()
        self._handed_in.append(future)
        self._queue.put((future, work))
        return future

    def close(self) -> None:
        """Cancels what has not begun, and lets the threads end after what they are doing."""
        for future in self._handed_in:
            future.cancel()
        for _ in range(self._count):
            self._queue.put(None)

    def _work(self, prepare: Callable[[], None]) -> None:
        prepare()
        while (item := self._queue.get()) is not None:
            future, work = item
            if future.set_running_or_notify_cancel():
                settle(future, work)
