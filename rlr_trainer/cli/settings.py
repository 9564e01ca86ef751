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
import errno
import functools
import importlib
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from rlr_trainer.rollouts.prompts import FILE_LOADERS, open_dataset

RUN_KEYS = ("model", "reward", "prompts", "eval_prompts")
PROMPT_KEYS = ("path", "split", "name", "column")  # of `prompts`, where it is a mapping
TRUTH = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}
_BOOL, _FLOAT, _TIMESTAMP = (f"tag:yaml.org,2002:{kind}" for kind in ("bool", "float", "timestamp"))
_NO_KIND = {"None", "NoneType", "Optional", "Union", "typing"}  # words in a written type that name no type of a value


class SettingsError(ValueError):
    """A file or an override that cannot be understood, or a key that is missing."""


class _Loader(yaml.SafeLoader):
    """YAML with three differences: `1e-4` is a number, `no` and `2026-01-31` are words (options such as `save_strategy: no` need that;
    `_convert` reads them where a truth value is wanted), and a key that stands twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if (key.tag, key.value) in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key.value!r} stands twice", key.start_mark)
            seen.add((key.tag, key.value))
        return super().construct_mapping(node, deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in pairs if tag not in (_BOOL, _TIMESTAMP)]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(_BOOL, re.compile("^(?:true|True|TRUE|false|False|FALSE)$"), list("tTfF"))
_Loader.add_implicit_resolver(_FLOAT, re.compile(r"^[-+]?(?:\d+\.?\d*|\.\d+)[eE][-+]?\d+$"), list("-+.0123456789"))


def load_settings(path: str | Path | None, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """Settings of a YAML file, with `--key value` or `--key=value` overrides on top (values are read as YAML).

    Raises:
        SettingsError: a file that is no mapping, an override that is no pair, an unknown key (with the nearest known one), or a value of
            another type than its option's.
    """
    settings = {} if path is None else _read_file(path)
    texts = _parse_overrides(overrides)
    fields = _fields()
    for key, value in (settings | texts).items():
        if key not in fields and key not in RUN_KEYS:
            raise SettingsError(f"unknown key {key!r}{_hint(key, value, [*fields, *RUN_KEYS])}")
    settings |= {key: _read_override(key, text, key in fields and _is_text(fields[key])) for key, text in texts.items()}
    return {key: _convert(key, value, fields[key]) if key in fields else value for key, value in settings.items()}


def _read_file(path: str | Path) -> dict[Any, Any]:
    try:
        settings = yaml.load(Path(path).read_text(encoding="utf-8"), _Loader) or {}
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SettingsError(f"--config {path}: cannot be read: {error}") from error
    if not isinstance(settings, dict):
        raise SettingsError(f"--config {path}: must hold `key: value` lines, but holds a {type(settings).__name__}")
    return settings


def _fields() -> dict[str, dataclasses.Field[Any]]:
    """The options of RLRConfig."""
    from rlr_trainer.training.config import RLRConfig  # loads transformers, which takes seconds

    return {field.name: field for field in dataclasses.fields(RLRConfig) if field.init}


@functools.cache
def _types() -> dict[str, Any]:
    """Options -> their types. Not `field.type`: transformers.HfArgumentParser writes into that what it makes of it."""
    from rlr_trainer.training.config import RLRConfig

    return get_type_hints(RLRConfig)


def _hint(key: Any, value: Any, known: Sequence[str]) -> str:
    import difflib

    if isinstance(value, Mapping):
        return "; keys are not grouped: write those below it without indentation"
    near = difflib.get_close_matches(str(key), known, n=1)
    return f"; did you mean {near[0]!r}?" if near else f"; the run's own keys are {', '.join(RUN_KEYS)}"


def _kinds(field: dataclasses.Field[Any]) -> set[str]:
    """The types of an option's values, as words: {"int", "list"} for `int | list[int] | None`."""
    kind = _types()[field.name]
    written = kind.__name__ if isinstance(kind, type) and not hasattr(kind, "__origin__") else str(kind)
    return set(re.findall(r"\w+", re.sub(r"\b(?:list|tuple|dict|List|Tuple|Dict)\[[^\]]*\]", "list", written)))


def _is_text(field: dataclasses.Field[Any]) -> bool:
    return _kinds(field) - _NO_KIND == {"str"}


def _convert(key: str, value: Any, field: dataclasses.Field[Any]) -> Any:
    """What YAML made of a value, in the type of its option.

    Raises:
        SettingsError: a value of another type.
    """
    written = _kinds(field)
    kinds, may_be_none = written - _NO_KIND, field.default is None or bool(written & {"None", "NoneType", "Optional"})
    if isinstance(value, str) and value.lower() == "none" and "str" not in kinds and may_be_none:
        return None
    if value is None:
        if not may_be_none:
            raise SettingsError(f"{key} has no value: give it one, or leave the key out")
        return None
    if kinds == {"bool"}:
        return _truth(key, value)
    if kinds == {"str"} and isinstance(value, int | float) and not isinstance(value, bool):
        raise SettingsError(f"{key}={value}: must be text; write it in quotes")
    if isinstance(value, str) and kinds <= {"int", "float"}:
        try:
            value = float(value)
        except ValueError:
            raise SettingsError(f"{key}={value!r}: must be a number") from None
    if isinstance(value, str) and kinds == {"list"}:
        return [yaml.load(part, _Loader) for part in value.strip("[] ").split(",")]
    if isinstance(value, bool) and kinds & {"int", "float"}:
        raise SettingsError(f"{key}={str(value).lower()}: must be a number")
    if isinstance(value, float) and kinds == {"int"}:
        if not value.is_integer():
            raise SettingsError(f"{key}={value}: must be a whole number")
        return int(value)
    return value


