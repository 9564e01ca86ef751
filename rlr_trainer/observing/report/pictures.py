"""Grids of the fixed prompts' pictures over time, embedded in the page."""

from __future__ import annotations

import base64
import dataclasses
import io
import warnings
from pathlib import Path

import numpy as np

from rlr_trainer.observing.report.reading import Run
from rlr_trainer.observing.report.series import number, shorten

MOST_COLUMNS = 6  # that a phone shows side by side
MOST_ROWS = 8
LARGEST_SIDE = 224  # pixels
PIXELATED_BELOW = 97  # pixels: smaller pictures are enlarged without smoothing, and stay PNG


@dataclasses.dataclass(frozen=True)
class Picture:
    """A picture as a data URI, with its size as shown."""

    source: str
    width: int
    height: int
    pixelated: bool


@dataclasses.dataclass(frozen=True)
class Cell:
    """One picture with its reward as text; None where the file cannot be read."""

    picture: Picture | None
    step: int
    text: str


@dataclasses.dataclass(frozen=True)
class Grid:
    """The pictures of one run: the updates of the columns, rows of (prompt, cells), and notes on what was left out."""

    steps: list[int]
    rows: list[tuple[str, list[Cell | None]]]
    notes: list[str]

    @property
    def cells(self) -> list[Cell]:
        """All of them."""
        return [cell for _, cells in self.rows for cell in cells if cell is not None]

    @property
    def large(self) -> bool:
        """Pictures that are not pixelated need wider columns."""
        return any(cell.picture is not None and not cell.picture.pixelated for cell in self.cells)


def grid_of(run: Run, most_columns: int = MOST_COLUMNS, most_rows: int = MOST_ROWS) -> Grid | None:
    """The grid of a run, or None if it has no pictures.

    Args:
        most_columns: points in time, evenly spread, the first and the last among them.
        most_rows: prompts, the first ones.
    """
    taken = [pictures for pictures in run.pictures if pictures.rows]
    if not taken:
        return None
    columns = [taken[i] for i in np.unique(np.linspace(0, len(taken) - 1, min(most_columns, len(taken))).round().astype(int))]
    # Place i is row i, as long as its prompt stays the same; others get rows of their own.
    order: dict[tuple[int, str], list[tuple[int, float, Path | None] | None]] = {}
    for k, pictures in enumerate(columns):
        for place, (prompt, reward, file) in enumerate(pictures.rows):
            order.setdefault((place, prompt), [None] * len(columns))[k] = (pictures.step, reward, file)
    rows = [
        (shorten(prompt, 300), [None if entry is None else _cell(*entry) for entry in entries])
        for (_, prompt), entries in list(order.items())[:most_rows]
    ]
    grid = Grid([pictures.step for pictures in columns], rows, [])
    unreadable = sum(cell.picture is None for cell in grid.cells)
    if len(columns) < len(taken) or len(grid.rows) < len(order):
        grid.notes.append(
            f"{len(grid.rows)} of {len(order)} pictures at {len(columns)} of {len(taken)} points in time are shown, at most {LARGEST_SIDE} "
            f"pixels large; all are in {run.name}/samples."
        )
    if unreadable:
        grid.notes.append(f"{unreadable} picture files are missing, damaged, no PNG, or outside the folder.")
    return grid


def _cell(step: int, reward: float, file: Path | None) -> Cell:
    return Cell(None if file is None else encode(file), step, number(reward))


def encode(path: Path) -> Picture | None:
    """Reads a PNG file, reduced where it is large; None for one that is missing, no PNG, damaged, or absurdly large."""
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=["PNG"]) as opened:  # Pillow starts other programs for some formats
                image = opened.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError, Image.DecompressionBombWarning):
        return None
    image.thumbnail((LARGEST_SIDE, LARGEST_SIDE))
    pixelated = max(image.size) < PIXELATED_BELOW
    buffer = io.BytesIO()
    image.save(buffer, "PNG" if pixelated else "JPEG", quality=82)
    kind = "png" if pixelated else "jpeg"
    return Picture(f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}", *image.size, pixelated)
