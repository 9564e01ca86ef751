"""Where prompts come from: a function, as DDPO has it, or a dataset."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch

from rlr_trainer.chain import seeded_generator

PROMPT_COLUMN = "prompt"
NEGATIVE_COLUMN = "negative_prompt"


@dataclasses.dataclass(frozen=True)
class PromptRow:
    """One prompt: its text, what the reward gets as metadata, and its own negative prompt or None for the run's."""

    prompt: str
    metadata: Any
    negative_prompt: str | None = None


class FunctionPrompts:
    """Prompts from a function `() -> (prompt, metadata)`.

    Every process calls it for the whole batch of all processes and keeps its share: with the same state of the random number
    generators all processes agree on the prompts, and the run does not depend on how many there are.
    """

    def __init__(self, function: Callable[[], tuple[str, Any]]) -> None:
        if not callable(function):
            raise TypeError(f"prompt_function={function!r}: must be a function () -> (prompt, metadata)")
        self.function = function
        self._ahead: list[PromptRow] = []

    def take(self, count: int) -> list[PromptRow]:
        """The next `count` prompts."""
        rows = self.peek(count)
        self._ahead = self._ahead[count:]
        return rows

    def peek(self, count: int) -> list[PromptRow]:
        """The next `count` prompts, which `take` will return again."""
        while len(self._ahead) < count:
            self._ahead.append(self._call())
        return self._ahead[:count]

    def _call(self) -> PromptRow:
        returned = self.function()
        if not isinstance(returned, tuple) or len(returned) != 2 or not isinstance(returned[0], str):
            raise TypeError(
                f"prompt_function returned {returned!r:.120}: must return a pair (prompt, metadata) with a string and, for instance, "
                "an empty dict"
            )
        return PromptRow(*returned)

    def state_dict(self) -> dict[str, int]:
        """Nothing: the function's state is in the global random number generators, which Trainer saves."""
        return {}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._ahead = []


class DatasetPrompts:
    """Prompts from a dataset with a "prompt" column, shuffled anew in every pass; the order is a function of the seed.

    Args:
        dataset: a `datasets.Dataset`, or any sequence of dicts.
        seed: of the shuffling.
        shuffle: False keeps the dataset's order.
        name: how messages call the dataset.

    Raises:
        TypeError, ValueError: no rows, no "prompt" column, or a prompt that is not a string.
    """

    def __init__(self, dataset: Any, seed: int, shuffle: bool = True, name: str = "train_dataset") -> None:
        if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
            raise TypeError(
                f"{name} is a {type(dataset).__name__}: must have a length and rows, such as datasets.Dataset or a list of dicts; load a "
                "streaming dataset into memory, or use prompt_function"
            )
        if len(dataset) == 0:
            raise ValueError(f"{name} has no rows: give at least one prompt")
        columns = getattr(dataset, "column_names", None) or list(dataset[0])
        if PROMPT_COLUMN not in columns:
            raise ValueError(
                f'{name} has the columns {", ".join(map(str, columns))}, but needs "{PROMPT_COLUMN}"; rename one: '
                f'dataset.rename_column("{columns[0]}", "{PROMPT_COLUMN}")'
            )
        self.dataset, self.seed, self.shuffle, self.name = dataset, seed, shuffle, name
        self.taken = 0
        self._order: tuple[int, list[int]] | None = None

    def __len__(self) -> int:
        return len(self.dataset)

    def take(self, count: int) -> list[PromptRow]:
        """The next `count` prompts; passes follow each other without a gap."""
        rows = self.peek(count)
        self.taken += count
        return rows

    def peek(self, count: int) -> list[PromptRow]:
        """The next `count` prompts, which `take` will return again."""
        return [self._row(position) for position in range(self.taken, self.taken + count)]

    def _row(self, position: int) -> PromptRow:
        epoch, offset = divmod(position, len(self.dataset))
        row = dict(self.dataset[self._epoch_order(epoch)[offset]])
        prompt = row.pop(PROMPT_COLUMN)
        negative = row.get(NEGATIVE_COLUMN)
        for column, text in ((PROMPT_COLUMN, prompt), (NEGATIVE_COLUMN, negative)):
            if not isinstance(text, str) and (column == PROMPT_COLUMN or text is not None):
                raise TypeError(f"{self.name}: column {column!r} holds {text!r:.80} ({type(text).__name__}): must be a string")
        return PromptRow(prompt, row, negative)

    def _epoch_order(self, epoch: int) -> Sequence[int]:
        if not self.shuffle:
            return range(len(self.dataset))
        if self._order is None or self._order[0] != epoch:
            self._order = (epoch, torch.randperm(len(self.dataset), generator=seeded_generator(self.seed, epoch)).tolist())
        return self._order[1]

    def state_dict(self) -> dict[str, int]:
        return {"taken": self.taken}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.taken = state["taken"]
