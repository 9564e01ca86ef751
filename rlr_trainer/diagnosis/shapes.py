"""Work on shapes alone: the bytes and operations that it would take, counted on torch's meta device."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop, sdpa_flop

from rlr_trainer.diagnosis.memory import LiveStorages

META = torch.device("meta")
_ATTENTION = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_ATTENTION_BACKWARD = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
FLOPS = flop_registry | {_ATTENTION: sdpa_flop, _ATTENTION_BACKWARD: sdpa_backward_flop}


def tensors_of(module: nn.Module) -> list[Tensor]:
    """Parameters and buffers, each once."""
    return list({id(t): t for t in [*module.parameters(), *module.buffers()]}.values())


def weight_bytes(*modules: nn.Module) -> int:
    """Bytes of parameters and buffers; one that several modules share counts once."""
    return sum({id(t): t.nbytes for module in modules for t in tensors_of(module)}.values())


class Meter(LiveStorages):
    """Counts, on the meta device, live bytes, their peak and floating-point operations of the operations in the block.

    What is read of a meta tensor is 1: a number, a truth value, a copy on the CPU. So code that checks for finite values passes.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0

    def run(self, func: Any, args: Any, kwargs: Any) -> Any:
        """The operation, or the answer to a question for a value."""
        if func is torch.ops.aten._local_scalar_dense.default and args[0].device == META:
            return torch.ones((), dtype=args[0].dtype).item()
        if func is torch.ops.aten._to_copy.default and args[0].device == META and _leaves_meta(kwargs):
            return torch.ones(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        result = func(*args, **kwargs)
        packet = getattr(func, "_overloadpacket", None)
        if packet in FLOPS and any(isinstance(leaf, Tensor) and leaf.device == META for leaf in tree_leaves(args)):
            self.flops += FLOPS[packet](*args, **kwargs, out_val=result)
        return result


def _leaves_meta(kwargs: dict[str, Any]) -> bool:
    return kwargs.get("device") is not None and torch.device(kwargs["device"]) != META


class FusedAttention(TorchFunctionMode):
    """Attention on the meta device as fused kernels do it. Otherwise it would make the whole matrix of attention weights."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is nn.functional.scaled_dot_product_attention:
            given = _SDPA.bind(*args, **kwargs)
            given.apply_defaults()
            query, key, value = (given.arguments[name] for name in ("query", "key", "value"))
            mask = given.arguments["attn_mask"]
            fits = query.dim() == 4 and query.shape[-1] == value.shape[-1] and not (mask is not None and mask.requires_grad)
            if query.device == META and fits:
                if query.shape[1] != key.shape[1]:  # grouped queries
                    key, value = (t.repeat_interleave(query.shape[1] // key.shape[1], 1) for t in (key, value))
                return _ATTENTION(query, key, value, 0.0, given.arguments["is_causal"], scale=given.arguments["scale"])[0]
        return func(*args, **kwargs)


_SDPA = inspect.Signature(
    [
        inspect.Parameter(name, inspect.Parameter.POSITIONAL_OR_KEYWORD, default=default)
        for name, default in (
            ("query", None), ("key", None), ("value", None), ("attn_mask", None), ("dropout_p", 0.0), ("is_causal", False),
            ("scale", None), ("enable_gqa", False),
        )
    ]
)  # fmt: skip


@contextlib.contextmanager
def counting() -> Iterator[Meter]:
    """Counts what the operations on the meta device in the block would take."""
    with FusedAttention(), Meter() as meter:
        yield meter
