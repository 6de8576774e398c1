"""The content of each picture, as data that plots.py draws; `pictures` are all pictures of any number of runs."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise, zip_longest
from statistics import fmean

import numpy as np

from sparsessm.pruning.aggregation import time_weights
from sparsessm.report.looks import Looks, Style, plain_style
from sparsessm.report.results import Record
from sparsessm.report.wording import figure_text, grouped, number_text, percent_text, plural

# Values that differ by more than this factor are drawn over a logarithmic axis.
_LOG_FROM = 6.0

_PARAMETER_LETTERS = {"power": "p", "discount": "g", "window": "k"}

# Channels side by side in a map of masks: of more, neighbours share a column.
_MASK_COLUMNS = 384

# A share that differs by less than this from layer to layer is one share, up to rounding.
_SAME_SHARE = 1e-3

_PARTS = {"ssm": "A_log", "mixer": "mixer", "attention": "attention", "mlp": "MLP", "layers": "weights"}

_Point = tuple[float, float, str]  # x, y, and a note for a reader who points there


@dataclass(frozen=True)
class Axis:
    """kind: "number", "percent" (a share from 0 to 1) or "index" (whole numbers).

    scale: "linear", "log", or "symlog", which is linear between -linear_to and linear_to. ticks: where they must be.
    """

    label: str
    kind: str = "number"
    scale: str = "linear"
    linear_to: float = 1.0
    ticks: Sequence[float] = ()


@dataclass(frozen=True)
class Series:
    """points: those with a note are single runs, and have a marker each."""

    label: str
    style: Style
    points: Sequence[_Point]

    @property
    def line(self) -> list[tuple[float, float]]:
        """(x, y) from left to right, the means of what has the same x."""
        return [(x, fmean(values)) for x, values in sorted(grouped((x, y) for x, y, _ in self.points).items())]


@dataclass(frozen=True)
class LineChart:
    """kind: which chart of the page. key: unlike that of other pictures. level: (y, label) of a horizontal line."""

    kind: str
    key: str
    title: str
    note: str
    x: Axis
    y: Axis
    series: Sequence[Series]
    level: tuple[float, str] | None = None

    @property
    def description(self) -> str:
        words = percent_text if self.x.kind == "percent" else number_text
        lines = {one.label: ", ".join(f"{number_text(y)} at {words(x)}" for x, y in one.line[:12]) for one in self.series}
        told = [f"{label}: {line}" for label, line in lines.items()]
        return f"{self.title}. {self.y.label.splitlines()[0]} against {self.x.label}. {'; '.join(told)}"


@dataclass(frozen=True, eq=False)
class HeatMap:
    """Shares from 0 to 1 in cells; values (rows,columns), NaN where there is nothing. A row's name may be empty."""

    kind: str
    key: str
    title: str
    note: str
    rows: Sequence[str]
    columns: Sequence[str]
    values: np.ndarray
    row_label: str = ""
    column_label: str = ""

    @property
    def description(self) -> str:
        return f"{self.title}, from {percent_text(np.nanmin(self.values))} to {percent_text(np.nanmax(self.values))}"


Picture = LineChart | HeatMap


def pictures(records: Sequence[Record], of_runs: bool = True) -> Iterator[Picture]:
    """All there are, in the order of the page, made one after the other; of_runs: the maps of single runs as well."""
    looks = Looks(records)
    for kind in (perplexity_charts, removal_charts, state_charts, part_maps, sensitivity_charts, weight_charts):
        yield from kind(records, looks)
    for record in records if of_runs else ():
        yield from run_maps(record)[0]


def protocol(record: Record) -> str:
    """How perplexity was taken: figures are comparable only where this is the same."""
    windows = record.options["eval_windows"]
    which = "all windows" if windows is None else f"first {plural(windows, 'window')}"
    return f"{which} of {record.options['seqlen']} tokens"


def dense_perplexities(records: Sequence[Record]) -> dict[tuple[str, str, str], float]:
    """By (model, data set, protocol), from dense runs and from --eval_dense."""
    dense: dict[tuple[str, str, str], float] = {}
    for record in records:
        own = record.metrics["perplexity" if record.method == "dense" else "dense_perplexity"]
        dense |= {(record.model, name, protocol(record)): value for name, value in own.items() if math.isfinite(value)}
    return dense


