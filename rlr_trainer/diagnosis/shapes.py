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

    Args:
        on_cpu: whether to add the workspace that a CPU takes, see `conv3d_workspace`.
    """

    def __init__(self, on_cpu: bool = False) -> None:
        super().__init__()
        self.on_cpu = on_cpu
        self.flops = 0

    def workspace(self, func: Any, args: Any, result: Any) -> int:
        """That of three-dimensional convolutions on a CPU; of other operations none is known."""
        return conv3d_workspace(func, args, result) if self.on_cpu else 0

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


def conv3d_workspace(func: Any, args: Any, result: Any) -> int:
    """Bytes that torch's own three-dimensional convolution takes on a CPU for frozen weights, beside its result.

    It spreads its input out, one column per position of the output, and so does its backward pass; only a kernel of one position without
    padding needs no columns forward. Torch is asked whether it takes it: with several samples it mostly takes oneDNN's, whose copies in
    other orders depend on the shapes and are not known here.
    """
    if func is torch.ops.aten.convolution.default:
        into, weight, bias, stride, padding, *others = args
        output, backward = result, False
    elif func is torch.ops.aten.convolution_backward.default:
        output, into, weight, _, stride, padding, *others, _ = args
        bias, backward = None, True
    else:
        return 0
    backend = torch._C._select_conv_backend(*map(_on_cpu, (into, weight, bias)), stride, padding, *others, None)
    if backend.name != "Slow3d":
        return 0
    is_view = not backward and weight[0, 0].numel() == 1 and not any(padding) and set(stride) == {1}
    return 0 if is_view else output.nbytes // output.shape[1] * weight[0].numel()


def _on_cpu(tensor: Tensor | None) -> Tensor | None:
    """A tensor of that shape without memory."""
    return None if tensor is None else torch.empty((), dtype=tensor.dtype).expand(tensor.shape)


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
def counting(on_cpu: bool = False) -> Iterator[Meter]:
    """Counts what the operations on the meta device in the block would take, on a CPU if `on_cpu`."""
    with FusedAttention(), Meter(on_cpu) as meter:
        yield meter
