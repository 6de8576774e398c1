"""The pictures of figures.py as SVG inside a page. Colours are classes, so that the page's style sets them."""

from __future__ import annotations

import base64
import html
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from sparsessm.report.figures import Axis, HeatMap, LineChart, MaskMap
from sparsessm.report.palette import DASHES, HEAT, MARKERS, Style
from sparsessm.report.png import share_png
from sparsessm.report.wording import clipped, number_text, percent_text, plural

WIDTH = 560
_PLOT_HEIGHT = 236
_LETTER = 7.5  # mean width of a letter of the labels, in pixels
_MARGIN_LEFT, _MARGIN_TOP, _MARGIN_BOTTOM = 66, 14, 44
_LABEL_STEP = 16  # between the baselines of two labels
_LONGEST, _LONGEST_ROW = 64, 24  # letters of a name of a line, of a row
_STRIPS = 12  # of a mask map that stand in one column
_CELLS = 400  # of a map of shares; one with more is an image without numbers, as a cell takes some 250 bytes

# Outlines of the markers around (0,0).
_SHAPES = {
    "circle": "M4.2 0A4.2 4.2 0 1 1-4.2 0A4.2 4.2 0 1 1 4.2 0Z",
    "square": "M-3.8-3.8H3.8V3.8H-3.8Z",
    "diamond": "M0-5.2L5.2 0L0 5.2L-5.2 0Z",
    "triangle": "M0-4.9L4.7 3.6H-4.7Z",
    "point-down": "M0 4.9L4.7-3.6H-4.7Z",
    "pentagon": "M0-4.8L4.6-1.5L2.8 3.9H-2.8L-4.6-1.5Z",
    "cross": "M-4.4-2.2L-2.2-4.4L0-2.2L2.2-4.4L4.4-2.2L2.2 0L4.4 2.2L2.2 4.4L0 2.2L-2.2 4.4L-4.4 2.2L-2.2 0Z",
    "hexagon": "M-4.6 0L-2.3-4H2.3L4.6 0L2.3 4H-2.3Z",
}


