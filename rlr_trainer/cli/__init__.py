"""The `rlr-trainer` command: one module a subcommand, each with `add_parser(commands, common)`. See docs/command_line.md."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence

from rlr_trainer import __version__
from rlr_trainer.cli import demo, diagnose, report, sample, serve_reward, train

SUBCOMMANDS = (train, demo, sample, diagnose, serve_reward, report)
EXIT_FAILED = 1
EXIT_USAGE = 2  # argparse's, too
EXIT_INTERRUPTED = 130  # 128 + SIGINT
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
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    try:
        code = options.run(options)
        sys.stdout.flush()
        return code
    except KeyboardInterrupt as error:
        print(f"interrupted {error}".rstrip(), file=sys.stderr)
        return EXIT_INTERRUPTED
    except Exception as error:  # everything becomes one line; --debug shows the rest
        if isinstance(error, BrokenPipeError):
            discard_output()
        if options.debug:
            raise
        print(f"rlr-trainer {options.command}: {_in_one_line(error)}", file=sys.stderr)
        return EXIT_USAGE if _is_usage_error(error) else EXIT_FAILED


def build_parser() -> argparse.ArgumentParser:
    """The parser of all subcommands."""
    parser = argparse.ArgumentParser(
        prog="rlr-trainer",
        description="Fine-tune diffusion models on a reward.",
        epilog="Exit codes: 0 done, 1 failed, 2 wrong arguments, 130 interrupted, 143 ended by SIGTERM after a checkpoint.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"rlr-trainer {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")
    for module in SUBCOMMANDS:
        module.add_parser(commands, common)
    return parser


def discard_output() -> None:
    """Sends standard output nowhere once its reader has gone, or the interpreter, which flushes it at its end, would fail there."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _in_one_line(error: Exception) -> str:
    if isinstance(error, BrokenPipeError):
        return f"ended, because what reads its output has ended, as `| head` does ({error})"
    if isinstance(error, EXPECTED_ERRORS) and str(error):
        return " ".join(str(error).split())
    first_line = next(iter(str(error).splitlines()), "")
    hint = "--debug shows the traceback"
    if type(error).__name__ == "OutOfMemoryError":
        hint = "lower per_device_train_batch_size and sample_batch_size, and raise gradient_accumulation_steps instead; " + hint
    return f"{type(error).__name__}{': ' if first_line else ''}{first_line} ({hint})"


def _is_usage_error(error: Exception) -> bool:
    settings = sys.modules.get("rlr_trainer.cli.settings")  # not loaded by every subcommand
    return settings is not None and isinstance(error, settings.SettingsError)
