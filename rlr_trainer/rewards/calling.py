"""In which thread, and for how long, a reward function runs: time limits, coroutines, and calls beside the sampling.

Python threads cannot be stopped. All threads here are daemons: one that hangs keeps its memory until the program ends, but does
not keep the program from ending (those of `concurrent.futures` would).
"""

from __future__ import annotations

import asyncio
import contextlib
import contextvars
import inspect
import queue
import threading
from collections.abc import Callable
from concurrent.futures import Future, wait
from functools import partial
from typing import Any

import torch

from rlr_trainer.rewards.values import RewardError


class RewardTimeoutError(RewardError):
    """A reward did not return in time."""


def groupwise(function: Any) -> Any:
    """Marks a reward that compares the pictures of one prompt (ranking, preference, diversity), and returns it.

    It is called with all `num_images_per_prompt` pictures of one prompt at once, `(images [G, 3, H, W], prompts, metadata)`, however
    the samples were divided into batches, and returns G numbers. A class does the same with the attribute `needs_group = True`.

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

    if timeout is None:
        returned = call()
    else:
        thread = Workers(1)
        future = thread.submit(call)
        thread.close(cancel=False)
        returned = _within(name, future, timeout)
    if not inspect.isawaitable(returned):
        return returned

    async def settle() -> Any:
        return await returned

    future = asyncio.run_coroutine_threadsafe(settle(), _event_loop())
    try:
        return _within(name, future, timeout)
    finally:
        future.cancel()  # after a time limit, or an interrupt, the coroutine ends; done ones do not care


def _within(name: str, future: Future[Any], timeout: float | None) -> Any:
    if not wait([future], timeout).done:
        raise RewardTimeoutError(
            f"reward {name!r} did not return within reward_timeout={timeout:g} seconds (a thread that hangs cannot be stopped: it goes on "
            "until the program ends); raise reward_timeout, lower reward_batch_size, or drop such samples with on_reward_error='skip'"
        )
    return future.result()


_loops: list[asyncio.AbstractEventLoop] = []
_loops_lock = threading.Lock()


def _event_loop() -> asyncio.AbstractEventLoop:
    """One loop for the whole process, so that a reward may keep a connection or a session from call to call."""
    with _loops_lock:
        if not _loops:
            _loops.append(asyncio.new_event_loop())
            threading.Thread(target=_run, args=(_loops[0],), name="rlr-reward-coroutines", daemon=True).start()
        return _loops[0]


def _run(loop: asyncio.AbstractEventLoop) -> None:
    torch.set_grad_enabled(False)
    while True:
        with contextlib.suppress(KeyboardInterrupt, SystemExit):  # they reach the one who waits, and must not end the loop
            loop.run_forever()


class Workers:
    """A number of daemon threads that do work in the order in which it was handed in.

    They have the grad mode and the CUDA device of the thread that made them: PyTorch keeps both per thread.
    """

    def __init__(self, count: int) -> None:
        self._queue: queue.SimpleQueue[tuple[Future[Any], Callable[[], Any]] | None] = queue.SimpleQueue()
        self._handed_in: list[Future[Any]] = []
        self._count = count
        state = torch.is_grad_enabled(), torch.cuda.current_device() if torch.cuda.is_initialized() else None
        for _ in range(count):
            threading.Thread(target=self._work, args=state, name="rlr-reward-worker", daemon=True).start()

    def submit(self, work: Callable[[], Any]) -> Future[Any]:
        """Hands in work, to be done with the caller's context variables; its result comes through the future."""
        future: Future[Any] = Future()
        self._handed_in.append(future)
        self._queue.put((future, partial(contextvars.copy_context().run, work)))
        return future

    def close(self, cancel: bool = True) -> None:
        """Lets the threads end after what they are doing; what has not begun is cancelled, or done first."""
        for future in self._handed_in if cancel else ():
            future.cancel()
        for _ in range(self._count):
            self._queue.put(None)

    def _work(self, grad_enabled: bool, device: int | None) -> None:
        torch.set_grad_enabled(grad_enabled)
        if device is not None:
            torch.cuda.set_device(device)
        while (item := self._queue.get()) is not None:
            future, work = item
            if future.set_running_or_notify_cancel():
                with contextlib.ExitStack() as stack:
                    stack.push(partial(_hand_on, future))
                    future.set_result(work())


def _hand_on(future: Future[Any], kind: Any, error: BaseException | None, traceback: Any) -> bool:
    """Whatever is raised, of any class, goes to the one who waits for the future; else he would wait for ever."""
    if error is not None:
        future.set_exception(error)
    return True
