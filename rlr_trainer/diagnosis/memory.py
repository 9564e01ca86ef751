"""Bytes that a piece of work holds and takes at its peak, beyond what was there before."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class MemoryMeter(NamedTuple):
    """Bytes beyond those at the start: held now, and the most since the start."""

    held: Callable[[], int]
    peak: Callable[[], int]


@contextlib.contextmanager
def measuring_memory(device: torch.device) -> Iterator[MemoryMeter]:
    """Measures the memory of the tensors that the block makes.

    On CUDA: the allocator's own counters, whose peak it resets. Elsewhere every operation's new storages are followed: exact for
    tensors, blind to workspace inside one operation. That makes every operation slower: do not time the block.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        start = torch.cuda.memory_allocated(device)
        yield MemoryMeter(
            lambda: torch.cuda.memory_allocated(device) - start, lambda: torch.cuda.max_memory_allocated(device) - start
        )
        return
    with LiveStorages() as storages:
        yield MemoryMeter(storages.live, lambda: storages.peak)


class LiveStorages(TorchDispatchMode):
    """Follows the storages that operations make until they are freed."""

    def __init__(self) -> None:
        super().__init__()
        self.peak = self._live = 0
        self._held: dict[int, tuple[weakref.ref[Any], int]] = {}  # id of a storage -> it, and its bytes

    def run(self, func: Any, args: Any, kwargs: Any) -> tuple[Any, list[Any]]:
        """One operation: its result, and the storages that it made. A subclass may look at it."""
        given = {id(storage) for storage in storages((args, kwargs))}
        result = func(*args, **kwargs)
        return result, [storage for storage in storages(result) if id(storage) not in given]

    def workspace(self, func: Any, args: Any, result: Any) -> int:
        """Bytes that an operation takes beside its result and gives back at its end; a subclass may know them."""
        return 0

    def live(self) -> int:
        return self._live

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result, made = self.run(func, args, kwargs or {})
        for storage in made:
            if id(storage) not in self._held:
                self._follow(storage)
        self.peak = max(self.peak, self._live + self.workspace(func, args, result))
        return result

    def _follow(self, storage: Any) -> None:
        key, size = id(storage), storage.nbytes()
        self._held[key] = (weakref.ref(storage, lambda _: self._freed(key)), size)
        self._live += size

    def _freed(self, key: int) -> None:
        self._live -= self._held.pop(key)[1]


def tensors_in(tree: Any) -> list[Tensor]:
    """All tensors in nested lists, tuples and dicts."""
    if isinstance(tree, Tensor):
        return [tree]
    if isinstance(tree, dict):
        tree = tree.values()
    elif not isinstance(tree, list | tuple):
        return []
    return [tensor for item in tree for tensor in tensors_in(item)]


def storages(tree: Any) -> list[Any]:
    """Of all tensors in nested lists, tuples and dicts."""
    return [tensor.untyped_storage() for tensor in tensors_in(tree)]
