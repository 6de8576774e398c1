"""What was pruned from a checkpoint before: found by the masks and the record beside it, or by its values; counted once.

Pruned entries stay pruned, count in every total, and are neither candidates nor calibrated as large weights. Masks
are kept in the shape that a parameter had before anything was removed from it.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from sparsessm.errors import InputError, first_line
from sparsessm.models.architecture import MODULE_PARTS, PARTS, Layout
from sparsessm.models.checkpoint import read_json
from sparsessm.models.family import Architecture
from sparsessm.models.place import MASKS, RECORD

logger = logging.getLogger("sparsessm")

# exp(-dt exp(20)) is 0 for every time step above 2e-7: no training ends there, and pruning writes 30.
_NO_TRANSITION = 20.0
# A matrix of which less is exactly zero may be so by chance or by rounding.
_BY_CHANCE = 0.01

_LAYER = re.compile(r"\.(\d+)\.")  # the first number in a name is the layer


@dataclass(frozen=True)
class Cut:
    """What was removed from a parameter: entries (size,) along a dimension, True = gone."""

    dim: int
    gone: Tensor

    def left(self, tensor: Tensor) -> Tensor:
        """The entries of a tensor, in the shape from before, that are left."""
        return tensor.index_select(self.dim, (~self.gone).nonzero().flatten())

    def after(self, before: Cut | None) -> Cut:
        """Both, one after the other, in the shape from before the first."""
        if before is None:
            return self
        gone = before.gone.clone()
        gone[~before.gone] = self.gone
        return Cut(before.dim, gone)

    def whole(self, tensor: Tensor) -> Tensor:
        """A mask of the entries that are left, in the shape from before: removed entries are True."""
        shape = list(tensor.shape)
        shape[self.dim] = len(self.gone)
        found = torch.ones(shape, dtype=torch.bool)
        return found.index_copy_(self.dim, (~self.gone).nonzero().flatten(), tensor.cpu())


@dataclass(frozen=True)
class History:
    """What was pruned before.

    Attributes:
        masks: by parameter, True = gone, in the shape from before anything was removed.
        cuts: by parameter, what was removed from it; none where nothing was.
        counts: entries of whole parameters that were removed, by part.
        runs: the records of earlier runs, the first one first.
    """

    masks: dict[str, Tensor] = field(default_factory=dict)
    cuts: dict[str, Cut] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=lambda: dict.fromkeys(PARTS, 0))
    runs: list[dict[str, Any]] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.masks or any(self.counts.values()))

    def present(self) -> dict[str, Tensor]:
        """Masks in the shapes that parameters have now."""
        return {name: self.cuts[name].left(mask) if name in self.cuts else mask for name, mask in self.masks.items()}

    def merged(self, masks: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """These masks together with those of a run, which are in the present shapes."""
        found = dict(self.masks)
        for name, mask in masks.items():
            whole = self.cuts[name].whole(mask) if name in self.cuts else mask
            found[name] = whole | self.masks[name] if name in self.masks else whole
        return found

    def without_layers(self, removed: Sequence[int]) -> History:
        """The same for a model from which blocks were removed, without their masks, later blocks renumbered."""

        def renamed(values: Mapping[str, Any]) -> dict[str, Any]:
            found = {}
            for name, value in values.items():
                place = _LAYER.search(name)
                assert place is not None  # every mask is of a layer
                layer = int(place[1])
                if layer not in removed:
                    found[_LAYER.sub(f".{layer - sum(gone < layer for gone in removed)}.", name, count=1)] = value
            return found

        return replace(self, masks=renamed(self.masks), cuts=renamed(self.cuts))

    def removed(self, cuts: Mapping[str, Cut]) -> dict[str, dict[str, Any]]:
        """What is cut from each parameter, with these cuts of a run: dimension, and indices in the model as it once was."""
        every = self.cuts | {name: cut.after(self.cuts.get(name)) for name, cut in cuts.items()}
        return {
            name: {"dim": cut.dim, "index": cut.gone.nonzero().flatten().tolist()} for name, cut in sorted(every.items())
        }

    def followed_by(self, masks: Mapping[str, Tensor], past: Mapping[str, Any], run: dict[str, Any]) -> History:
        """The history of the model after a run that left these masks and this past (result.Result)."""
        cuts = {name: _recorded_cut(masks[name], cut) for name, cut in past.get("removed", {}).items()}
        counts = past.get("gone") or dict.fromkeys(PARTS, 0)
        return History(dict(masks), {name: cut for name, cut in cuts.items() if cut}, dict(counts), [*self.runs, run])

    def __str__(self) -> str:
        methods = [str(run.get("options", {}).get("method")) for run in self.runs]
        return ", ".join(methods) or "by its values"


def cut_between(mask: Tensor, shape: Sequence[int]) -> Cut:
    """Where a parameter became smaller than its mask: along the first such dimension, where the mask is full."""
    dim = next(d for d, (old, new) in enumerate(zip(mask.shape, shape, strict=True)) if old != new)
    full = mask.transpose(0, dim).flatten(1).all(1) if mask.dim() > 1 else mask.clone()
    missing = mask.shape[dim] - shape[dim]  # more may be full than was removed: pruned entirely, but not removed
    return Cut(dim, full & (full.cumsum(0) <= missing))


def read_history(folder: Path | None, layout: Layout) -> History:
    """What the folder of a checkpoint, if there is one, and the values of the loaded model say of earlier pruning.

    Raises:
        InputError: masks.safetensors or sparsessm.json is broken, or belongs to another model.
    """
    record = _read_record(folder)
    parameters = dict(layout.model.named_parameters())
    masks, cuts = _read_masks(folder, layout.row, parameters, record)
    sidecar = bool(masks)
    for name, (part, *_) in layout.parts().items():
        parameter, known = parameters[name], name in masks
        gone = _gone_by_value(parameter, part, sidecar)
        if known:
            here = cuts[name].left(masks[name]) if name in cuts else masks[name]
            value_gone = (parameter == 0) | (parameter >= _NO_TRANSITION) if part == "ssm" else parameter == 0
            stale = here & ~value_gone
            if stale.any():
                logger.warning(
                    "warning: %s marks %d entries of %s that hold other values: they count as not pruned",
                    MASKS, int(stale.sum()), name,
                )  # fmt: skip
            gone |= here & value_gone
        if name in cuts:
            masks[name] = cuts[name].whole(gone)
        elif gone.any():
            masks[name] = gone
        elif known:
            del masks[name]
    counts = {part: int(record.get("gone", {}).get(part, 0)) for part in PARTS}
    return History(dict(sorted(masks.items())), cuts, counts, _runs(record))


def _gone_by_value(parameter: Tensor, part: str, sidecar: bool) -> Tensor:
    """Entries of a parameter whose values can only come from pruning."""
    zero = parameter == 0
    if part == "ssm":
        gone = parameter >= _NO_TRANSITION
        return gone if sidecar or _is_initial(zero) else gone | zero
    return zero if not sidecar and float(zero.float().mean()) >= _BY_CHANCE else torch.zeros_like(zero)


def _is_initial(zero: Tensor) -> bool:
    """Whether A_log is zero where its initial values are: log 1 in the first state, or of the first head."""
    first = zero[:, 0] if zero.dim() == 2 else zero[:1]
    return bool(first.all()) and int(zero.sum()) == first.numel()


def _read_record(folder: Path | None) -> dict[str, Any]:
    if folder is None or not (folder / RECORD).is_file():
        return {}
    file = folder / RECORD
    record = read_json(file)
    gone, cuts = record.get("gone", {}), record.get("removed", {})
    whole = isinstance(gone, dict) and all(isinstance(n, int) and not isinstance(n, bool) and n >= 0 for n in gone.values())
    if not (
        whole and isinstance(cuts, dict) and all(map(_is_cut, cuts.values()))
        and isinstance(record.get("history", []), list) and isinstance(record.get("options", {}), dict)
    ):  # fmt: skip
        raise InputError(f"{file} does not have the expected content: restore it, or remove it and {MASKS}")
    return record


def _is_cut(value: Any) -> bool:
    if not (isinstance(value, dict) and isinstance(value.get("dim"), int) and isinstance(value.get("index"), list)):
        return False
    return all(isinstance(n, int) and not isinstance(n, bool) for n in value["index"])


def _runs(record: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The earlier records, and this one without them."""
    earlier = [run for run in record.get("history", []) if isinstance(run, dict)]
    own = {key: value for key, value in record.items() if key not in ("history", "gone", "removed")}
    return [*earlier, own] if own else earlier


