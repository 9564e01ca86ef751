"""What the processes of a distributed run tell each other, and how they leave."""

from __future__ import annotations

import atexit
import time
from typing import Any

import torch.distributed
from accelerate.utils import broadcast_object_list

_GLOO_SECONDS = 0.5  # the threads need microseconds, and on a busy machine their turn on the processor


def of_main_process(value: Any, accelerator: Any) -> Any:
    """The main process's value, on every process; collective."""
    holder = [value]
    if accelerator.num_processes > 1:
        broadcast_object_list(holder)
    return holder[0]


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
