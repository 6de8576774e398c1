"""Pruning linear and conv1d weights (sections 3.4 and 4): sparsities from sensitivities, then OBS or a baseline."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from sparsessm.layerwise.layer import Layer
from sparsessm.layerwise.statistics import SquaredNorms, hessian
from sparsessm.procedure.driver import Change, Job, Masks, Measurement, Outcome, Shapes, run_pass
from sparsessm.procedure.plan import WeightPlan
from sparsessm.procedure.rules import observed, prune_module
from sparsessm.procedure.transitions import restore_values
from sparsessm.pruning.sensitivity import sensitivity, sparsities

Shares = Mapping[tuple[int, str], float]  # sparsity by layer and module, or A_log; where it is not the plan's


class MeasureSensitivity(Measurement):
    """Pass 1: how sensitive the modules at both ends of each mixer and those outside are, in the model as it is."""

    name = "sensitivity"

    def __init__(self, plan: WeightPlan) -> None:
        self.plan = plan

    def _modules(self, layer: Layer) -> list[str]:
        ends = {layer.mixer.MODULES[0], layer.mixer.MODULES[-1]} if layer.has_mixer else set()
        ranked = ends | {name for name, module in layer.modules.items() if module.part != "mixer"}
        return [name for name in layer.those(self.plan.modules) if name in ranked]

    def concerns(self, layer: Layer) -> bool:
        return bool(self._modules(layer))

    def visit(self, layer: Layer, dense: Layer | None) -> Outcome:
        norms = {name: SquaredNorms(layer.weight(name).shape[1], layer.stream.device) for name in self._modules(layer)}
        layer.observe(norms, advance=True)
        found = {name: sensitivity(hessian(sums.total, layer.stream.total)) for name, sums in norms.items()}
        return Outcome(figures=found, record=found)

    def fits(self, layer: Layer, record: Any) -> bool:
        return list(record) == self._modules(layer) and all(math.isfinite(value) for value in record.values())


class PruneWeights(Change):
    """Pass 2: prunes the modules of each layer on the outputs of the pruned layers before it."""

    name = "layers"

    def __init__(self, plan: WeightPlan, shares: Shares) -> None:
        self.plan, self.shares = plan, shares

    def concerns(self, layer: Layer) -> bool:
        return bool(layer.those(self.plan.modules))

    def visit(self, layer: Layer, dense: Layer | None) -> Outcome:
        modules = layer.those(self.plan.modules)
        seen, masks = observed(layer, modules, self.plan), {}
        for name in modules:
            share = self.shares.get((layer.index, name))
            mask = prune_module(layer, name, self.plan, seen.get(name), sparsity=share)
            masks[layer.full_name(f"{name}.weight")] = mask
        return self._outcome(layer, masks)

    def _outcome(self, layer: Layer, masks: Masks) -> Outcome:
        values = {layer.full_name(f"{name}.weight"): layer.weight(name) for name in layer.those(self.plan.modules)}
        return Outcome(masks, values=values, figures={"sparsity": share_of(masks)})

    def expected(self, layer: Layer) -> tuple[Shapes, Shapes]:
        shapes = {layer.full_name(f"{name}.weight"): layer.weight(name).shape for name in layer.those(self.plan.modules)}
        return shapes, shapes

    def restore(self, layer: Layer, values: Masks, choices: Masks) -> Outcome:
        restore_values(layer, values)
        return self._outcome(layer, choices)


def share_of(masks: Masks) -> float:
    return sum(int(mask.sum()) for mask in masks.values()) / sum(mask.numel() for mask in masks.values())


def sensitive_shares(job: Job, plan: WeightPlan) -> Shares:
    """Sparsities by sensitivity, where the plan spreads them; {} for uniform ones."""
    if not plan.alpha:
        return {}
    found = run_pass(job, MeasureSensitivity(plan))
    scores = {(layer, name): value for layer, outcome in found.items() for name, value in outcome.record.items()}
    return sparsities(scores, plan.pattern.sparsity, plan.alpha)