def _truth(key: str, value: Any) -> bool:
    if isinstance(value, str) and value.lower() in TRUTH:
        return TRUTH[value.lower()]
    if value not in (0, 1):
        raise SettingsError(f"{key}={value!r}: must be true or false")
    return bool(value)


def _parse_overrides(overrides: Sequence[str]) -> dict[str, str]:
    """Keys and the texts of their values."""
    parsed: dict[str, str] = {}
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
        parsed[key.replace("-", "_")] = value
    return parsed


def _read_override(key: str, text: str, is_text: bool) -> Any:
    """An override's value, read as YAML; but outside quotes, brackets and braces, text stays as it is: `a cat: no. #1` is a prompt.

    Args:
        is_text: of an option that is nothing but text, numbers and dates are text, too.

    Raises:
        SettingsError: brackets, braces or quotes that do not close.
    """
    text = text.strip()
    is_quoted, is_flow = text[:1] in ("'", '"'), text[:1] in ("[", "{")
    try:
        value = yaml.load(text, _Loader)
    except yaml.YAMLError as error:
        if is_flow:
            raise SettingsError(f"--{key} {text}: cannot be read as YAML ({' '.join(str(error).split())})") from error
        return text
    if is_quoted or is_flow:
        return value
    stays = isinstance(value, str | Mapping | list) or (is_text and not isinstance(value, bool) and (value is not None or not text))
    return text if stays else value


def build_trainer(settings: Mapping[str, Any], **arguments: Any) -> Any:
    """The trainer that the settings describe; `arguments` go to `RLRTrainer`.

    Raises:
        SettingsError: a key that a run needs is missing.
        ValueError: something that is not there, or an option outside its range.
    """
    from rlr_trainer.training.config import RLRConfig
    from rlr_trainer.training.trainer import RLRTrainer

    settings = dict(settings)
    run = {key: settings.pop(key, None) for key in RUN_KEYS}
    for key in ("model", "reward", "prompts"):
        if run[key] is None:
            raise SettingsError(f"key {key!r} is missing: give it in the file or as --{key}")
    if not isinstance(run["model"], str):
        raise SettingsError(f"model={run['model']!r}: must be digits, a folder or a hub id")
    if settings.get("output_dir") == "":
        raise SettingsError("output_dir='': must be a folder; is a variable of the shell empty?")
    config = RLRConfig(**settings)
    prompts = load_prompts(run["prompts"])
    eval_prompts = None if run["eval_prompts"] is None else load_prompts(run["eval_prompts"], "eval_prompts")
    if callable(eval_prompts):
        raise SettingsError(
            f"eval_prompts={run['eval_prompts']!r}: is a function, but must be a dataset or prompts, so that all are evaluated"
        )
    names = run["reward"] if isinstance(run["reward"], list) and run["reward"] else [run["reward"]]
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
    from rlr_trainer.rewards.neural import named

    functions = {
        "jpeg_compressibility": rewards.jpeg_compressibility,
        "jpeg_incompressibility": rewards.jpeg_incompressibility,
    }
    if name in functions:
        return functions[name]
    if named.is_named(name):
        return named.load_named(name)
    if name.startswith(("http://", "https://")):
        from rlr_trainer.rewards.remote.client import RemoteReward

        return RemoteReward(name)
    kind, _, argument = name.partition(":")
    if name == "ink" or (kind == "digit" and re.fullmatch("[0-9]", argument)):
        from rlr_trainer.digits import rewards as digit_rewards

        return digit_rewards.ink if name == "ink" else digit_rewards.digit_reward(int(argument))
    if ":" not in name or kind == "digit":
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
    is_there = _exists(path)
    if re.fullmatch(r"(?:[A-Za-z_][\w.]*|\S+\.py):[A-Za-z_]\w*", source) and not is_there:
        return load_function(source, field)
    is_one_word = not re.search(r"\s", source)  # a word with a slash or an ending is a misspelt name rather than a prompt
    if is_there or path.suffix in (".txt", *FILE_LOADERS) or (is_one_word and ("/" in source or path.suffix)):
        return open_dataset(source, field)
    return [{"prompt": source}]


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:  # a long prompt
            return False
        raise


def load_function(name: str, field: str) -> Callable[..., Any]:
    """The function that `package.module:function` names; modules beside the working directory are found too.

    Raises:
        ValueError: no such module, or no such function in it.
    """
    module_name, _, attribute = name.partition(":")
    if module_name.endswith(".py"):
        module = Path(module_name).stem
        raise ValueError(
            f"{field}={name!r}: names a file, but must name a module: write {module}:{attribute}, in the file's folder"
        )
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
