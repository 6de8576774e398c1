"""The pictures, drawn with matplotlib: SVG inside a page, PNG and PDF for papers and for wandb.

matplotlib is imported when the first picture is drawn: a run that draws none does not wait for it.
"""

from __future__ import annotations

import io
import re
import warnings
import xml.etree.ElementTree as ET
from collections.abc import Callable, Sequence
from functools import lru_cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from sparsessm.errors import storing
from sparsessm.files import write_whole
from sparsessm.report.charts import Axis, LineChart, pictures
from sparsessm.report.looks import DASHES, LIGHT, MARKERS, Style
from sparsessm.report.maps import HeatMap
from sparsessm.report.results import Record
from sparsessm.report.wording import clipped, number_text, percent_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    Draw = Callable[[Figure, Any], dict[str, list[str]]]

_INK, _MUTED, _RULE, _CARD = "#1d2126", "#586270", "#dddcd6", "#ffffff"
# Colours of a picture -> variables of the page, which are others on a dark ground.
_VARIABLES = {_INK: "ink", _MUTED: "muted", _RULE: "rule", _CARD: "card"} | {c: f"s{i}" for i, c in enumerate(LIGHT)}
_STYLE: dict[Any, Any] = {
    "font.family": "DejaVu Sans", "font.size": 8, "axes.titlesize": 8.5, "axes.labelsize": 8, "axes.titlelocation": "left",
    "axes.edgecolor": _MUTED, "axes.labelcolor": _MUTED, "axes.linewidth": 0.7, "axes.spines.top": False,
    "axes.spines.right": False, "axes.axisbelow": True, "axes.facecolor": "none", "grid.color": _RULE, "grid.linewidth": 0.6,
    "text.color": _INK, "xtick.color": _MUTED, "xtick.labelcolor": _INK, "ytick.color": _MUTED, "ytick.labelcolor": _INK,
    "lines.linewidth": 1.4, "lines.markersize": 5, "legend.frameon": False, "legend.fontsize": 8, "pdf.fonttype": 42,
    "svg.fonttype": "none", "savefig.dpi": 200, "text.parse_math": False,
}  # fmt: skip
_NO_STAMP = {"png": {"Software": None}, "pdf": {"CreationDate": None}, "svg": {"Date": None}}  # same runs, same bytes

_WIDTH = 5.2  # inches
_LETTER = 0.072  # of it, of the legend
_NUMBERS_TO, _NAMES_TO = 16, 40  # columns of a map with a number in each cell, and rows with a name each
_SVG, _LINK = "http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"


def write_plots(records: Sequence[Record], folder: Path) -> list[str]:
    """Writes NAME.png and NAME.pdf of every picture of these runs, each whole or not at all; returns the names.

    Raises:
        InputError: the folder cannot be written.
    """
    names: list[str] = []
    with storing(f"--plots {folder}", "name another folder"):
        folder.mkdir(parents=True, exist_ok=True)
        for picture in pictures(records):
            name = picture.key
            while name in names:
                name += "-"  # two names that differ in odd characters alone
            for kind in ("png", "pdf"):
                write_whole(folder / f"{name}.{kind}", partial(_save, picture, kind))
            names.append(name)
    return names


def write_run_plots(record: Record, folder: Path) -> dict[str, Path]:
    """Writes as PNG what one run has to show by itself; returns the files by kind of picture, the same in all runs."""
    files = {}
    for picture in pictures([record]):
        if picture.kind != "perplexity":  # one point
            files[picture.kind] = folder / f"{picture.kind}.png"
            write_whole(files[picture.kind], partial(_save, picture, "png"))
    return files


def svg(picture: LineChart | HeatMap, name: str) -> str:
    """The picture as an element of a page, without its title. name: unique in the page; ids begin with it."""
    content = io.BytesIO()
    notes = _save(picture, "svg", content)
    return _for_page(content.getvalue(), name, notes, _told(picture))


