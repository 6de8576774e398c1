"""The content of each chart, as data; plots.py draws it."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise
from typing import Any

import numpy as np
import torch

from sparsessm.pruning.aggregation import time_weights
from sparsessm.pruning.methods import AGGREGATES
from sparsessm.report.looks import Style, Variant, plain_style, run_label, variants
from sparsessm.report.maps import HeatMap, part_maps, run_maps, unit_of
from sparsessm.report.results import Record
from sparsessm.report.wording import number_text, percent_text, perplexity_text, plural, short_names, slug

# Values that differ by more than this factor are drawn over a logarithmic axis.
_LOG_FROM = 6.0

_PARAMETER_LETTERS = {"power": "p", "discount": "g", "window": "k"}


@dataclass(frozen=True)
class Axis:
    """kind: "number", "percent" (a share from 0 to 1) or "index" (whole numbers). ticks: where they must be.

    scale: "linear", "log", or up to what number above and below 0 a logarithmic one is linear.
    """

    label: str
    kind: str = "number"
    scale: str | float = "linear"
    ticks: tuple[float, ...] = ()


@dataclass(frozen=True)
class Series:
    """points: (x, y, what a reader who points there is told); line: (x, y) from left to right, no markers."""

    label: str
    style: Style
    points: tuple[tuple[float, float, str], ...]
    line: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class LineChart:
    """level: (y, label) of a horizontal line. note: what holds for the whole chart."""

    kind: str
    title: str
    note: str
    x: Axis
    y: Axis
    series: tuple[Series, ...]
    level: tuple[float, str] | None = None

    @property
    def key(self) -> str:
        """A name for files; two charts may have the same."""
        return slug(f"{self.kind} {self.title} {self.note}")


def overviews(records: Sequence[Record]) -> Iterator[LineChart | HeatMap]:
    """The pictures of many runs together, in the order of the page."""
    looks = variants(records)
    makers = (perplexity_charts, removal_charts, state_charts, part_maps, sensitivity_charts, weight_charts)
    yield from chain.from_iterable(make(records, looks) for make in makers)


def pictures(records: Sequence[Record]) -> Iterator[LineChart | HeatMap]:
    """All there are: of many runs together, then of each."""
    return chain(overviews(records), chain.from_iterable(map(run_maps, records)))


def protocol(record: Record) -> str:
    """How perplexity was taken: figures are comparable only where this is the same."""
    windows = record.options.get("eval_windows")
    which = "all windows" if windows is None else f"first {plural(windows, 'window')}"
    return f"{which} of {record.options.get('seqlen')} tokens"


def dense_perplexities(records: Sequence[Record]) -> dict[Hashable, float]:
    """By (model, data set, protocol), from dense runs and from --eval_dense."""
    dense: dict[Hashable, float] = {}
    for record in records:
        own = record.perplexity if record.method == "dense" else record.metrics["dense_perplexity"]
        for name, value in own.items():
            if math.isfinite(value):
                dense.setdefault((record.model, name, protocol(record)), value)
    return dense


def perplexity_charts(records: Sequence[Record], looks: Mapping[str, Variant]) -> list[LineChart]:
    """Perplexity against sparsity: a chart for each model, data set, protocol and kind of what was pruned.

    Where the perplexity of the dense model is known, what is drawn is the difference to it.
    """
    models = short_names(record.model for record in records)
    sets = short_names(name for record in records for name in record.perplexity)
    dense = dense_perplexities(records)
    groups: dict[tuple[Any, ...], list[tuple[Record, float]]] = defaultdict(list)
    for record in records:
        for name, value in record.perplexity.items():
            # what is infinite has no place in a picture; the table has it
            if math.isfinite(value) and record.options["method"] and record.sparsity is not None:
                groups[record.model, name, protocol(record), record.parts].append((record, value))
    charts = []
    for (model, name, how, parts), found in groups.items():
        what, level = " + ".join(parts) or "other", dense.get((model, name, how))
        points = [
            (looks[r.name].label(), looks[r.name].style, r.sparsity or 0.0, value - (level or 0.0),
             f"{run_label(r, looks[r.name])}: {perplexity_text(value)} ({r.name})")
            for r, value in found
        ]  # fmt: skip
        scale = _scale_of(point[3] for point in points)
        label = "perplexity" if level is None else f"perplexity above dense ({perplexity_text(level)})"
        charts.append(LineChart(
            "perplexity", f"{models[model]} on {sets[name]}: {what} pruned", how,
            Axis("sparsity", "percent", ticks=_own_ticks(point[2] for point in points)), Axis(label, scale=scale),
            _series(points), None if level is None or scale == "log" else (0.0, "dense"),
        ))  # fmt: skip
    return charts


def removals(record: Record) -> list[tuple[int, float]]:
    """(layer, perplexity of the calibration text after it) of each layer or SSM removed, in order."""
    found = {}
    for event in record.events if record.removes_parts else ():
        layer, value = event.get("layer"), event.get("perplexity")
        if event.get("event") == "layer" and type(layer) is int and isinstance(value, float) and 0 < value < 1e300:
            found[layer] = value  # a resumed run may tell of a step twice
    return list(found.items())


def removal_charts(records: Sequence[Record], looks: Mapping[str, Variant]) -> list[LineChart]:
    """Perplexity on the calibration text after each removed layer or SSM: a chart for each model and kind of part."""
    models = short_names(record.model for record in records)
    groups: dict[tuple[str, str], list[Record]] = defaultdict(list)
    for record in records:
        if removals(record):
            groups[record.model, record.pattern or ""].append(record)
    charts = []
    for (model, parts), found in groups.items():
        points = [
            (looks[r.name].label(), looks[r.name].style, float(step), value,
             f"{run_label(r, looks[r.name])}: after layer {layer}, {perplexity_text(value)}")
            for r in found for step, (layer, value) in enumerate(removals(r), 1)
        ]  # fmt: skip
        charts.append(LineChart(
            "removal", f"{models[model]}: {parts} removed", "calibration text",
            Axis(f"{parts} removed", "index"), Axis("perplexity", scale=_scale_of(y for _, _, _, y, _ in points)),
            _series(points),
        ))  # fmt: skip
    return charts


def state_charts(records: Sequence[Record], looks: Mapping[str, Variant]) -> list[LineChart]:
    """Pruned share of A_log by state, or head, over all layers and channels: a chart for each model and sparsity."""
    models = short_names(record.model for record in records)
    groups: dict[tuple[Any, ...], list[tuple[Record, list[float]]]] = defaultdict(list)
    for record in records:
        masks = {} if record.removes_parts else record.masks()
        shares = [mask.double().mean(0) for mask in masks.values()]
        if shares and record.sparsity is not None and len({len(share) for share in shares}) == 1:
            key = record.model, record.sparsity, unit_of(masks)
            groups[key].append((record, torch.stack(shares).mean(0).tolist()))
    charts = []
    for (model, sparsity, unit), found in groups.items():
        points = [
            (looks[r.name].label_of_masks(), looks[r.name].style, float(n), share,
             f"{run_label(r, looks[r.name])}: {unit} {n}, {percent_text(share)}")
            for r, shares in found for n, share in enumerate(shares)
        ]  # fmt: skip
        asked = percent_text(sparsity)
        charts.append(LineChart(
            "states", f"{models[model]}: {asked} of A_log", "mean over layers",
            Axis(f"{unit} index", "index"), Axis("pruned share", "percent"), _series(points), (sparsity, f"asked {asked}"),
        ))  # fmt: skip
    return charts


def sensitivity_charts(records: Sequence[Record], looks: Mapping[str, Variant]) -> list[LineChart]:
    """Sensitivity by layer, a line for each module; runs that found the same share a chart."""
    models = short_names(record.model for record in records)
    groups: dict[tuple[Any, ...], list[Record]] = defaultdict(list)
    for record in records:
        values = {module: tuple(sorted(found.items())) for module, found in record.sensitivities.items()}
        if values:
            groups[record.model, tuple(sorted(values.items()))].append(record)
    charts = []
    for (model, modules), found in groups.items():
        series = []
        for index, (module, values) in enumerate(modules):
            line = tuple((layer, s) for layer, s in values if s > 0 and math.isfinite(s))
            points = tuple((layer, s, f"layer {layer}, {module}: {number_text(s)}") for layer, s in line)
            series.append(Series(module, plain_style(index), points, line))
        others = f" and {plural(len(found) - 1, 'run')} more" if len(found) > 1 else ""
        scale = _scale_of(s for one in series for _, s in one.line)
        charts.append(LineChart(
            "sensitivity", f"{models[model]}: {run_label(found[0], looks[found[0].name])}{others}",
            ", ".join(record.name for record in found), Axis("layer", "index"), Axis("sensitivity s", scale=scale),
            tuple(series),
        ))  # fmt: skip
    return charts


def weight_charts(records: Sequence[Record], looks: Mapping[str, Variant]) -> list[LineChart]:
    """The weights over time of the aggregations that the runs used: a chart for each length of a window."""
    groups: dict[int, dict[tuple[Any, ...], list[Record]]] = defaultdict(lambda: defaultdict(list))
    for record in records:
        if record.aggregation and record.aggregation[0] in AGGREGATES and record.options.get("seqlen", 0) > 1:
            groups[record.options["seqlen"]][record.aggregation].append(record)
    charts = []
    for L, rules in sorted(groups.items()):
        steps = np.unique(np.geomspace(1, L, min(L, 160)).round().astype(int))  # as even as whole steps go on a log axis
        series = []
        for (rule, parameter), found in sorted(rules.items(), key=lambda item: str(item[0])):
            if rule == "vote":  # a vote for each step but the first, which no state enters
                weights = torch.tensor([0.0] + [1 / (L - 1)] * (L - 1), dtype=torch.float64)
            else:
                weights = time_weights(rule, L, parameter)
            values = [(int(step), float(weights[step - 1])) for step in steps]
            line = tuple((step, weight) for step, weight in values if weight >= 1e-4 / L)
            name = rule if parameter is None else f"{rule}, {_PARAMETER_LETTERS[rule]} = {number_text(parameter)}"
            marked = sorted({round(i * (len(line) - 1) / 6) for i in range(7)}) if line else []
            points = tuple((*line[i], f"{name}, step {line[i][0]}: {number_text(line[i][1])}") for i in marked)
            methods = ", ".join(sorted({record.method for record in found}))
            series.append(Series(f"{name} ({methods})", looks[found[0].name].style, points, line))
        charts.append(LineChart(
            "time_weights", f"Windows of {L} tokens", "weights sum to 1",
            Axis("time step", scale="log"), Axis("weight", scale="log"), tuple(series),
        ))  # fmt: skip
    return charts


def _series(points: Iterable[tuple[str, Style, float, float, str]]) -> tuple[Series, ...]:
    """(label, style, x, y, note) as a series for each label; its line connects the means."""
    found: dict[str, list[tuple[Style, float, float, str]]] = defaultdict(list)
    for label, style, x, y, note in points:
        found[label].append((style, x, y, note))
    series = []
    for label, mine in found.items():
        at: dict[float, list[float]] = defaultdict(list)
        for _, x, y, _ in mine:
            at[x].append(y)
        line = tuple((x, sum(values) / len(values)) for x, values in sorted(at.items()))
        series.append(Series(label, mine[0][0], tuple(sorted((x, y, note) for _, x, y, note in mine)), line))
    return tuple(series)


def _scale_of(values: Iterable[float]) -> str | float:
    """A scale that does not flatten most values: an Axis' scale."""
    found = sorted(values)
    sizes = sorted(map(abs, found))
    if found and found[0] > 0:
        return "log" if found[-1] > _LOG_FROM * found[0] else "linear"
    if not sizes or sizes[-1] <= _LOG_FROM * sizes[len(sizes) // 2]:
        return "linear"
    return 10.0 ** math.floor(math.log10(max(sizes[len(sizes) // 2], sizes[-1] / 100)))  # noise around 0 is no decade


def _own_ticks(values: Iterable[float]) -> tuple[float, ...]:
    """The values themselves where they are few, and there is space between neighbours for their names."""
    distinct = sorted(set(values))
    apart = all(b - a > 0.09 * (distinct[-1] - distinct[0]) for a, b in pairwise(distinct))
    return tuple(distinct) if len(distinct) <= 8 and apart else ()
