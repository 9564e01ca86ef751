"""Grids of the fixed prompts' pictures over time, embedded in the page."""

from __future__ import annotations

import base64
import dataclasses
import io
import warnings
from pathlib import Path
from typing import Any

import numpy as np

from rlr_trainer.observing.report.reading import Run
from rlr_trainer.observing.report.series import number, shorten

MOST_COLUMNS = 6  # that a phone shows side by side
MOST_ROWS = 8
LARGEST_SIDE = 224  # pixels
PIXELATED_BELOW = 97  # pixels: smaller pictures are enlarged without smoothing, and lose nothing
LARGEST_SIDE_OF_CLIPS = 160  # pixels
MOST_FRAMES = 16  # of a clip in the page
MOST_READ = (1024, 2**28)  # frames, and pixels of all frames together, of a GIF that is read
SHORTEST, LONGEST = 20, 10_000  # milliseconds of a frame, whatever the file says


@dataclasses.dataclass(frozen=True)
class Picture:
    """A picture as a data URI, with its size as shown.

    Attributes:
        still: of a clip, its first frame, for print and for readers who want nothing to move; None of a picture.
    """

    source: str
    width: int
    height: int
    pixelated: bool
    still: str | None = None


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
        grid.notes.append(f"{unreadable} picture files are missing, damaged, neither PNG nor GIF, or outside the folder.")
    return grid


def _cell(step: int, reward: float, file: Path | None) -> Cell:
    return Cell(None if file is None else encode(file), step, number(reward))


def encode(path: Path) -> Picture | None:
    """Reads a PNG or GIF file, reduced where it is large; None for one that is missing, of another kind, damaged, or absurdly large.

    Only what is made of the pixels goes into the page, never the file's own bytes.
    """
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=["PNG", "GIF"]) as opened:  # Pillow starts other programs for some formats
                frames, milliseconds = _clip(opened) if opened.format == "GIF" else ([opened.convert("RGB")], 0)
    except Exception:  # Pillow has half a dozen types for damaged files, IndexError and SyntaxError among them
        return None
    largest = LARGEST_SIDE if len(frames) == 1 else LARGEST_SIDE_OF_CLIPS
    for frame in frames:
        frame.thumbnail((largest, largest))
    width, height = frames[0].size
    pixelated = max(width, height) < PIXELATED_BELOW
    still = _data_uri(frames[0], "PNG" if pixelated else "JPEG", quality=82)
    if len(frames) == 1:
        return Picture(still, width, height, pixelated)
    moving = {"save_all": True, "append_images": frames[1:], "duration": milliseconds, "loop": 0}
    source = _data_uri(frames[0], "WEBP", lossless=pixelated, quality=70, **moving)
    return Picture(source, width, height, pixelated, still)


def _clip(opened: Any) -> tuple[list[Any], int]:
    """At most `MOST_FRAMES` frames of a GIF, evenly spaced in time, and the milliseconds of each; ValueError for more than `MOST_READ`."""
    frames: list[Any] = []
    lasting: list[int] = []
    pixels = 0
    while True:
        pixels += opened.width * opened.height
        if len(frames) == MOST_READ[0] or pixels > MOST_READ[1]:
            raise ValueError(f"more than {MOST_READ[0]} frames, or {MOST_READ[1]} pixels")
        frame = opened.convert("RGB")
        frame.thumbnail((LARGEST_SIDE, LARGEST_SIDE))  # the whole clip in full size may not fit into memory
        frames.append(frame)
        lasting.append(min(max(int(opened.info.get("duration", 0)), SHORTEST), LONGEST))
        try:
            opened.seek(len(frames))
        except EOFError:
            break
    ends = np.cumsum(lasting)
    count = min(MOST_FRAMES, max(1, round(ends[-1] / min(lasting))))
    times = (np.arange(count) + 0.5) * ends[-1] / count
    return [frames[i] for i in np.searchsorted(ends, times, side="right")], round(ends[-1] / count)


def _data_uri(image: Any, kind: str, **options: Any) -> str:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"
