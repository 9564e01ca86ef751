"""Charts as inline SVG. Colours are classes (`c0` ... `c7`) of the page's style sheet, so that charts follow light, dark and print."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
from markupsafe import Markup

from rlr_trainer.observing.report.reading import Floats
from rlr_trainer.observing.report.series import Line, log_ticks, robust_range, ticks
from rlr_trainer.observing.report.wording import number, tick

COLOURS = 8
LABEL_GAP = 14  # pixels between two labels at the ends of lines
LABEL_REACH = 30  # labels whose lines end within so many pixels of each other share a column
CHARACTER = 7.2  # width of a label's character in pixels, about


@dataclasses.dataclass(frozen=True)
class Series:
    """A line with its label.

    Attributes:
        label: short, shown at the end of the line.
        colour: index, taken modulo `COLOURS`; the second round is dashed.
        markers: dots on the values, which are then joined without smoothing.
        joined: whether dots are joined.
    """

    label: str
    colour: int
    line: Line
    markers: bool = False
    joined: bool = True


@dataclasses.dataclass(frozen=True)
class Drawing:
    """An SVG, and how many values lie outside its axes."""

    svg: Markup
    outside: int


@dataclasses.dataclass(frozen=True)
class _Frame:
    """The plot area in pixels and the ranges (of logarithms, if `log`) that it shows."""

    left: float
    right: float
    top: float
    bottom: float
    x_range: tuple[float, float]
    y_range: tuple[float, float]
    log: bool

    def x(self, values: Floats) -> Floats:
        low, high = self.x_range
        return self.left + (values - low) / (high - low) * (self.right - self.left)

    def y(self, values: Floats) -> Floats:
        low, high = self.y_range
        scaled = np.log10(np.maximum(values, 1e-300)) if self.log else values
        # far outside is as good as infinitely far, and SVG readers dislike huge numbers
        return np.clip(self.bottom - (scaled - low) / (high - low) * (self.bottom - self.top), -2000, 4000)


def line_chart(
    series: list[Series], *, title: str, x_label: str, size: tuple[int, int] = (440, 250), log: bool = False, identity: str = ""
) -> Drawing:
    """Lines over a common x axis.

    Args:
        series: at least one, each with at least one value.
        title: for screen readers.
        size: width and height of the view box in pixels.
        log: logarithmic y axis; values that are not positive are left out (and counted as outside).
        identity: unique on the page, names the clip path.
    """
    width, height = size
    values = np.concatenate([s.line.raw_y for s in series])
    shown = values[values > 0] if log else values
    y_range = _padded(robust_range(np.log10(shown) if log else shown))
    x = np.concatenate([s.line.raw_x for s in series])
    marks = _y_ticks(y_range, log, height)
    gutter = max(len(text) for _, text in marks) * CHARACTER + 12
    labels = max(len(s.label) for s in series) * CHARACTER + 10 if any(s.label for s in series) else 12
    left, right = float(x.min()), float(x.max())
    left = 0.0 if 0 < left < 0.1 * right else left
    x_range = _padded((left, right), 0.0)
    frame = _Frame(gutter, width - labels, 10, height - 40, x_range, y_range, log)
    bottom, top = (10.0**r if log else r for r in y_range)
    outside = sum(int(((s.line.raw_y < bottom) | (s.line.raw_y > top)).sum()) for s in series)
    parts = [_axes(frame, marks, x_label, width, height, whole=bool((x == np.round(x)).all()))]
    parts.append(
        Markup('<clipPath id="{}"><rect x="{}" y="{}" width="{}" height="{}"/></clipPath>').format(
            identity,
            _px(frame.left - 3),
            _px(frame.top - 3),
            _px(frame.right - frame.left + 6),
            _px(frame.bottom - frame.top + 6),
        )
    )
    parts.append(Markup('<g clip-path="url(#{})">{}</g>').format(identity, Markup("").join(_lines(s, frame) for s in series)))
    parts.append(_end_labels(series, frame))
    y_kind = "log" if log else "linear"
    svg = Markup(
        '<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}" data-box="{}" data-x="{}" data-y="{}" data-kind="{}">{}</svg>'
    ).format(
        width,
        height,
        title,
        " ".join(_px(v) for v in (frame.left, frame.right, frame.top, frame.bottom)),
        " ".join(f"{v:.9g}" for v in frame.x_range),
        " ".join(f"{v:.9g}" for v in frame.y_range),
        y_kind,
        Markup("").join(parts),
    )
    return Drawing(svg, outside)


def histogram(before: Floats, after: Floats, *, value_range: tuple[float, float], title: str, x_label: str, colour: int) -> Drawing:
    """Two distributions as shares of their samples: `before` as an outline in grey, `after` filled, their means as ticks."""
    width, height = 440, 230
    low, high = _padded(value_range, 0.0)
    bins = _bin_count(np.concatenate([before, after]), low, high)
    edges = np.linspace(low, high, bins + 1)
    shares = [np.histogram(v, edges)[0] / max(1, len(v)) * 100 for v in (before, after)]
    top = max(float(s.max()) for s in shares) or 1.0
    marks = [(t, tick(t, 1) + " %") for t in ticks(0, top, 4)]
    gutter = max(len(text) for _, text in marks) * CHARACTER + 12
    frame = _Frame(gutter, width - 14, 16, height - 40, (low, high), (0.0, top * 1.02), False)
    parts = [_axes(frame, marks, x_label, width, height)]
    for share, values, name in ((shares[1], after, f"after c{colour % COLOURS}"), (shares[0], before, "before")):
        if not len(values):
            continue
        x, y = frame.x(edges), frame.y(share)
        steps = "".join(f"L{_px(a)} {_px(v)}L{_px(b)} {_px(v)}" for a, b, v in zip(x[:-1], x[1:], y, strict=True))
        path = f"M{_px(x[0])} {_px(frame.bottom)}{steps}L{_px(x[-1])} {_px(frame.bottom)}"
        parts.append(Markup('<path class="bars {}" d="{}"/>').format(name, path))
        mean = float(frame.x(np.array([values.mean()]))[0])
        parts.append(Markup('<path class="mean {}" d="M{} {}l-5 -9h10z"/>').format(name, _px(mean), _px(frame.top)))
    svg = Markup('<svg class="chart" viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>')
    return Drawing(svg.format(width, height, title, Markup("").join(parts)), 0)


def _px(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


def _padded(value_range: tuple[float, float], share: float = 0.05) -> tuple[float, float]:
    low, high = value_range
    span = high - low
    if span <= 1e-9 * max(abs(low), abs(high)):
        reach = 0.1 * abs(low) or 0.5
        return low - reach, high + reach
    return low - share * span, high + share * span


def _bin_count(values: Floats, low: float, high: float) -> int:
    """Freedman and Diaconis' rule, within 12 and 32."""
    quartiles = np.quantile(values, (0.25, 0.75))
    width = 2 * float(quartiles[1] - quartiles[0]) / len(values) ** (1 / 3)
    return 20 if width <= 0 else max(12, min(32, math.ceil((high - low) / width)))


