"""A look at the keys of a run's file and overrides before torch is loaded, so that a misspelt one is named at once."""

from __future__ import annotations

import ast
import contextlib
import functools
import importlib.util
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from rlr_trainer.training.option_names import meant


class SettingsError(ValueError):
    """A file or an override that cannot be understood, or a key that is missing."""

    exit_code = 2


def unknown_key(key: Any, known: Iterable[str]) -> str:
    """The message about a key that is none of the `known` ones."""
    return f"unknown key {key!r}; {meant(str(key), known)}"


def check_keys(path: str | None, overrides: Sequence[str]) -> None:
    """Refuses keys that no run has, and words that belong to no key. Whatever else is wrong is left to `settings.parse_run`, which needs torch.

    Raises:
        SettingsError: names the key or word and what it may mean.
    """
    if overrides and not overrides[0].startswith("--"):
        raise SettingsError(f"{overrides[0]!r} stands before any option; if it is the run's file, write --config {overrides[0]}")
    known = known_keys()
    for key in [*keys_of_file(path), *flags_of(overrides)] if known else ():
        if key.replace("-", "_").removeprefix("no_") not in known and key not in known:
            raise SettingsError(unknown_key(key, sorted(known)))


@functools.cache
def known_keys() -> frozenset[str]:
    """The fields of `RunArguments`, `RLRConfig` and `TrainingArguments`, read from their source; empty where that is not at hand."""
    here = Path(__file__).parents[1]
    found = _fields(here / "cli" / "settings.py", "RunArguments") | _fields(here / "training" / "config.py", "RLRConfig")
    spec = importlib.util.find_spec("transformers")
    folders = spec.submodule_search_locations if spec is not None else None
    theirs = _fields(Path(folders[0]) / "training_args.py", "TrainingArguments") if folders else set()
    return frozenset(found | theirs) if found and theirs else frozenset()


def _fields(file: Path, name: str) -> set[str]:
    """The annotated names in the body of a class."""
    with contextlib.suppress(OSError, SyntaxError, ValueError):
        for node in ast.parse(file.read_text(encoding="utf-8")).body:
            if isinstance(node, ast.ClassDef) and node.name == name:
                lines = [line for line in node.body if isinstance(line, ast.AnnAssign)]
                return {line.target.id for line in lines if isinstance(line.target, ast.Name) and line.target.id[0] != "_"}
    return set()


def flags_of(overrides: Sequence[str]) -> list[str]:
    """The names of options on a command line, as they are written there."""
    return [text[2:].partition("=")[0] for text in overrides if text.startswith("--")]


def keys_of_file(path: str | Path | None) -> list[str]:
    """The keys that a file has; none without one, or where it cannot be read."""
    import yaml

    if path is not None:
        with contextlib.suppress(OSError, ValueError, yaml.YAMLError):
            content = yaml.load(Path(path).read_text(encoding="utf-8"), yaml.BaseLoader)
            return [str(key) for key in content] if isinstance(content, dict) else []
    return []
