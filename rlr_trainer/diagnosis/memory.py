"""Bytes that a piece of work holds and takes at its peak, beyond what was there before."""

from __future__ import annotations

import contextlib
import dataclasses
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


@dataclasses.dataclass(frozen=True)
class MemoryMeter:
    """What `measuring_memory` yields.

    Attributes:
        held: () -> bytes held now, beyond those at the start.
        peak: () -> most bytes held at any time since the start, beyond those at the start.
    """

    held: Callable[[], int]
    peak: Callable[[], int]


@contextlib.contextmanager
def measuring_memory(device: torch.device) -> Iterator[MemoryMeter]:
    """Measures the memory of the tensors that the block makes.

    On CUDA: the allocator's own counters (`torch.cuda.memory_allocated`, `max_memory_allocated`, whose peak it resets). Elsewhere
    every operation's new storages are counted when they are made and when they die (as torch.distributed._tools.mem_tracker does it):
    exact for tensors, blind to workspace inside one operation. That makes every operation slower: do not time the block.
    """
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        start = torch.cuda.memory_allocated(device)
        yield MemoryMeter(
            lambda: torch.cuda.memory_allocated(device) - start, lambda: torch.cuda.max_memory_allocated(device) - start
        )
        return
    with _LiveStorages() as storages:
        yield MemoryMeter(lambda: storages.live, lambda: storages.peak)


class _LiveStorages(TorchDispatchMode):
    """Follows the storages that operations make until they are freed."""

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self._known: dict[int, weakref.ref] = {}  # address of the storage -> a reference that tells of its end

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        inputs = {_address(t) for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and _address(tensor) not in self._known and _address(tensor) not in inputs:
                storage = tensor.untyped_storage()
                self._known[_address(tensor)] = weakref.ref(storage, self._forget(_address(tensor), storage.nbytes()))
                self.live += storage.nbytes()
        self.peak = max(self.peak, self.live)
        return result

    def _forget(self, address: int, size: int) -> Callable[[Any], None]:
        def forget(reference: Any) -> None:
            self.live -= size
            self._known.pop(address, None)

        return forget


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
