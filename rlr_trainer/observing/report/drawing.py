"""Charts as inline SVG, drawn by matplotlib. Colours become variables of the page's style sheet, so that charts follow light, dark and print."""

from __future__ import annotations

import dataclasses
import io
import re
from typing import Any

import matplotlib as mpl
import numpy as np
from markupsafe import Markup
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator

from rlr_trainer.observing.report.series import Line, robust_range

COLOURS = 8
PALETTE = ("#0068ad", "#c44e00", "#00835f", "#a6447f", "#a87900", "#5a6b7a", "#6a4fc0", "#b3261e")
SOFT, GRID = "#5b636d", "#eceef0"
VARIABLES = {colour: f"c{number}" for number, colour in enumerate(PALETTE)} | {SOFT: "soft", GRID: "grid"}
LABEL_GAP = 14  # pixels between two labels at the ends of lines
STYLE: Any = {"svg.fonttype": "none", "font.size": 9.5, "text.parse_math": False, "axes.unicode_minus": True, "path.simplify": True}


@dataclasses.dataclass(frozen=True)
class Series:
    """A line with its label.

    Attributes:
        label: short, shown at the end of the line.
        colour: index, taken modulo `COLOURS`; the second round is dashed.
        markers: dots on the values, which are then joined without smoothing.
    """

    label: str
    colour: int
    line: Line
    markers: bool = False


def line_chart(series: list[Series], *, title: str, x_label: str, size: tuple[int, int], log: bool, identity: str) -> Markup:
    """Lines over a common x axis.

    Args:
        series: at least one, each with at least one value.
        title: for screen readers.
        size: width and height in pixels.
        log: logarithmic y axis; values that are not positive are left out.
        identity: unique on the page.
    """
    with mpl.rc_context(STYLE | {"svg.hashsalt": identity}):
        figure, axes = _axes(size, x_label)
        for s in series:
            _draw(axes, s)
        x = np.concatenate([s.line.raw_x for s in series])
        left, right = float(x.min()), float(x.max())
        if right > left:
            axes.set_xlim(0.0 if 0 < left < 0.1 * right else left, right)
        axes.xaxis.set_major_locator(MaxNLocator(max(3, size[0] // 90), integer=bool((x == np.round(x)).all())))
        if log:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(numticks=5))
            axes.minorticks_off()
        axes.set_ylim(*y_range(series, log))
        axes.yaxis.set_major_formatter(_tick)
        _label_ends(axes, series, size[1])
        return _svg(figure, title)


def y_range(series: list[Series], log: bool) -> tuple[float, float]:
    """What the y axis shows."""
    values = np.concatenate([s.line.raw_y for s in series])
    low, high = robust_range(np.log10(values[values > 0]) if log else values)
    span = high - low
    room = 0.05 * span if span > 1e-9 * max(abs(low), abs(high)) else 0.1 * abs(low) or 0.5
    return (10 ** (low - room), 10 ** (high + room)) if log else (low - room, high + room)


def _axes(size: tuple[int, int], x_label: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(size[0] / 72, size[1] / 72), layout="constrained")
    axes = figure.add_subplot()
    axes.spines[["left", "top", "right"]].set_visible(False)
    axes.spines["bottom"].set_color(SOFT)
    axes.grid(axis="y", color=GRID)
    axes.set_axisbelow(True)
    axes.tick_params(labelcolor=SOFT, color=SOFT)
    axes.tick_params(axis="y", length=0)
    axes.set_xlabel(x_label, color=SOFT)
    axes.xaxis.set_major_formatter(_tick)
    axes.yaxis.set_major_locator(MaxNLocator(max(3, size[1] // 60)))
    return figure, axes


def _tick(value: float, position: float) -> str:
    return f"{value:,.6g}".replace("-", "\N{MINUS SIGN}")


def _draw(axes: Axes, series: Series) -> None:
    """Faint raw line with the smoothed one over it; or dots."""
    line, colour = series.line, PALETTE[series.colour % COLOURS]
    style = "--" if series.colour >= COLOURS else "-"
    dots = series.markers or len(line.raw_x) == 1
    if dots or line.window > 1:
        axes.plot(line.raw_x, line.raw_y, style, color=colour, alpha=0.4, linewidth=1)
    if dots:
        axes.plot(line.raw_x, line.raw_y, "o", color=colour, markersize=5, clip_on=False)
    else:
        axes.plot(line.x, line.y, style, color=colour, linewidth=2.2)


def _label_ends(axes: Axes, series: list[Series], height: int) -> None:
    """Labels right of the lines' ends, moved upwards where they would touch."""
    to_share = axes.transScale + axes.transLimits
    bottom, top = axes.get_ylim()
    shares = [float(to_share.transform((0.0, min(max(float(s.line.y[-1]), bottom), top)))[1]) for s in series]
    lowest = 0.0
    for share, s in sorted(zip(shares, series, strict=True), key=lambda place: place[0]):
        place = (float(s.line.x[-1]), max(share, lowest))
        lowest = place[1] + LABEL_GAP / (height - 50)
        options: Any = {"xycoords": axes.get_xaxis_transform(), "textcoords": "offset points", "annotation_clip": False}
        axes.annotate(s.label, place, (6, 0), color=PALETTE[s.colour % COLOURS], va="center", **options)


def _svg(figure: Figure, title: str) -> Markup:
    """The figure as an element of the page: no style attributes, which the page's policy forbids, and no colours of its own."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    box = re.search(r'viewBox="[^"]*"', text)
    assert box is not None, "matplotlib writes a viewBox"
    text = text[text.index("<defs>") : text.rindex("</svg>")]
    text = re.sub(r"<style.*?</style>|<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r' id="[a-zA-Z]\w*_\d+"', "", text)  # of groups, which nothing refers to
    text = re.sub(r' style="([^"]*)"', _attributes, text)
    text = re.sub(r"<[^>]+>", lambda tag: re.sub(r"(\d\.\d)\d+", r"\1", tag[0]), text)  # a tenth of a pixel is enough
    for colour, name in VARIABLES.items():
        text = text.replace(colour, f"var(--{name})")
    return Markup('<svg class="chart" {} role="img" aria-label="{}">{}</svg>').format(Markup(box[0]), title, Markup(text))


def _attributes(match: re.Match[str]) -> str:
    """A style attribute as attributes of their own; the style sheet sets the font."""
    pairs = [part.split(":", 1) for part in match[1].split(";") if part.strip()]
    return "".join(f' {name.strip()}="{value.strip()}"' for name, value in pairs if not name.strip().startswith("font"))