def tag(name: str, content: str = "", /, **attributes: object) -> str:
    """An element with content that is markup already; attributes are escaped, class_ is class, _ is -, None is left out."""
    pairs = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(_attribute(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    return f"<{name}{pairs}>{content}</{name}>"


def text(x: float, y: float, words: str, kind: str = "", anchor: str | None = None) -> str:
    """Words at a point; kind: further classes."""
    return tag("text", html.escape(words), x=x, y=y, class_=kind or None, text_anchor=anchor)


def swatch(style: Style) -> str:
    """A short piece of a line with its marker, to stand beside a name."""
    line = tag("path", d="M1 7H27", class_="line", stroke_dasharray=_dash(style))
    line += _marker(14, 7, style)
    return tag("svg", line, class_=f"swatch c{style.colour}", viewBox="0 0 28 14", aria_hidden="true")


def line_chart(chart: LineChart) -> str:
    """A chart with lines: axes, level, lines, markers, and each line's name at its end."""
    beside = max((len(line.label) for line in chart.series), default=0) <= 24
    names = [clipped(line.label, _LONGEST) for line in chart.series] + ([chart.level[1]] if chart.level else [])
    right = WIDTH - (38 + _LETTER * max(map(len, names), default=0) if beside else 14)
    top = _MARGIN_TOP + (0 if beside else 18 * len(names))
    bottom = top + _PLOT_HEIGHT
    ys = [y for line in chart.series for _, y in line.line] + [y for line in chart.series for _, y, _ in line.points]
    ys += [chart.level[0]] if chart.level else []
    xs = [x for line in chart.series for x, _ in line.line]
    x_at, x_ticks = _scale(xs, chart.x, _MARGIN_LEFT + 8, right - 8, 7)
    y_at, y_ticks = _scale(ys, chart.y, bottom, top, 5)
    parts = []
    for value, words in y_ticks:
        parts.append(tag("path", d=f"M{_MARGIN_LEFT} {y_at(value):.1f}H{right:.1f}", class_="guide"))
        parts.append(text(_MARGIN_LEFT - 8, y_at(value) + 4, words, anchor="end"))
    for value, words in x_ticks:
        parts.append(tag("path", d=f"M{x_at(value):.1f} {bottom}v4", class_="axis"))
        parts.append(text(x_at(value), bottom + 18, words, anchor="middle"))
    parts.append(tag("path", d=f"M{_MARGIN_LEFT} {bottom}H{right:.1f}", class_="axis"))
    parts.append(text((_MARGIN_LEFT + right) / 2, bottom + 36, chart.x.label, "name", "middle"))
    turned = f"rotate(-90 12 {(top + bottom) / 2})"
    scale = f"{chart.y.label} (log scale)" if chart.y.log else chart.y.label
    middle = {"x": 12, "y": (top + bottom) / 2, "text_anchor": "middle"}
    parts.append(tag("text", html.escape(scale), class_="name", transform=turned, **middle))
    ends: list[tuple[float, float, Style | None, str]] = []
    if chart.level:
        y = y_at(chart.level[0])
        parts.append(tag("path", d=f"M{_MARGIN_LEFT} {y:.1f}H{right:.1f}", class_="level"))
        ends.append((right, y, None, chart.level[1]))
    for line in chart.series:
        where = [(x_at(x), y_at(y)) for x, y in line.line]
        if not where:
            continue
        path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in where)
        drawn = tag("path", d=path, class_="line", stroke_dasharray=_dash(line.style))
        for x, y, note in line.points:
            drawn += _marker(x_at(x), y_at(y), line.style, note)
        parts.append(tag("g", drawn, class_=f"c{line.style.colour}"))
        ends.append((*where[-1], line.style, clipped(line.label, _LONGEST)))
    parts += _names_beside(ends, right, top, bottom) if beside else _names_above(ends)
    height = bottom + _MARGIN_BOTTOM
    return _picture(parts, height, f"{chart.title}. {chart.y.label} against {chart.x.label}. {_told(chart)}", "chart")


def heat_map(table: HeatMap) -> str:
    """Cells as dark as their share, with numbers where they fit; below, a key for the lightest and the darkest."""
    values = [value for row in table.values for value in row if value is not None]
    low, high = math.floor(min(values) * 100 + 1e-9) / 100, math.ceil(max(values) * 100 - 1e-9) / 100
    left = 12 + _LETTER * min(max(map(len, (table.row_label, *table.rows))), _LONGEST_ROW)
    width = min(46.0, (WIDTH - left - 4) / len(table.columns))
    height = 24 if len(table.rows) <= 12 else 16
    parts = [tag("text", html.escape(table.row_label), x=left - 8, y=14, class_="name", text_anchor="end")]
    every = max(1, math.ceil(24 / width))
    for j, name in enumerate(table.columns):
        if j % every == 0:
            parts.append(text(left + (j + 0.5) * width, 14, name, anchor="middle"))
    for i, name in enumerate(table.rows):
        parts.append(text(left - 8, 22 + i * height + height / 2 + 4, clipped(name, _LONGEST_ROW), anchor="end"))
    if len(table.rows) * len(table.columns) > _CELLS:
        depths = [[0.0 if value is None else _depth(value, low, high) for value in row] for row in table.values]
        size = {"width": width * len(table.columns), "height": height * len(table.rows)}
        parts.append(_image(np.array(depths), x=left, y=22, **size))
    else:
        parts += _cells(table, low, high, left, width, height)
    base = 22 + len(table.rows) * height + 10
    parts.append(text(left, base + 13, percent_text(low), "name"))
    x = left + 8 + _LETTER * len(percent_text(low))
    for step in range(6 if high > low else 1):
        fill = _depth(low + step / 5 * (high - low), low, high)
        parts.append(tag("rect", x=x + 18 * step, y=base + 2, width=17, height=13, class_="cell", fill_opacity=fill))
    if high > low:
        parts.append(text(x + 118, base + 13, f"{percent_text(high)} pruned", "name"))
    parts.append(text(WIDTH - 4, base + 13, f"across: {table.column_label}", "name", "end"))
    about = f"{table.title}, from {percent_text(low)} to {percent_text(high)}."
    return _picture(parts, base + 22, about, "heat")


def mask_map(masks: MaskMap) -> str:
    """A strip for each layer: across the channels, down the states, drawn where pruned. Many layers stand in two columns."""
    left, gap = 62, 7
    columns = 1 if len(masks.layers) <= _STRIPS else 2
    below = math.ceil(len(masks.layers) / columns)
    height = min(48, max(16, (2 if columns == 1 else 1) * max(len(shares) for _, shares in masks.layers)))
    parts = []
    for index, (layer, shares) in enumerate(masks.layers):
        x, y = index // below * (WIDTH + 24) + left, 4 + index % below * (height + gap)
        parts.append(text(x - 8, y + height / 2 + 4, f"layer {layer}", anchor="end"))
        place = {"x": x, "y": y, "width": WIDTH - left - 2, "height": height}
        parts.append(tag("rect", class_="ground", **place))
        parts.append(_image(shares, **place))
    base = 4 + below * (height + gap)
    per = f", {masks.per_column} to a column" if masks.per_column > 1 else ""
    parts.append(text(left, base + 12, f"across: {plural(masks.channels, 'channel')}{per}; down: states", "name"))
    about = f"{masks.title}: {plural(len(masks.layers), 'layer')}, {masks.channels} channels, pruned entries drawn."
    return _picture(parts, base + 20, about, "masks wide" if columns > 1 else "masks", WIDTH * columns + 24 * (columns - 1))


def _cells(table: HeatMap, low: float, high: float, left: float, width: float, height: float) -> list[str]:
    """A rectangle for each share, its number where that fits, and what it is for a reader who points there."""
    parts = []
    for i, (name, row) in enumerate(zip(table.rows, table.values, strict=True)):
        y = 22 + i * height
        for j, value in enumerate(row):
            if value is None:
                continue
            x = left + j * width
            about = f"{table.row_label} {name}, {table.column_label} {table.columns[j]}: {percent_text(value, 2)}"
            size = {"width": f"{width - 1:.1f}", "height": height - 1}
            told, depth = tag("title", html.escape(about)), _depth(value, low, high)
            parts.append(tag("rect", told, x=f"{x:.1f}", y=y, class_="cell", fill_opacity=depth, **size))
            if width >= 26:
                words = f"{100 * value:.0f}" if width < 40 else f"{100 * value:.1f}"
                parts.append(text(x + width / 2 - 0.5, y + height / 2 + 4, words, "in", "middle"))
    return parts


def _image(shares: np.ndarray, **place: object) -> str:
    source = "data:image/png;base64," + base64.b64encode(share_png(shares, HEAT)).decode()
    return tag("image", href=source, preserveAspectRatio="none", class_="mask", **place)


def phase_bar(parts: Sequence[float], whole: float) -> str:
    """Lengths beside each other, in one order, out of `whole`: grey, blue, empty."""
    x, pieces = 0.0, []
    for index, part in enumerate(parts):
        width = 160 * part / whole if whole > 0 else 0.0
        drawn = f"{max(0.0, width - 1):.1f}"
        pieces.append(tag("rect", x=f"{x + 0.5:.1f}", y=1.5, width=drawn, height=9, class_=f"phase p{index}"))
        x += width
    return tag("svg", "".join(pieces), class_="bar", viewBox="0 0 161 12", aria_hidden="true")


def phase_key(index: int) -> str:
    """The fill of one of the lengths of `phase_bar`."""
    box = tag("rect", x=0.5, y=1.5, width=21, height=9, class_=f"phase p{index}")
    return tag("svg", box, viewBox="0 0 22 12", aria_hidden="true")


def _picture(parts: Sequence[str], height: float, about: str, kind: str, width: int = WIDTH) -> str:
    return tag("svg", "".join(parts), viewBox=f"0 0 {width} {height:.0f}", role="img", aria_label=about, class_=kind)


def _attribute(value: object) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)


