"""Decoders whose graph is kept for one call at a time."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint


@contextlib.contextmanager
def calls_checkpointed(module: Any) -> Iterator[None]:
    """Inside, a call of `module` keeps its inputs in place of its graph, which the backward pass makes again (gradient checkpointing).

    Values and gradients stay the same. If the module is called once per chunk of a video, the graph of one chunk is in memory at a time.
    What a call hands on to the next, a causal decoder's features of the last frames, is one of its outputs, so the gradient goes back from
    chunk to chunk. Wan's decoder hands it on in a list that it changes, `feat_cache`.
    """
    own, forward = module.__dict__.get("forward"), module.forward
    module.forward = functools.partial(_checkpointed, forward)
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:  # accelerate's hooks put theirs there
            module.forward = own


def _checkpointed(forward: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*args, **kwargs)
    changed: list[Any] | None = kwargs.pop("feat_cache", None)
    if changed is None:
        return checkpoint(forward, *args, use_reentrant=False, **kwargs)

    def on_a_copy(*inputs: Any, features: tuple[Any, ...]) -> tuple[Any, list[Any]]:
        """The same call, whenever it is made: it leaves `features`, those of the call before, as they are."""
        own = list(features)
        return forward(*inputs, feat_cache=own, **kwargs | {"feat_idx": [0]}), own

    output, changed[:] = checkpoint(on_a_copy, *args, features=tuple(changed), use_reentrant=False)
    return output
