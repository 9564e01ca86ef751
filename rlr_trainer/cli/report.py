"""`rlr-trainer report`."""

from __future__ import annotations

import argparse
from typing import Any


def add_parser(commands: Any, common: argparse.ArgumentParser) -> None:
    """Adds the subcommand."""
    report = commands.add_parser(
        "report",
        parents=[common],
        help="write one HTML page about one or several runs",
        description="Reads the folders of runs and writes one self-contained HTML page: rewards, pictures, diagnostics, settings. "
        "With several folders the runs are compared. The page opens in any browser without a network.",
        allow_abbrev=False,
    )
    report.add_argument("folders", nargs="+", metavar="RUN_DIR", help="output_dir of a run")
    report.add_argument("--output", default="report.html", help="file to write (default: report.html)")
    report.set_defaults(run=run)


def run(options: argparse.Namespace) -> int:
    """Runs it; returns the exit code."""
    from rlr_trainer.observing.report import write_report

    path = write_report(options.folders, options.output)
    print(f"written to {path} ({path.stat().st_size / 1e6:.1f} MB)")
    return 0