def _dash(style: Style) -> str | None:
    return " ".join(map(str, DASHES[style.dash])) or None


def _marker(x: float, y: float, style: Style, note: str = "") -> str:
    about = tag("title", html.escape(note)) if note else ""
    kind = "dot hollow" if style.hollow else "dot"
    return tag("path", about, d=_SHAPES[MARKERS[style.marker]], class_=kind, transform=f"translate({x:.1f} {y:.1f})")


def _depth(value: float, low: float, high: float) -> float:
    """Opacity of a cell: never so deep that ink cannot be read on it."""
    return 0.06 + 0.62 * ((value - low) / (high - low) if high > low else 0.5)


def _names_beside(
    ends: Sequence[tuple[float, float, Style | None, str]], right: float, top: float, bottom: float
) -> list[str]:
    """Names to the right of the plot, as near to the ends of their lines as they may stand."""
    placed: list[list[Any]] = []
    free = top + 4.0
    for _, y, style, name in sorted(ends, key=lambda end: end[1]):
        free = max(y, free)
        placed.append([free, y, style, name])
        free += _LABEL_STEP
    limit = float(bottom)
    for label in reversed(placed):  # pushed below the plot: moved up again, and those above with it
        label[0] = min(label[0], limit)
        limit = label[0] - _LABEL_STEP
    parts = []
    for at, y, style, name in placed:
        colour = "" if style is None else f"c{style.colour}"
        mark = tag("path", d=f"M{right + 14:.1f} {at:.1f}h18", class_="level" if style is None else "line",
                   stroke_dasharray=None if style is None else _dash(style))  # fmt: skip
        mark += "" if style is None else _marker(right + 23, at, style)
        leader = tag("path", d=f"M{right:.1f} {y:.1f}L{right + 12:.1f} {at:.1f}", class_="leader")
        parts.append(leader + tag("g", mark, class_=colour or None) + text(right + 37, at + 4, name))
    return parts


