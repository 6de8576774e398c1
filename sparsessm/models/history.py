"""What a checkpoint has lost already: found by the masks and the record beside it, or by its values, and never counted anew.

Entries that are gone stay gone, count in every total, and are neither candidates nor calibrated as large weights. Masks
are kept in the shape that a parameter had before anything was removed from it.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from sparsessm.errors import InputError, first_line
from sparsessm.models.checkpoint import Source, read_json
from sparsessm.models.mamba1 import MODULES
from sparsessm.models.place import MASKS, RECORD

logger = logging.getLogger("sparsessm")

# exp(-dt exp(20)) is 0 for every time step above 2e-7: no training ends there, and pruning writes 30.
_NO_TRANSITION = 20.0
# A matrix of which less is exactly zero may be so by chance or by rounding.
_BY_CHANCE = 0.01

PARTS = ("ssm", "layers", "model")
_LAYER = re.compile(r"\.layers\.(\d+)\.")
_WEIGHT = re.compile(rf"\.mixer\.({'|'.join(MODULES)})\.weight$")


def part_of(name: str) -> str:
    """The part that a parameter counts in besides the whole model: "ssm", "layers", or "model" for all others."""
    return "ssm" if name.endswith(".A_log") else "layers" if _WEIGHT.search(name) else "model"


@dataclass(frozen=True)
class History:
    """What was pruned before.

    Attributes:
        masks: by parameter, True = gone, in the shape from before anything was removed.
        states: by A_log parameter, the states (N0,) that were removed from it; none where none were.
        counts: entries of whole parameters that are not there any more, by part.
        runs: the records of earlier runs, the first one first.
    """

    masks: dict[str, Tensor] = field(default_factory=dict)
    states: dict[str, Tensor] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(PARTS, 0))
    runs: list[dict[str, Any]] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.masks or any(self.counts.values()))

    def present(self) -> dict[str, Tensor]:
        """Masks of what is there, in the shapes that parameters have now."""
        return {name: mask[:, ~self.states[name]] if name in self.states else mask for name, mask in self.masks.items()}

    def merged(self, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """These masks together with those of a run, which has the shapes of now."""
        found = dict(self.masks)
        for name, mask in masks.items():
            if name in self.states:
                whole = self.masks[name].clone()
                whole[:, ~self.states[name]] |= mask
                found[name] = whole
            else:
                found[name] = mask | self.masks[name] if name in self.masks else mask
        return found

    def without_layers(self, removed: Sequence[int]) -> History:
        """The same for a model from which blocks were taken out: their masks go, those behind them move up."""

        def renamed(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
            found = {}
            for name, tensor in tensors.items():
                place = _LAYER.search(name)
                layer = int(place[1])
                if layer not in removed:
                    found[_LAYER.sub(f".layers.{layer - sum(gone < layer for gone in removed)}.", name)] = tensor
            return found

        return replace(self, masks=renamed(self.masks), states=renamed(self.states))

    def removed(self, masks: Mapping[str, Tensor], model: nn.Module) -> dict[str, list[int]]:
        """Which states are gone from each A_log of a pruned model, counted from 0 in the model as it once was."""
        found = {}
        for name, parameter in model.named_parameters():
            mask = masks.get(name)
            if mask is None or mask.shape == parameter.shape:
                continue
            before = self.states.get(name, torch.zeros(mask.shape[1], dtype=torch.bool))
            columns = before | mask.all(0)
            if int(columns.sum()) != mask.shape[1] - parameter.shape[1]:  # pruned whole before others were removed
                left = mask.shape[1] - parameter.shape[1] - int(before.sum())
                columns = before | _first(mask.all(0) & ~before, left)
            found[name] = columns.nonzero().flatten().tolist()
        return found

    def __str__(self) -> str:
        methods = [str(run.get("options", {}).get("method")) for run in self.runs]
        return ", ".join(methods) or "by its values"


def _first(mask: Tensor, count: int) -> Tensor:
    return mask & (mask.cumsum(0) <= count)


def read_history(source: Source, model: nn.Module) -> History:
    """What the folder and the values of a loaded model say of earlier pruning.

    Raises:
        InputError: masks.safetensors or sparsessm.json is broken, or belongs to another model.
    """
    record = _read_record(source)
    parameters = dict(model.named_parameters())
    masks, states = _read_masks(source, parameters, record)
    sidecar = bool(masks)
    for name, parameter in parameters.items():
        kind = part_of(name)
        if kind == "model":
            continue
        known = name in masks
        gone = _gone_by_value(parameter, kind, sidecar)
        if known:
            here = masks[name][:, ~states[name]] if name in states else masks[name]
            value_gone = (parameter == 0) | (parameter >= _NO_TRANSITION) if kind == "ssm" else parameter == 0
            stale = here & ~value_gone
            if stale.any():
                logger.warning(
                    "warning: %s marks %d entries of %s that hold other values: they count as not pruned",
                    MASKS, int(stale.sum()), name,
                )  # fmt: skip
            gone |= here & value_gone
        if name in states:
            whole = states[name].expand(parameter.shape[0], -1).clone()
            whole[:, ~states[name]] = gone
            masks[name] = whole
        elif gone.any():
            masks[name] = gone
        elif known:
            del masks[name]
    counts = {part: int(record.get("gone", {}).get(part, 0)) for part in PARTS}
    return History(dict(sorted(masks.items())), states, counts, _runs(record))


def _gone_by_value(parameter: Tensor, kind: str, sidecar: bool) -> Tensor:
    """Entries of a parameter whose values can only come from pruning."""
    zero = parameter == 0
    if kind == "ssm":
        # S4D's initial values are log 1 = 0 in all of the first state; zeros elsewhere were put there
        initial = bool(zero[:, 0].all()) and int(zero.sum()) == zero.shape[0]
        gone = parameter >= _NO_TRANSITION
        return gone if initial or sidecar else gone | zero
    return zero if not sidecar and float(zero.float().mean()) >= _BY_CHANCE else torch.zeros_like(zero)


def _read_record(source: Source) -> dict[str, Any]:
    file = source.folder / RECORD
    if not file.is_file():
        return {}
    record = read_json(file)
    gone, states = record.get("gone", {}), record.get("removed_states", {})
    whole = isinstance(gone, dict) and all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in gone.values())
    named = isinstance(states, dict) and all(isinstance(n, int) for row in states.values() for n in _listed(row, file))
    if not (whole and named and isinstance(record.get("history", []), list) and isinstance(record.get("options", {}), dict)):
        raise InputError(f"{file} does not hold what it should: restore it, or remove it and {MASKS}")
    return record


def _listed(row: Any, file: Any) -> list[Any]:
    if not isinstance(row, list):
        raise InputError(f"{file} does not hold what it should: restore it, or remove it and {MASKS}")
    return row


def _runs(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The earlier records, and this one without them."""
    earlier = [run for run in record.get("history", []) if isinstance(run, dict)]
    own = {key: value for key, value in record.items() if key not in ("history", "gone", "removed_states")}
    return [*earlier, own] if own else earlier


