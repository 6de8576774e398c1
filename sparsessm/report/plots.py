"""The pictures of figures.py as PNG and PDF, for papers and for wandb: the one module that needs matplotlib."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sparsessm.errors import InputError, storing
from sparsessm.files import write_whole
from sparsessm.report import figures
from sparsessm.report.figures import Axis, HeatMap, LineChart, MaskMap
from sparsessm.report.palette import DASHES, HEAT, LIGHT, MARKERS, Style
from sparsessm.report.results import Record
from sparsessm.report.wording import clipped, number_text, percent_text

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MARKERS = dict(zip(MARKERS, "osD^vpXh", strict=True))
_INK, _MUTED, _RULE = "#1d2126", "#586270", "#dddcd6"
_POINTS = 0.75  # of a pixel of the page
_NO_STAMP = {"png": {"Software": None}, "pdf": {"CreationDate": None}}  # the same runs give the same bytes
_STYLE: dict[Any, Any] = {
    "font.family": "sans-serif", "font.size": 8, "axes.titlesize": 8.5, "axes.labelsize": 8, "axes.titlelocation": "left",
    "axes.edgecolor": _MUTED, "axes.labelcolor": _MUTED, "axes.linewidth": 0.7, "axes.spines.top": False,
    "axes.spines.right": False, "axes.axisbelow": True, "grid.color": _RULE, "grid.linewidth": 0.6, "text.color": _INK,
    "xtick.color": _INK, "ytick.color": _INK, "lines.linewidth": 1.4, "lines.markersize": 5, "legend.frameon": False,
    "legend.fontsize": 7.5, "pdf.fonttype": 42, "savefig.dpi": 200, "text.parse_math": False,
}  # fmt: skip


def has_matplotlib() -> bool:
    return importlib.util.find_spec("matplotlib") is not None


def check_matplotlib() -> None:
    """Raises InputError where plots are wanted and matplotlib is not there."""
    if not has_matplotlib():
        raise InputError("plots need matplotlib: pip install -r requirements-plots.txt, or leave --plots out")


def write_plots(records: Sequence[Record], folder: Path) -> list[str]:
    """Writes NAME.png and NAME.pdf of every picture of these runs, each whole or not at all; returns the names.

    Raises:
        InputError: the folder cannot be written.
    """
    names: list[str] = []
    with storing(f"--plots {folder}", "name another folder"):
        folder.mkdir(parents=True, exist_ok=True)
        for _, picture in _pictures(records):
            name = picture.key
            while name in names:
                name += "-"  # two names that differ in odd characters alone
            _write(picture, [folder / f"{name}.{kind}" for kind in ("png", "pdf")])
            names.append(name)
    return names


def write_run_plots(record: Record, folder: Path) -> dict[str, Path]:
    """Writes as PNG what one run has to show by itself; returns the files by kind of picture, the same in all runs."""
    files = {}
    for kind, picture in _pictures([record]):
        if kind != "perplexity":  # one point
            files[kind] = folder / f"{kind}.png"
            _write(picture, [files[kind]])
    return files


def _pictures(records: Sequence[Record]) -> Iterator[tuple[str, LineChart | HeatMap | MaskMap]]:
    """(kind, picture) of all there are, made one after the other."""
    charts = {
        "perplexity": figures.perplexity_charts, "states": figures.state_charts, "sensitivity": figures.sensitivity_charts,
        "time_weights": figures.weight_charts,
    }  # fmt: skip
    for kind, make in charts.items():
        yield from ((kind, chart) for chart in make(records))
    maps = {"shares": figures.share_map, "state_shares": figures.state_map, "masks": figures.mask_map}
    for record in records:
        for kind, show in maps.items():
            picture = show(record)
            if isinstance(picture, (HeatMap, MaskMap)):
                yield kind, picture


def _write(picture: LineChart | HeatMap | MaskMap, files: Sequence[Path]) -> None:
    from matplotlib import rc_context
    from matplotlib.figure import Figure

    draws: dict[type, Callable[[Figure, Any], None]] = {LineChart: _line_chart, HeatMap: _heat_map, MaskMap: _mask_map}
    with rc_context(_STYLE):  # some of it is read only when a figure is written
        figure = Figure(figsize=(4.6, 2.9))  # not pyplot's, whose list of open figures would grow
        figure.set_layout_engine("constrained", w_pad=0.08, h_pad=0.06)
        draws[type(picture)](figure, picture)
        for file in files:
            kind = file.suffix[1:]
            write_whole(file, partial(figure.savefig, format=kind, metadata=_NO_STAMP[kind]))


def _line_chart(figure: Figure, chart: LineChart) -> None:
    axes = figure.add_subplot()
    axes.set_title("\n".join(clipped(words, 64) for words in (chart.title, chart.note) if words))
    axes.grid(axis="y")
    handles: list[tuple[Any, str]] = []
    for line in chart.series:
        look = _look(line.style)
        axes.plot([x for x, _ in line.line], [y for _, y in line.line], **(look | {"marker": None}))
        axes.plot([x for x, _, _ in line.points], [y for _, y, _ in line.points], **(look | {"linestyle": "none"}))
        handles.append((_handle(look), clipped(line.label, 64)))
    if chart.level:
        look = {"color": _MUTED, "linestyle": (0, (1, 2)), "linewidth": 1.0}
        axes.axhline(chart.level[0], **look)
        handles.append((_handle(look), chart.level[1]))
    _set_axis(axes.xaxis, axes.set_xscale, axes.set_xlabel, chart.x)
    _set_axis(axes.yaxis, axes.set_yscale, axes.set_ylabel, chart.y)
    figure.set_figwidth(4.0 + 0.065 * max(len(label) for _, label in handles))
    shown, labels = zip(*((handle, f" {label}") for handle, label in handles), strict=True)  # with no space "_x" is hidden
    figure.legend(shown, labels, loc="outside right upper")


def _look(style: Style) -> dict[str, Any]:
    colour, dash = LIGHT[style.colour], DASHES[style.dash]
    return {
        "color": colour, "marker": _MARKERS[MARKERS[style.marker]], "markerfacecolor": "white" if style.hollow else colour,
        "linestyle": (0, tuple(_POINTS * length for length in dash)) if dash else "solid",
    }  # fmt: skip


def _handle(look: dict[str, Any]) -> Any:
    from matplotlib.lines import Line2D

    return Line2D([], [], **look)


def _set_axis(axis: Any, set_scale: Any, set_label: Any, about: Axis) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    set_label(about.label)
    if about.log:
        set_scale("log")
        axis.set_major_locator(LogLocator(subs=(1, 2, 5), numticks=7))
        axis.set_minor_formatter(NullFormatter())
    else:
        axis.set_major_locator(MaxNLocator(6, steps=(1, 2, 5, 10), integer=about.kind == "index"))
    words = percent_text if about.kind == "percent" else number_text
    axis.set_major_formatter(FuncFormatter(lambda value, _: words(value)))


def _heat_map(figure: Figure, table: HeatMap) -> None:
    import numpy as np

    rows, columns = len(table.rows), len(table.columns)
    figure.set_size_inches(max(3.6, 1.6 + 0.32 * min(columns, 24)), max(1.9, 1.1 + 0.22 * rows))
    axes = figure.add_subplot()
    values = np.array([[np.nan if value is None else value for value in row] for row in table.values])
    picture = axes.imshow(values, cmap=_shades(), aspect="auto")
    axes.set_title(table.title)
    axes.set_xlabel(table.column_label)
    axes.set_ylabel(table.row_label)
    every = -(-columns // 24)
    axes.set_xticks(range(0, columns, every), table.columns[::every])
    axes.set_yticks(range(rows), [clipped(name, 24) for name in table.rows])
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    if columns <= 24:
        for i, j in np.argwhere(~np.isnan(values)):
            axes.text(j, i, f"{100 * values[i, j]:.0f}", ha="center", va="center", fontsize=6)
    bar = figure.colorbar(picture, ax=axes, shrink=0.8, aspect=15)
    bar.outline.set_visible(False)
    bar.ax.yaxis.set_major_formatter(lambda value, _: percent_text(value))


def _mask_map(figure: Figure, masks: MaskMap) -> None:
    figure.set_size_inches(6.8, 0.7 + min(0.33 * len(masks.layers), 9.0))
    all_axes = figure.subplots(len(masks.layers), squeeze=False)[:, 0]
    for axes, (layer, shares) in zip(all_axes, masks.layers, strict=True):
        axes.imshow(shares, cmap=_shades(deep=True), vmin=0, vmax=1, aspect="auto", interpolation="nearest",
                    extent=(0, masks.channels, len(shares), 0))  # fmt: skip
        axes.set_xticks([])
        axes.set_yticks([])
        axes.spines[:].set_visible(True)
        axes.set_ylabel(f"layer {layer}", rotation=0, ha="right", va="center")
    all_axes[0].set_title(masks.title)
    all_axes[-1].set_xlabel(f"{masks.channels} channels across, states down; drawn where pruned")


def _shades(deep: bool = False) -> Any:
    """White to the colour of shares; not so deep where numbers stand on it."""
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("shares", ["#ffffff", HEAT if deep else "#8fbaf0"])
