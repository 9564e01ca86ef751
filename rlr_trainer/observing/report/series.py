"""Numbers for charts and facts: thinning, smoothing, means of a window with their errors, ranges of axes."""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np

from rlr_trainer.observing.report.reading import Floats

BUCKETS = 240  # points of a drawn line at most: about one per two pixels
SMOOTHING = 1 / 15  # width of the moving mean, as a share of the line
LEAST_FOR_ERROR = 4  # values from whose scatter a standard error is taken


@dataclasses.dataclass(frozen=True)
class Mean:
    """A mean, its standard error (None: too few values) and the number of values."""

    value: float
    error: float | None
    count: int


@dataclasses.dataclass(frozen=True)
class Line:
    """A line ready to be drawn.

    Attributes:
        raw_x, raw_y: [<= 2 * BUCKETS + 2] the values, thinned to the least and the largest of each bucket, and the ends.
        x, y: [<= BUCKETS] moving mean, see `moving_mean`.
        window: log lines in the moving mean; 1: not smoothed.
        count: values before thinning.
    """

    raw_x: Floats
    raw_y: Floats
    x: Floats
    y: Floats
    window: int
    count: int


def mean_of(values: Floats) -> Mean | None:
    """Mean and standard error of the values that are not NaN, taken as independent; None if there are none."""
    valid = values[~np.isnan(values)]
    if not len(valid):
        return None
    error = float(valid.std(ddof=1) / math.sqrt(len(valid))) if len(valid) >= LEAST_FOR_ERROR else None
    return Mean(float(valid.mean()), error, len(valid))


def window_size(count: int) -> int:
    """Log lines at either end that stand for "start" and "end": a tenth, 5 to 50, never more than half."""
    return max(1, min(max(count // 10, 5), 50, count // 2))


def ends(values: Floats) -> tuple[Mean, Mean] | None:
    """Means over the first and the last window of the values that are not NaN."""
    valid = values[~np.isnan(values)]
    if not len(valid):
        return None
    size = window_size(len(valid))
    first, last = mean_of(valid[:size]), mean_of(valid[-size:])
    assert first is not None and last is not None
    return first, last


def moving_mean(values: Floats, width: int) -> Floats:
    """Mean over `width` (odd) values around each, [N].

    Near the ends, where half of the window is missing, it is the value there of the straight line fitted to the rest of the window, within
    the rest's range (in the middle of a whole window the line's value is the mean): no lag, and no jump to the last value.
    """
    half = width // 2
    result = np.empty(len(values))
    for i in range(len(values)):
        part = values[max(0, i - half) : i + half + 1]
        place = np.arange(len(part)) - (len(part) - 1) / 2
        spread = float((place**2).sum())
        slope = float((place * part).sum()) / spread if spread else 0.0
        result[i] = min(max(part.mean() + slope * place[min(half, i)], part.min()), part.max())
    return result


def thin(x: Floats, y: Floats) -> Line:
    """Makes a line of [N] points, sorted by x; points with a NaN are left out."""
    known = ~(np.isnan(x) | np.isnan(y))
    x, y = x[known], y[known]
    count = len(x)
    if count <= BUCKETS:
        width = int(count * SMOOTHING) | 1
        return Line(x, y, x, moving_mean(y, width), width, count)
    edges = np.linspace(0, count, BUCKETS + 1).astype(int)
    parts = [slice(a, b) for a, b in itertools.pairwise(edges)]
    extremes = sorted({0, count - 1, *(p.start + int(pick(y[p])) for p in parts for pick in (np.argmin, np.argmax))})
    width = int(BUCKETS * SMOOTHING) | 1
    return Line(
        raw_x=x[extremes],
        raw_y=y[extremes],
        x=np.array([x[p].mean() for p in parts]),
        y=moving_mean(np.array([y[p].mean() for p in parts]), width),
        window=round(width * count / BUCKETS),
        count=count,
    )


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
