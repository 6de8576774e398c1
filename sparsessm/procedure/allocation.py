"""Sparsities of layers and modules from the errors that they make at the output of their block (docs/BEYOND.md)."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from sparsessm.layerwise.walk import BlockView, Stream, walk
from sparsessm.procedure.pipeline import (
    NO_PROGRESS,
    Progress,
    Report,
    TransitionPlan,
    WeightPlan,
    accumulator,
    module_weight,
    prune_block_A_log,
    prune_module,
)
from sparsessm.pruning.budget import MEASURED_AT, budget

ALLOCATIONS = ("uniform", "sensitivity", "output")


@torch.no_grad()
def output_shares(
    model: nn.Module,
    embed: Callable[[], Stream],
    transitions: TransitionPlan | None,
    weights: WeightPlan | None,
    first: int,
    stop: int,
    report: Report,
    progress: Progress = NO_PROGRESS,
) -> dict[tuple[int, str], float]:
    """Sparsity by layer and module, and by layer and A_log, for the plans' sparsities over all of them.

    One walk over the model as it is. Each part is pruned alone at the sparsities MEASURED_AT, the error of the block's
    output is taken on the first batch of windows of each process, relative to the energy of the stream, and the part is
    put back. A_log and the weights have a budget each.
    """
    names = ["A_log"] * (transitions is not None) + list(weights.modules if weights is not None else ())
    parts = [(layer, name) for layer in range(first, stop) for name in names]

    def fits(rows: Any) -> bool:
        return [tuple(row[:2]) for row in rows] == parts and all(
            size > 0 and len(errors) == len(MEASURED_AT) and all(map(math.isfinite, errors)) for _, _, size, errors in rows
        )

    rows = progress.load_figures("allocation", fits)
    if rows is None:
        rows = []
        for view in walk(model, embed(), first, stop):
            found = _measure(view, transitions, weights)
            rows += [(view.index, name, size, errors) for name, (size, errors) in found.items()]
            report("allocation", view.index, **{name: errors[0] for name, (_, errors) in found.items()})
        progress.store_figures("allocation", rows)
    shares: dict[tuple[int, str], float] = {}
    for plan, ours in ((transitions, lambda name: name == "A_log"), (weights, lambda name: name != "A_log")):
        parts = {(layer, name): (size, errors) for layer, name, size, errors in rows if ours(name)}
        if plan is not None:
            shares |= budget(parts, plan.pattern.sparsity)
    return shares


def _measure(
    view: BlockView, transitions: TransitionPlan | None, weights: WeightPlan | None
) -> dict[str, tuple[int, list[float]]]:
    """Size and errors of each part of a block; the block is left as it was."""
    before = copy.deepcopy(view.block)
    original = BlockView(view.index, before, view.stream)
    found = {}
    if transitions is not None:
        errors = []
        for sparsity in MEASURED_AT:
            prune_block_A_log(view, transitions, sparsity)
            errors.append(view.output_error(original))
            view.write("A_log", before.mixer.A_log)
        found["A_log"] = (view.A_log.numel(), errors)
    if weights is not None:
        plan = replace(weights, polish=0)
        made = {name: accumulator(view, name, plan) for name in plan.modules}
        seen = {name: sums for name, sums in made.items() if sums is not None}
        if seen:
            view.observe(seen)
        for name in plan.modules:
            errors = []
            for sparsity in MEASURED_AT:
                prune_module(view, name, plan, seen[name].total if name in seen else None, sparsity=sparsity)
                errors.append(view.output_error(original))
                view.write(f"{name}.weight", module_weight(original, name))
            found[name] = (module_weight(view, name).numel(), errors)
    return found
