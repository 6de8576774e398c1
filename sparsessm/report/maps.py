"""The content of the maps: pruned shares by part, by module, by state or head, and the masks themselves."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor
from torch.nn.functional import pad

from sparsessm.report.looks import Variant, run_label
from sparsessm.report.results import Record
from sparsessm.report.wording import percent_text, short_names, slug

_MASK_COLUMNS = 384  # channels side by side in a map of masks: of more, neighbours share a column
_SAME_SHARE = 1e-3  # a share that differs by less from layer to layer is one share, up to rounding
_PARTS = {"ssm": "A_log", "mixer": "mixer", "attention": "attention", "mlp": "MLP", "layers": "all weights"}


@dataclass(frozen=True)
class HeatMap:
    """values: (rows, columns) shares from 0 to 1, nan where there is nothing; rows, columns: names of some, by index."""

    kind: str
    key: str
    title: str
    rows: Mapping[Any, str]
    columns: Mapping[Any, str]
    values: np.ndarray
    row_label: str
    column_label: str


def run_maps(record: Record) -> list[HeatMap]:
    return [one for one in (share_map(record), state_map(record), mask_map(record)) if isinstance(one, HeatMap)]


def part_maps(records: Sequence[Record], looks: Mapping[str, Variant]) -> list[HeatMap]:
    """For each hybrid, a row a run: the pruned share of A_log, and of the weights of mixer, attention and MLP."""
    models = short_names(record.model for record in records)
    groups: dict[str, list[Record]] = defaultdict(list)
    for record in records:
        if {"attention", "mlp"} & record.metrics["sparsity"].keys() and record.parts:
            groups[record.model].append(record)
    return [
        HeatMap("parts", slug(f"parts {models[model]}"), models[model],
                dict(enumerate(run_label(record, looks[record.name]) for record in found)), dict(enumerate(_PARTS.values())),
                np.array([[r.metrics["sparsity"].get(part, np.nan) for part in _PARTS] for r in found]), "", "part")
        for model, found in groups.items()
    ]  # fmt: skip


def share_map(record: Record) -> HeatMap | str | None:
    """Pruned share by module and layer; in words where it is the same everywhere; None where none is known."""
    shares = record.shares
    if not shares:
        return None
    layers = sorted({layer for layer, _ in shares})
    modules = list(dict.fromkeys(module for _, module in shares))  # in the order in which they were pruned
    if max(shares.values()) - min(shares.values()) < _SAME_SHARE:
        where = f"{'layer' if len(layers) == 1 else 'layers'} {', '.join(map(str, layers))}"
        if len(layers) > 2 and layers[-1] - layers[0] == len(layers) - 1:
            where = f"layers {layers[0]} to {layers[-1]}"
        return f"{percent_text(sum(shares.values()) / len(shares))} of {', '.join(modules)} in {where}"
    values = np.array([[shares.get((layer, module), np.nan) for layer in layers] for module in modules])
    return HeatMap("shares", slug(f"shares {record.name}"), "Pruned share by module and layer", dict(enumerate(modules)),
                   dict(enumerate(map(str, layers))), values, "", "layer")  # fmt: skip


def state_map(record: Record) -> HeatMap | None:
    """Pruned share of A_log by layer and state, or head; the longer axis is horizontal."""
    masks = {} if record.removes_parts else record.masks()
    if not masks:
        return None
    unit, most = unit_of(masks), max(mask.shape[1] for mask in masks.values())
    shares = [mask.double().mean(0) for mask in masks.values()]
    values = np.array([pad(share, (0, most - len(share)), value=np.nan).numpy() for share in shares])
    layers, states = dict(enumerate(map(str, masks))), dict(enumerate(map(str, range(most))))
    about = "state_shares", slug(f"state shares {record.name}"), f"Pruned share of A_log by layer and {unit}"
    if len(layers) > most:
        return HeatMap(*about, states, layers, values.T, f"{unit} index", "layer")
    return HeatMap(*about, layers, states, values, "layer", f"{unit} index")


def mask_map(record: Record) -> HeatMap | None:
    """The masks of A_log themselves: a strip for each layer, channels across, states down, and a gap below."""
    masks = {} if record.removes_parts else record.masks()
    if not masks or unit_of(masks) == "head":
        return None  # of heads, state_map shows each
    channels, states = (max(mask.shape[dim] for mask in masks.values()) for dim in (0, 1))
    each, gap = -(-channels // _MASK_COLUMNS), max(1, states // 6)
    values = np.full((len(masks), states + gap, -(-channels // each)), np.nan)
    for strip, mask in zip(values, masks.values(), strict=True):
        starts = np.arange(0, len(mask), each)
        sums = np.add.reduceat(mask.numpy().astype(float), starts)  # (columns,N); the last of perhaps fewer channels
        strip[: mask.shape[1], : len(starts)] = sums.T / np.diff(starts, append=len(mask))
    rows = {i * (states + gap) + (states - 1) / 2: f"layer {layer}" for i, layer in enumerate(masks)}
    about = f"{channels} channels across{f', {each} to a column' if each > 1 else ''}; {states} states down"
    picture = values.reshape(-1, values.shape[2])[:-gap]
    return HeatMap("masks", slug(f"masks {record.name}"), "Masks of A_log", rows, {}, picture, "", about)


def unit_of(masks: Mapping[int, Tensor]) -> str:
    """What the columns of masks are: Mamba-2 has one row, and a column for each head."""
    return "head" if all(len(mask) == 1 for mask in masks.values()) else "state"
