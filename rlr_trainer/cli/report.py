"""`rlr-trainer report`."""

from __future__ import annotations

import argparse

from rlr_trainer.observing.report import write_report


def report(options: argparse.Namespace) -> None:
    """Writes the page about runs."""
    path = write_report(options.folders, options.output)
    print(f"written to {path} ({path.stat().st_size / 1e6:.1f} MB)")