def _read_masks(
    folder: Path | None, row: Architecture, parameters: Mapping[str, Tensor], record: Mapping[str, Any]
) -> tuple[dict[str, Tensor], dict[str, Cut]]:
    """The masks beside a checkpoint, and what was removed from parameters."""
    if folder is None or not (folder / MASKS).is_file():
        return {}, {}
    file = folder / MASKS
    try:
        masks = {row.here(name, parameters): mask for name, mask in load_file(file).items()}
    except (SafetensorError, OSError, ValueError) as error:
        raise InputError(f"{file} cannot be read ({first_line(error)}): restore it, or remove it") from None
    cuts = {}
    for name, mask in masks.items():
        parameter = parameters.get(name)
        if parameter is None or mask.dtype != torch.bool or mask.dim() != parameter.dim():
            raise InputError(f"{file}: {name} is not a mask of this model: remove the file, or restore the right one")
        if mask.shape == parameter.shape:
            continue
        cut = _recorded_cut(mask, record.get("removed", {}).get(name)) or cut_between(mask, parameter.shape)
        if cut.left(mask).shape != parameter.shape:
            raise InputError(
                f"{file}: {name} has shape {tuple(mask.shape)}, the model's is {tuple(parameter.shape)}: remove the file, "
                "or restore the right one"
            )
        cuts[name] = cut
    return masks, cuts


