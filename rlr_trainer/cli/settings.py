"""A training run described by a YAML file and overrides: what `rlr-trainer train` and `rlr-trainer diagnose` read.

TRL's parser reads both. The keys are the options of `RLRConfig` and the fields of `RunArguments`.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import pkgutil
import re
import sys
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

import yaml
from transformers import TrainingArguments
from trl import TrlParser

from rlr_trainer import digits, rewards
from rlr_trainer.cli.keys import SettingsError, unknown_key
from rlr_trainer.cli.video_rewards import NAMES, load_video_reward
from rlr_trainer.digits import moving
from rlr_trainer.digits.moving_classifiers import DIRECTIONS
from rlr_trainer.digits.rewards import digit_reward, ink, moving_digit_reward
from rlr_trainer.observing.progress import announce
from rlr_trainer.rewards.neural import named
from rlr_trainer.rollouts.prompt_sets import PROMPT_SETS, prompt_set
from rlr_trainer.rollouts.prompts import FILE_LOADERS, open_dataset
from rlr_trainer.training.config import RLRConfig
from rlr_trainer.training.trainer import RLRTrainer

REWARDS: dict[str, Callable[..., Any]] = {
    "ink": ink,
    "jpeg_compressibility": rewards.jpeg_compressibility,
    "jpeg_incompressibility": rewards.jpeg_incompressibility,
}
# What stands first in the help, in this order; with a text where that of TrainingArguments is long.
MOST_USED = {
    **dict.fromkeys(("model", "reward", "prompts", "eval_prompts", "output_dir", "overwrite", "estimator"), ""),
    "max_steps": "Updates; -1: as num_train_epochs says.",
    "per_device_train_batch_size": "Pictures per process and backward pass; times gradient_accumulation_steps those of an update.",
    "gradient_accumulation_steps": "Backward passes per update.",
    "learning_rate": "",
    "lr_scheduler_type": "Schedule of the learning rate: linear falls to 0 at the end of the run, constant stays.",
    **dict.fromkeys(("sample_num_steps", "sample_guidance_scale", "lora_r", "save_steps", "log_images_steps"), ""),
    "eval_strategy": "When eval_prompts are evaluated: no, steps or epoch.",
    "eval_steps": "Updates between two evaluations.",
    "seed": "Of everything random.",
    "bf16": "Compute in bfloat16.",
    "use_cpu": "No GPU, even if there is one.",
}
_FUNCTION = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")


def _key(help_text: str) -> Any:
    return dataclasses.field(default=None, metadata={"help": help_text})


@dataclasses.dataclass
class RunArguments:
    """What a run consists of, beside the options of `RLRConfig`.

    Raises:
        SettingsError: a key that a run needs is missing.
    """

    model: str | None = _key(
        "Folder or hub id of a diffusers pipeline; digits, digits-flow and moving-digits are the bundled ones."
    )
    reward: list[str] | None = _key("Name, URL of a reward server, or package.module:function; or several.")
    # of such a union TRL's parser takes the second type: a list and a mapping come from the file alone
    prompts: dict[str, str] | str | list[str] | None = _key(
        "Text file, dataset file, hub id, name of a set that ships, package.module:function, or a prompt (docs/prompts.md)."
    )
    eval_prompts: dict[str, str] | str | list[str] | None = _key(
        "The same for evaluation, but no function; needs eval_strategy and eval_steps."
    )

    def __post_init__(self) -> None:
        for name in ("model", "reward", "prompts"):
            if not getattr(self, name):
                raise SettingsError(f"key {name!r} is missing: give it in the file or as --{name}")


def _parser() -> TrlParser:
    classes: Any = (RunArguments, RLRConfig)
    return TrlParser(classes, add_help=False, allow_abbrev=False, exit_on_error=False, usage=argparse.SUPPRESS)


def parse_run(path: str | Path | None, overrides: Sequence[str] = ()) -> tuple[RunArguments, RLRConfig]:
    """The run that a YAML file describes, with `--key value` or `--key=value` overrides on top, and the options of a bundled model below.

    Raises:
        SettingsError: a file that is no mapping, an unknown key (with the nearest known one), a missing key, or a value of another type
            than its option's.
        ValueError: an option outside its range.
    """
    parser = _parser()
    file = {} if path is None else _read_file(path, parser)
    parser.set_defaults(**file)
    try:
        first = parser.parse_known_args(list(overrides))[0]
        if not first.output_dir:
            raise SettingsError("output_dir='': must be a folder; is a variable of the shell empty?")
        parser.set_defaults(**options_of_model(first.model, file))
        run, config, unknown = parser.parse_args_into_dataclasses(
            list(overrides), return_remaining_strings=True, look_for_args_file=False
        )
    except argparse.ArgumentError as error:
        raise SettingsError(str(error)) from error
    if unknown and not unknown[0].startswith("--"):
        raise SettingsError(f"{unknown[0]!r}: belongs to no key; overrides are written --key value or --key=value")
    if unknown:
        raise SettingsError(_unknown(unknown[0].removeprefix("--").partition("=")[0], parser))
    return run, config


def _read_file(path: str | Path, parser: TrlParser) -> dict[str, Any]:
    """The file's keys and values, as defaults of the parser.

    A plain value stays text, which the parser reads as if it stood on the command line: YAML would make a truth value of
    `save_strategy: no` and text of `1e-4`. Lists and mappings are YAML's, except that the items of a list option get its type.
    """
    try:
        content = Path(path).read_text(encoding="utf-8")
        texts, values = yaml.load(content, yaml.BaseLoader), yaml.load(content, yaml.SafeLoader)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise SettingsError(f"--config {path}: cannot be read: {error}") from error
    if not isinstance(texts, dict):
        raise SettingsError(f"--config {path}: must hold `key: value` lines")
    hints = get_type_hints(RunArguments) | get_type_hints(RLRConfig)
    actions: dict[str, Any] = {action.dest: action for action in parser._actions}
    defaults: dict[str, Any] = {}
    for key, text in texts.items():
        if (action := actions.get(key)) is None:
            raise SettingsError(_unknown(key, parser))
        value = values.get(key)
        is_plain = isinstance(text, str) and value is not None
        kinds = {get_origin(kind) or kind for kind in get_args(hints[key]) or (hints[key],)}
        if not is_plain and type(value) not in kinds and value is not action.default:
            raise SettingsError(
                f"{key}={value!r}: cannot be a {type(value).__name__}; see `rlr-trainer train --help`, or leave it out"
            )
        defaults[key] = text if is_plain else value
        if value is not None and action.nargs == "+":
            try:
                defaults[key] = [action.type(item) for item in ([text] if is_plain else text)]
            except (TypeError, ValueError) as error:
                raise SettingsError(f"{key}={value!r}: must be a list of {action.type.__name__} ({error})") from error
    return defaults


def _unknown(key: str, parser: TrlParser) -> str:
    return unknown_key(key, [action.dest for action in parser._actions])


def help_on_keys() -> str:
    """Help on the keys of a run; those of `TrainingArguments` by name alone, but for what `RLRConfig` explains anew."""
    base = {field.name: field.metadata for field in dataclasses.fields(TrainingArguments)}
    theirs = [field.name for field in dataclasses.fields(RLRConfig) if field.init and base.get(field.name) == field.metadata]
    parser = _parser()
    for action in parser._actions:
        action.option_strings = action.option_strings[:1]  # without the spelling with "-"
        if MOST_USED.get(action.dest):
            action.help = MOST_USED[action.dest]
            action.metavar = action.dest.upper()  # in place of a long list of choices
        elif action.dest in theirs:
            action.help = argparse.SUPPRESS
        if action.default is None:
            action.default = argparse.SUPPRESS  # its help says what is done then
    first, others = parser.add_argument_group("most used"), parser.add_argument_group("all others of RLRConfig")
    first._group_actions = [action for name in MOST_USED for action in parser._actions if action.dest == name]
    others._group_actions = [action for action in parser._actions if action.dest not in MOST_USED]
    parser._action_groups = [first, others]
    names = " ".join(f"--{name}" for name in theirs if name not in MOST_USED)
    parser.epilog = f"Options of transformers.TrainingArguments, which its documentation explains: {names}"
    return parser.format_help()


def options_of_model(model: str | None, given: Collection[str]) -> dict[str, Any]:
    """The options that suit a bundled model and that a run does not give; none for any other model."""
    own: dict[str, Any] = digits.OPTIONS if model in digits.MODELS else {}
    own = own | moving.OPTIONS if model == "moving-digits" else own
    return {name: value for name, value in own.items() if name not in given}


def raw_options(path: str | Path | None, overrides: Sequence[str], names: Sequence[str]) -> dict[str, bool]:
    """What a run says of truth values, before `RLRConfig` looks whether this machine can do it.

    Raises:
        SettingsError: as `parse_run`.
    """
    parser = _parser()
    if path is not None:
        parser.set_defaults(**_read_file(path, parser))
    try:
        read = parser.parse_known_args(list(overrides))[0]
    except argparse.ArgumentError as error:
        raise SettingsError(str(error)) from error
    return {name: bool(getattr(read, name)) for name in names}


def build_trainer(
    run: RunArguments, config: RLRConfig, model: Any = None, functions: Sequence[Callable[..., Any]] | None = None
) -> RLRTrainer:
    """The trainer of a run; `model` and `functions` stand in for its own model and rewards, which are then not loaded.

    Raises:
        SettingsError, ValueError: something that is not there or cannot be used together.
    """
    prompts = load_prompts(run.prompts)
    eval_prompts = None if run.eval_prompts is None else load_prompts(run.eval_prompts, "eval_prompts")
    if callable(eval_prompts):
        raise SettingsError(f"eval_prompts={run.eval_prompts!r}: is a function, but must be prompts, so that all are evaluated")
    functions = [load_reward(name) for name in run.reward or ()] if functions is None else functions
    announce(f"loading the model {run.model}", bool(config.disable_tqdm))
    return RLRTrainer(
        config,
        functions if len(functions) > 1 else functions[0],
        prompts if callable(prompts) else None,
        load_model(run.model) if model is None else model,
        train_dataset=None if callable(prompts) else prompts,
        eval_dataset=eval_prompts,
    )


def load_model(name: str | None) -> Any:
    """The pipeline: a bundled one (of `digits.MODELS`), or what the trainer loads itself (a path or a hub id).

    Raises:
        ValueError: neither a bundled model nor a folder, and no hub id.
    """
    if name is not None and name not in digits.MODELS and "/" not in name and not os.path.exists(name):
        raise ValueError(
            f"model={name!r}: no such folder; give one of {', '.join(digits.MODELS)}, a folder, or a hub id, owner/name"
        )
    return digits.load_pipeline(name) if name in digits.MODELS else name


def load_reward(name: str) -> Callable[..., Any]:
    """A reward: a name of `REWARDS`, "digit:7", "moving_digit:7:right", a name of `rewards.neural.named` ("pickscore",
    "classifier:SOURCE:CLASS"), one of `video_rewards` ("frames:8:pickscore"), the URL of a reward server, or `package.module:function`.

    Raises:
        ValueError: no such name, module or function; or (`WeightsError`) weights that are missing or damaged.
    """
    if name in REWARDS:
        return REWARDS[name]
    if (of_videos := load_video_reward(name, load_reward)) is not None:
        return of_videos
    if named.is_named(name):
        return named.load_named(name)
    if name.startswith(("http://", "https://")):
        return rewards.RemoteReward(name)
    if re.fullmatch("digit:[0-9]", name):
        return digit_reward(int(name[-1]))
    if found := re.fullmatch(f"moving_digit:([0-9]):({'|'.join(DIRECTIONS)})", name):
        return moving_digit_reward(int(found[1]), found[2])
    if not _FUNCTION.fullmatch(name):
        known = ", ".join(
            [*REWARDS, "digit:0 to digit:9", "moving_digit:7:right", *named.NEURAL, f"{named.CLASSIFIER}:SOURCE:CLASS", *NAMES]
        )
        raise ValueError(f"reward={name!r}: must be {known}, the URL of a reward server, or package.module:function")
    return load_function(name, "reward")


def load_prompts(source: Any, field: str = "prompts") -> Any:
    """Prompts of a run: a function, or something that `RLRTrainer` takes as a dataset.

    Args:
        source: a list of prompts; or one of: a name of `PROMPT_SETS`, `package.module:function`, what `prompts.open_dataset` opens, a mapping
            of path, split, name and column to its arguments, or else a single prompt.
        field: how messages call it.

    Raises:
        ValueError: nothing of that name, or something that cannot be read.
    """
    if isinstance(source, Mapping):
        if not {"path"} <= source.keys() <= {"path", "split", "name", "column"}:
            raise ValueError(f"{field}={source}: the keys are path, and optionally split, name, column")
        return open_dataset(str(source["path"]), field, **{key: value for key, value in source.items() if key != "path"})
    texts = source if isinstance(source, list) else [source]
    if not texts or not all(isinstance(text, str) and text.strip() for text in texts):
        raise ValueError(
            f"{field}={source!r}: must be a prompt, a list of prompts, a file, a hub id, or package.module:function; put words such as yes "
            "and numbers in quotes"
        )
    if isinstance(source, list):
        return texts
    if os.path.exists(source):
        return open_dataset(source, field)
    if source in PROMPT_SETS:
        return prompt_set(source)
    if _FUNCTION.fullmatch(source):
        return load_function(source, field)
    ending, is_word = Path(source).suffix, not re.search(r"\s", source)
    is_name = ending in (".txt", *FILE_LOADERS) or (
        is_word and ("/" in source or ending)
    )  # and a misspelt one rather than a prompt
    return open_dataset(source, field) if is_name else texts


def load_function(name: str, field: str) -> Callable[..., Any]:
    """The function that `package.module:function` names; modules beside the working directory are found too.

    Raises:
        ValueError: no such module, or no such function in it.
    """
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    try:
        return pkgutil.resolve_name(name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"{field}={name!r}: must be package.module:function, but cannot be imported ({error})") from error
