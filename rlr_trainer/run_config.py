"""A training run described by a YAML file and overrides: what `rlr-trainer train` and `rlr-trainer diagnose` read.

The keys are those of `RLRConfig`, and beside them:

    model: digits | path | hub id         the pipeline ("digits" is the bundled one)
    reward: name | URL of a reward server | package.module:function | a list of them
    prompts: package.module:function | a file, folder or hub id, see `prompts.open_dataset` | a prompt | a list of prompts |
             {path: file, folder or hub id, split: train, name: configuration, column: of the prompts}
    eval_prompts: the same but a function, for evaluation
"""

from __future__ import annotations

import dataclasses
import importlib
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from rlr_trainer.prompts import FILE_LOADERS, open_dataset

RUN_KEYS = ("model", "reward", "prompts", "eval_prompts")
PROMPT_KEYS = ("path", "split", "name", "column")  # of `prompts`, where it is a mapping


class SettingsError(ValueError):
    """A file or an override that cannot be understood, or a key that is missing."""


def load_settings(path: str | Path | None, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Settings of a YAML file, with `--key value` or `--key=value` overrides on top (values are read as YAML).

    Raises:
        SettingsError: a file that is no mapping, an override that is no pair, or an unknown key (with the nearest known one).
    """
    settings: dict[str, Any] = {}
    if path is not None:
        try:
            settings = yaml.safe_load(Path(path).read_text()) or {}
        except (OSError, yaml.YAMLError) as error:
            raise SettingsError(f"--config {path}: cannot be read: {error}") from error
        if not isinstance(settings, dict):
            raise SettingsError(f"--config {path}: must hold `key: value` lines, but holds a {type(settings).__name__}")
    settings |= _parse_overrides(overrides)
    fields = _fields()
    for key in settings:
        if key not in fields and key not in RUN_KEYS:
            raise SettingsError(f"unknown key {key!r}{_hint(key, [*fields, *RUN_KEYS])}")
    return {key: _convert(key, value, fields[key]) if key in fields else value for key, value in settings.items()}


def _fields() -> dict[str, str]:
    """Options of RLRConfig -> their types, as they are written."""
    from rlr_trainer.config import RLRConfig  # loads transformers, which takes seconds

    def written(kind: Any) -> str:
        return kind.__name__ if isinstance(kind, type) and not hasattr(kind, "__origin__") else str(kind)

    return {field.name: written(field.type) for field in dataclasses.fields(RLRConfig) if field.init}


def _hint(key: Any, known: Sequence[str]) -> str:
    import difflib

    near = difflib.get_close_matches(str(key), known, n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; the run's own keys are {', '.join(RUN_KEYS)}"


def _convert(key: str, value: Any, written_type: str) -> Any:
    """What YAML made of a value, in the type of its option: YAML reads 1e-4 and none as strings.

    Raises:
        SettingsError: a string, or a truth value, for an option that takes numbers.
    """
    kinds = set(re.findall(r"\w+", re.sub(r"\b(?:list|tuple|dict|List|Tuple|Dict)\[[^\]]*\]", "list", written_type))) - {"typing"}
    if isinstance(value, str) and value.lower() == "none" and "str" not in kinds and kinds & {"None", "Optional"}:
        return None
    if isinstance(value, str) and not kinds & {"str", "list", "dict"} and kinds & {"int", "float"}:
        try:
            number = float(value)
        except ValueError:
            raise SettingsError(f"{key}={value!r}: must be a number") from None
        return number if "float" in kinds or not number.is_integer() else int(number)
    if isinstance(value, str) and "list" in kinds and not kinds & {"str", "dict"}:
        return [yaml.safe_load(part) for part in value.strip("[] ").split(",")]
    if isinstance(value, bool) and kinds <= {"int", "float", "None", "Optional"}:
        raise SettingsError(f"{key}={str(value).lower()}: must be a number")
    if isinstance(value, float) and not value.is_integer() and kinds <= {"int", "None", "Optional"}:
        raise SettingsError(f"{key}={value}: must be a whole number")
    return value


def _parse_overrides(overrides: Sequence[str]) -> dict[str, Any]:
    parsed: dict[str, Any] = {}
    rest = list(overrides)
    while rest:
        word = rest.pop(0)
        if not word.startswith("--"):
            raise SettingsError(f"{word!r}: overrides are written --key value or --key=value")
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
        SettingsError: a key that a run needs is missing.
        ValueError: something that is not there, or an option outside its range.
    """
    from rlr_trainer.config import RLRConfig
    from rlr_trainer.trainer import RLRTrainer

    settings = dict(settings)
    run = {key: settings.pop(key, None) for key in RUN_KEYS}
    for key in ("model", "reward", "prompts"):
        if run[key] is None:
            raise SettingsError(f"key {key!r} is missing: give it in the file or as --{key}")
    config = RLRConfig(**settings)
    prompts = load_prompts(run["prompts"])
    eval_prompts = None if run["eval_prompts"] is None else load_prompts(run["eval_prompts"], "eval_prompts")
    if callable(eval_prompts):
        raise SettingsError(
            f"eval_prompts={run['eval_prompts']!r}: is a function, but must be a dataset or prompts, so that all are evaluated"
        )
    names = run["reward"] if isinstance(run["reward"], list) else [run["reward"]]
    for name in names:
        if not isinstance(name, str):
            raise SettingsError(f"reward={name!r}: must be a name, a URL or package.module:function, or a list of them")
    rewards = [load_reward(name) for name in names]
    return RLRTrainer(
        config,
        rewards if len(rewards) > 1 else rewards[0],
        prompts if callable(prompts) else None,
        load_model(run["model"]),
        train_dataset=None if callable(prompts) else prompts,
        eval_dataset=eval_prompts,
        **arguments,
    )


def load_model(name: str) -> Any:
    """The pipeline: "digits", or what the trainer loads itself (a path or a hub id)."""
    if name == "digits":
        from rlr_trainer import digits

        return digits.load_pipeline()
    return name


def load_reward(name: str) -> Callable[..., Any]:
    """A reward by name, or as `package.module:function`.

    The names: "digit:7", "ink", "jpeg_compressibility", "jpeg_incompressibility", and those of `rewards.named`: "pickscore" with its
    published weights, "pickscore:SOURCE" with those of a folder or a hub id, "classifier:SOURCE:CLASS"; and the URL of a reward server, "http://host:8000".

    Raises:
        ValueError: no such name, module or function; or (`WeightsError`) weights that are missing or damaged.
    """
    from rlr_trainer import rewards
    from rlr_trainer.rewards import named

    functions = {
        "jpeg_compressibility": rewards.jpeg_compressibility,
        "jpeg_incompressibility": rewards.jpeg_incompressibility,
    }
    if name in functions:
        return functions[name]
    if named.is_named(name):
        return named.load_named(name)
    if name.startswith(("http://", "https://")):
        from rlr_trainer.rewards.remote import RemoteReward

        return RemoteReward(name)
    kind, _, argument = name.partition(":")
    if name == "ink" or (kind == "digit" and argument.isdigit()):
        from rlr_trainer import demo  # loads the trainer

        return demo.ink if name == "ink" else demo.digit_reward(int(argument))
    if ":" not in name:
        known = ", ".join(["ink", *functions, "digit:0 to digit:9", *named.NEURAL, f"{named.CLASSIFIER}:SOURCE:CLASS"])
        raise ValueError(f"reward={name!r}: must be {known}, the URL of a reward server, or package.module:function")
    return load_function(name, "reward")


def load_prompts(source: Any, field: str = "prompts") -> Any:
    """Prompts of a run: a function, or something that `RLRTrainer` takes as a dataset.

    Args:
        source: what the module's docstring says of `prompts`. A string that is no function, file, folder or hub id is itself the
            only prompt.
        field: how messages call it.

    Raises:
        ValueError: nothing of that name, or something that cannot be read.
    """
    if isinstance(source, Mapping):
        unknown = [key for key in source if key not in PROMPT_KEYS]
        if unknown or "path" not in source:
            wrong = f"unknown key {unknown[0]!r}" if unknown else "no key 'path'"
            raise ValueError(f"{field}={dict(source)!r}: {wrong}; the keys are path, and optionally {', '.join(PROMPT_KEYS[1:])}")
        return open_dataset(str(source["path"]), field, **{key: value for key, value in source.items() if key != "path"})
    if isinstance(source, list) and source and all(isinstance(text, str) for text in source):
        return [{"prompt": text} for text in source]
    if not isinstance(source, str) or not source.strip():
        raise ValueError(f"{field}={source!r}: must be a prompt, a list of prompts, a file, a hub id, or package.module:function")
    path = Path(source).expanduser()
    if re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", source) and not path.exists():
        return load_function(source, field)
    is_one_word = not re.search(r"\s", source)  # a word with a slash or an ending is a misspelt name rather than a prompt
    if path.exists() or path.suffix in (".txt", *FILE_LOADERS) or (is_one_word and ("/" in source or path.suffix)):
        return open_dataset(source, field)
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
