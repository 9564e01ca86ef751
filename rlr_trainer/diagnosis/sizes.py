"""Batch sizes, and what else decides on the memory of an update of the same samples; which of them to try where it does not fit."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

BATCHES = ("per_device_train_batch_size", "gradient_accumulation_steps", "sample_batch_size", "sample_num_batches_per_epoch")


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The settings that a proposal may change, under the names of their options; samples per update stay the same."""

    per_device_train_batch_size: int
    gradient_accumulation_steps: int
    sample_batch_size: int
    sample_num_batches_per_epoch: int
    reward_batch_size: int
    gradient_checkpointing: bool
    offload_text_encoders: bool
    offload_rollouts: bool
    recompute: str

    @classmethod
    def of(cls, config: Any) -> Sizes:
        """Those of an `RLRConfig`."""
        values = {field.name: getattr(config, field.name) for field in dataclasses.fields(cls)}
        values["reward_batch_size"] = values["reward_batch_size"] or config.sample_batch_size
        values["gradient_checkpointing"] = bool(values["gradient_checkpointing"])
        return cls(**values)

    @property
    def samples(self) -> int:
        """Of a rollout, per process."""
        return self.sample_batch_size * self.sample_num_batches_per_epoch


def candidates(sizes: Sizes) -> Iterator[Sizes]:
    """Settings that need less and less memory, for the same samples per update; those that cost least come first."""
    now = dataclasses.replace(sizes, offload_text_encoders=True)
    yield now
    now = dataclasses.replace(now, reward_batch_size=1, recompute="recursive")
    yield now
    whole = now.sample_batch_size == now.per_device_train_batch_size
    for checkpointing in dict.fromkeys((now.gradient_checkpointing, True)):
        size = sizes.per_device_train_batch_size
        now = dataclasses.replace(now, gradient_checkpointing=checkpointing)
        while True:
            factor = sizes.per_device_train_batch_size // size
            yield dataclasses.replace(
                now,
                per_device_train_batch_size=size,
                gradient_accumulation_steps=sizes.gradient_accumulation_steps * factor,
                sample_batch_size=size if whole else sizes.sample_batch_size,
                sample_num_batches_per_epoch=sizes.samples // size if whole else sizes.sample_num_batches_per_epoch,
            )
            if size % 2:
                break
            size //= 2
    now = dataclasses.replace(now, per_device_train_batch_size=1, offload_rollouts=True)
    total = sizes.per_device_train_batch_size * sizes.gradient_accumulation_steps
    yield dataclasses.replace(
        now, gradient_accumulation_steps=total, sample_batch_size=1, sample_num_batches_per_epoch=sizes.samples
    )
