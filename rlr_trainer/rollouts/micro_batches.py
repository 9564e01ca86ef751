"""The micro-batches of a rollout that are still to come."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from rlr_trainer.rollouts.batches import Experience


class MicroBatches:
    """Hands out a rollout in micro-batches. Each sample is held once, however many passes see it, and only until its last."""

    def __init__(self) -> None:
        self._parts: list[Experience | None] = []  # sampling batches; None when nothing more comes from them
        self._sizes: list[int] = []
        self._first: list[int] = []  # number of each one's first sample
        self._rows: deque[Tensor] = deque()  # sample numbers of each micro-batch

    def __len__(self) -> int:
        return len(self._rows)

    def fill(self, parts: Sequence[Experience | None], rows: Sequence[Tensor], sizes: Sequence[int]) -> None:
        """Takes a rollout.

        Args:
            parts: its sampling batches.
            rows: for every micro-batch the numbers of its samples, counted through all parts.
            sizes: samples in each part.
        """
        self._parts, self._rows, self._sizes = list(parts), deque(rows), list(sizes)
        self._first = [sum(self._sizes[:number]) for number in range(len(self._sizes))]
        self._release()

    def clear(self) -> None:
        """Forgets everything."""
        self.fill([], [], [])

    def pop(self) -> Experience:
        """The next micro-batch."""
        rows = self._rows.popleft()
        numbers = self._part_of(rows)
        pieces, places = [], []
        for number in numbers.unique().tolist():
            place = torch.nonzero(numbers == number)[:, 0]
            own = rows[place] - self._first[number]
            part = self._parts[number]
            assert part is not None
            pieces.append(part if torch.equal(own, torch.arange(len(part))) else part.select(own))
            places.append(place)
        self._release()
        if len(pieces) == 1:
            return pieces[0]
        return Experience.concatenate(pieces).select(torch.cat(places).argsort())

    def state(self) -> dict[str, Any]:
        """What `fill` takes, by name."""
        return {"parts": list(self._parts), "rows": list(self._rows), "sizes": list(self._sizes)}

    def _part_of(self, rows: Tensor) -> Tensor:
        return torch.bucketize(rows, torch.tensor(self._first), right=True) - 1

    def _release(self) -> None:
        used = {int(number) for rows in self._rows for number in self._part_of(rows).unique()}
        self._parts = [part if number in used else None for number, part in enumerate(self._parts)]
