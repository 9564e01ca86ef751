"""Bytes that a piece of work holds and takes at its peak, beyond what was there before."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.weak import WeakIdKeyDictionary


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
        self.peak = 0
        self._bytes: Any = WeakIdKeyDictionary()  # storage -> its size

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """One operation; a subclass may look at it."""
        return func(*args, **kwargs)

    def workspace(self, func: Any, args: Any, result: Any) -> int:
        """Bytes that an operation takes beside its result and gives back at its end; a subclass may know them."""
        return 0

    def live(self) -> int:
        return sum(self._bytes.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = {id(storage) for storage in storages((args, kwargs))}
        result = self.run(func, args, kwargs or {})
        for storage in storages(result):
            if id(storage) not in given:
                self._bytes[storage] = storage.nbytes()
        self.peak = max(self.peak, self.live() + self.workspace(func, args, result))
        return result


def storages(tree: Any) -> list[Any]:
    """Of all tensors in nested containers."""
    return [leaf.untyped_storage() for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
