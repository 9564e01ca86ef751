"""Work on shapes alone: the bytes and operations that it would take, counted on torch's meta device."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop, sdpa_flop

from rlr_trainer.diagnosis.memory import LiveStorages, storages, tensors_in

META = torch.device("meta")
_ITEM, _TO_COPY = torch.ops.aten._local_scalar_dense.default, torch.ops.aten._to_copy.default
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

    def run(self, func: Any, args: Any, kwargs: Any) -> tuple[Any, list[Any]]:
        """The operation, or the answer to a question for a value."""
        if func is _ITEM and args[0].device == META:
            return torch.ones((), dtype=args[0].dtype).item(), []
        if func is _TO_COPY and args[0].device == META and _leaves_meta(kwargs):
            return torch.ones(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype), []
        key = func, _shapes_of(args), _shapes_of(kwargs)
        known = _KNOWN.get(key)
        if known is None:
            result, made = super().run(func, args, kwargs)
            known = _KNOWN[key] = _Known.of(func, args, kwargs, result, made)
        elif known.shapes is not None:
            made = [shape and shape.make() for shape in known.shapes]
            result, made = (known.kind(made) if known.kind else made[0]), storages(made)
        elif known.makes_none:
            result, made = func(*args, **kwargs), []
        else:
            result, made = super().run(func, args, kwargs)
        self.flops += known.flops
        return result, made


class _Shape(NamedTuple):
    """Of a tensor."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, tensor: Tensor) -> _Shape:
        return cls(tensor.shape, tensor.stride(), tensor.dtype, tensor.device)

    def make(self) -> Tensor:
        return torch.empty_strided(self.size, self.stride, dtype=self.dtype, device=self.device)


class _Known(NamedTuple):
    """What an operation does.

    Attributes:
        shapes: of its results, None for a result that is None; None where a result is no tensor on the meta device, or one that was given.
        kind: that holds the results; None for a single one.
        makes_none: whether no result has memory of its own: views, and operations in place.
        flops: floating-point operations.
    """

    shapes: list[_Shape | None] | None
    kind: Any
    makes_none: bool
    flops: int

    @classmethod
    def of(cls, func: Any, args: Any, kwargs: Any, result: Any, made: list[Any]) -> _Known:
        """What is seen of an operation that has run, with its arguments, its result and the storages that it `made`."""
        single = isinstance(result, Tensor)
        results = [result] if single else result
        own = {id(storage) for storage in made}
        fresh = isinstance(results, list | tuple) and all(
            t is None or (isinstance(t, Tensor) and t.device == META and id(t.untyped_storage()) in own) for t in results
        )
        packet, flops = getattr(func, "_overloadpacket", None), 0
        if packet in FLOPS and any(tensor.device == META for tensor in tensors_in(args)):
            flops = int(FLOPS[packet](*args, **kwargs, out_val=result))
        shapes = [t if t is None else _Shape.of(t) for t in results] if fresh else None
        return cls(shapes, None if single else type(result), not made, flops)


# Operation and shapes of what it is given -> what it does. A network has the same layer many times, and torch works out most shapes in Python.
_KNOWN: dict[Any, _Known] = {}


def _shapes_of(tree: Any) -> Any:
    """Something hashable, the same for arguments that lead to tensors of the same shapes."""
    if isinstance(tree, Tensor):
        return _Shape.of(tree)
    if isinstance(tree, list | tuple):
        return tuple(map(_shapes_of, tree))
    if isinstance(tree, dict):
        return tuple((name, _shapes_of(value)) for name, value in tree.items())
    return type(tree), tree  # 1 and 1.0 lead to different tensors


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
