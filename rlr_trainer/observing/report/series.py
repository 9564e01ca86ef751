"""Numbers for charts and facts: thinning, smoothing, means of a window with their errors, ranges of axes; and numbers as text."""

from __future__ import annotations

import dataclasses
import datetime
import itertools
import json
import math
import string
from typing import Any

import numpy as np

from rlr_trainer.observing.report.reading import Floats

BUCKETS = 240  # points of a drawn line at most: about one per two pixels
SMOOTHING = 1 / 15  # width of the moving mean, as a share of the line
LEAST_FOR_ERROR = 4  # values from whose scatter a standard error is taken
LOG_RATIO = 50  # values that span more than this may get a logarithmic axis
UNKNOWN = "\N{EN DASH}"


@dataclasses.dataclass(frozen=True)
class Mean:
    """A mean and its standard error; NaN: there are too few values."""

    value: float
    error: float

    def __sub__(self, other: Mean) -> Mean:
        return Mean(self.value - other.value, math.hypot(self.error, other.error))

    def __str__(self) -> str:
        """`0.123 ± 0.004`: as many decimals as two digits of the error have."""
        if not 1e-6 < self.error < 1e6:
            return number(self.value)
        decimals = max(0, 1 - math.floor(math.log10(self.error)))
        return f"{self.value:,.{decimals}f} ± {self.error:,.{decimals}f}"


@dataclasses.dataclass(frozen=True)
class Line:
    """A line ready to be drawn.

    Attributes:
        raw_x, raw_y: [<= 2 * BUCKETS + 2] the values, thinned to the least and the largest of each bucket, and the ends.
        x, y: [<= BUCKETS] moving mean.
        window: log lines in the moving mean; 1: not smoothed.
    """

    raw_x: Floats
    raw_y: Floats
    x: Floats
    y: Floats
    window: int


def mean_of(values: Floats) -> Mean:
    """Mean and standard error of the values that are not NaN, taken as independent."""
    valid = values[~np.isnan(values)]
    error = float(valid.std(ddof=1) / math.sqrt(len(valid))) if len(valid) >= LEAST_FOR_ERROR else math.nan
    return Mean(float(valid.mean()) if len(valid) else math.nan, error)


def window_size(count: int) -> int:
    """Log lines at either end that stand for "start" and "end": a tenth, 5 to 50, never more than half."""
    return max(1, min(max(count // 10, 5), 50, count // 2))


def ends(values: Floats) -> tuple[Mean, Mean]:
    """Means over the first and the last window of the values that are not NaN."""
    valid = values[~np.isnan(values)]
    size = window_size(len(valid))
    return mean_of(valid[:size]), mean_of(valid[-size:])


def moving_mean(values: Floats, width: int) -> Floats:
    """Mean over `width` (odd) values around each, [N]; over those that there are near the ends."""
    if not len(values):
        return values
    sums, counts = (np.convolve(part, np.ones(width)) for part in (values, np.ones(len(values))))
    return (sums / counts)[width // 2 : width // 2 + len(values)]


def thin(x: Floats, y: Floats) -> Line:
    """Makes a line of [N] points, sorted by x; points with a NaN are left out."""
    known = ~(np.isnan(x) | np.isnan(y))
    x, y = x[known], y[known]
    count = len(x)
    if count <= BUCKETS:
        width = int(count * SMOOTHING) | 1
        return Line(x, y, x, moving_mean(y, width), width)
    parts = [slice(a, b) for a, b in itertools.pairwise(np.linspace(0, count, BUCKETS + 1).astype(int))]
    extremes = sorted({0, count - 1, *(p.start + int(pick(y[p])) for p in parts for pick in (np.argmin, np.argmax))})
    width = int(BUCKETS * SMOOTHING) | 1
    means = [np.array([values[p].mean() for p in parts]) for values in (x, y)]
    return Line(x[extremes], y[extremes], means[0], moving_mean(means[1], width), round(width * count / BUCKETS))


def robust_range(values: Floats) -> tuple[float, float]:
    """Range of an axis: that of the values, unless a few of them dwarf the others; then that of the others."""
    low, high = float(values.min()), float(values.max())
    if len(values) < 20:
        return low, high
    inner_low, inner_high = (float(v) for v in np.quantile(values, (0.02, 0.98)))
    room = 3 * (inner_high - inner_low)
    if room > 0:
        low = low if low >= inner_low - room else inner_low - room / 6
        high = high if high <= inner_high + room else inner_high + room / 6
    return low, high


def spans_decades(values: Floats) -> bool:
    """Whether values suit a logarithmic axis: nearly all positive, over more than `LOG_RATIO`."""
    positive = values[values > 0]
    if not len(positive) or len(positive) < 0.9 * len(values):
        return False
    low, high = np.quantile(positive, (0.02, 0.98))
    return bool(high > LOG_RATIO * low)


def number(value: float, digits: int = 3) -> str:
    """`digits` significant digits, from there on a whole number with its thousands separated; a dash for NaN."""
    if not math.isfinite(value):
        return UNKNOWN
    return f"{value:,.0f}" if 10**digits <= abs(value) < 1e9 else f"{value:.{digits}g}"


def count(value: float) -> str:
    """A whole number, thousands separated."""
    return f"{value:,.0f}" if math.isfinite(value) else UNKNOWN


def duration(seconds: float) -> str:
    """`0:03:20`, `2 days, 3:00:00`."""
    return str(datetime.timedelta(seconds=round(seconds))) if math.isfinite(seconds) else UNKNOWN


def value_text(value: Any) -> str:
    """An option's value as a reader writes it."""
    if isinstance(value, float):
        return f"{value:.12g}"
    text = value if isinstance(value, str) else "none" if value is None else json.dumps(value, ensure_ascii=False, default=str)
    return shorten(text, 400)


def shorten(text: str, length: int) -> str:
    """At most `length` characters."""
    return text if len(text) <= length else text[: length - 1].rstrip() + "\N{HORIZONTAL ELLIPSIS}"


def letters(index: int) -> str:
    """A, B, ..., Z, A1, B1, ...: short names of runs."""
    return f"{string.ascii_uppercase[index % 26]}{index // 26 or ''}"
