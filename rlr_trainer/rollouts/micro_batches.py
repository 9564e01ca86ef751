"""The micro-batches of a rollout that are still to come."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import torch
from torch import Tensor

from rlr_trainer.estimators.chain import seeded_generator
from rlr_trainer.rollouts.batches import SHUFFLE, ScoredBatch


def micro_batch_rows(count: int, size: int, num_epochs: int, seed: int, rollout: int) -> list[Tensor]:
    """Numbers of the samples of every micro-batch of `size`: all in order, then shuffled anew in every later pass."""
    rows: list[Tensor] = []
    for epoch in range(num_epochs):
        order = torch.arange(count)
        if epoch:
            order = torch.randperm(count, generator=seeded_generator(seed, SHUFFLE, rollout, epoch))
        rows.extend(order.split(size))
    return rows


class MicroBatches:
    """Hands out a rollout in micro-batches. Each sample is held once, however many passes see it, and only until its last."""

    def __init__(self) -> None:
        self.fill([], [])

    def __len__(self) -> int:
        return len(self._rows)

    def fill(self, parts: Sequence[ScoredBatch], rows: Sequence[Tensor]) -> None:
        """Takes a rollout.

        Args:
            parts: its sampling batches.
            rows: for every micro-batch the numbers of its samples, counted through all parts.
        """
        sizes = [len(part) for part in parts]
        self._first = [sum(sizes[:number]) for number in range(len(sizes))]  # number of each part's first sample
        self._parts = dict(enumerate(parts))
        self._rows: deque[Tensor] = deque(rows)

    def pop(self) -> ScoredBatch:
        """The next micro-batch."""
        rows = self._rows.popleft()
        numbers = self._part_of(rows)
        pieces, places = [], []
        for number in numbers.unique().tolist():
            place = torch.nonzero(numbers == number)[:, 0]
            own, part = rows[place] - self._first[number], self._parts[number]
            pieces.append(part if torch.equal(own, torch.arange(len(part))) else part.select(own))
            places.append(place)
        used = {int(number) for later in self._rows for number in self._part_of(later).unique()}
        self._parts = {number: part for number, part in self._parts.items() if number in used}
        if len(pieces) == 1:
            return pieces[0]
        return ScoredBatch.concatenate(pieces).select(torch.cat(places).argsort())

    def _part_of(self, rows: Tensor) -> Tensor:
        return torch.bucketize(rows, torch.tensor(self._first), right=True) - 1