def _recorded_cut(mask: Tensor, recorded: Mapping[str, Any] | None) -> Cut | None:
    if recorded is None or not 0 <= recorded["dim"] < mask.dim():
        return None
    gone = torch.zeros(mask.shape[recorded["dim"]], dtype=torch.bool)
    gone[[n for n in recorded["index"] if 0 <= n < len(gone)]] = True
    return Cut(recorded["dim"], gone)


def counts_of(masks: Mapping[str, Tensor]) -> dict[str, dict[str, int]]:
    """What sparsity.json holds: pruned and total entries by parameter."""
    return {name: {"pruned": int(mask.sum()), "total": mask.numel()} for name, mask in masks.items()}


class Ledger:
    """Counts entries by part: of A_log (ssm), of the weights that can be pruned (layers), of the whole model.

    What earlier runs removed from the model counts as pruned; tied parameters count once.
    """

    def __init__(self, layout: Layout, history: History) -> None:
        self._parts, self._before = layout.parts(), history.counts
        self.sizes = dict(history.counts)
        for name, parameter in layout.model.named_parameters():
            self.add(self.sizes, name, history.masks[name].numel() if name in history.cuts else parameter.numel())

    def add(self, counts: dict[str, int], name: str, size: int) -> None:
        """Adds entries of a parameter to what it counts as."""
        for part in (*self._parts.get(name, ()), "model"):
            counts[part] += size

    def shares(self, counts: Mapping[str, Mapping[str, int]]) -> dict[str, float]:
        """Shares pruned by these counts and before; what was removed counts as pruned."""
        pruned = dict(self._before)
        for name, count in counts.items():
            self.add(pruned, name, count["pruned"])
        shown = {part: size for part, size in self.sizes.items() if size or part not in MODULE_PARTS}
        return {part: pruned[part] / size if size else 0.0 for part, size in shown.items()}


def already_pruned(history: History, model: nn.Module, names: set[str], sparsity: float) -> str | None:
    """A message if nothing would be pruned: all of these parameters have the requested sparsity already."""
    masks = history.present()
    sizes = {name: parameter.numel() for name, parameter in model.named_parameters() if name in names}
    if not sizes or any(round(sparsity * size) > int(masks[n].sum() if n in masks else 0) for n, size in sizes.items()):
        return None
    share = sum(int(masks[name].sum()) for name in sizes) / sum(sizes.values())
    return f"the model was pruned before and {share:.1%} of what is named is gone already: give a higher --sparsity"
