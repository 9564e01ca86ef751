"""What the processes of a distributed run tell each other, and how they leave."""

from __future__ import annotations

import atexit
import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed
from accelerate.utils import broadcast_object_list
from torch import Tensor

from rlr_trainer.rewards.interface import RewardError

_GLOO_SECONDS = 0.5  # the threads need microseconds, and on a busy machine their turn on the processor


class Processes:
    """The processes of a run. Its methods are collective: all processes must call them.

    Args:
        accelerator: accelerate's.

    Attributes:
        count, index, device: number of processes; number and device of this one.
    """

    def __init__(self, accelerator: Any) -> None:
        self.accelerator = accelerator

    @property
    def count(self) -> int:
        return self.accelerator.num_processes

    @property
    def index(self) -> int:
        return self.accelerator.process_index

    @property
    def device(self) -> torch.device:
        return self.accelerator.device

    def gather(self, tensor: Tensor) -> Tensor:
        """The tensors of all processes, joined along the first dimension, on the CPU."""
        return self.accelerator.gather(tensor.to(self.device)).cpu()

    def gather_in_order(self, index: Sequence[Tensor], values: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
        """Values of all processes in the order of their sample numbers, on the CPU: (numbers [S], values [S, ...])."""
        numbers, gathered = self.gather(torch.cat(list(index))), self.gather(torch.cat(list(values)))
        order = numbers.argsort()
        return numbers[order], gathered[order]

    def sum(self, count: int) -> int:
        """The sum over the processes."""
        return int(self.gather(torch.tensor([count])).sum())

    def of_main(self, value: Any) -> Any:
        """The main process's value, on every process."""
        holder = [value]
        if self.count > 1:
            broadcast_object_list(holder)
        return holder[0]

    def raise_everywhere(self, failure: Exception | None, where: str) -> None:
        """Raises the failure of a process, and an error that names it on all others, which would wait for it otherwise.

        Raises:
            RewardError: some process has a failure.
        """
        if self.count > 1:
            failed = torch.nonzero(self.gather(torch.tensor([failure is not None], dtype=torch.int32))).flatten().tolist()
            if failed and failure is None:
                named = f"process {' and '.join(map(str, failed))}"
                raise RewardError(
                    f"scoring failed on {named} in {where}, so this one stops as well; the error is in the log of {named}"
                )
        if failure is not None:
            raise failure


def let_gloo_finish_at_exit() -> None:
    """Has the interpreter wait a moment for gloo's threads before it goes away.

    The thread that ran a collective operation frees its tensors after the caller went on, and needs the GIL for it. Asked for while
    the interpreter is being taken down, the GIL ends the thread, and with it the process: SIGABRT, "terminate called without an
    active exception", after all work is done. Destroying the process group does not end those threads while DDP holds it.
    """
    atexit.unregister(_let_gloo_finish)
    atexit.register(_let_gloo_finish)


def _let_gloo_finish() -> None:
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        time.sleep(_GLOO_SECONDS)