def perplexity_charts(records: Sequence[Record], looks: Looks) -> Iterator[LineChart]:
    """Perplexity against sparsity: a chart for each model, data set, protocol and kind of what was pruned.

    Where the perplexity of the dense model is known, what is drawn is the difference to it.
    """
    dense = dense_perplexities(records)
    groups = grouped(
        ((r.model, name, protocol(r), r.parts), (r, r.sparsity, value))
        for r in records
        for name, value in r.metrics["perplexity"].items()  # what is infinite has no place in a picture; the table has it
        if math.isfinite(value) and r.options["method"] and r.sparsity is not None
    )
    for (model, name, how, parts), found in groups.items():
        what, level = " + ".join(parts) or "other", dense.get((model, name, how))
        points = [
            (looks.label(r), (sparsity, value - (level or 0.0), f"{looks.run(r)}: {figure_text(value)} ({r.name})"))
            for r, sparsity, value in found
        ]
        shares = sorted({sparsity for _, sparsity, _ in found})
        apart = all(b - a > 0.09 * (shares[-1] - shares[0]) for a, b in pairwise(shares))  # or their names would collide
        y = _axis("perplexity" if level is None else "perplexity above dense", [y for _, (_, y, _) in points])
        yield LineChart(
            "perplexity", f"perplexity {looks.models[model]} {looks.sets[name]} {what} {how}",
            f"{looks.models[model]} on {looks.sets[name]}: {what} pruned",
            how if level is None else f"{how}; dense {figure_text(level)}",
            Axis("sparsity", "percent", ticks=shares if len(shares) <= 8 and apart else ()), y,
            _series(points, looks), None if level is None or y.scale == "log" else (0.0, "dense"),
        )  # fmt: skip


def removal_charts(records: Sequence[Record], looks: Looks) -> Iterator[LineChart]:
    """Perplexity on the calibration text after each removed layer or SSM: a chart for each model and kind of part."""
    groups = grouped(
        ((r.model, r.pattern), (looks.label(r), (step, value, f"{looks.run(r)}, layer {layer}: {figure_text(value)}")))
        for r in records
        for step, (layer, value) in enumerate(r.removals.items(), 1)
    )
    for (model, parts), points in groups.items():
        yield LineChart(
            "removal", f"removal {looks.models[model]} {parts}", f"{looks.models[model]}: {parts} removed",
            "calibration text", Axis("number removed", "index"), _axis("perplexity", [y for _, (_, y, _) in points]),
            _series(points, looks),
        )  # fmt: skip


def state_charts(records: Sequence[Record], looks: Looks) -> Iterator[LineChart]:
    """Pruned share of A_log by state, or head, over all layers and channels: a chart for each model and sparsity."""
    points = []
    for record in records:
        masks = record.masks()
        if record.sparsity is not None and len({mask.shape[1] for mask in masks.values()}) == 1:
            key, label = (record.model, record.sparsity, unit_of(masks)), looks.label(record, of_masks=True)
            shares = np.mean([mask.mean(0) for mask in masks.values()], 0)
            points += [(key, (label, (n, share, ""))) for n, share in enumerate(shares.tolist())]
    for (model, sparsity, unit), found in grouped(points).items():
        asked = percent_text(sparsity)
        yield LineChart(
            "states", f"states {looks.models[model]} {asked}", f"{looks.models[model]}: {asked} of A_log",
            "mean over layers and seeds", Axis(f"{unit} index", "index"), Axis("pruned share", "percent"),
            _series(found, looks), (sparsity, f"asked {asked}"),
        )  # fmt: skip


def sensitivity_charts(records: Sequence[Record], looks: Looks) -> Iterator[LineChart]:
    """Sensitivity by layer, a line for each module; runs that found the same share a chart."""
    groups = grouped(((r.model, str(r.sensitivities)), r) for r in records if r.sensitivities)
    for number, ((model, _), (first, *others)) in enumerate(groups.items(), 1):
        series = [
            Series(module, plain_style(index), [(layer, value, "") for layer, value in by_layer.items() if value > 0])
            for index, (module, by_layer) in enumerate(sorted(first.sensitivities.items()))
        ]
        more = f" and {plural(len(others), 'run')} more" if others else ""
        yield LineChart(
            "sensitivity", f"sensitivity {looks.models[model]} {number}", f"{looks.models[model]}: {looks.run(first)}{more}",
            first.name, Axis("layer", "index"), _axis("sensitivity s", [y for one in series for _, y in one.line]), series,
        )  # fmt: skip


def weight_charts(records: Sequence[Record], looks: Looks) -> Iterator[LineChart]:
    """The weights over time of the aggregations that the runs used: a chart for each length of a window."""
    lengths = grouped((r.options["seqlen"], (r.aggregation, r)) for r in records if r.aggregation)
    for L, mine in sorted(lengths.items()):
        series = []
        for (rule, parameter), found in sorted(grouped(mine).items(), key=lambda item: str(item[0])):
            vote = [0.0] + [1 / (L - 1)] * (L - 1)  # for each step but the first, which no state enters
            weights = vote if rule == "vote" else time_weights(rule, L, parameter).tolist()
            name = rule if parameter is None else f"{rule}, {_PARAMETER_LETTERS[rule]} = {number_text(parameter)}"
            methods = ", ".join(sorted({record.method for record in found}))
            points = [(step, weight, "") for step, weight in enumerate(weights, 1) if weight >= 1e-4 / L]
            series.append(Series(f"{name} ({methods})", looks.style(found[0]), points))
        yield LineChart(
            "time_weights", f"weights {L}", f"Windows of {L} tokens", "weights sum to 1",
            Axis("time step", scale="log"), Axis("weight", scale="log"), series,
        )  # fmt: skip


