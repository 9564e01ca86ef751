"""Decoders of videos whose graph is kept for one call at a time, in memory that does not grow with the number of calls."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from rlr_trainer.estimators.chain import without_autocast

KEPT = 4  # features between calls that are in memory at most; more of them cost memory and save calls


@contextlib.contextmanager
def calls_checkpointed(module: Any) -> Iterator[None]:
    """Inside, a call of `module` keeps its inputs in place of its graph, which the backward pass makes again (gradient checkpointing).

    Values and gradients stay the same. If the module is called once per chunk of a video, the graph of one chunk is in memory at a time.
    What a call hands on to the next, a causal decoder's features of the last frames, is one of its outputs, so the gradient goes back from
    chunk to chunk. At most `KEPT` of these features are in memory, and the others are made again (`Calls`).

    The module is frozen and works without autocast: its weights get no gradient.
    """
    own, forward = module.__dict__.get("forward"), module.forward
    module.forward = functools.partial(_checkpointed, forward, [])
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:  # accelerate's hooks put theirs there
            module.forward = own


def _checkpointed(forward: Callable[..., Any], current: list[Calls], *args: Any, **kwargs: Any) -> Any:
    """One call. Wan's decoder changes the features in a list, `feat_cache`; CogVideoX's takes `conv_cache`, and returns the next ones."""
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    name = next((name for name in ("feat_cache", "conv_cache") if name in kwargs), None)
    features: Any = None if name is None else kwargs.pop(name)
    if not _tensors_of(features)[0]:  # the first chunk of a video, or of a tile of one
        current[:] = [Calls(forward, name)]
    output, following = current[0].run((args, kwargs), features)
    if name == "feat_cache":
        features[:] = following
    return (output, following) if name == "conv_cache" else output


class Calls:
    """Calls in a row, each of which takes the features that the one before hands on, with the graph of one at a time.

    Forward, the features before every n-th call are kept, with n doubled whenever they are more than `KEPT`. The backward pass goes from the
    last call to the first: it makes those between again from the nearest kept ones before them, and keeps some of these in the places that
    have become free (as binomial checkpointing, Griewank and Walther 2000, with simpler places).

    Args:
        forward: the decoder's.
        name: the argument that takes the features; None: it hands none on.
    """

    def __init__(self, forward: Callable[..., Any], name: str | None) -> None:
        self.forward, self.name = forward, name
        self.inputs: list[Any] = []  # arguments of each call, without a graph
        self.kept: dict[int, Any] = {}  # features before the calls of these numbers; those before the first call are nothing
        self.spacing = 1

    def run(self, inputs: Any, features: Any) -> tuple[Any, Any]:
        """Output and features of the next call; their graph is one node."""
        number = len(self.inputs)
        self.inputs.append(tree_map_only(Tensor, Tensor.detach, inputs))
        if number % self.spacing == 0:
            self.kept[number] = tree_map_only(Tensor, Tensor.detach, features)
        if len(self.kept) > KEPT + 1:
            self.spacing *= 2
            self.kept = {n: kept for n, kept in self.kept.items() if n % self.spacing == 0}
        tensors, together = _tensors_of((inputs, features))
        results: list[Callable[[Sequence[Tensor]], Any]] = []
        outputs = _Call.apply(self, number, together, results, *tensors)
        return results[0](outputs)

    def step(self, inputs: Any, features: Any) -> tuple[Any, Any]:
        """One call, the same whenever it is made: it leaves `features` as they are."""
        args, kwargs = inputs
        with without_autocast(args[0].device):
            if self.name is None:
                return self.forward(*args, **kwargs), None
            if self.name == "conv_cache":
                return self.forward(*args, conv_cache=features, **kwargs)
            following = list(features)
            return self.forward(*args, feat_cache=following, **kwargs | {"feat_idx": [0]}), following

    def features(self, number: int) -> Any:
        """The features before a call, kept or made again; those after it are let go."""
        self.kept = {n: kept for n, kept in self.kept.items() if n <= number}
        start = max(self.kept)
        features, places = self.kept[start], KEPT + 2 - len(self.kept)
        marks = {start + (number - start) * place // places for place in range(1, places)}
        for n in range(start, number):
            if n in marks:
                self.kept[n] = features
            _, features = self.step(self.inputs[n], features)
        return features


class _Call(torch.autograd.Function):
    """A call as one node of the graph, which makes its own graph in the backward pass."""

    @staticmethod
    def forward(ctx: Any, calls: Calls, number: int, together: Callable[..., Any], results: list[Any], *tensors: Tensor) -> Any:
        """The tensors among the output and the features; `results` gets the function that puts them together."""
        ctx.calls, ctx.number = calls, number
        ctx.set_materialize_grads(False)
        outputs, result = _tensors_of(calls.step(*together(tensors)))
        results.append(result)
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> Any:
        """Makes the call again with its graph, from its inputs and the features before it, and differentiates that."""
        calls, number, needed = ctx.calls, ctx.number, ctx.needs_input_grad[4:]
        tensors, together = _tensors_of((calls.inputs[number], calls.features(number)))
        tensors = [tensor.detach().requires_grad_(need) for tensor, need in zip(tensors, needed, strict=True)]
        with torch.enable_grad():
            outputs, _ = _tensors_of(calls.step(*together(tensors)))
        told = [pair for pair in zip(outputs, gradients, strict=True) if pair[0].requires_grad and pair[1] is not None]
        wanted = [tensor for tensor in tensors if tensor.requires_grad]
        heads, gradients = zip(*told, strict=True)
        found = iter(torch.autograd.grad(heads, wanted, gradients, allow_unused=True))
        return (None,) * 4 + tuple(next(found) if need else None for need in needed)


def _tensors_of(tree: Any) -> tuple[list[Tensor], Callable[[Sequence[Tensor]], Any]]:
    """The tensors in nested tuples, lists and dicts, and a function that puts others in their places."""
    leaves, structure = tree_flatten(tree)
    tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
    others = [None if isinstance(leaf, Tensor) else (leaf,) for leaf in leaves]  # without the tensors, which would stay in memory

    def together(tensors: Sequence[Tensor]) -> Any:
        given = iter(tensors)
        return tree_unflatten([next(given) if other is None else other[0] for other in others], structure)

    return tensors, together
