"""Where prompts come from: a function, as DDPO has it, or a dataset."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch

from rlr_trainer.chain import seeded_generator

PROMPT_COLUMN = "prompt"
NEGATIVE_COLUMN = "negative_prompt"
SCALES_COLUMN = "scale_prompts"


@dataclasses.dataclass(frozen=True)
class PromptRow:
    """One prompt.

    Attributes:
        prompt: what the reward sees, and the network too unless there are `scale_prompts`.
        metadata: what the reward gets beside it.
        negative_prompt: its own, or None for the run's.
        scale_prompts: one prompt per scale, coarse to fine (Diffusive Chain-of-Thought); None uses `prompt` in all.
    """

    prompt: str
    metadata: Any
    negative_prompt: str | None = None
    scale_prompts: tuple[str, ...] | None = None


class FunctionPrompts:
    """Prompts from a function `() -> (prompt, metadata)`; the prompt is a string, or one string per scale, coarse to fine.

    The reward sees the last of several.

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
        pair = isinstance(returned, tuple) and len(returned) == 2
        if pair and isinstance(returned[0], list | tuple) and returned[0] and all(isinstance(p, str) for p in returned[0]):
            return PromptRow(returned[0][-1], returned[1], scale_prompts=tuple(returned[0]))
        if not pair or not isinstance(returned[0], str):
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
        scales = row.get(SCALES_COLUMN)
        if scales is not None and not (isinstance(scales, list | tuple) and all(isinstance(text, str) for text in scales)):
            raise TypeError(
                f"{self.name}: column {SCALES_COLUMN!r} holds {scales!r:.80}: must be a list of strings, coarse to fine"
            )
        return PromptRow(prompt, row, negative, None if scales is None else tuple(scales))

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
