"""Pipelines with another scheduler than their own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def with_scheduler(make_pipeline: Callable[[], Any], name: str, **options: Any) -> Callable[[], Any]:
    """Makes the pipeline with the scheduler of this class, on the same noise levels but for `options`."""

    def make() -> Any:
        import diffusers

        pipeline = make_pipeline()
        pipeline.scheduler = getattr(diffusers, name).from_config(pipeline.scheduler.config, **options)
        return pipeline

    return make
