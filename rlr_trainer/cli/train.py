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
    "Values are read as YAML; a flag without a value is true."
)
RUN_KEYS = (
    ("model", "folder or hub id of a diffusers pipeline; digits is the bundled one"),
    ("reward", "name, URL of a reward server, or package.module:function; several in brackets: [ink, my.rewards:smile]"),
    ("prompts", "text file, dataset file, hub id, package.module:function, or a prompt (docs/prompts.md)"),
    ("eval_prompts", "the same for evaluation, but no function; needs eval_strategy and eval_steps"),
)
# Options of transformers.TrainingArguments that runs of this kind usually set; its documentation has all of them.
USUAL_OPTIONS = (
    ("per_device_train_batch_size", "samples per process and micro-batch"),
    ("gradient_accumulation_steps", "micro-batches per update"),
    ("max_steps", "updates in all, in place of num_train_epochs; -1: not set"),
    ("seed", "of all randomness: noise, plan, prompts' order, first weights"),
    ("lr_scheduler_type", "linear, cosine, constant, ..."),
    ("warmup_steps", "updates of warm-up"),
    ("max_grad_norm", "limit of the gradient's norm; 0: none"),
    ("adam_beta1", "of AdamW"),
    ("adam_beta2", "of AdamW"),
    ("optim", "optimizer"),
    ("bf16", "bfloat16 mixed precision"),
    ("fp16", "float16 mixed precision"),
    ("gradient_checkpointing", "recompute activations within the network"),
    ("use_cpu", "no GPU, even if there is one"),
    ("save_strategy", "steps, epoch or no"),
    ("save_total_limit", "checkpoints kept"),
    ("eval_strategy", "steps, epoch or no"),
    ("eval_steps", "updates between two evaluations"),
    ("run_name", "name in trackers"),
    ("push_to_hub", "upload the result"),
    ("hub_model_id", "owner/name to upload to"),
    ("disable_tqdm", "no progress bars"),
)
INDENT = 34  # columns of the option's name


class _FullHelp(argparse.Action):
    """--help with all options of RLRConfig, which are known only after seconds of imports."""

    def __init__(self, option_strings: Any, dest: str, **keywords: Any) -> None:
        super().__init__(option_strings, dest, nargs=0, help="show this message with every option, and exit", **keywords)

    def __call__(self, parser: argparse.ArgumentParser, *arguments: Any) -> None:
        lines = [parser.format_help(), *option_lines()]
        from rlr_trainer.cli import discard_output

        try:
            print("\n".join(lines), flush=True)
        except BrokenPipeError:  # `| head` has seen enough
            discard_output()
        parser.exit()


def add_parser(commands: Any, common: argparse.ArgumentParser) -> None:
    """Adds the subcommand."""
    train = commands.add_parser(
        "train", parents=[common], help="train as a YAML file says", description=DESCRIPTION, add_help=False, allow_abbrev=False
    )
    train.add_argument("-h", "--help", action=_FullHelp, default=argparse.SUPPRESS)
    train.add_argument("--config", default=None, help="YAML file of keys and values")
    train.add_argument(
        "--resume",
        nargs="?",
        const=True,
        default=None,
        metavar="CHECKPOINT",
        help="go on from this checkpoint's folder, or without a value from the last one in output_dir",
    )
    train.set_defaults(run=run, takes_overrides=True)


def run(options: argparse.Namespace) -> int:
    """Runs it; returns the exit code."""
    from pathlib import Path

    from rlr_trainer.cli.settings import build_trainer, load_settings

    settings = load_settings(options.config, options.overrides)
    if isinstance(options.resume, str) and not Path(options.resume).is_dir():
        raise ValueError(f"--resume {options.resume}: no such folder; give that of a checkpoint, or nothing for the last one")
    trainer = build_trainer(settings)
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
    """Help on every key: the run's own, those of RLRConfig in the groups of its source, and the usual ones of TrainingArguments."""
    import dataclasses
    import inspect
    import re

    from rlr_trainer.training.config import RLRConfig

    fields = {field.name: field for field in dataclasses.fields(RLRConfig)}
    yield "the run:"
    for name, meaning in RUN_KEYS:
        yield from _option_lines(name, meaning, None)
    for line in inspect.getsource(RLRConfig).splitlines():
        if heading := re.fullmatch(r"    # ---- (.+) ----", line):
            yield f"\n{'changed defaults' if 'TrainingArguments' in heading[1] else heading[1]}:"
        elif option := re.match(r"    (\w+): .* = _option\(", line):
            field = fields[option[1]]
            yield from _option_lines(field.name, field.metadata["help"], field.default)
    yield "\nusual options of transformers.TrainingArguments (its documentation has the others):"
    for name, meaning in USUAL_OPTIONS:
        yield from _option_lines(name, meaning, fields[name].default)


def _option_lines(name: str, meaning: str, default: Any) -> list[str]:
    import shutil
    import textwrap

    if default is not None:
        default = getattr(default, "value", default)  # of an enumeration
        shown = str(default).lower() if isinstance(default, bool) else default
        meaning = f"{meaning} (default: {shown})" if shown != "" else f"{meaning} (default: empty)"
    width = max(60, min(shutil.get_terminal_size().columns, 120))
    lines = textwrap.wrap(meaning, width - INDENT)
    head = f"  --{name} "
    return [f"{head:{INDENT}}{lines[0]}", *(" " * INDENT + line for line in lines[1:])]