@lru_cache(maxsize=256)
def swatch(style: Style, name: str) -> str:
    """A short piece of a line with its marker, as an element of a page that others can <use>."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    with rc_context(_STYLE | {"svg.hashsalt": name}):
        figure, content = Figure(figsize=(0.36, 0.18)), io.BytesIO()
        figure.add_artist(_handle(_look(style), [0.05, 0.5, 0.95], [0.5, 0.5, 0.5], markevery=[1]))
        figure.savefig(content, format="svg", transparent=True, metadata=_NO_STAMP["svg"])
    return _for_page(content.getvalue(), name, {}, "")


def _save(picture: LineChart | HeatMap, kind: str, target: Any) -> dict[str, list[str]]:
    """Draws into a file; returns what a reader is told who points at the parts of each group."""
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    draws: dict[type, Draw] = {LineChart: _line_chart, HeatMap: _heat_map}
    with rc_context(_STYLE | {"svg.hashsalt": picture.key}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing")  # a name in another script: a page has more fonts
        figure = Figure()  # not pyplot's, whose list of open figures would grow
        figure.set_layout_engine("constrained", w_pad=0.06, h_pad=0.05)
        notes = draws[type(picture)](figure, picture)
        if kind != "svg":  # a page writes it above
            note = [clipped(words, 76) for words in (picture.title, getattr(picture, "note", "")) if words]
            figure.suptitle("\n".join(note), x=0.02, ha="left", fontsize=8.5)
            figure.set_figheight(figure.get_figheight() + 0.18 * len(note))
        figure.savefig(target, format=kind, metadata=_NO_STAMP[kind], facecolor="none" if kind == "svg" else "white")
    return notes


def _line_chart(figure: Figure, chart: LineChart) -> dict[str, list[str]]:
    axes = figure.add_subplot()
    axes.grid(axis="y")
    handles: list[tuple[Any, str]] = []
    notes = {}
    for index, one in enumerate(chart.series):
        look, points = _look(one.style), one.points
        axes.plot([x for x, _ in one.line], [y for _, y in one.line], **(look | {"marker": None}))
        axes.plot([x for x, _, _ in points], [y for _, y, _ in points], gid=f"points-{index}", clip_on=False, zorder=3,
                  **(look | {"linestyle": "none"}))  # fmt: skip
        notes[f"points-{index}"] = [note for _, _, note in points]
        handles.append((_handle(look), clipped(one.label, 70)))
    if chart.level:
        look = {"color": _MUTED, "linestyle": (0, (1, 2)), "linewidth": 1.0}
        axes.axhline(chart.level[0], **look)
        handles.append((_handle(look), chart.level[1]))
    axes.set_xlabel(_set_axis(axes.xaxis, axes.set_xscale, chart.x))
    axes.set_title(_set_axis(axes.yaxis, axes.set_yscale, chart.y), fontsize=8, color=_MUTED)  # level: it may be long
    longest = 0.55 + _LETTER * max(len(label) for _, label in handles)
    columns = max(1, min(len(handles), int(_WIDTH / longest), 4))
    figure.set_size_inches(_WIDTH, 2.65 + 0.19 * -(-len(handles) // columns))
    shown, labels = zip(*((handle, f" {label}") for handle, label in handles), strict=True)  # with no space "_x" is hidden
    figure.legend(shown, labels, loc="outside lower left", ncols=columns, columnspacing=1.4, handlelength=2.6)
    return notes


def _set_axis(axis: Any, set_scale: Any, about: Axis) -> str:
    """Sets scale, ticks and their names; returns the axis' own name."""
    from matplotlib import ticker

    words = percent_text if about.kind == "percent" else number_text
    label = f"{about.label}, log scale"
    if about.scale == "log":
        set_scale("log")
        low, high = axis.get_view_interval()
        axis.set_major_locator(ticker.LogLocator(subs=(1, 2, 5) if high < 200 * low else (1,), numticks=7))
        axis.set_minor_formatter(ticker.NullFormatter())
    elif isinstance(about.scale, float):
        set_scale("symlog", linthresh=about.scale)
        axis.set_major_locator(ticker.SymmetricalLogLocator(base=10, linthresh=about.scale))
        label += f", linear from {number_text(-about.scale)} to {number_text(about.scale)}"
    else:
        locator = ticker.MaxNLocator(6, steps=(1, 2, 5, 10), integer=about.kind == "index")
        axis.set_major_locator(ticker.FixedLocator(about.ticks) if about.ticks else locator)
        label = about.label
    axis.set_major_formatter(ticker.FuncFormatter(lambda value, _: words(value)))
    return label


def _look(style: Style) -> dict[str, Any]:
    colour, dash = LIGHT[style.colour], DASHES[style.dash]
    return {
        "color": colour, "marker": MARKERS[style.marker], "markerfacecolor": _CARD if style.hollow else colour,
        "linestyle": (0, dash) if dash else "solid",
    }  # fmt: skip


