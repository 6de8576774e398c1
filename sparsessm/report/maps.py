"""The content of the maps, as data that plots.py draws: pruned shares by module, part and state, and masks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest

import numpy as np

from sparsessm.report.looks import Looks
from sparsessm.report.results import Record
from sparsessm.report.wording import grouped, percent_text, plural

# Channels side by side in a map of masks: of more, neighbours share a column.
_MASK_COLUMNS = 384

# A share that differs by less than this from layer to layer is one share, up to rounding.
_SAME_SHARE = 1e-3

_PARTS = {"ssm": "A_log", "mixer": "mixer", "attention": "attention", "mlp": "MLP", "layers": "weights"}


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
        values = np.array([[record.metrics["sparsity"].get(part, np.nan) for part in parts] for record in found])
        maps.append(HeatMap("parts", f"parts {looks.models[model]}", looks.models[model], "a row a run",
                            [looks.run(record) for record in found], [_PARTS[part] for part in parts], values))  # fmt: skip
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
    values = np.array([[shares.get((layer, module), np.nan) for layer in layers] for module in modules])
    return HeatMap("shares", f"shares {record.name}", "Pruned share by module and layer", "", modules,
                   [str(layer) for layer in layers], values, "", "layer")  # fmt: skip


def state_map(record: Record) -> HeatMap | None:
    """Pruned share of A_log by layer and state, or head; the longer axis is horizontal."""
    masks = record.masks()
    if not masks:
        return None
    unit, layers = unit_of(masks), [str(layer) for layer in masks]
    values = np.array([*zip_longest(*(mask.mean(0) for mask in masks.values()), fillvalue=np.nan)])  # (states,layers)
    states = [str(n) for n in range(len(values))]
    title, key = f"Pruned share of A_log by layer and {unit}", f"state shares {record.name}"
    if len(layers) > len(states):
        return HeatMap("state_shares", key, title, "", states, layers, values, unit, "layer")
    return HeatMap("state_shares", key, title, "", layers, states, values.T, "layer", f"{unit} index")


def mask_map(record: Record) -> HeatMap | None:
    """The masks of A_log themselves: for each layer a strip of N rows, named in its middle, and a gap."""
    masks = record.masks()
    if not masks or unit_of(masks) == "head":
        return None  # of heads, state_map shows each
    channels = max(map(len, masks.values()))
    per_column = -(-channels // _MASK_COLUMNS)
    columns = [str(start) for start in range(0, channels, per_column)]
    names, strips = [], []
    for layer, mask in masks.items():
        D, N = mask.shape
        shares = [mask[start : start + per_column].mean(0) for start in range(0, D, per_column)]
        strip = np.full((N + max(1, N // 5), len(columns)), np.nan)
        strip[:N, : len(shares)] = np.transpose(shares)
        names += [str(layer) if n == N // 2 else "" for n in range(len(strip))]
        strips.append(strip)
    note = "states from top to bottom" + (f", {per_column} channels to a column" if per_column > 1 else "")
    values = np.concatenate(strips)
    return HeatMap("masks", f"masks {record.name}", "Masks of A_log", note, names, columns, values, "layer", "channel")


def unit_of(masks: Mapping[int, np.ndarray]) -> str:
    """What the columns of masks are: Mamba-2 has one row, and a column for each head."""
    return "head" if all(len(mask) == 1 for mask in masks.values()) else "state"