def _names_above(ends: Sequence[tuple[float, float, Style | None, str]]) -> list[str]:
    """Names in rows above the plot, for those that are too long to stand beside it."""
    parts = []
    for index, (_, _, style, name) in enumerate(ends):
        y = 10 + 18 * index
        mark = tag("path", d=f"M{_MARGIN_LEFT} {y}h28", class_="level" if style is None else "line",
                   stroke_dasharray=None if style is None else _dash(style))  # fmt: skip
        mark += "" if style is None else _marker(_MARGIN_LEFT + 14, y, style)
        parts.append(tag("g", mark, class_=None if style is None else f"c{style.colour}"))
        parts.append(text(_MARGIN_LEFT + 36, y + 4, name))
    return parts


def _told(chart: LineChart) -> str:
    """The chart as text, for screen readers."""
    said = []
    for line in chart.series:
        points = line.line if len(line.line) <= 8 else (line.line[0], line.line[-1])
        values = ", ".join(f"{_tick(y, chart.y)} at {_tick(x, chart.x)}" for x, y in points)
        said.append(f"{line.label}: {values}.")
    return " ".join(said)


def _scale(
    values: Sequence[float], axis: Axis, start: float, end: float, count: int
) -> tuple[Callable[[float], float], list[tuple[float, str]]]:
    """From values to pixels between start and end, and (value, words) of the ticks."""
    low, high = min(values, default=0.0), max(values, default=1.0)
    if axis.log:
        a, b = math.log10(low), math.log10(high)
        pad = 0.06 * (b - a) or 0.1
        if end > start:  # along x the data begin and end where the plot does
            pad = 0.0 if b > a else 0.1
        a, b = a - pad, b + pad
        ticks = _log_ticks(a, b, count)
        return (lambda v: start + (math.log10(v) - a) / (b - a) * (end - start)), [(t, _tick(t, axis)) for t in ticks]
    pad = 0.07 * (high - low) or 0.05 * abs(high) or 0.5
    if axis.kind == "index":
        pad = 0.0 if high > low else 0.5
    a, b = low - pad, high + pad
    if axis.kind == "percent":
        a, b = max(a, min(0.0, low)), min(b, max(1.0, high))
    distinct = sorted(set(values))
    if axis.kind == "percent" and end > start and len(distinct) <= 8 and _apart(distinct):
        ticks = distinct  # the sparsities that there are
    else:
        ticks = _linear_ticks(a, b, count, whole=axis.kind == "index")
    return (lambda v: start + (v - a) / (b - a) * (end - start)), [(t, _tick(t, axis)) for t in ticks]


def _apart(values: Sequence[float]) -> bool:
    """Whether there is space between neighbours of these sorted values for their names."""
    return all(b - a > 0.14 * (values[-1] - values[0]) for a, b in itertools.pairwise(values))


def _tick(value: float, axis: Axis) -> str:
    return percent_text(value) if axis.kind == "percent" else number_text(value)


def _linear_ticks(a: float, b: float, count: int, whole: bool) -> list[float]:
    """Multiples of 1, 2 or 5 times a power of ten between a and b."""
    raw = (b - a) / count
    power = 10 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 5, 10) if power * m >= raw * (1 - 1e-9))
    if whole:
        step = max(1.0, step)
    first, last = math.ceil(a / step - 1e-9), math.floor(b / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def _log_ticks(a: float, b: float, count: int) -> list[float]:
    """1, 2 and 5 of each decade between 10^a and 10^b, or powers of ten alone where those are many."""
    decades = range(math.floor(a), math.ceil(b) + 1)
    for digits in ((1, 2, 5), (1,)):
        ticks = [digit * 10.0**decade for decade in decades for digit in digits]
        ticks = [tick for tick in ticks if a - 1e-9 <= math.log10(tick) <= b + 1e-9]
        if len(ticks) <= count + 2:
            return ticks
    return ticks[:: math.ceil(len(ticks) / count)]