def _handle(look: dict[str, Any], x: Sequence[float] = (), y: Sequence[float] = (), **more: Any) -> Any:
    from matplotlib.lines import Line2D

    return Line2D(x, y, **look, **more)


def _heat_map(figure: Figure, table: HeatMap) -> dict[str, list[str]]:
    rows, columns = len(table.rows), table.values.shape[1]
    numbered = len(table.columns) == columns <= _NUMBERS_TO and rows <= _NAMES_TO
    figure.set_size_inches(_WIDTH, 0.95 + (0.22 if table.columns else 0.3) * min(rows, _NAMES_TO))
    axes, low, high = figure.add_subplot(), float(np.nanmin(table.values)), float(np.nanmax(table.values))
    shown = axes.imshow(table.values, cmap="Blues", vmin=low if high > low else 0.0, vmax=high if high > low else 1.0,
                        aspect="auto", interpolation="none")  # fmt: skip
    for axis, names, most in ((axes.xaxis, table.columns, _NUMBERS_TO), (axes.yaxis, table.rows, _NAMES_TO)):
        every = -(-len(names) // most) or 1
        axis.set_ticks(list(names)[::every], [clipped(name, 44) for name in list(names.values())[::every]])
    axes.set_xlabel(table.column_label)
    axes.set_ylabel(table.row_label)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    notes = {}
    for i, j in np.argwhere(~np.isnan(table.values)) if numbered else ():
        value, gid = float(table.values[i, j]), f"cell-{i}-{j}"
        colour = "#fefefe" if value - low > 0.55 * (high - low or 1.0) else "#101010"  # cells are the same on any ground
        axes.text(j, i, f"{100 * value:.0f}", ha="center", va="center", fontsize=7, gid=gid, color=colour)
        notes[gid] = [f"{table.rows[i]}, {table.column_label} {table.columns[j]}: {percent_text(value, 2)}"]
    bar = figure.colorbar(shown, ax=axes, aspect=15, pad=0.02, label="pruned share")
    bar.ax.spines[:].set_visible(False)
    bar.ax.yaxis.set_major_formatter(lambda value, _: percent_text(value))
    return notes


def _for_page(content: bytes, name: str, notes: dict[str, list[str]], about: str) -> str:
    """matplotlib's SVG as an element among others: ids of its own, colours as the page's variables, notes to point at."""
    ET.register_namespace("", _SVG)
    ET.register_namespace("xlink", _LINK)
    root = ET.fromstring(content)
    for place in (root, *root.iter(f"{{{_SVG}}}defs")):
        for kind in ("metadata", "style"):
            for part in place.findall(f"{{{_SVG}}}{kind}"):
                place.remove(part)
    for part in list(root.iter()):
        marks = list(part.iter(f"{{{_SVG}}}use")) or [part]
        for target, note in zip(marks, notes.get(part.get("id", ""), ()), strict=False):
            ET.SubElement(target, f"{{{_SVG}}}title").text = clipped(note, 300)
        for key, value in part.attrib.items():
            if key == "id":
                part.set(key, f"{name}-{value}")
            elif key == f"{{{_LINK}}}href":
                part.set(key, value.replace("#", f"#{name}-", 1) if value.startswith("#") else value)
            elif key == "clip-path":
                part.set(key, value.replace("#", f"#{name}-"))
            elif key == "style":
                value = re.sub(r"#\w{6}", lambda m: f"var(--{_VARIABLES[m[0]]})" if m[0] in _VARIABLES else m[0], value)
                part.set(key, re.sub(r"'DejaVu Sans'[^;]*", "var(--sans)", value))
    for key, value in {"role": "img", "aria-label": about}.items() if about else {"aria-hidden": "true"}.items():
        root.set(key, value)
    return ET.tostring(root, encoding="unicode")


def _told(picture: LineChart | HeatMap) -> str:
    """The picture as text, for screen readers."""
    if not isinstance(picture, LineChart):
        return clipped(picture.title, 300)
    x, y = ((percent_text if axis.kind == "percent" else number_text) for axis in (picture.x, picture.y))
    ends = {one.label: one.line if len(one.line) <= 8 else (one.line[0], one.line[-1]) for one in picture.series}
    said = [f"{label}: {', '.join(f'{y(b)} at {x(a)}' for a, b in line)}." for label, line in ends.items()]
    return clipped(f"{picture.title}. {picture.y.label} against {picture.x.label}. {' '.join(said)}", 2000)
