"""`rlr-trainer diagnose`."""

from __future__ import annotations

import argparse
from pathlib import Path

from rlr_trainer.cli.settings import build_trainer, parse_run


def run(options: argparse.Namespace) -> int:
    """Runs it; returns the exit code."""
    trainer = build_trainer(*parse_run(options.config, options.overrides))
    diagnosis = trainer.diagnose(time_limit=options.time_limit, num_batches=options.num_batches)
    folder = Path(trainer.args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "diagnosis.json").write_text(diagnosis.to_json() + "\n")
    print(diagnosis.table())
    print(f"\nwritten to {folder}: diagnosis.json")
    return 0
