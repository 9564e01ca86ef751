"""`rlr-trainer train`."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Iterator
from typing import Any

logger = logging.getLogger(__name__)

DESCRIPTION = (
    "Trains as a YAML file says. Every key of the file can be given, or overridden, on the command line: --learning_rate 1e-4 "
    "--fo_steps 3. The keys are model, reward, prompts, eval_prompts and every option of RLRConfig; an unknown key is an error. "
    "A value means the same in both places. A list is written [1, 2] in the file and 1 2 on the command line."
)
INDENT = 34  # columns of the option's name


def add_parser(commands: Any, common: argparse.ArgumentParser) -> None:
    """Adds the subcommand."""
    train = commands.add_parser(
        "train", parents=[common], help="train as a YAML file says", description=DESCRIPTION, add_help=False, allow_abbrev=False
    )
    train.add_argument("-h", "--help", action="store_true", help="show this message with every option, and exit")
    train.add_argument("--config", default=None, help="YAML file of keys and values")
    train.add_argument(
        "--resume",
        nargs="?",
        const=True,
        default=None,
        metavar="CHECKPOINT",
        help="go on from this checkpoint's folder, or without a value from the last one in output_dir",
    )
    train.set_defaults(run=run, takes_overrides=True, usage=train.format_help)


def run(options: argparse.Namespace) -> int:
    """Runs it; returns the exit code."""
    from pathlib import Path

    from rlr_trainer.cli.settings import build_trainer, parse_run

    if options.help:
        print("\n".join([options.usage(), *option_lines()]))
        return 0
    described = parse_run(options.config, options.overrides)
    if isinstance(options.resume, str) and not Path(options.resume).is_dir():
        raise ValueError(f"--resume {options.resume}: no such folder; give that of a checkpoint, or nothing for the last one")
    trainer = build_trainer(*described)
    if trainer.eval_prompts is not None and trainer.args.eval_strategy == "no" and not trainer.args.eval_on_start:
        logger.warning(
            "eval_prompts are given, but nothing is evaluated during training: set eval_strategy to steps, and eval_steps"
        )
    try:
        trainer.train(resume_from_checkpoint=options.resume)  # leaves by SystemExit(143) after SIGTERM
    except KeyboardInterrupt:
        raise KeyboardInterrupt(_what_is_left(trainer) if trainer.is_world_process_zero() else "") from None
    trainer.save_pretrained(trainer.args.output_dir)
    if trainer.is_world_process_zero():
        print(f"written to {trainer.args.output_dir}: the trained weights, README.md, metrics.jsonl")
    return 0


def _what_is_left(trainer: Any) -> str:
    """What a run that was interrupted can go on from."""

    from rlr_trainer.persistence.checkpoints import CheckpointStore

    done = f"after {trainer.state.global_step} updates"
    kept = CheckpointStore(trainer.args.output_dir).checkpoints()
    if not kept:
        return f"{done}; no checkpoint was saved before (save_steps={trainer.args.save_steps:g}), so nothing can be resumed"
    return f"{done}; --resume goes on from {kept[-1].name}"


def option_lines() -> Iterator[str]:
    """Help on every key: the run's own, those of RLRConfig, and the names of the others."""
    import dataclasses

    from transformers import TrainingArguments

    from rlr_trainer.cli.settings import RunArguments
    from rlr_trainer.training.config import RLRConfig

    base = {field.name: field for field in dataclasses.fields(TrainingArguments)}
    options = dataclasses.fields(RLRConfig)
    own = [field for field in options if field.name not in base or base[field.name].metadata != field.metadata]
    for title, fields in (("the run", dataclasses.fields(RunArguments)), ("options of RLRConfig", own)):
        yield f"\n{title}:"
        for field in fields:
            yield from _option_lines(field.name, field.metadata["help"], field.default)
    yield "\noptions of transformers.TrainingArguments, which its documentation explains:"
    yield from _wrapped("  ", " ".join(f"--{field.name}" for field in options if field.init and field not in own))


def _option_lines(name: str, meaning: str, default: Any) -> list[str]:
    if default is not None:
        shown = str(default).lower() if isinstance(default, bool) else default
        meaning = f"{meaning} (default: {'empty' if shown == '' else shown})"
    lines = _wrapped(" " * INDENT, meaning)
    return [f"  --{name} ".ljust(INDENT) + lines[0][INDENT:], *lines[1:]]


def _wrapped(indent: str, text: str) -> list[str]:
    import shutil
    import textwrap

    width = max(60, min(shutil.get_terminal_size().columns, 120))
    return textwrap.wrap(text, width, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False)
