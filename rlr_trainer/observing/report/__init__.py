"""One self-contained HTML page about one or several training runs; see docs/report.md."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from rlr_trainer import __version__
from rlr_trainer.observing.report.page import render
from rlr_trainer.observing.report.reading import ReportError, read_run

__all__ = ["ReportError", "write_report"]

SUFFIXES = (".html", ".htm")


def write_report(folders: Sequence[str | Path], output: str | Path) -> Path:
    """Writes the report of some runs' folders.

    Args:
        folders: output folders of runs, at least one; more are compared.
        output: the file to write, ending in .html; its folder is made where it is missing, and an older report is replaced.

    Returns:
        The file.

    Raises:
        ReportError: a folder without a run, the same folder twice, or an `output` that cannot be.
    """
    output = Path(output)
    if output.suffix.lower() not in SUFFIXES:
        raise ReportError(f"output={str(output)!r}: must end in .html, so that no other file is overwritten by mistake")
    if output.is_dir():
        raise ReportError(f"output={str(output)!r}: is a folder; name a file in it")
    if not folders:
        raise ReportError("no folder given; name the output_dir of a run")
    paths = [Path(folder) for folder in folders]
    twice = [str(path) for path, count in Counter(path.resolve() for path in paths).items() if count > 1]
    if twice:
        raise ReportError(f"{twice[0]}: given twice; name every run once")
    page = render([read_run(path, name) for path, name in zip(paths, _names(paths), strict=True)], __version__)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(page, encoding="utf-8", errors="replace")  # a prompt may hold half of a surrogate pair
    return output


def _names(paths: list[Path]) -> list[str]:
    """The folders' names, with those of their parents that are not common to all."""
    resolved = [path.resolve() for path in paths]
    common = os.path.commonpath([path.parent for path in resolved])
    return [str(path.relative_to(common)) for path in resolved]