def _series(points: Iterable[tuple[str, _Point]], looks: Looks) -> list[Series]:
    return [Series(label, looks.styles[label], mine) for label, mine in grouped(points).items()]


def _axis(label: str, values: Sequence[float]) -> Axis:
    """With a scale that does not flatten most of the values, which the label names."""
    sizes = sorted(map(abs, values)) or [1.0]
    low, middle, high = sizes[0], sizes[len(sizes) // 2], sizes[-1]
    positive = min(values, default=0.0) > 0
    if high <= _LOG_FROM * (low if positive else middle):
        return Axis(label)
    if positive:
        return Axis(f"{label}\n(log scale)", scale="log")
    linear_to = 10.0 ** math.ceil(math.log10(max(middle, high / 1e4, 1e-4)))
    return Axis(f"{label}\n(log scale beyond {number_text(linear_to)})", scale="symlog", linear_to=linear_to)


def run_maps(record: Record) -> tuple[list[HeatMap], str | None]:
    """The maps of a run; and in words the shares by module, where they are the same everywhere."""
    shares = share_map(record)
    maps = [one for one in (shares, state_map(record), mask_map(record)) if isinstance(one, HeatMap)]
    return maps, shares if isinstance(shares, str) else None


def part_maps(records: Sequence[Record], looks: Looks) -> Iterator[HeatMap]:
    """For each hybrid, a row a run: the pruned share of A_log, and of the weights of mixer, attention and MLP."""
    hybrids = [r for r in records if {"attention", "mlp"} & r.metrics["sparsity"].keys() and r.parts]
    for model, found in grouped((record.model, record) for record in hybrids).items():
        parts = [part for part in _PARTS if any(part in record.metrics["sparsity"] for record in found)]
        values = np.array([[record.metrics["sparsity"].get(part, np.nan) for part in parts] for record in found])
        yield HeatMap("parts", f"parts {looks.models[model]}", looks.models[model], "a row a run",
                      [looks.run(record) for record in found], [_PARTS[part] for part in parts], values)  # fmt: skip


def share_map(record: Record) -> HeatMap | str | None:
    """Pruned share by module and layer; in words where it is the same everywhere; None where none is known."""
    shares = record.shares
    if not shares:
        return None
    layers = sorted({layer for layer, _ in shares})
    modules = list(dict.fromkeys(module for _, module in shares))  # in the order in which they were pruned
    if max(shares.values()) - min(shares.values()) < _SAME_SHARE:
        return f"{percent_text(fmean(shares.values()))} of {', '.join(modules)} in {plural(len(layers), 'layer')}"
    values = np.array([[shares.get((layer, module), np.nan) for layer in layers] for module in modules])
    return HeatMap("shares", f"shares {record.name}", "Pruned share by module and layer", "", modules,
                   [str(layer) for layer in layers], values, "", "layer")  # fmt: skip


def state_map(record: Record) -> HeatMap | None:
    """Pruned share of A_log by layer and state, or head; the longer axis is horizontal."""
    masks = record.masks()
    if not masks:
        return None
    unit, layers = unit_of(masks), [str(layer) for layer in masks]
    values = _padded([mask.mean(0) for mask in masks.values()])
    states = [str(n) for n in range(values.shape[1])]
    upright, turned = (layers, states, values, "layer", f"{unit} index"), (states, layers, values.T, unit, "layer")
    return HeatMap("state_shares", f"state shares {record.name}", f"Pruned share of A_log by layer and {unit}", "",
                   *(turned if len(layers) > len(states) else upright))  # fmt: skip


def mask_map(record: Record) -> HeatMap | None:
    """The masks of A_log themselves: for each layer a strip of N rows, named in its middle, and a gap."""
    masks = record.masks()
    if not masks or unit_of(masks) == "head":
        return None  # of heads, state_map shows each
    channels = max(map(len, masks.values()))
    per_column = -(-channels // _MASK_COLUMNS)
    names, rows = [], []
    for layer, mask in masks.items():
        D, N = mask.shape
        strip = np.transpose([mask[start : start + per_column].mean(0) for start in range(0, D, per_column)]).tolist()
        strip += [[]] * max(1, N // 5)
        names += [str(layer) if n == N // 2 else "" for n in range(len(strip))]
        rows += strip
    columns, values = [str(start) for start in range(0, channels, per_column)], _padded(rows)
    note = "states from top to bottom" + (f", {per_column} channels to a column" if per_column > 1 else "")
    return HeatMap("masks", f"masks {record.name}", "Masks of A_log", note, names, columns, values, "layer", "channel")


def _padded(rows: Iterable[Sequence[float]]) -> np.ndarray:
    """Rows as an array; NaN where a row is shorter than the longest."""
    return np.array([*zip_longest(*rows, fillvalue=np.nan)]).T


def unit_of(masks: Mapping[int, np.ndarray]) -> str:
    """What the columns of masks are: Mamba-2 has one row, and a column for each head."""
    return "head" if all(len(mask) == 1 for mask in masks.values()) else "state"
