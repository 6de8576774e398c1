"""Draws the pictures of pictures.py by matplotlib: SVG for the page, PNG and PDF for papers and for wandb."""

from __future__ import annotations

import io
import math
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

import numpy as np

from sparsessm.errors import storing
from sparsessm.files import write_whole
from sparsessm.report.looks import COLOURS, DASHES, HEAT, MARKERS, Style
from sparsessm.report.pictures import Axis, HeatMap, LineChart, Picture, pictures
from sparsessm.report.results import Record
from sparsessm.report.wording import clipped, number_text, percent_text, slug

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_INK, _MUTED, _RULE, _CARD = "#1d2126", "#586270", "#dddcd6", "#ffffff"
_VARIABLES = {colour: f"var(--s{i})" for i, colour in enumerate(COLOURS)} | {
    _INK: "var(--ink)", _MUTED: "var(--muted)", _RULE: "var(--rule)", _CARD: "var(--card)"
}  # fmt: skip
_STYLE: dict[Any, Any] = {
    "font.family": "sans-serif", "font.sans-serif": ["DejaVu Sans"], "font.size": 9, "axes.titlesize": 9,
    "axes.titlelocation": "left", "axes.edgecolor": _MUTED, "axes.labelcolor": _MUTED, "axes.linewidth": 0.7,
    "axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True, "grid.color": _RULE, "grid.linewidth": 0.6,
    "text.color": _INK, "text.parse_math": False, "xtick.color": _MUTED, "ytick.color": _MUTED, "xtick.labelcolor": _INK,
    "ytick.labelcolor": _INK, "lines.markersize": 5.5, "legend.frameon": False, "legend.fontsize": 9, "pdf.fonttype": 42,
    "savefig.dpi": 200, "svg.fonttype": "none",
}  # fmt: skip
_NO_STAMP = {"png": {"Software": None}, "pdf": {"CreationDate": None}}  # the same runs give the same bytes

_SVG, _LINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"
ElementTree.register_namespace("", _SVG)
ElementTree.register_namespace("xlink", _LINK)

# In inches: the width of all pictures, a letter, a line of text, the plot of a chart, and a title.
_WIDTH, _LETTER, _LINE, _HEIGHT, _TITLE = 5.4, 0.075, 0.17, 2.1, 0.45
_LONGEST = 60  # letters of a name


def svg(picture: Picture) -> str:
    """An <svg> element for a page: its text is text, its colours are the page's variables, its ids are its own."""
    stream = io.BytesIO()
    with _drawn(picture, titled=False) as figure:
        figure.savefig(stream, format="svg", transparent=True, metadata={"Date": None})
        top, (width, height) = _TITLE - 0.12, figure.get_size_inches()  # the page has a title of its own
    root = ElementTree.fromstring(stream.getvalue())
    root[:] = [child for child in root if child.find(f"{{{_SVG}}}style") is None and not child.tag.endswith("metadata")]
    for element in root.iter():
        if element.tag == f"{{{_SVG}}}g":  # no group is referred to, and other pictures have the same
            name = element.attrib.pop("id", "")
            if name.startswith("note-"):
                title = ElementTree.Element(f"{{{_SVG}}}title")
                title.text = name.removeprefix("note-")
                element.insert(0, title)
        if "style" in element.attrib:
            style = re.sub(r"#[0-9a-f]{6}", lambda found: _VARIABLES.get(found[0], found[0]), element.attrib["style"])
            element.attrib["style"] = re.sub(r"font-family: [^;]*;? ?", "", style)
    box = " ".join(f"{72 * inches:g}" for inches in (0.0, top, width, height - top))
    root.attrib = {"viewBox": box, "role": "img", "aria-label": picture.description}
    if width > _WIDTH:
        root.attrib["class"] = "wide"
    return ElementTree.tostring(root, encoding="unicode")


def write_plots(records: Sequence[Record], folder: Path) -> list[str]:
    """Writes NAME.png and NAME.pdf of every picture of these runs, each whole or not at all; returns the names.

    Raises:
        InputError: the folder cannot be written.
    """
    names: list[str] = []
    with storing(f"--plots {folder}", "name another folder"):
        folder.mkdir(parents=True, exist_ok=True)
        for picture in pictures(records):
            name = slug(picture.key)
            while name in names:
                name += "-"  # two names that differ in odd characters alone
            _write(picture, folder / f"{name}.png", folder / f"{name}.pdf")
            names.append(name)
    return names


def write_run_plots(record: Record, folder: Path) -> dict[str, Path]:
    """Writes as PNG what one run has to show by itself; returns the files by kind of picture, the same in all runs."""
    files = {}
    for picture in pictures([record]):
        if picture.kind not in ("perplexity", "parts"):  # one point, one row
            files[picture.kind] = folder / f"{picture.kind}.png"
            _write(picture, files[picture.kind])
    return files


def _write(picture: Picture, *files: Path) -> None:
    with _drawn(picture, titled=True) as figure:
        for file in files:
            kind = file.suffix[1:]
            write_whole(file, partial(figure.savefig, format=kind, metadata=_NO_STAMP[kind]))


