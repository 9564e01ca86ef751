"""What a run was trained on, for its record and to compare it with what a resumed run is given: the rewards' code and options, the prompts."""

from __future__ import annotations

import functools
import hashlib
import inspect
import json
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from rlr_trainer.persistence.descriptions import in_words
from rlr_trainer.rollouts.prompts import NEGATIVE_COLUMN, PROMPT_COLUMN, SCALES_COLUMN, DatasetPrompts, FunctionPrompts

SECRETS = {"token", "password", "secret", "key"}  # words in names of options that are not recorded
FIRST_PROMPTS = 5  # recorded as they are
MOST_ITEMS = 50  # of an option that is a list or a mapping
OWN = "rlr_trainer"


def describe_function(function: Any, depth: int = 2) -> dict[str, Any]:
    """Of a reward or prompt function: `function` (module:name), `options` where it has some, `code`, a digest of its source, if it has one.

    Options are what a `functools.partial`, a closure or an object's public attributes hold, as far as they are plain values. The code of
    this package is known by its version.
    """
    options: dict[str, Any] = {}
    while isinstance(function, functools.partial):
        options = function.keywords | {f"argument {number}": value for number, value in enumerate(function.args)} | options
        function = function.func
    is_function = inspect.isroutine(function)
    named = function if is_function else type(function)
    if is_function and inspect.isfunction(plain := inspect.unwrap(getattr(function, "__func__", function))):
        cells = zip(plain.__code__.co_freevars, plain.__closure__ or (), strict=True)
        options |= {name: cell.cell_contents for name, cell in cells if not _is_empty(cell) and cell.cell_contents is not plain}
        named = plain
    else:
        options |= {
            name: value for name, value in getattr(function, "__dict__", {}).items() if name != "training"
        }  # a module's mode
    module = str(getattr(named, "__module__", ""))
    kept = {
        name: value for name, value in options.items() if not name.startswith("_") and SECRETS.isdisjoint(name.lower().split("_"))
    }
    told = {name: text for name, value in kept.items() if (text := _plain(value, depth)) is not None}
    code = None if module.partition(".")[0] == OWN else _source(named)
    described = {"function": f"{module}:{getattr(named, '__qualname__', type(named).__name__)}"}
    return described | ({"options": told} if told else {}) | ({"code": _digest([code])} if code else {})


def describe_prompts(prompts: FunctionPrompts | DatasetPrompts) -> dict[str, Any]:
    """Of a run's prompts: of a dataset the number of rows, a digest of them and the first ones; of a function what it is."""
    if isinstance(prompts, FunctionPrompts):
        return describe_function(prompts.function)
    first = [row.prompt for row in prompts.head(FIRST_PROMPTS)]
    return {"rows": len(prompts), "sha256": _digest(_rows(prompts.dataset)), "first": first}


def _rows(dataset: Any) -> Iterable[Any]:
    """What is to be digested of a dataset's rows: plain columns, all of them; of rows that are made when asked for the number alone."""
    features = getattr(dataset, "features", None)
    if features is None:
        listed = dataset if isinstance(dataset, list | tuple) else ()
        return ({name: value for name, value in row.items() if _plain(value, 1) is not None} for row in listed)
    if dataset.format["type"] == "custom":
        return (str(len(dataset)),)
    texts = {PROMPT_COLUMN, NEGATIVE_COLUMN, SCALES_COLUMN}
    columns = [name for name, kind in features.items() if name in texts or type(kind).__name__ == "Value"]
    return dataset.select_columns(columns).with_format(None).iter(batch_size=1000)


def _digest(items: Iterable[Any]) -> str:
    """The first 16 digits of a SHA-256."""
    digest = hashlib.sha256()
    for item in items:
        digest.update(json.dumps(item, sort_keys=True, default=str).encode() + b"\n")
    return digest.hexdigest()[:16]


def _source(named: Callable[..., Any] | type) -> str | None:
    try:
        return inspect.getsource(named)
    except (OSError, TypeError):  # built in, or typed into an interpreter
        return None


def _is_empty(cell: Any) -> bool:
    try:
        _ = cell.cell_contents
    except ValueError:
        return True
    return False


def _plain(value: Any, depth: int) -> Any:
    """A value as JSON takes it; of functions and of this package's objects a description; None for anything else."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)  # JSON has no such number
    if isinstance(value, bool | int | float) or (isinstance(value, str) and len(value) <= 500):
        return value
    if isinstance(value, str):
        return f"text of {len(value)} letters, sha256 {_digest([value])}"
    if isinstance(value, list | tuple) and len(value) <= MOST_ITEMS:
        items = [_plain(item, depth) for item in value]
        return items if all(item is not None for item in items) else None
    if isinstance(value, Mapping) and len(value) <= MOST_ITEMS:
        return {str(name): text for name, item in value.items() if (text := _plain(item, depth)) is not None} or None
    if depth > 0 and (inspect.isfunction(value) or type(value).__module__.partition(".")[0] == OWN):
        return in_words(describe_function(value, depth - 1))
    return str(value) if type(value).__module__ == "torch" and type(value).__name__ in ("dtype", "device") else None
