"""The content of the maps, as data that plots.py draws: pruned shares by module, part and state, and masks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sparsessm.report.looks import Looks
from sparsessm.report.results import Record
from sparsessm.report.wording import grouped, percent_text, plural, slug

# Channels side by side in a map of masks: of more, neighbours share a column.
_MASK_COLUMNS = 384

# A share that differs by less than this from layer to layer is one share, up to rounding.
_SAME_SHARE = 1e-3

_PARTS = {"ssm": "A_log", "mixer": "mixer", "attention": "attention", "mlp": "MLP", "layers": "weights"}


@dataclass(frozen=True)
class HeatMap:
    """Shares from 0 to 1 in cells; values[row][column], None where there is nothing. A row's name may be empty."""

    kind: str
    key: str
    title: str
    note: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    values: tuple[tuple[float | None, ...], ...]
    row_label: str
    column_label: str

    @property
    def description(self) -> str:
        values = [value for row in self.values for value in row if value is not None]
        return f"{self.title}, from {percent_text(min(values))} to {percent_text(max(values))}"


def run_maps(record: Record) -> tuple[list[HeatMap], str | None]:
    """The maps of a run; and in words the shares by module, where they are the same everywhere."""
    shares = share_map(record)
    maps = [None if isinstance(shares, str) else shares, state_map(record), mask_map(record)]
    return [one for one in maps if one is not None], shares if isinstance(shares, str) else None


def part_maps(records: Sequence[Record], looks: Looks) -> list[HeatMap]:
    """For each hybrid, a row a run: the pruned share of A_log, and of the weights of mixer, attention and MLP."""
    hybrids = [r for r in records if {"attention", "mlp"} & r.metrics["sparsity"].keys() and r.parts]
    maps = []
    for model, found in grouped((record.model, record) for record in hybrids).items():
        parts = [part for part in _PARTS if any(part in record.metrics["sparsity"] for record in found)]
        values = tuple(tuple(record.metrics["sparsity"].get(part) for part in parts) for record in found)
        names = tuple(looks.run(record) for record in found)
        maps.append(HeatMap("parts", slug(f"parts {looks.models[model]}"), looks.models[model], "a row a run", names,
                            tuple(_PARTS[part] for part in parts), values, "", ""))  # fmt: skip
    return maps


def share_map(record: Record) -> HeatMap | str | None:
    """Pruned share by module and layer; in words where it is the same everywhere; None where none is known."""
    shares = record.shares
    if not shares:
        return None
    layers = sorted({layer for layer, _ in shares})
    modules = list(dict.fromkeys(module for _, module in shares))  # in the order in which they were pruned
    if max(shares.values()) - min(shares.values()) < _SAME_SHARE:
        mean = sum(shares.values()) / len(shares)
        return f"{percent_text(mean)} of {', '.join(modules)} in {plural(len(layers), 'layer')}"
    values = tuple(tuple(shares.get((layer, module)) for layer in layers) for module in modules)
    return HeatMap("shares", slug(f"shares {record.name}"), "Pruned share by module and layer", "", tuple(modules),
                   tuple(map(str, layers)), values, "", "layer")  # fmt: skip


def state_map(record: Record) -> HeatMap | None:
    """Pruned share of A_log by layer and state, or head; the longer axis is horizontal."""
    masks = {} if record.removes_parts else record.masks()
    if not masks:
        return None
    unit, shares = unit_of(masks), {layer: mask.double().mean(0).tolist() for layer, mask in masks.items()}
    layers, states = tuple(map(str, shares)), tuple(map(str, range(max(map(len, shares.values())))))
    values = [tuple(row[n] if n < len(row) else None for n in range(len(states))) for row in shares.values()]
    title, key = f"Pruned share of A_log by layer and {unit}", slug(f"state shares {record.name}")
    if len(layers) > len(states):
        return HeatMap("state_shares", key, title, "", states, layers, tuple(zip(*values, strict=True)), unit, "layer")
    return HeatMap("state_shares", key, title, "", layers, states, tuple(values), "layer", f"{unit} index")


def mask_map(record: Record) -> HeatMap | None:
    """The masks of A_log themselves: for each layer a strip of N rows, named in its middle, and a gap."""
    masks = {} if record.removes_parts else record.masks()
    if not masks or unit_of(masks) == "head":
        return None  # of heads, state_map shows each
    channels = max(len(mask) for mask in masks.values())
    per_column = -(-channels // _MASK_COLUMNS)
    names, values = [], []
    for layer, mask in masks.items():
        shares = torch.stack([group.mean(0) for group in mask.double().split(per_column)], 1)  # (N,columns)
        rows = [tuple(row) + (None,) * (-(-channels // per_column) - len(row)) for row in shares.tolist()]
        gap = [(None,) * len(rows[0])] * max(1, len(rows) // 5)
        names += [str(layer) if n == len(rows) // 2 else "" for n in range(len(rows) + len(gap))]
        values += [*rows, *gap]
    columns = tuple(str(n * per_column) for n in range(len(values[0])))
    note = "states from top to bottom" + (f", {per_column} channels to a column" if per_column > 1 else "")
    return HeatMap("masks", slug(f"masks {record.name}"), "Masks of A_log", note, tuple(names), columns, tuple(values),
                   "layer", "channel")  # fmt: skip


def unit_of(masks: Mapping[int, Tensor]) -> str:
    """What the columns of masks are: Mamba-2 has one row, and a column for each head."""
    return "head" if all(len(mask) == 1 for mask in masks.values()) else "state"