@contextmanager
def _drawn(picture: Picture, titled: bool) -> Iterator[Figure]:
    """The picture as a figure, which is to be written inside."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context({**_STYLE, "svg.hashsalt": picture.key}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Glyph .* missing")  # a name in a script that the font does not have
        figure = Figure()  # not pyplot's, whose list of open figures would grow
        axes = _line_chart(figure, picture) if isinstance(picture, LineChart) else _heat_map(figure, picture)
        if titled:
            axes.set_title("\n".join(clipped(text, _LONGEST + 8) for text in (picture.title, picture.note) if text))
        yield figure


def _axes(figure: Figure, left: float, right: float, height: float, bottom: float) -> Axes:
    """Axes with margins in inches; the figure is as high as they need, with space for a title, and wide for long names."""
    total, width = bottom + height + _TITLE, _WIDTH if left < 2.0 else 1.5 * _WIDTH
    figure.set_size_inches(width, total)
    return figure.add_axes((left / width, bottom / total, 1 - (left + right) / width, height / total))


def _line_chart(figure: Figure, chart: LineChart) -> Axes:
    from matplotlib.lines import Line2D

    names = [clipped(series.label, _LONGEST) for series in chart.series]
    looks = [_look(series.style) for series in chart.series]
    if chart.level:
        names.append(chart.level[1])
        looks.append({"color": _MUTED, "linestyle": (0, (1, 2)), "linewidth": 1.0})
    columns = max(1, min(3, int(5.1 / (0.6 + _LETTER * max(map(len, names), default=0)))))
    axes = _axes(figure, 0.85, 0.2, _HEIGHT, 0.5 + _LINE * math.ceil(len(names) / columns))
    axes.grid(axis="y")
    if chart.level:
        axes.axhline(chart.level[0], **looks[-1])
    for series, look in zip(chart.series, looks, strict=False):
        line, noted = series.line, [point for point in series.points if point[2]]
        shown = {"marker": ""} if noted else {"markevery": 0.08 if len(line) > 24 else 1}
        axes.plot([x for x, _ in line], [y for _, y in line], **(look | shown))
        for x, y, note in noted:
            axes.plot([x], [y], **(look | {"linestyle": "none"}), gid=f"note-{clipped(note, 400)}")
    _set_axis(axes.xaxis, axes.set_xscale, chart.x)
    _set_axis(axes.yaxis, axes.set_yscale, chart.y)
    handles = [Line2D([], [], **look) for look in looks]
    labels = [f" {name}" for name in names]  # a name that begins with _ would be hidden
    figure.legend(handles, labels, loc="lower left", bbox_to_anchor=(0.005, 0.0), ncols=columns, handlelength=2.6,
                  borderpad=0.1, labelspacing=0.35, columnspacing=1.2)  # fmt: skip
    return axes


def _look(style: Style) -> dict[str, Any]:
    colour, dash = COLOURS[style.colour], DASHES[style.dash]
    return {
        "color": colour, "marker": MARKERS[style.marker], "markerfacecolor": _CARD if style.hollow else colour,
        "linestyle": (0, dash) if dash else "solid",
    }  # fmt: skip


def _set_axis(axis: Any, set_scale: Callable[..., None], about: Axis) -> None:
    from matplotlib.ticker import FixedLocator, LogLocator, MaxNLocator, NullLocator

    axis.set_label_text(about.label)
    if about.scale == "log":
        set_scale("log")
        axis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=7))
    elif about.scale == "symlog":
        set_scale("symlog", linthresh=about.linear_to, linscale=0.7)
    elif about.ticks:
        axis.set_major_locator(FixedLocator(about.ticks))
    else:
        axis.set_major_locator(MaxNLocator(6, steps=(1, 2, 5, 10), integer=about.kind == "index"))
    axis.set_minor_locator(NullLocator())
    words = percent_text if about.kind == "percent" else number_text
    axis.set_major_formatter(lambda value, _: words(value))


def _heat_map(figure: Figure, table: HeatMap) -> Axes:
    from matplotlib.colors import LinearSegmentedColormap

    rows, columns = len(table.rows), len(table.columns)
    names = {i: clipped(name, 44) for i, name in enumerate(table.rows) if name}
    left = 0.45 + _LETTER * max(map(len, names.values()))
    most = min(0.23 * rows, 0.45 * len(names), max(4.6, 0.1 * len(names)))
    axes = _axes(figure, left, 1.1, max(0.9, most), 0.45)
    place, (across, down) = axes.get_position(), figure.get_size_inches()
    width, height = across * place.width / columns, down * place.height / rows  # of a cell
    low = math.floor(np.nanmin(table.values) * 100 + 1e-9) / 100
    high = max(low + 0.01, math.ceil(np.nanmax(table.values) * 100 - 1e-9) / 100)
    shades = LinearSegmentedColormap.from_list("shares", [(HEAT, 0.06), (HEAT, 0.75)])  # they stand on any ground
    shown = axes.imshow(table.values, cmap=shades, vmin=low, vmax=high, aspect="auto", interpolation="none")
    axes.set(xlabel=table.column_label, ylabel=table.row_label)
    every = _every(_LETTER * (0.5 + max(map(len, table.columns))) / width)
    axes.set_xticks(range(0, columns, every), table.columns[::every])
    every = _every(0.16 / (height * rows / len(names)))
    axes.set_yticks(list(names)[::every], list(names.values())[::every])
    if width > 0.22 and height > 0.15:
        for i, j in np.argwhere(~np.isnan(table.values)):
            axes.text(j, i, f"{100 * table.values[i, j]:.0f}", ha="center", va="center", fontsize=7)
    cax = figure.add_axes((1 - 0.95 / across, place.y0, 0.12 / across, place.height))
    bar = figure.colorbar(shown, cax=cax, label="pruned share", format=percent_text, ticks=[low, high])
    assert bar.solids is not None
    bar.solids.set(rasterized=True, edgecolor="none")
    bar.outline.set_visible(False)
    for one in (axes, bar.ax):
        one.tick_params(length=0)
        one.spines[:].set_visible(False)
    return axes


def _every(least: float) -> int:
    """The least round number that is not below."""
    return next(n * 10**power for power in range(9) for n in (1, 2, 5) if n * 10**power >= least)
