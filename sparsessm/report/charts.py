"""The content of each chart, as data that plots.py draws; `pictures` are all pictures of any number of runs."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, pairwise

import torch

from sparsessm.pruning.aggregation import time_weights
from sparsessm.pruning.methods import AGGREGATES
from sparsessm.report.looks import Looks, Style, plain_style
from sparsessm.report.maps import HeatMap, part_maps, run_maps, unit_of
from sparsessm.report.results import Record
from sparsessm.report.wording import figure_text, grouped, number_text, percent_text, plural, slug

# Values that differ by more than this factor are drawn over a logarithmic axis.
_LOG_FROM = 6.0

_PARAMETER_LETTERS = {"power": "p", "discount": "g", "window": "k"}


@dataclass(frozen=True)
class Axis:
    """kind: "number", "percent" (a share from 0 to 1) or "index" (whole numbers).

    scale: "linear", "log", or "symlog", which is linear between -linear_to and linear_to. ticks: where they must be.
    """

    label: str
    kind: str = "number"
    scale: str = "linear"
    linear_to: float = 1.0
    ticks: tuple[float, ...] = ()


@dataclass(frozen=True)
class Series:
    """line: (x, y) from left to right. points: (x, y, note for a reader who points there), where they are single runs."""

    label: str
    style: Style
    line: tuple[tuple[float, float], ...]
    points: tuple[tuple[float, float, str], ...] = ()


@dataclass(frozen=True)
class LineChart:
    """kind: which chart of the page. key: a name for files and anchors. level: (y, label) of a horizontal line."""

    kind: str
    key: str
    title: str
    note: str
    x: Axis
    y: Axis
    series: tuple[Series, ...]
    level: tuple[float, str] | None = None

    @property
    def description(self) -> str:
        words = percent_text if self.x.kind == "percent" else number_text
        values = [", ".join(f"{number_text(y)} at {words(x)}" for x, y in series.line[:12]) for series in self.series]
        told = [f"{series.label}: {each}" for series, each in zip(self.series, values, strict=True)]
        return f"{self.title}. {self.y.label.splitlines()[0]} against {self.x.label}. {'; '.join(told)}"


Picture = LineChart | HeatMap


def pictures(records: Sequence[Record], of_runs: bool = True) -> Iterator[Picture]:
    """All there are, in the order of the page, made one after the other; of_runs: the maps of single runs as well."""
    looks = Looks(records)
    yield from chain(perplexity_charts(records, looks), removal_charts(records, looks), state_charts(records, looks))
    yield from chain(part_maps(records, looks), sensitivity_charts(records, looks), weight_charts(records, looks))
    for record in records if of_runs else ():
        yield from run_maps(record)[0]


def protocol(record: Record) -> str:
    """How perplexity was taken: figures are comparable only where this is the same."""
    windows = record.options.get("eval_windows")
    which = "all windows" if windows is None else f"first {plural(windows, 'window')}"
    return f"{which} of {record.options.get('seqlen')} tokens"


def dense_perplexities(records: Sequence[Record]) -> dict[tuple[str, str, str], float]:
    """By (model, data set, protocol), from dense runs and from --eval_dense."""
    dense: dict[tuple[str, str, str], float] = {}
    for record in records:
        own = record.perplexity if record.method == "dense" else record.metrics["dense_perplexity"]
        dense |= {(record.model, name, protocol(record)): value for name, value in own.items() if math.isfinite(value)}
    return dense


def perplexity_charts(records: Sequence[Record], looks: Looks) -> list[LineChart]:
    """Perplexity against sparsity: a chart for each model, data set, protocol and kind of what was pruned.

    Where the perplexity of the dense model is known, what is drawn is the difference to it.
    """
    dense = dense_perplexities(records)
    groups = grouped(
        ((r.model, name, protocol(r), r.parts), (r, value))
        for r in records
        for name, value in r.perplexity.items()  # what is infinite has no place in a picture; the table has it
        if math.isfinite(value) and r.options["method"] and r.sparsity is not None
    )
    charts = []
    for (model, name, how, parts), found in groups.items():
        what, level = " + ".join(parts) or "other", dense.get((model, name, how))
        points = [
            (looks.label(r), r.sparsity or 0.0, v - (level or 0.0), f"{looks.run(r)}: {figure_text(v)} ({r.name})")
            for r, v in found
        ]
        shares = sorted({x for _, x, _, _ in points})
        apart = all(b - a > 0.09 * (shares[-1] - shares[0]) for a, b in pairwise(shares))  # or their names would collide
        ticks = tuple(shares) if len(shares) <= 8 and apart else ()
        y = _axis("perplexity" if level is None else "perplexity above dense", [value for _, _, value, _ in points])
        charts.append(LineChart(
            "perplexity", slug(f"perplexity {looks.models[model]} {looks.sets[name]} {what} {how}"),
            f"{looks.models[model]} on {looks.sets[name]}: {what} pruned",
            how if level is None else f"{how}; dense {figure_text(level)}", Axis("sparsity", "percent", ticks=ticks), y,
            _series(points, looks), None if level is None or y.scale == "log" else (0.0, "dense"),
        ))  # fmt: skip
    return charts


def removal_charts(records: Sequence[Record], looks: Looks) -> list[LineChart]:
    """Perplexity on the calibration text after each removed layer or SSM: a chart for each model and kind of part."""
    groups = grouped(
        ((r.model, r.pattern), (looks.label(r), step, value, f"{looks.run(r)}, layer {layer}: {figure_text(value)}"))
        for r in records
        for step, (layer, value) in enumerate(r.removals.items(), 1)
    )
    return [
        LineChart(
            "removal", slug(f"removal {looks.models[model]} {parts}"), f"{looks.models[model]}: {parts} removed",
            "calibration text", Axis("number removed", "index"), _axis("perplexity", [y for _, _, y, _ in points]),
            _series(points, looks),
        )
        for (model, parts), points in groups.items()
    ]  # fmt: skip


def state_charts(records: Sequence[Record], looks: Looks) -> list[LineChart]:
    """Pruned share of A_log by state, or head, over all layers and channels: a chart for each model and sparsity."""
    points = []
    for record in records:
        masks = {} if record.removes_parts else record.masks()
        shares = [mask.double().mean(0) for mask in masks.values()]
        if shares and record.sparsity is not None and len({len(share) for share in shares}) == 1:
            key, label = (record.model, record.sparsity, unit_of(masks)), looks.label(record, of_masks=True)
            points += [(key, (label, n, share, "")) for n, share in enumerate(torch.stack(shares).mean(0).tolist())]
    charts = []
    for (model, sparsity, unit), found in grouped(points).items():
        asked = percent_text(sparsity)
        charts.append(LineChart(
            "states", slug(f"states {looks.models[model]} {asked}"), f"{looks.models[model]}: {asked} of A_log",
            "mean over layers and seeds", Axis(f"{unit} index", "index"), Axis("pruned share", "percent"),
            _series(found, looks), (sparsity, f"asked {asked}"),
        ))  # fmt: skip
    return charts


def sensitivity_charts(records: Sequence[Record], looks: Looks) -> list[LineChart]:
    """Sensitivity by layer, a line for each module; runs that found the same share a chart."""
    groups = grouped(
        ((r.model, tuple(sorted((module, tuple(sorted(found.items()))) for module, found in r.sensitivities.items()))), r)
        for r in records
        if r.sensitivities
    )
    charts = []
    for number, ((model, modules), found) in enumerate(groups.items(), 1):
        lines = [(module, tuple((layer, s) for layer, s in line if s > 0 and math.isfinite(s))) for module, line in modules]
        others = f" and {plural(len(found) - 1, 'run')} more" if len(found) > 1 else ""
        charts.append(LineChart(
            "sensitivity", slug(f"sensitivity {looks.models[model]} {number}"),
            f"{looks.models[model]}: {looks.run(found[0])}{others}",
            found[0].name, Axis("layer", "index"), _axis("sensitivity s", [s for _, line in lines for _, s in line]),
            tuple(Series(module, plain_style(index), line) for index, (module, line) in enumerate(lines)),
        ))  # fmt: skip
    return charts


def weight_charts(records: Sequence[Record], looks: Looks) -> list[LineChart]:
    """The weights over time of the aggregations that the runs used: a chart for each length of a window."""
    used = [r for r in records if r.aggregation and r.aggregation[0] in AGGREGATES and r.options.get("seqlen", 0) > 1]
    charts = []
    for L, mine in sorted(grouped((r.options["seqlen"], r) for r in used).items()):
        series = []
        for (rule, parameter), found in sorted(grouped((r.aggregation or ("", None), r) for r in mine).items(), key=str):
            vote = torch.tensor([0.0] + [1 / (L - 1)] * (L - 1))  # for each step but the first, which no state enters
            weights = (vote if rule == "vote" else time_weights(rule, L, parameter)).tolist()
            name = rule if parameter is None else f"{rule}, {_PARAMETER_LETTERS[rule]} = {number_text(parameter)}"
            methods = ", ".join(sorted({record.method for record in found}))
            line = tuple((step, weight) for step, weight in enumerate(weights, 1) if weight >= 1e-4 / L)
            series.append(Series(f"{name} ({methods})", looks.style(found[0]), line))
        charts.append(LineChart(
            "time_weights", f"weights-{L}", f"Windows of {L} tokens", "weights sum to 1",
            Axis("time step", scale="log"), Axis("weight", scale="log"), tuple(series),
        ))  # fmt: skip
    return charts


def _series(points: Sequence[tuple[str, float, float, str]], looks: Looks) -> tuple[Series, ...]:
    """(label, x, y, note) as a series for each label; its line connects the means; points without a note are not shown."""
    series = []
    for label, mine in grouped((label, (x, y, note)) for label, x, y, note in points).items():
        line = tuple((x, sum(ys) / len(ys)) for x, ys in sorted(grouped((x, y) for x, y, _ in mine).items()))
        series.append(Series(label, looks.styles[label], line, tuple((x, y, note) for x, y, note in mine if note)))
    return tuple(series)


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
