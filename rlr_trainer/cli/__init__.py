"""The `rlr-trainer` command: `runs` has train and diagnose, each other subcommand its module. See docs/command_line.md."""

from __future__ import annotations

import importlib
import logging
import os
import sys
from collections.abc import Sequence

from rlr_trainer.cli.keys import check_keys
from rlr_trainer.cli.language import CommandHandler, in_command_language
from rlr_trainer.cli.parsers import build_parser

__all__ = ["build_parser", "main"]

EXIT_INTERRUPTED = 130  # 128 + SIGINT
SLOW = ("train", "diagnose", "demo", "sample")  # to begin: a terminal is told so
EXPECTED_ERRORS = (ValueError, TypeError, OSError, FloatingPointError)  # what the package raises for input that cannot be


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code.

    0: done. 1: the run failed. 2: wrong arguments, or a file or override that cannot be understood. 130: interrupted. 143: ended by
    SIGTERM, with a checkpoint.
    """
    parser = build_parser()
    options, rest = parser.parse_known_args(arguments)
    if rest and not getattr(options, "takes_overrides", False):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    options.overrides = rest
    logging.basicConfig(level=logging.WARNING, handlers=[CommandHandler()])
    try:
        if getattr(options, "takes_overrides", False):
            check_keys(options.config, rest)
        command = options.command.replace("-", "_")
        if command in SLOW and not getattr(options, "help", False) and sys.stderr.isatty():
            print("loading torch, diffusers and transformers", file=sys.stderr, flush=True)
        module = importlib.import_module(f"rlr_trainer.cli.{'runs' if command in ('train', 'diagnose') else command}")
        getattr(module, command)(options)
        sys.stdout.flush()
        return 0
    except KeyboardInterrupt as interrupt:
        print(in_command_language(str(interrupt)) or "interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except Exception as error:  # everything becomes one line; --debug shows the rest
        if isinstance(error, BrokenPipeError):  # the interpreter flushes the output at its end, and would fail there again
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        if options.debug:
            raise
        print(f"rlr-trainer {options.command}: {in_command_language(_in_one_line(error), options.command)}", file=sys.stderr)
        return getattr(error, "exit_code", 1)


def _in_one_line(error: Exception) -> str:
    if isinstance(error, EXPECTED_ERRORS) and str(error):
        return " ".join(" ".join([str(error), *_notes(error)]).split())
    first_line = next(iter(str(error).splitlines()), "")
    hint = "; ".join([*_notes(error), "--debug shows the traceback"])
    if type(error).__name__ == "OutOfMemoryError":
        hint = "lower per_device_train_batch_size and sample_batch_size, and raise gradient_accumulation_steps instead; " + hint
    return f"{type(error).__name__}{': ' if first_line else ''}{first_line} ({hint})"


def _notes(error: Exception) -> list[str]:
    """What was added to an error on its way, each as a sentence of its own."""
    return [f"-- {note}" for note in getattr(error, "__notes__", ())]
