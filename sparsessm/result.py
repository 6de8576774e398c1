"""What was pruned from a model: this run's masks together with those from before, counted, saved and reported."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from importlib import metadata
from typing import Any

from torch import Tensor

from sparsessm.models.history import History, Ledger, counts_of
from sparsessm.procedure.removal import RemovedParts
from sparsessm.version import __version__


@dataclass(frozen=True)
class Result:
    """The result of pruning a model.

    Attributes:
        masks: by parameter name as in the model now, bool, True = pruned, in the shape from before anything was removed;
            what earlier runs pruned is in them.
        sparsity: pruned shares: "ssm" of the entries of A_log, "layers" of the weights that can be pruned, "model".
        counts: pruned and total entries by parameter name as in the model before.
        removed_layers: indices of layers that were removed whole, in the model before.
        past: the part of a saved model's record about removed parts and earlier runs.
    """

    masks: dict[str, Tensor] = field(default_factory=dict)
    sparsity: dict[str, float] = field(default_factory=dict)
    counts: dict[str, dict[str, int]] = field(default_factory=dict)
    removed_layers: list[int] = field(default_factory=list)
    past: dict[str, Any] = field(default_factory=dict)


def result_of(history: History, ledger: Ledger, removed: RemovedParts) -> Result:
    """The result of a run on a model with a history; ledger: of the model before the run."""
    merged = history.merged(removed.masks)  # of removed layers, the entries removed with them count instead
    counts = counts_of({name: mask for name, mask in merged.items() if name not in removed.gone})
    counts |= {name: {"pruned": size, "total": size} for name, size in removed.gone.items()}
    rest = history.without_layers(removed.layers)
    masks = rest.merged(removed.masks)
    gone = dict(history.counts)
    for name, size in removed.gone.items():
        ledger.add(gone, name, size)
    past = {
        "gone": gone if any(gone.values()) else {}, "removed": rest.removed(removed.cuts), "history": history.runs,
    }  # fmt: skip
    past = {key: value for key, value in past.items() if value}
    return Result(masks, ledger.shares(counts), counts, removed.layers, past)


def versions() -> dict[str, str]:
    """Versions of the packages that a figure may depend on."""
    found = {"sparsessm": __version__, "python": sys.version.split()[0]}
    for package in ("torch", "transformers", "tokenizers", "safetensors", "numpy", "datasets", "mamba-ssm", "lm-eval"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
