"""The `rlr-trainer` command: one module a subcommand, each with `add_parser(commands, common)`."""

from __future__ import annotations

import argparse
import logging
import sys
from collections.abc import Sequence

from rlr_trainer.cli import demo, diagnose, train

SUBCOMMANDS = (train, demo, diagnose)
EXIT_USAGE = 2
EXIT_FAILED = 1


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command; returns the exit code: 0, 1 (the run failed) or 2 (wrong arguments)."""
    parser = build_parser()
    options, rest = parser.parse_known_args(arguments)
    if rest and not getattr(options, "takes_overrides", False):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    options.overrides = rest
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s")
    try:
        return options.run(options)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except (ValueError, TypeError, OSError, FloatingPointError) as error:
        if options.debug:
            raise
        print(f"rlr-trainer {options.command}: {error}", file=sys.stderr)
        return EXIT_FAILED


def build_parser() -> argparse.ArgumentParser:
    """The parser of all subcommands."""
    parser = argparse.ArgumentParser(prog="rlr-trainer", description="Fine-tune diffusion models on a reward.")
    commands = parser.add_subparsers(dest="command", required=True)
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--debug", action="store_true", help="show the traceback of an error")
    for module in SUBCOMMANDS:
        module.add_parser(commands, common)
    return parser
