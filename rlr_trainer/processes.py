"""What the processes of a distributed run tell each other."""

from __future__ import annotations

from typing import Any

from accelerate.utils import broadcast_object_list


def of_main_process(value: Any, accelerator: Any) -> Any:
    """The main process's value, on every process; collective."""
    holder = [value]
    if accelerator.num_processes > 1:
        broadcast_object_list(holder)
    return holder[0]
