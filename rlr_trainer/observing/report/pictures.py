"""Grids of the fixed prompts' pictures over time, embedded in the page."""

from __future__ import annotations

import base64
import dataclasses
import io
import warnings
from pathlib import Path

import numpy as np

from rlr_trainer.observing.report.reading import Pictures, Run
from rlr_trainer.observing.report.wording import number, shorten

MOST_BYTES = 4_000_000  # of all pictures of a report, before base64
MOST_COLUMNS = 6  # that a phone shows side by side
MOST_ROWS = 8
LARGEST_SIDE = 224  # pixels
PIXELATED_BELOW = 97  # pixels: smaller pictures are enlarged without smoothing, and stay PNG
LONGEST_PROMPT = 300
NEGLIGIBLE = 1e-4  # of the largest reward of the grid: shown as about 0


class UnreadablePicture(ValueError):
    """The file is not there or is no picture."""


@dataclasses.dataclass(frozen=True)
class Cell:
    """One picture with its reward as text; `source` is a data URI, or None where the file cannot be read."""

    source: str | None
    step: int
    text: str
    pixelated: bool = False
    reduced: bool = False
    width: int = 1
    height: int = 1


@dataclasses.dataclass(frozen=True)
class Row:
    """One prompt over time; `prompt` is empty where it is that of the row above."""

    prompt: str
    cells: list[Cell | None]


@dataclasses.dataclass(frozen=True)
class Grid:
    """The pictures of one run.

    Attributes:
        steps: updates of the columns.
        notes: what was left out.
    """

    steps: list[int]
    rows: list[Row]
    notes: list[str]

    @property
    def large(self) -> bool:
        """Pictures that are not pixelated need wider columns."""
        return any(cell is not None and not cell.pixelated and cell.source for row in self.rows for cell in row.cells)


def grid_of(run: Run, most_bytes: int = MOST_BYTES, most_columns: int = MOST_COLUMNS, most_rows: int = MOST_ROWS) -> Grid | None:
    """The grid of a run, or None if it has no pictures.

    Args:
        most_bytes: of the encoded pictures; rows that would exceed it are left out.
        most_columns: points in time, evenly spread, the first and the last among them.
        most_rows: prompts, the first ones.
    """
    taken = [pictures for pictures in run.pictures if pictures.files]
    if not taken:
        return None
    columns = spread(taken, most_columns)
    largest = max((abs(reward) for pictures in columns for reward in pictures.rewards if reward is not None), default=0.0)
    order = _rows_of(columns)
    rows: list[Row] = []
    used, last_prompt = 0, None
    for prompt, places in order[:most_rows]:
        cells = [None if i is None else _cell(pictures, i, largest) for pictures, i in zip(columns, places, strict=True)]
        used += sum(len(cell.source or "") * 3 // 4 for cell in cells if cell is not None)
        if rows and used > most_bytes:
            break
        rows.append(Row("" if prompt == last_prompt else shorten(prompt, LONGEST_PROMPT), cells))
        last_prompt = prompt
    shown = [cell for row in rows for cell in row.cells if cell is not None]
    unreadable = sum(cell.source is None for cell in shown)
    notes = [
        (f"{len(columns)} of {len(taken)} points in time are shown.", len(columns) < len(taken)),
        (f"{len(rows)} of {len(order)} pictures are shown at each; all are in {run.name}/samples.", len(rows) < len(order)),
        (f"Pictures are reduced to {LARGEST_SIDE} pixels.", any(cell.reduced for cell in shown)),
        (f"{unreadable} picture files are missing, damaged, or no PNG.", unreadable > 0),
    ]
    return Grid([pictures.step for pictures in columns], rows, [note for note, applies in notes if applies])


def _cell(pictures: Pictures, place: int, largest: float) -> Cell:
    reward = pictures.rewards[place]
    text = "\N{ALMOST EQUAL TO} 0" if reward is not None and 0 < abs(reward) < NEGLIGIBLE * largest else number(reward)
    try:
        return encode(pictures.files[place], pictures.step, text)
    except UnreadablePicture:
        return Cell(None, pictures.step, text)


def spread(items: list[Pictures], most: int) -> list[Pictures]:
    """At most `most` (2 or more) of them, evenly spread, the first and the last among them."""
    return [items[i] for i in np.unique(np.linspace(0, len(items) - 1, min(most, len(items))).round().astype(int))]


def encode(path: Path, step: int, text: str) -> Cell:
    """Reads a PNG file and embeds it, reduced where it is large.

    Raises:
        UnreadablePicture: missing, no plain file, no PNG, damaged, or absurdly large.
    """
    from PIL import Image

    try:
        if not path.is_file():  # a pipe would be waited for
            raise OSError("no such file, or no plain one")
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=["PNG"]) as opened:  # Pillow starts other programs for some formats
                image = opened.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise UnreadablePicture(f"{path}: {error}") from error
    reduced = max(image.size) > LARGEST_SIDE
    if reduced:
        image.thumbnail((LARGEST_SIDE, LARGEST_SIDE))
    pixelated = max(image.size) < PIXELATED_BELOW
    buffer = io.BytesIO()
    image.save(buffer, "PNG" if pixelated else "JPEG", **({"optimize": True} if pixelated else {"quality": 82}))
    kind = "png" if pixelated else "jpeg"
    source = f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
    return Cell(source, step, text, pixelated, reduced, *image.size)


def _rows_of(columns: list[Pictures]) -> list[tuple[str, list[int | None]]]:
    """(prompt, its place in each column). Place i is row i, as long as its prompt stays the same; others get rows of their own."""
    order: dict[tuple[int, str], list[int | None]] = {}
    for k, pictures in enumerate(columns):
        for place, prompt in enumerate(pictures.prompts):
            order.setdefault((place, prompt), [None] * len(columns))[k] = place
    return [(prompt, places) for (_, prompt), places in order.items()]
