"""Where prompts come from: a function, as DDPO has it, or a dataset: in memory, in a file, or on the hub (docs/prompts.md)."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import inspect
import logging
import random
import re
import warnings
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rlr_trainer.estimators.chain import seeded_generator

logger = logging.getLogger(__name__)

PROMPT_COLUMN = "prompt"
NEGATIVE_COLUMN = "negative_prompt"
SCALES_COLUMN = "scale_prompts"
FILE_LOADERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
_SAVED_TO_DISK = ("state.json", "dataset_dict.json")  # marks of `save_to_disk`
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


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
    """Prompts from a function `() -> (prompt, metadata)`; the prompt is a string, or several, one per scale, coarse to fine.

    Every process calls it for the whole batch of all processes and keeps its share: with the same state of the random number
    generators all processes agree on the prompts, and the run does not depend on how many there are.
    """

    def __init__(self, function: Callable[[], tuple[str, Any]]) -> None:
        if not callable(function):
            raise TypeError(
                f"prompt_function={function!r:.120}: must be a function () -> (prompt, metadata); a list of prompts, a dataset or a file is "
                "given by name, train_dataset=..."
            )
        _check_takes_nothing(function)
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
            self._ahead.append(_function_row(self.function()))
        return self._ahead[:count]

    @contextlib.contextmanager
    def borrowed(self) -> Iterator[FunctionPrompts]:
        """Prompts as the training would get them next; afterwards the training gets the same ones, in the same order.

        The global random number generators (torch's of the CPU, numpy's, Python's) end where they were, so a function that draws
        from them will draw the same again. Any other moves on when it is called: what it gave here waits for the training.
        """
        drawn: list[PromptRow] = []
        drew_globally = False

        def function() -> Any:
            """The user's function, watched: what it gave, and whether it drew from the global generators."""
            nonlocal drew_globally
            before = _global_generators()
            returned = self.function()
            drew_globally |= before != _global_generators()
            drawn.append(_function_row(returned))
            return returned

        lent = FunctionPrompts(function)
        lent._ahead = list(self._ahead)
        with _global_generators_kept():
            try:
                yield lent
            finally:
                if not drew_globally:
                    self._ahead += drawn

    def state_dict(self) -> dict[str, Any]:
        """Prompts that were drawn and not used, and the function's own state if it has `state_dict` and `load_state_dict`.

        Without these two the function's state is taken to be in the global random number generators, which the trainer saves.
        """
        state: dict[str, Any] = {}
        if self._ahead:
            state["ahead"] = [(row.prompt, row.metadata, row.negative_prompt, row.scale_prompts) for row in self._ahead]
        if (owner := self._stateful()) is not None:
            state["function"] = owner.state_dict()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes up what `state_dict` gave; warns where the function has a state and the checkpoint none, or the other way round."""
        self._ahead = [PromptRow(*row) for row in state.get("ahead", ())]
        owner = self._stateful()
        if owner is not None and "function" in state:
            owner.load_state_dict(state["function"])
        elif (owner is None) != ("function" not in state):
            has, lacks = ("the checkpoint", "prompt_function") if owner is None else ("prompt_function", "the checkpoint")
            logger.warning("%s has a state for the prompts and %s has none: they go on from where the function stands", has, lacks)

    def _stateful(self) -> Any:
        """The function, or the object whose method it is, if that has both methods of a state."""
        owners = (self.function, getattr(self.function, "__self__", None))
        return next((owner for owner in owners if hasattr(owner, "state_dict") and hasattr(owner, "load_state_dict")), None)


def _check_takes_nothing(function: Callable[..., Any]) -> None:
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # of some builtins nothing is known
        return
    try:
        signature.bind()
    except TypeError:
        raise TypeError(
            f"prompt_function takes {signature}: it is called without arguments, once per prompt, and returns a pair (prompt, metadata)"
        ) from None


def _function_row(returned: Any) -> PromptRow:
    """What a prompt function returned; numpy's strings become Python's, or a checkpoint that holds them could not be read back."""
    match returned:
        # a list of two strings is two prompts without metadata rather than a pair
        case [str(prompt), metadata] if not (isinstance(returned, list) and isinstance(metadata, str)):
            return PromptRow(str(prompt), metadata)
        case [[*texts], metadata] if texts and all(isinstance(text, str) for text in texts):
            scales = tuple(map(str, texts))
            return PromptRow(scales[-1], metadata, scale_prompts=scales)
    raise TypeError(
        f"prompt_function returned {returned!r:.120}: must return a pair (prompt, metadata) with a string and, say, {{}}"
    )


def _global_generators() -> tuple[Any, ...]:
    """States of the global random number generators, comparable."""
    numpy_state: Any = np.random.get_state()  # noqa: NPY002  # users' prompt functions draw from it
    return random.getstate(), str(numpy_state), numpy_state[1].tobytes(), torch.get_rng_state().tolist()


@contextlib.contextmanager
def _global_generators_kept() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]), contextlib.ExitStack() as stack:
        stack.callback(random.setstate, random.getstate())
        stack.callback(np.random.set_state, np.random.get_state())  # noqa: NPY002
        yield


class DatasetPrompts:
    """Prompts from a dataset with a "prompt" column, shuffled anew in every pass; the order is a function of the seed.

    Args:
        dataset: a `datasets.Dataset`, any sequence of dicts, a list of strings, or what `open_dataset` opens.
        seed: of the shuffling.
        shuffle: False keeps the dataset's order.
        name: how messages call the dataset.

    Raises:
        TypeError, ValueError: no rows, no "prompt" column, or a prompt that is not a string.
    """

    def __init__(self, dataset: Any, seed: int, shuffle: bool = True, name: str = "train_dataset") -> None:
        dataset = open_dataset(dataset, name)
        is_rows = hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")
        if not is_rows or isinstance(dataset, Mapping) or hasattr(dataset, "iloc"):
            raise TypeError(
                f"{name} is a {type(dataset).__name__}: must be a datasets.Dataset or a list of dicts or strings; take one split of a "
                "DatasetDict, and make other data a dataset with datasets.Dataset.from_dict, from_pandas or from_list"
            )
        if len(dataset) == 0:
            raise ValueError(f"{name} has no rows: give at least one prompt")
        if isinstance(dataset, list | tuple) and all(isinstance(row, str) for row in dataset):
            dataset = [{PROMPT_COLUMN: text} for text in dataset]
        self.dataset, self.seed, self.shuffle, self.name = dataset, seed, shuffle, name
        self.taken = 0
        self._check_rows()

    def __len__(self) -> int:
        return len(self.dataset)

    def take(self, count: int) -> list[PromptRow]:
        """The next `count` prompts; passes follow each other without a gap."""
        rows = self.peek(count)
        self.taken += count
        return rows

    def peek(self, count: int) -> list[PromptRow]:
        """The next `count` prompts, which `take` will return again."""
        places = [divmod(position, len(self)) for position in range(self.taken, self.taken + count)]
        return [self._row(_order(self.seed, epoch, len(self))[offset] if self.shuffle else offset) for epoch, offset in places]

    def head(self, count: int) -> list[PromptRow]:
        """The first rows of the dataset, `count` at most, in its own order."""
        return [self._row(number) for number in range(min(count, len(self)))]

    @contextlib.contextmanager
    def borrowed(self) -> Iterator[DatasetPrompts]:
        """Prompts as the training would get them next, without moving its position; the global generators are kept."""
        with _global_generators_kept():
            yield copy.copy(self)

    def _row(self, number: int) -> PromptRow:
        return _dataset_row(self.dataset[number], f"{self.name}: row {number}")

    def _check_rows(self) -> None:
        """All rows of a list, the prompt column of a dataset, else the first row; others are checked when it is their turn."""
        for number in range(len(self.dataset)) if isinstance(self.dataset, list | tuple) else range(1):
            self._row(number)
        if getattr(self.dataset, "features", None) is None or self.dataset.format["type"] == "custom":
            return  # a transform makes the rows
        empty = self.dataset.select_columns([PROMPT_COLUMN]).with_format("arrow")[:][PROMPT_COLUMN].is_null()
        if (number := empty.index(True).as_py()) >= 0:
            raise TypeError(
                f"{self.name}: row {number} has no text in the column {PROMPT_COLUMN!r}, and others may not have: "
                f"dataset.filter(lambda row: row[{PROMPT_COLUMN!r}] is not None) drops them"
            )

    def state_dict(self) -> dict[str, int]:
        return {"taken": self.taken}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.taken = state["taken"]


@functools.lru_cache(maxsize=2)
def _order(seed: int, epoch: int, count: int) -> list[int]:
    return torch.randperm(count, generator=seeded_generator(seed, epoch)).tolist()


def _dataset_row(row: Any, where: str) -> PromptRow:
    """A row of a dataset as a prompt; TypeError or ValueError, which begins with `where`, for anything else."""
    if not isinstance(row, Mapping):
        raise TypeError(
            f"{where} is a {type(row).__name__}: all rows must be dicts with a {PROMPT_COLUMN!r}, or all strings in a list"
        )
    if PROMPT_COLUMN not in row:
        raise ValueError(
            f"{where} has the columns {', '.join(map(str, row))}, but needs {PROMPT_COLUMN!r}: rename one, as with "
            f"dataset.rename_column('text', {PROMPT_COLUMN!r}), or name it as column in a run's file"
        )
    prompt, negative, scales = row[PROMPT_COLUMN], row.get(NEGATIVE_COLUMN), row.get(SCALES_COLUMN)
    for column, text in ((PROMPT_COLUMN, prompt), (NEGATIVE_COLUMN, "" if negative is None else negative)):
        if not isinstance(text, str):
            raise TypeError(
                f"{where} holds {text!r:.80} ({type(text).__name__}) in the column {column!r}: must be one string; dataset.map makes one, "
                f"such as row[{column!r}][-1]['content'] of a conversation or str(row[{column!r}]) of a number"
            )
    if scales is not None and not (isinstance(scales, list | tuple) and all(isinstance(text, str) for text in scales)):
        raise TypeError(f"{where} holds {scales!r:.80} in the column {SCALES_COLUMN!r}: must be a list of strings, coarse to fine")
    metadata = {column: value for column, value in row.items() if column != PROMPT_COLUMN}
    return PromptRow(prompt, metadata, negative, None if scales is None else tuple(scales))


def open_dataset(
    source: Any, field: str = "train_dataset", *, split: str = "train", name: str | None = None, column: str | None = None
) -> Any:
    """The dataset that a string or path names; anything else is returned as it is.

    Args:
        source: a text file (.txt) with a prompt per line; a dataset file (.json, .jsonl, .csv, .parquet); a folder that
            `Dataset.save_to_disk` wrote, or of dataset files; or the hub id of a dataset, "owner/name".
        field: how messages call it.
        split: of a folder or a dataset on the hub; files have none but "train".
        name: of the configuration of a folder or a dataset on the hub.
        column: the one that holds the prompts, if it is not called "prompt"; a text file has none.

    Raises:
        ValueError: nothing there, something that cannot be read, or no such split, configuration or column; names the source.
    """
    if not isinstance(source, str | Path):
        return source
    path, called = Path(source).expanduser(), f"{field}={str(source)!r}"
    is_text, is_readable = path.suffix == ".txt", path.suffix in (".txt", *FILE_LOADERS)
    is_hub_id = not path.exists() and not is_readable and _HUB_ID.fullmatch(str(source)) is not None
    if not (path.is_dir() or (path.is_file() and is_readable) or is_hub_id):
        kinds = ", ".join([".txt", *FILE_LOADERS])
        raise ValueError(f"{called}: must be a file that exists ({kinds}), a dataset's folder, or a hub id owner/name")
    if path.is_file() and (split != "train" or name is not None or (is_text and column is not None)):
        given = f"split={split!r}, name={name!r}, column={column!r}"
        raise ValueError(f"{called}, {given}: a file has no splits and configurations, and a .txt file no columns; leave them out")
    import datasets

    try:
        dataset: Any = _load(str(source) if is_hub_id else path, split, name)
    except (OSError, ValueError, KeyError, StopIteration, Warning, datasets.exceptions.DatasetsError) as error:
        cause = " ".join(str(error.__cause__ or error).split())[:300] or f"no rows ({type(error).__name__})"
        way_out = "; put texts that contain a comma in double quotes" if path.suffix == ".csv" else ""
        if is_hub_id:
            way_out = "; no such file exists, and a hub id needs a network or an earlier `hf download`"
        raise ValueError(f"{called}: cannot be read: {cause}{way_out}") from error
    if column in (None, PROMPT_COLUMN):
        return dataset
    if column not in dataset.column_names:
        raise ValueError(f"{called}: has no column {column!r}, but {', '.join(dataset.column_names)}")
    others = [other for other in dataset.column_names if other != PROMPT_COLUMN]
    return dataset.select_columns(others).rename_column(column, PROMPT_COLUMN)


def _load(source: Path | str, split: str, name: str | None) -> Any:
    """A file or folder (a path), or a dataset on the hub (a string)."""
    import datasets
    import pandas

    if isinstance(source, str) or (source.is_dir() and not any((source / file).is_file() for file in _SAVED_TO_DISK)):
        return datasets.load_dataset(str(source), name, split=split)
    if source.is_dir():
        loaded = datasets.load_from_disk(str(source))
        splits = loaded if isinstance(loaded, dict) else {"train": loaded}
        if name is not None or split not in splits:
            raise ValueError(
                f"has no split={split!r} of a configuration name={name!r}, but the splits {', '.join(splits)} without one"
            )
        return splits[split]
    if source.suffix == ".txt":
        lines = [line.strip() for line in source.read_text(encoding="utf-8-sig").split("\n")]  # other separators may be in a prompt
        if not any(lines):
            raise ValueError("the file has no line with a prompt")
        return [{PROMPT_COLUMN: line} for line in lines if line]
    if source.suffix != ".csv":
        return datasets.load_dataset(FILE_LOADERS[source.suffix], data_files=str(source), split="train")
    with warnings.catch_warnings():
        warnings.simplefilter("error", pandas.errors.ParserWarning)  # it has cut a line that is longer than the header
        # without index_col, `a cat, sitting` below `prompt` is an index and the prompt ` sitting`; datasets may leave the file open
        return datasets.Dataset.from_pandas(pandas.read_csv(source, index_col=False), preserve_index=False)
