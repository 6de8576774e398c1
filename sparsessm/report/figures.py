"""The content of each figure, as data: svg.py draws it for the page, plots.py with matplotlib for a paper."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparsessm.pruning.aggregation import time_weights
from sparsessm.pruning.methods import AGGREGATES
from sparsessm.report.palette import Style, method_style, plain_style
from sparsessm.report.results import Record
from sparsessm.report.wording import (
    number_text,
    percent_text,
    perplexity_text,
    plural,
    short_names,
    slug,
)

# Perplexities (and sensitivities) that differ by more than this factor are drawn over a logarithmic axis.
_LOG_FROM = 6.0

# Channels side by side in a mask map: of more, neighbours share a column.
_MASK_COLUMNS = 384

# A share that differs by less than this from layer to layer is one share, up to rounding.
_SAME_SHARE = 1e-3

# Options that do not make another curve: paths and speed, those drawn in another way, and the seed, which is averaged.
_NO_VARIANT = frozenset(
    "model method sparsity prunen prunem prune_A prune_layers seqlen seed data_dir ppl_datasets raw_zeros device offload "
    "memory_budget calib_batch experiment_name base_dir".split()
)
_NO_VARIANT_PREFIXES = ("eval_", "save", "log_", "zero_shot_")

# Options that the masks of A_log do not depend on: they come before the weights.
_OF_WEIGHTS = frozenset(("alpha", "target_modules", "module", "conv_hessian"))

_PARAMETER_LETTERS = {"power": "p", "discount": "g", "window": "k"}


@dataclass(frozen=True)
class Axis:
    """kind: "number", "percent" (a share from 0 to 1) or "index" (whole numbers)."""

    label: str
    kind: str = "number"
    log: bool = False


@dataclass(frozen=True)
class Series:
    """points: (x, y, what a reader who points there is told); line: (x, y) from left to right, no markers."""

    label: str
    style: Style
    points: tuple[tuple[float, float, str], ...]
    line: tuple[tuple[float, float], ...]


@dataclass(frozen=True)
class LineChart:
    """key: a name for files and anchors. level: (y, label) of a horizontal line. note: what holds for the whole chart."""

    key: str
    title: str
    note: str
    x: Axis
    y: Axis
    series: tuple[Series, ...]
    level: tuple[float, str] | None = None


@dataclass(frozen=True)
class HeatMap:
    """Shares from 0 to 1 in cells; values[row][column], None where there is nothing."""

    key: str
    title: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    values: tuple[tuple[float | None, ...], ...]
    row_label: str
    column_label: str


@dataclass(frozen=True)
class MaskMap:
    """A strip for each layer: (N, columns) pruned shares of the channels that share a column."""

    key: str
    title: str
    layers: tuple[tuple[int, np.ndarray], ...]
    channels: int
    per_column: int


def run_label(record: Record) -> str:
    """A run in a few words: method, what it pruned, how much of it."""
    if not record.parts:
        return record.method
    share = "" if record.sparsity is None else f" {percent_text(record.sparsity)}"
    text = f"{record.method}, {' + '.join(record.parts)}{share}"
    if record.options.get("prunem"):
        text += f" {record.pattern}"
    for name in ("alpha", "seed"):
        if record.options.get(name):
            text += f", {name} {number_text(record.options[name])}"
    return text


def protocol(record: Record) -> str:
    """How perplexity was taken: figures are comparable only where this is the same."""
    windows = record.options.get("eval_windows")
    which = "all windows" if windows is None else f"first {plural(windows, 'window')}"
    return f"{which} of {record.options.get('seqlen')} tokens"


def perplexity_charts(records: Sequence[Record]) -> list[LineChart]:
    """Perplexity against sparsity: a chart for each model, data set, protocol and kind of what was pruned."""
    models = short_names(record.model for record in records)
    sets = short_names(name for record in records for name in record.perplexity)
    dense: dict[Hashable, float] = {}
    groups: dict[tuple[Any, ...], list[tuple[Record, float, float]]] = defaultdict(list)
    for record in records:
        for name, value in record.metrics["dense_perplexity"].items():
            if math.isfinite(value):
                dense.setdefault((record.model, name, protocol(record)), value)
        for name, value in record.perplexity.items():
            if not math.isfinite(value):
                continue  # no place in a picture; the table has it
            if not record.options["method"]:
                dense[record.model, name, protocol(record)] = value
            elif record.sparsity is not None:
                groups[record.model, name, protocol(record), record.parts].append((record, record.sparsity, value))
    charts = []
    for (model, name, how, parts), found in sorted(groups.items(), key=lambda group: len(group[0][3])):
        what = " + ".join(parts) or "other"
        points = [(r, p, v, f"{run_label(r)}: {perplexity_text(v)} ({r.name})") for r, p, v in found]
        level = dense.get((model, name, how))
        values = [value for *_, value in found] + ([] if level is None else [level])
        charts.append(LineChart(
            key=slug(f"perplexity {models[model]} {sets[name]} {what} {how}"),
            title=f"{models[model]} on {sets[name]}: {what} pruned", note=how,
            x=Axis("sparsity", "percent"), y=Axis("perplexity", log=_wants_log(values)),
            series=_method_series(points), level=None if level is None else (level, f"dense {perplexity_text(level)}"),
        ))  # fmt: skip
    return charts


def state_charts(records: Sequence[Record]) -> list[LineChart]:
    """Pruned share of A_log by state, or head, over all layers and channels: a chart for each model and sparsity."""
    models = short_names(record.model for record in records)
    groups: dict[tuple[Any, ...], list[tuple[Record, list[float]]]] = defaultdict(list)
    for record in records:
        masks = {} if record.removes_parts else record.masks()
        shares = [mask.double().mean(0) for mask in masks.values()]
        if shares and record.sparsity is not None and len({len(share) for share in shares}) == 1:
            key = record.model, record.sparsity, _unit(masks)
            groups[key].append((record, torch.stack(shares).mean(0).tolist()))
    charts = []
    for (model, sparsity, unit), found in groups.items():
        points = [
            (record, state, share, f"{run_label(record)}: {unit} {state}, {percent_text(share)}")
            for record, shares in found
            for state, share in enumerate(shares)
        ]
        asked = percent_text(sparsity)
        charts.append(LineChart(
            key=slug(f"states {models[model]} {asked}"), title=f"{models[model]}: {asked} of A_log", note="mean over layers",
            x=Axis(f"{unit} index", "index"), y=Axis("pruned share", "percent"), series=_method_series(points, _OF_WEIGHTS),
            level=(sparsity, f"asked {asked}"),
        ))  # fmt: skip
    return charts


def sensitivity_charts(records: Sequence[Record]) -> list[LineChart]:
    """Sensitivity by layer, a line for each module; runs that found the same share a chart."""
    models = short_names(record.model for record in records)
    groups: dict[tuple[Any, ...], list[Record]] = defaultdict(list)
    for record in records:
        values = {module: tuple(sorted(found.items())) for module, found in record.sensitivities.items()}
        if values:
            groups[record.model, tuple(sorted(values.items()))].append(record)
    charts = []
    for number, ((model, modules), found) in enumerate(groups.items(), 1):
        series = []
        for index, (module, values) in enumerate(modules):
            line = tuple((layer, s) for layer, s in values if s > 0 and math.isfinite(s))
            points = tuple((layer, s, f"layer {layer}, {module}: {number_text(s)}") for layer, s in line)
            series.append(Series(module, plain_style(index), points, line))
        others = f" and {plural(len(found) - 1, 'run')} more" if len(found) > 1 else ""
        every = [s for one in series for _, s, _ in one.points]
        charts.append(LineChart(
            key=slug(f"sensitivity {models[model]} {number}"), title=f"{models[model]}: {run_label(found[0])}{others}",
            note=", ".join(record.name for record in found), x=Axis("layer", "index"),
            y=Axis("sensitivity s", log=_wants_log(every)), series=tuple(series),
        ))  # fmt: skip
    return charts


def weight_charts(records: Sequence[Record]) -> list[LineChart]:
    """The weights over time of the aggregations that the runs used: a chart for each length of a window."""
    groups: dict[int, dict[tuple[Any, ...], set[str]]] = defaultdict(lambda: defaultdict(set))
    for record in records:
        if record.aggregation and record.aggregation[0] in AGGREGATES and record.options.get("seqlen", 0) > 1:
            groups[record.options["seqlen"]][record.aggregation].add(record.method)
    charts = []
    for L, rules in sorted(groups.items()):
        steps = np.unique(np.geomspace(1, L, min(L, 160)).round().astype(int))  # as even as whole steps go on a log axis
        series = []
        for index, ((rule, parameter), methods) in enumerate(sorted(rules.items(), key=str)):
            if rule == "vote":  # a vote for each step but the first, which no state enters
                weights = torch.tensor([0.0] + [1 / (L - 1)] * (L - 1), dtype=torch.float64)
            else:
                weights = time_weights(rule, L, parameter)
            values = [(int(step), float(weights[step - 1])) for step in steps]
            floor = 1e-4 / L
            line = tuple((step, weight) for step, weight in values if weight >= floor)
            name = rule if parameter is None else f"{rule}, {_PARAMETER_LETTERS[rule]} = {number_text(parameter)}"
            marks = {round(i * (len(line) - 1) / 6) for i in range(7)}
            points = tuple(
                (step, weight, f"{name}, step {step}: {number_text(weight)}")
                for i, (step, weight) in enumerate(line)
                if i in marks
            )
            series.append(Series(f"{name} ({', '.join(sorted(methods))})", plain_style(index), points, line))
        charts.append(LineChart(
            key=f"weights-{L}", title=f"Windows of {L} tokens", note="weights sum to 1",
            x=Axis("time step", log=True), y=Axis("weight", log=True), series=tuple(series),
        ))  # fmt: skip
    return charts


def share_map(record: Record) -> HeatMap | str | None:
    """Pruned share by module and layer; in words where it is the same everywhere; None where none is known."""
    shares = record.shares
    if not shares:
        return None
    layers = sorted({layer for layer, _ in shares})
    modules = list(dict.fromkeys(module for _, module in shares))  # in the order in which they were pruned
    if max(shares.values()) - min(shares.values()) < _SAME_SHARE:
        mean = sum(shares.values()) / len(shares)
        return f"{percent_text(mean)} of {', '.join(modules)} in {_layer_words(layers)}"
    return HeatMap(
        key=slug(f"shares {record.name}"), title="Pruned share by module and layer", rows=tuple(modules),
        columns=tuple(map(str, layers)), row_label="module", column_label="layer",
        values=tuple(tuple(shares.get((layer, module)) for layer in layers) for module in modules),
    )  # fmt: skip


def state_map(record: Record) -> HeatMap | None:
    """Pruned share of A_log by layer and state, or head; the longer axis is horizontal."""
    if record.removes_parts or not record.layers_with_masks:
        return None
    masks = record.masks()
    unit, shares = _unit(masks), {layer: mask.double().mean(0).tolist() for layer, mask in masks.items()}
    layers, states = tuple(shares), range(max(map(len, shares.values())))
    values = [tuple(row[n] if n < len(row) else None for n in states) for row in shares.values()]
    names, labels = (tuple(map(str, layers)), tuple(map(str, states))), ("layer", f"{unit} index")
    if len(layers) > len(states):
        values, names, labels = list(zip(*values, strict=True)), names[::-1], labels[::-1]
    return HeatMap(
        key=slug(f"state shares {record.name}"), title=f"Pruned share of A_log by layer and {unit}", rows=names[0],
        columns=names[1], values=tuple(values), row_label=labels[0], column_label=labels[1],
    )  # fmt: skip


def mask_map(record: Record) -> MaskMap | None:
    """The masks of A_log themselves."""
    if record.removes_parts or not record.layers_with_masks:
        return None
    masks = record.masks()
    if _unit(masks) == "head":
        return None  # state_map shows each of them
    channels = max(len(mask) for mask in masks.values())
    per_column = -(-channels // _MASK_COLUMNS)
    layers = []
    for layer, mask in masks.items():
        rows = mask.double()  # (D,N)
        whole = len(rows) // per_column * per_column
        shares = [rows[:whole].unflatten(0, (whole // per_column, per_column)).mean(1)]  # (columns,N)
        if whole < len(rows):
            shares.append(rows[whole:].mean(0, keepdim=True))
        layers.append((layer, torch.cat(shares).T.contiguous().numpy()))
    return MaskMap(slug(f"masks {record.name}"), "Masks of A_log", tuple(layers), channels, per_column)


def _unit(masks: Mapping[int, Tensor]) -> str:
    """What the columns of masks are: Mamba-2 has one row, and a column for each head."""
    return "head" if all(len(mask) == 1 for mask in masks.values()) else "state"


def _wants_log(values: Iterable[float]) -> bool:
    values = list(values)
    return bool(values) and min(values) > 0 and max(values) > _LOG_FROM * min(values)


def _layer_words(layers: Sequence[int]) -> str:
    """layers 0 to 5, or each by its number where some lie between."""
    if len(layers) > 2 and layers[-1] - layers[0] == len(layers) - 1:
        return f"layers {layers[0]} to {layers[-1]}"
    return f"{'layer' if len(layers) == 1 else 'layers'} {', '.join(map(str, layers))}"


def _method_series(
    points: Sequence[tuple[Record, float, float, str]], ignored: frozenset[str] = frozenset()
) -> tuple[Series, ...]:
    """(run, x, y, note) as a series for each method, and for each set of options in which its runs differ."""
    by_method: dict[str, list[Any]] = defaultdict(list)
    for point in points:
        by_method[point[0].method].append(point)
    series = []
    for method, mine in by_method.items():
        runs = {point[0].name: point[0] for point in mine}
        differing = [name for name in _differing([record.options for record in runs.values()]) if name not in ignored]
        variants: dict[str, list[Any]] = defaultdict(list)
        for record, x, y, note in mine:
            words = [record.pattern] if record.options.get("prunem") else []
            words += [_option_words(name, record.options.get(name)) for name in differing]
            variants[", ".join([method, *words])].append((x, y, note))
        for index, (label, found) in enumerate(sorted(variants.items())):
            at: dict[float, list[float]] = defaultdict(list)
            for x, y, _ in found:
                at[x].append(y)
            line = tuple((x, sum(values) / len(values)) for x, values in sorted(at.items()))
            series.append(Series(label, method_style(method, index), tuple(found), line))
    return tuple(series)


def _differing(options: Sequence[Mapping[str, object]]) -> list[str]:
    names = dict.fromkeys(name for values in options for name in values)
    return [
        name
        for name in names
        if name not in _NO_VARIANT
        and not name.startswith(_NO_VARIANT_PREFIXES)
        and len({repr(values.get(name)) for values in options}) > 1
    ]


def _option_words(name: str, value: object) -> str:
    if isinstance(value, bool):
        return name if value else f"no {name}"
    if isinstance(value, (int, float)):
        return f"{name} {number_text(value)}"
    return f"{name} {', '.join(map(str, value)) if isinstance(value, list) else value or 'as the method'}"