def _y_ticks(y_range: tuple[float, float], log: bool, height: int) -> list[tuple[float, str]]:
    """(position, text) of the marks; position in the units of the values."""
    count = max(3, height // 55)
    if log and y_range[1] - y_range[0] >= 2:
        return [(10.0**e, _power(e)) for e in log_ticks(*y_range, count)]
    if log:
        low, high = (10.0**r for r in y_range)
        return [(t, number(t, 2)) for t in ticks(low, high, count) if t > 0] or [(low, number(low, 2))]
    values = ticks(*y_range, count)
    step = values[1] - values[0] if len(values) > 1 else abs(values[0]) or 1.0
    return [(t, tick(t, step)) for t in values]


def _power(exponent: float) -> str:
    return number(10.0**exponent, 1) if -3 <= exponent <= 4 else f"1e{exponent:.0f}"


def _axes(frame: _Frame, marks: list[tuple[float, str]], x_label: str, width: int, height: int, whole: bool = False) -> Markup:
    """Axes with their marks; `whole`: the x axis counts something, so that marks between whole numbers mean nothing."""
    parts = []
    for value, text in marks:
        y = _px(float(frame.y(np.array([value]))[0]))
        parts.append(Markup('<path class="grid" d="M{} {}H{}"/>').format(_px(frame.left), y, _px(frame.right)))
        parts.append(
            Markup('<text class="tick" x="{}" y="{}" dy=".32em" text-anchor="end">{}</text>').format(_px(frame.left - 6), y, text)
        )
    values = [value for value in ticks(*frame.x_range, max(3, width // 110)) if not whole or value == round(value)]
    step = values[1] - values[0] if len(values) > 1 else 1.0
    for value in values:
        x = _px(float(frame.x(np.array([value]))[0]))
        parts.append(Markup('<path class="axis" d="M{} {}v4"/>').format(x, _px(frame.bottom)))
        label = Markup('<text class="tick" x="{}" y="{}" text-anchor="middle">{}</text>')
        parts.append(label.format(x, _px(frame.bottom + 18), tick(value, step)))
    parts.append(Markup('<path class="axis" d="M{} {}H{}"/>').format(_px(frame.left), _px(frame.bottom), _px(frame.right)))
    middle = _px((frame.left + frame.right) / 2)
    parts.append(Markup('<text class="label" x="{}" y="{}" text-anchor="middle">{}</text>').format(middle, height - 5, x_label))
    return Markup("").join(parts)


def _lines(series: Series, frame: _Frame) -> Markup:
    """Faint raw line with the smoothed one over it; or dots."""
    classes = f"c{series.colour % COLOURS}" + (" dashed" if series.colour >= COLOURS else "")
    line, parts = series.line, []
    if series.markers or line.count == 1:
        x, y = _visible(line.raw_x, line.raw_y, frame)
        if series.joined:
            parts.append(Markup('<polyline class="raw {}" points="{}"/>').format(classes, _points(x, y)))
        dots = "".join(f"M{_px(a)} {_px(b)}h0" for a, b in zip(x, y, strict=True))
        parts.append(Markup('<path class="dots {}" data-label="{}" d="{}"/>').format(classes, series.label, dots))
        return Markup("").join(parts)
    if line.window > 1:
        parts.append(
            Markup('<polyline class="raw {}" points="{}"/>').format(classes, _points(*_visible(line.raw_x, line.raw_y, frame)))
        )
    points = _points(*_visible(line.x, line.y, frame))
    parts.append(Markup('<polyline class="line {}" data-label="{}" points="{}"/>').format(classes, series.label, points))
    return Markup("").join(parts)


def _visible(x: Floats, y: Floats, frame: _Frame) -> tuple[Floats, Floats]:
    """Pixels of the points that the axis can show."""
    keep = y > 0 if frame.log else np.ones(len(y), dtype=bool)
    return frame.x(x[keep]), frame.y(y[keep])


def _points(x: Floats, y: Floats) -> str:
    return " ".join(f"{_px(a)},{_px(b)}" for a, b in zip(x, y, strict=True))


def _end_labels(series: list[Series], frame: _Frame) -> Markup:
    """Labels right of the lines' ends, moved apart where they would touch."""
    wanted: list[tuple[float, float, Series]] = []
    for s in series:
        x, y = _visible(s.line.x, s.line.y, frame)
        if s.label and len(y):
            wanted.append((float(x[-1]), min(max(float(y[-1]), frame.top), frame.bottom), s))
    parts = []
    label = Markup('<text class="name c{}" x="{}" y="{}" dy=".32em">{}</text>')
    while wanted:
        right = max(x for x, _, _ in wanted)
        column = [item for item in wanted if item[0] > right - LABEL_REACH]
        wanted = [item for item in wanted if item[0] <= right - LABEL_REACH]
        column.sort(key=lambda item: item[1])
        places = _apart([y for _, y, _ in column], frame.bottom + 4)
        parts += [
            label.format(s.colour % COLOURS, _px(x + 6), _px(y), s.label) for y, (x, _, s) in zip(places, column, strict=True)
        ]
    return Markup("").join(parts)


def _apart(places: list[float], lowest: float) -> list[float]:
    """Sorted positions moved so that neighbours are `LABEL_GAP` apart and none lies below `lowest`."""
    places = list(places)
    for i in range(1, len(places)):
        places[i] = max(places[i], places[i - 1] + LABEL_GAP)
    for i in range(len(places) - 1, -1, -1):
        places[i] = min(places[i], lowest)
        lowest = places[i] - LABEL_GAP
    return places
