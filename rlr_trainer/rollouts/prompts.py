"""Where prompts come from: a function, as DDPO has it, or a dataset: in memory, in a file, or on the hub (docs/prompts.md)."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import logging
import random
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rlr_trainer.estimators.chain import seeded_generator

logger = logging.getLogger(__name__)

PROMPT_COLUMN = "prompt"
NEGATIVE_COLUMN = "negative_prompt"
SCALES_COLUMN = "scale_prompts"
USUAL_COLUMNS = ("text", "caption", "prompts", "Prompt", "question")  # where other datasets keep their prompts
FILE_LOADERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_CHECKED_AT_ONCE = 10_000  # rows of a datasets.Dataset


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

    def __post_init__(self) -> None:
        """numpy's strings (`np.random.choice(prompts)`) become Python's: a checkpoint that holds them could not be read back."""
        object.__setattr__(self, "prompt", str(self.prompt))
        if self.negative_prompt is not None:
            object.__setattr__(self, "negative_prompt", str(self.negative_prompt))
        if self.scale_prompts is not None:
            object.__setattr__(self, "scale_prompts", tuple(map(str, self.scale_prompts)))


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

    @contextlib.contextmanager
    def borrowed(self) -> Iterator[FunctionPrompts]:
        """Prompts as the training would get them next; afterwards the training gets the same ones, in the same order.

        The global random number generators (torch's of the CPU, numpy's, Python's) end where they were, so a function that draws
        from them will draw the same again. Any other moves on when it is called: what it gave here waits for the training.
        """
        lent = _LentPrompts(self)
        with _global_generators_kept():
            try:
                yield lent
            finally:
                if not lent.drew_globally:
                    self._ahead += lent.drawn

    def _call(self) -> PromptRow:
        returned = self.function()
        pair = isinstance(returned, tuple | list) and len(returned) == 2
        if isinstance(returned, list) and pair and isinstance(returned[1], str):  # prompts without metadata rather than a pair
            pair = False
        if pair and isinstance(returned[0], list | tuple) and returned[0] and all(isinstance(p, str) for p in returned[0]):
            return PromptRow(returned[0][-1], returned[1], scale_prompts=tuple(returned[0]))
        if not pair or not isinstance(returned[0], str):
            raise TypeError(
                f"prompt_function returned {returned!r:.120}: must return a pair (prompt, metadata) with a string and, for instance, "
                "an empty dict"
            )
        return PromptRow(*returned)

    def state_dict(self) -> dict[str, Any]:
        """Prompts that were drawn and not used, and the function's own state if it has `state_dict` and `load_state_dict`.

        Without these two the function's state is taken to be in the global random number generators, which the trainer saves.
        """
        state: dict[str, Any] = {}
        if self._ahead:
            state["ahead"] = [(row.prompt, row.metadata, row.negative_prompt, row.scale_prompts) for row in self._ahead]
        owner = self._stateful()
        if owner is not None:
            state["function"] = owner.state_dict()
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self._ahead = [
            PromptRow(prompt, metadata, negative, None if scales is None else tuple(scales))
            for prompt, metadata, negative, scales in state.get("ahead", ())
        ]
        owner = self._stateful()
        if owner is not None and "function" in state:
            owner.load_state_dict(state["function"])
        elif (owner is None) != ("function" not in state):
            has, lacks = ("the checkpoint", "prompt_function") if owner is None else ("prompt_function", "the checkpoint")
            logger.warning(
                "%s has a state of its own for the prompts and %s has none: they go on from where the function stands", has, lacks
            )

    def _stateful(self) -> Any:
        """The function, or the object whose method it is, if that has both methods of a state."""
        for owner in (self.function, getattr(self.function, "__self__", None)):
            if callable(getattr(owner, "state_dict", None)) and callable(getattr(owner, "load_state_dict", None)):
                return owner
        return None


class _LentPrompts(FunctionPrompts):
    """What `borrowed` yields: the owner's prompts from where it stands.

    Attributes:
        drawn: what the function gave.
        drew_globally: whether it used the global random number generators.
    """

    def __init__(self, owner: FunctionPrompts) -> None:
        super().__init__(owner.function)
        self._ahead = list(owner._ahead)
        self.drawn: list[PromptRow] = []
        self.drew_globally = False

    def _call(self) -> PromptRow:
        before = _global_generators()
        row = super()._call()
        self.drew_globally |= before != _global_generators()
        self.drawn.append(row)
        return row


def _global_generators() -> tuple[Any, ...]:
    """States of the global random number generators, comparable."""
    state: Any = np.random.get_state(legacy=False)  # noqa: NPY002  # users' prompt functions draw from it
    words = state["state"]
    numpy_state = words["key"].tobytes(), words["pos"], state["has_gauss"], state["gauss"]
    return random.getstate(), numpy_state, torch.get_rng_state().numpy().tobytes()


@contextlib.contextmanager
def _global_generators_kept() -> Iterator[None]:
    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002
    with torch.random.fork_rng(devices=[]):
        try:
            yield
        finally:
            random.setstate(python_state)
            np.random.set_state(numpy_state)  # noqa: NPY002


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
        _check_kind(dataset, name)
        if isinstance(dataset, list | tuple) and all(isinstance(row, str) for row in dataset):
            dataset = [{PROMPT_COLUMN: text} for text in dataset]
        first = dict(dataset[0])  # a transform of the dataset's may have made other columns than column_names says
        if PROMPT_COLUMN not in first:
            raise ValueError(f"{name} {_missing_column(dataset, list(first))}")
        self.dataset, self.seed, self.shuffle, self.name = dataset, seed, shuffle, name
        self.taken = 0
        self._order: tuple[int, list[int]] | None = None
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
        return [self._row(position) for position in range(self.taken, self.taken + count)]

    @contextlib.contextmanager
    def borrowed(self) -> Iterator[DatasetPrompts]:
        """Prompts as the training would get them next, without moving its position; the global generators as in `FunctionPrompts`."""
        with _global_generators_kept():
            yield copy.copy(self)

    def _row(self, position: int) -> PromptRow:
        epoch, offset = divmod(position, len(self.dataset))
        number = self._epoch_order(epoch)[offset]
        return _prompt_row(self.dataset[number], self.name, number)

    def _check_rows(self) -> None:
        """All rows where they can be read fast; others when it is their turn."""
        features = getattr(self.dataset, "features", None)
        if features is None or self.dataset.format["type"] == "custom":
            rows = range(len(self.dataset)) if isinstance(self.dataset, list | tuple) else range(1)
            for number in rows:
                _prompt_row(self.dataset[number], self.name, number)
            return
        _prompt_row(self.dataset[0], self.name, 0)
        first = 0
        for part in self.dataset.select_columns([PROMPT_COLUMN]).with_format("arrow").iter(_CHECKED_AT_ONCE):
            column = part[PROMPT_COLUMN]
            if column.null_count:
                number = first + column.is_null().to_pylist().index(True)
                raise TypeError(
                    f"{self.name}: column {PROMPT_COLUMN!r} is empty in row {number} and maybe others: "
                    f"dataset.filter(lambda row: row[{PROMPT_COLUMN!r}] is not None) drops them"
                )
            first += len(column)

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
    path = Path(source).expanduser()
    if path.is_file():
        given = {"split": split != "train", "name": name is not None, "column": path.suffix == ".txt" and column is not None}
        if none := next((option for option, is_given in given.items() if is_given), None):
            raise ValueError(f"{field}={str(source)!r}: {none} is given, but such a file has none; leave it out")
    if path.suffix == ".txt" and path.is_file():
        return _text_prompts(path, field)
    is_hub_id = not path.exists() and _HUB_ID.fullmatch(str(source)) is not None and path.suffix not in (".txt", *FILE_LOADERS)
    if not (path.is_dir() or (path.is_file() and path.suffix in FILE_LOADERS) or is_hub_id):
        kinds = ", ".join([".txt", *FILE_LOADERS])
        found = "is no file of a kind that can be read" if path.exists() else "does not exist"
        raise ValueError(f"{field}={str(source)!r}: {found}; must be a file ({kinds}), a dataset's folder, or a hub id owner/name")
    dataset = _load(path, str(source), field, split, name, is_hub_id)
    if column is not None and column != PROMPT_COLUMN:
        if column not in dataset.column_names:
            raise ValueError(f"{field}={str(source)!r}: has no column {column!r}, but {', '.join(dataset.column_names)}")
        if PROMPT_COLUMN in dataset.column_names:
            dataset = dataset.remove_columns(PROMPT_COLUMN)
        dataset = dataset.rename_column(column, PROMPT_COLUMN)
    elif PROMPT_COLUMN not in dataset.column_names:
        raise ValueError(f"{field}={str(source)!r} {_missing_column(dataset, dataset.column_names)}")
    return dataset


def _text_prompts(path: Path, field: str) -> list[dict[str, str]]:
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8-sig").split("\n")]  # other separators may be in a prompt
    except UnicodeDecodeError as error:
        raise ValueError(f"{field}={str(path)!r}: is not UTF-8 text ({error})") from error
    prompts = [{PROMPT_COLUMN: line} for line in lines if line]
    if not prompts:
        raise ValueError(f"{field}={str(path)!r}: the file has no line with a prompt")
    return prompts


def _load(path: Path, source: str, field: str, split: str, name: str | None, is_hub_id: bool) -> Any:
    import datasets

    try:
        if (path / "state.json").is_file() or (path / "dataset_dict.json").is_file():
            loaded = datasets.load_from_disk(str(path))
            splits = loaded if isinstance(loaded, dict) else {"train": loaded}
            if name is not None or split not in splits:
                wrong = f"configuration {name!r}" if name is not None else f"split {split!r}"
                raise ValueError(f"it has no {wrong}" + (f", but {', '.join(splits)}" if name is None else ""))
            return splits[split]
        if path.suffix == ".csv" and path.is_file():
            return _read_csv(path)
        if path.is_file() and not path.read_bytes().strip():
            raise ValueError("the file is empty")
        if path.is_file():
            return datasets.load_dataset(FILE_LOADERS[path.suffix], data_files=str(path), split="train")
        return datasets.load_dataset(source if is_hub_id else str(path), name, split=split)
    except (OSError, ValueError, KeyError, datasets.exceptions.DatasetsError) as error:
        cause = " ".join(str(error.__cause__ or error).split())[:300] or type(error).__name__
        if is_hub_id:
            way_out = "needs a network and an id that exists (`huggingface-cli download` beforehand serves offline runs), or give a local file"
            raise ValueError(
                f"{field}={source!r}: no such file, and as a hub id it cannot be loaded: {cause}; {way_out}"
            ) from error
        raise ValueError(f"{field}={source!r}: cannot be read: {cause}") from error


def _read_csv(path: Path) -> Any:
    """With pandas, as `datasets` reads them, too, but closing the file, and without a guess at lines that are longer than the header:
    pandas takes `a cat, sitting` below `prompt` for an index and the prompt ` sitting`, or cuts the rest off."""
    import datasets
    import pandas

    with warnings.catch_warnings():
        warnings.simplefilter("error", pandas.errors.ParserWarning)
        try:
            table = pandas.read_csv(path, index_col=False)
        except pandas.errors.ParserWarning:
            raise ValueError("lines have more fields than the header; put texts that contain a comma in double quotes") from None
    return datasets.Dataset.from_pandas(table, preserve_index=False)


def _check_kind(dataset: Any, name: str) -> None:
    kind = type(dataset).__name__
    if isinstance(dataset, Mapping):
        is_splits = all(hasattr(value, "column_names") for value in dataset.values())
        way_out = (
            f'take one of its splits, such as {name}["{next(iter(dataset), "train")}"]'
            if is_splits
            else "datasets.Dataset.from_dict(...)"
        )
        raise TypeError(f"{name} is a {kind}: must be a sequence of rows; {way_out}")
    if hasattr(dataset, "iloc"):
        raise TypeError(f"{name} is a pandas {kind}: must be a sequence of rows; datasets.Dataset.from_pandas(...) makes one")
    if not hasattr(dataset, "__len__") or not hasattr(dataset, "__getitem__"):
        raise TypeError(
            f"{name} is a {kind}: must have a length and rows, such as datasets.Dataset or a list of dicts; load a "
            "streaming dataset into memory (datasets.Dataset.from_list(list(...))), or use prompt_function"
        )
    if len(dataset) == 0:
        raise ValueError(f"{name} has no rows: give at least one prompt")
    if not isinstance(dataset[0], (str | Mapping) if isinstance(dataset, list | tuple) else Mapping):
        raise TypeError(
            f"{name} has rows of the type {type(dataset[0]).__name__}: must be dicts with a {PROMPT_COLUMN!r}, or strings"
        )


def _missing_column(dataset: Any, columns: Sequence[str]) -> str:
    other = next((column for column in USUAL_COLUMNS if column in columns), columns[0] if columns else "text")
    renamed = f'dataset.rename_column("{other}", "{PROMPT_COLUMN}")'
    way_out = (
        f"rename one: {renamed}, or column: {other} in a run's file" if hasattr(dataset, "rename_column") else "rename the key"
    )
    return f'has the columns {", ".join(map(str, columns)) or "(none)"}, but needs "{PROMPT_COLUMN}"; {way_out}'


def _prompt_row(row: Any, name: str, number: int) -> PromptRow:
    """Row `number` of the dataset as a prompt.

    Raises:
        TypeError, ValueError: a column that is missing or holds something else.
    """
    if not isinstance(row, Mapping):
        raise TypeError(
            f"{name}: row {number} is a {type(row).__name__}: must be a dict with a {PROMPT_COLUMN!r}, as the first row is"
        )
    metadata = dict(row)
    if PROMPT_COLUMN not in metadata:
        raise ValueError(f"{name}: row {number} has no {PROMPT_COLUMN!r}, but {', '.join(map(str, metadata)) or 'nothing'}")
    prompt = metadata.pop(PROMPT_COLUMN)
    negative = metadata.get(NEGATIVE_COLUMN)
    for column, text in ((PROMPT_COLUMN, prompt), (NEGATIVE_COLUMN, negative)):
        if not isinstance(text, str) and (column == PROMPT_COLUMN or text is not None):
            raise TypeError(
                f"{name}: column {column!r} holds {text!r:.80} ({type(text).__name__}) in row {number}: must be a string{_to_text(column, text)}"
            )
    scales = metadata.get(SCALES_COLUMN)
    if scales is not None and not (isinstance(scales, list | tuple) and all(isinstance(text, str) for text in scales)):
        raise TypeError(
            f"{name}: column {SCALES_COLUMN!r} holds {scales!r:.80} in row {number}: must be a list of strings, coarse to fine"
        )
    return PromptRow(prompt, metadata, negative, None if scales is None else tuple(scales))


def _to_text(column: str, value: Any) -> str:
    """How to make text of a conversation, a number or a list."""
    if isinstance(value, list | tuple) and value and isinstance(value[0], Mapping) and "content" in value[0]:
        return f"; of a conversation take the last message: dataset.map(lambda row: {{{column!r}: row[{column!r}][-1]['content']}})"
    if isinstance(value, int | float):
        return f"; dataset.cast_column({column!r}, datasets.Value('string')) makes it one"
    if isinstance(value, list | tuple):
        return "; one row per prompt, or the several prompts of a row, coarse to fine, in a column 'scale_prompts'"
    return ""
