"""A training run described by a YAML file and overrides: what `rlr-trainer train` and `rlr-trainer diagnose` read.

The keys are those of `RLRConfig`, and beside them:

    model: digits | path | hub id         the pipeline ("digits" is the bundled one)
    reward: name | package.module:function | a list of them
    prompts: package.module:function | path of a text file with a prompt per line | path of a dataset (json, jsonl, csv, parquet)
    eval_prompts: the same, for evaluation
"""

from __future__ import annotations

import dataclasses
import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from rlr_trainer.config import RLRConfig

RUN_KEYS = ("model", "reward", "prompts", "eval_prompts")
DATASET_LOADERS = {".json": "json", ".jsonl": "json", ".csv": "csv", ".parquet": "parquet"}


def load_settings(path: str | Path | None, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Settings of a YAML file, with `--key value` or `--key=value` overrides on top (values are read as YAML).

    Raises:
        ValueError: a file that is no mapping, an override that is no pair, or an unknown key (with the nearest known one).
    """
    settings: dict[str, Any] = {}
    if path is not None:
        try:
            settings = yaml.safe_load(Path(path).read_text()) or {}
        except (OSError, yaml.YAMLError) as error:
            raise ValueError(f"--config {path}: cannot be read: {error}") from error
        if not isinstance(settings, dict):
            raise ValueError(f"--config {path}: must hold `key: value` lines, but holds a {type(settings).__name__}")
    settings |= _parse_overrides(overrides)
    known = {field.name for field in dataclasses.fields(RLRConfig) if field.init} | set(RUN_KEYS)
    for key in settings:
        if key not in known:
            import difflib

            near = difflib.get_close_matches(key, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; the run's own keys are {', '.join(RUN_KEYS)}"
            raise ValueError(f"unknown key {key!r}{hint}")
    # YAML reads 1e-4 as a string: only a number with a dot or a sign in the exponent is a float there
    for field in dataclasses.fields(RLRConfig):
        value = settings.get(field.name)
        if isinstance(value, str) and "float" in str(field.type):
            try:
                settings[field.name] = float(value)
            except ValueError:
                continue
    return settings


def _parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    parsed: dict[str, Any] = {}
    rest = list(overrides)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            raise ValueError(f"{word!r}: overrides are written --key value or --key=value")
        key, equals, value = word[2:].partition("=")
        if not equals:
            if not rest or (rest[0].startswith("--")):
                value = "true"  # a bare flag
            else:
                value = rest.pop(0)
        parsed[key.replace("-", "_")] = yaml.safe_load(value)
    return parsed


def build_trainer(settings: Mapping[str, Any], **arguments: Any) -> Any:
    """The trainer that the settings describe; `arguments` go to `RLRTrainer`.

    Raises:
        ValueError: a key that a run needs is missing, or names something that is not there.
    """
    from rlr_trainer.trainer import RLRTrainer

    settings = dict(settings)
    run = {key: settings.pop(key, None) for key in RUN_KEYS}
    for key in ("model", "reward", "prompts"):
        if run[key] is None:
            raise ValueError(f"key {key!r} is missing: give it in the file or as --{key}")
    config = RLRConfig(**settings)
    prompts = load_prompts(run["prompts"])
    rewards = [load_reward(name) for name in (run["reward"] if isinstance(run["reward"], list) else [run["reward"]])]
    return RLRTrainer(
        config,
        rewards if len(rewards) > 1 else rewards[0],
        prompts if callable(prompts) else None,
        load_model(run["model"]),
        train_dataset=None if callable(prompts) else prompts,
        eval_dataset=None if run["eval_prompts"] is None else load_prompts(run["eval_prompts"]),
        **arguments,
    )


def load_model(name: str) -> Any:
    """The pipeline: "digits", or what the trainer loads itself (a path or a hub id)."""
    if name == "digits":
        from rlr_trainer import digits

        return digits.load_pipeline()
    return name


def load_reward(name: str) -> Callable[..., Any]:
    """A reward by name ("digit:7", "ink", "jpeg_compressibility", "jpeg_incompressibility") or as `package.module:function`."""
    from rlr_trainer import demo, rewards

    named = {
        "ink": demo.ink,
        "jpeg_compressibility": rewards.jpeg_compressibility,
        "jpeg_incompressibility": rewards.jpeg_incompressibility,
    }
    if name in named:
        return named[name]
    kind, _, argument = name.partition(":")
    if kind == "digit" and argument.isdigit():
        return demo.digit_reward(int(argument))
    if ":" not in name:
        raise ValueError(f"reward={name!r}: must be {', '.join(named)}, digit:0 to digit:9, or package.module:function")
    return load_function(name, "reward")


def load_prompts(source: str) -> Any:
    """Prompts: a function (`package.module:function`), a text file with one per line, or a dataset file with a "prompt" column."""
    path = Path(source)
    if path.suffix == ".txt" and path.is_file():
        lines = [line.strip() for line in path.read_text().splitlines()]
        prompts = [{"prompt": line} for line in lines if line]
        if not prompts:
            raise ValueError(f"prompts={source!r}: the file has no line with a prompt")
        return prompts
    if path.suffix in DATASET_LOADERS and path.is_file():
        from datasets import load_dataset

        return load_dataset(DATASET_LOADERS[path.suffix], data_files=str(path), split="train")
    if ":" in source and not path.exists():
        return load_function(source, "prompts")
    if path.suffix or path.exists():
        kinds = ", ".join([".txt", *DATASET_LOADERS])
        raise ValueError(f"prompts={source!r}: no such file of a kind that can be read ({kinds}), nor package.module:function")
    return [{"prompt": source}]


def load_function(name: str, field: str) -> Callable[..., Any]:
    """The function that `package.module:function` names; modules beside the working directory are found too.

    Raises:
        ValueError: no such module, or no such function in it.
    """
    module_name, _, attribute = name.partition(":")
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        function = getattr(importlib.import_module(module_name), attribute)
    except ImportError as error:
        raise ValueError(f"{field}={name!r}: cannot import {module_name!r} ({error})") from error
    except AttributeError:
        raise ValueError(f"{field}={name!r}: module {module_name!r} has no {attribute!r}") from None
    if not callable(function):
        raise ValueError(f"{field}={name!r}: is a {type(function).__name__}, but must be a function")
    return function
