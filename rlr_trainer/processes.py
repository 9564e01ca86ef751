"""What the processes of a distributed run tell each other, and how they leave."""

from __future__ import annotations

import atexit
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch.distributed
from accelerate.utils import broadcast_object_list


def of_main_process(value: Any, accelerator: Any) -> Any:
    """The main process's value, on every process; collective."""
    holder = [value]
    if accelerator.num_processes > 1:
        broadcast_object_list(holder)
    return holder[0]


@contextmanager
def leaving_cleanly() -> Iterator[None]:
    """Closes gloo's process group when the program ends, if the body ends well (or by SystemExit, which all processes raise together).

    A process whose gloo threads still run while the interpreter goes away sometimes aborts (SIGABRT, "terminate called without
    an active exception") after all its work is done. After an error the group is left alone: operations under way would wait
    for processes that may never answer.
    """
    atexit.unregister(_close_process_group)
    try:
        yield
    except SystemExit:
        atexit.register(_close_process_group)
        raise
    atexit.register(_close_process_group)


def _close_process_group() -> None:
    if torch.distributed.is_available() and torch.distributed.is_initialized() and torch.distributed.get_backend() == "gloo":
        torch.distributed.destroy_process_group()
