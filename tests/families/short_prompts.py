"""Prompts of fewer tokens than the pipeline's usual number: the tiny networks are several times faster with them."""

from __future__ import annotations

from typing import Any

from rlr_trainer.pipelines import adapt

TOKENS = 24


def adapt_short(pipeline: Any) -> Any:
    """The pipeline's adapter, for prompts of `TOKENS`."""
    adapter: Any = adapt(pipeline)
    adapter.max_sequence_length = TOKENS
    return adapter


SHORT: dict[str, Any] = {"make_adapter": adapt_short, "call_arguments": {"max_sequence_length": TOKENS}}  # of `check_adapter`
