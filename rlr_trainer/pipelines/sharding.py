"""Weights that FSDP2 spreads over the processes: how they are written and read."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor


@contextlib.contextmanager
def whole_weights(module: nn.Module) -> Iterator[None]:
    """Inside, `module.state_dict()` has the trained weights put together, on the CPU. All processes must enter.

    Nothing is exchanged between processes inside, so one of them may write a file there.
    """
    found = {name: p for name, p in module.named_parameters() if p.requires_grad and isinstance(p, DTensor)}
    whole = {name: parameter.full_tensor().detach().cpu() for name, parameter in found.items()}

    def replace(owner: nn.Module, state: dict[str, Any], prefix: str, metadata: Any) -> None:
        state.update({prefix + name: tensor for name, tensor in whole.items()})

    handle = module.register_state_dict_post_hook(replace)
    try:
        yield
    finally:
        handle.remove()


@contextlib.contextmanager
def spread_when_loaded(module: nn.Module) -> Iterator[None]:
    """Inside, `module.load_state_dict` takes whole tensors for weights that are spread over the processes. All must enter and load."""
    parameters = {name: p for name, p in module.named_parameters() if isinstance(p, DTensor)}

    def spread(owner: nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Replaces whole tensors, before they are loaded, by this process's part of them."""
        for name, parameter in parameters.items():
            value: Tensor | None = state.get(prefix + name)
            if value is not None and not isinstance(value, DTensor):
                value = value.to(device=parameter.device, dtype=parameter.dtype)
                state[prefix + name] = distribute_tensor(value, parameter.device_mesh, parameter.placements)

    handle = module.register_load_state_dict_pre_hook(spread)
    try:
        with torch.no_grad():
            yield
    finally:
        handle.remove()