def _read_masks(
    source: Source, parameters: Mapping[str, Tensor], record: Mapping[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The masks beside a checkpoint, and by A_log which states were removed."""
    file = source.folder / MASKS
    if not file.is_file():
        return {}, {}
    try:
        masks = load_file(file)
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{file} cannot be read ({first_line(error)}): restore it, or remove it") from None
    states = {}
    for name, mask in masks.items():
        parameter = parameters.get(name)
        if parameter is None or mask.dtype != torch.bool or mask.dim() != parameter.dim():
            raise InputError(f"{file}: {name} is no mask of this model: remove the file, or restore the right one")
        if mask.shape == parameter.shape:
            continue
        columns = _removed_states(mask, record.get("removed_states", {}).get(name))
        fits = name.endswith(".A_log") and mask.shape[0] == parameter.shape[0]
        if not fits or int((~columns).sum()) != parameter.shape[1]:
            raise InputError(
                f"{file}: {name} has shape {tuple(mask.shape)}, the model's is {tuple(parameter.shape)}: remove the file, "
                "or restore the right one"
            )
        states[name] = columns
    return masks, states


def _removed_states(mask: Tensor, recorded: list[int] | None) -> Tensor:
    """(N0,): the removed states; as recorded, else the columns that are gone whole (versions before 0.2)."""
    if recorded is None:
        return mask.all(0)
    columns = torch.zeros(mask.shape[1], dtype=torch.bool)
    columns[[n for n in recorded if 0 <= n < mask.shape[1]]] = True
    return columns


def already_pruned(history: History, model: nn.Module, names: set[str], sparsity: float) -> str | None:
    """A line where nothing would be pruned: every one of these parameters has lost the share that is asked for."""
    masks = history.present()
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters() if name in names}
    if not sizes or any(round(sparsity * size) > int(masks[n].sum() if n in masks else 0) for n, size in sizes.items()):
        return None
    share = sum(int(masks[name].sum()) for name in sizes) / sum(sizes.values())
    return f"the model was pruned before and {share:.1%} of what is named is gone already: give a higher --sparsity"
