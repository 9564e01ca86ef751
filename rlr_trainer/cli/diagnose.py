"""`rlr-trainer diagnose`."""

from __future__ import annotations

import argparse
from typing import Any


def add_parser(commands: Any, common: argparse.ArgumentParser) -> None:
    """Adds the subcommand."""
    diagnose = commands.add_parser(
        "diagnose",
        parents=[common],
        help="measure bias, noise, time and memory of gradient estimators on a run's model and reward",
        description="Measures what each estimator would do in the run that a YAML file and overrides describe (as for train), prints a "
        "table with a recommendation, and writes diagnosis.json. Nothing is trained.",
        allow_abbrev=False,
    )
    diagnose.add_argument("--config", default=None, help="YAML file of keys and values")
    diagnose.add_argument("--time_limit", type=float, default=300.0, help="seconds to measure for (default: 300)")
    diagnose.add_argument(
        "--num_batches", type=int, default=None, help="at most so many updates per plan (default: what the time allows)"
    )
    diagnose.add_argument("--output_dir", default=None, help="folder for the file (default: the run's output_dir)")
    diagnose.set_defaults(run=run, takes_overrides=True)


def run(options: argparse.Namespace) -> int:
    """Runs it; returns the exit code."""
    from pathlib import Path

    from rlr_trainer.cli.settings import build_trainer, parse_run

    output_dir = [] if options.output_dir is None else [f"--output_dir={options.output_dir}"]
    trainer = build_trainer(*parse_run(options.config, [*options.overrides, *output_dir]))
    diagnosis = trainer.diagnose(time_limit=options.time_limit, num_batches=options.num_batches)
    folder = Path(trainer.args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "diagnosis.json").write_text(diagnosis.to_json() + "\n")
    print(diagnosis.table())
    print(f"\nwritten to {folder}: diagnosis.json")
    return 0
