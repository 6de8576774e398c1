"""Sparsities of layers and modules by what pruning them costs: errors of layers, or all steps of OBC (docs/BEYOND.md)."""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from sparsessm.layerwise.layer import Layer
from sparsessm.procedure.driver import Job, Measurement, Outcome, run_pass
from sparsessm.procedure.plan import TransitionPlan, WeightPlan
from sparsessm.procedure.rules import observed, problem_of, prune_module, step_costs
from sparsessm.procedure.transitions import apply_choice, choose_transitions, transition_costs
from sparsessm.procedure.weights import Shares
from sparsessm.pruning.budget import MEASURED_AT, MOST, budget, cheapest, counts_of, in_whole_entries


class _Measure(Measurement):
    """Measures the parts of a layer that the plans prune: A_log, and modules by name."""

    def __init__(self, transitions: TransitionPlan | None, weights: WeightPlan | None) -> None:
        self.transitions, self.weights = transitions, weights

    def _parts(self, layer: Layer) -> list[str]:
        A_log = ["A_log"] * (self.transitions is not None and layer.has_mixer)
        return A_log + layer.those(self.weights.modules if self.weights else ())

    def concerns(self, layer: Layer) -> bool:
        return bool(self._parts(layer))


class MeasureErrors(_Measure):
    """Prunes each part of a layer alone at the sparsities MEASURED_AT, takes the error of the layer's output, puts it back.

    The error is taken on the first batch of windows of each process, relative to the squares of the stream.
    """

    name = "allocation"

    def __init__(self, transitions: TransitionPlan | None, weights: WeightPlan | None) -> None:
        super().__init__(transitions, None if weights is None else replace(weights, refine_steps=0))

    def visit(self, layer: Layer, dense: Layer | None) -> Outcome:
        original = layer.copy(copy.deepcopy(layer.module))
        found: dict[str, Any] = {}
        if self.transitions is not None and layer.has_mixer:
            errors = []
            for sparsity in MEASURED_AT:
                plan = self.transitions.share(sparsity)
                apply_choice(layer, choose_transitions(layer, plan), plan)
                errors.append(layer.output_error(original))
                layer.write("A_log", original.A_log)
            found["A_log"] = [layer.A_log.numel(), errors]
        if self.weights is not None:
            modules = layer.those(self.weights.modules)
            seen = observed(layer, modules, self.weights)
            for name in modules:
                errors = []
                for sparsity in MEASURED_AT:
                    prune_module(layer, name, self.weights, seen.get(name), sparsity=sparsity)
                    errors.append(layer.output_error(original))
                    layer.write(f"{name}.weight", original.weight(name))
                found[name] = [layer.weight(name).numel(), errors]
        return Outcome(figures={name: errors[0] for name, (_, errors) in found.items()}, record=found)

    def fits(self, layer: Layer, record: Any) -> bool:
        return list(record) == self._parts(layer) and all(
            size > 0 and len(errors) == len(MEASURED_AT) and all(map(math.isfinite, errors))
            for size, errors in record.values()
        )


class MeasureSteps(_Measure):
    """Takes what every step of pruning a part costs the model's loss, in the model as it is; counts by their size."""

    name = "steps"

    def visit(self, layer: Layer, dense: Layer | None) -> Outcome:
        found: dict[str, Any] = {}
        if self.transitions is not None and layer.has_mixer:
            found["A_log"] = counts_of(transition_costs(layer, self.transitions))
        if self.weights is not None:
            modules = layer.those(self.weights.modules)
            seen = observed(layer, modules, self.weights)
            for name in modules:
                found[name] = counts_of(step_costs(problem_of(layer, name, self.weights, seen[name])))
        return Outcome(record=found)

    def fits(self, layer: Layer, record: Any) -> bool:
        sizes = {name: layer.A_log.numel() if name == "A_log" else layer.weight(name).numel() for name in self._parts(layer)}
        return list(record) == list(sizes) and all(
            sum(count for _, count in record[name]) == size and all(count > 0 for _, count in record[name])
            for name, size in sizes.items()
        )


# The measurement of each allocation that takes one.
MEASURES: Mapping[str, type[_Measure]] = {"output": MeasureErrors, "loss": MeasureSteps}


def measured_shares(
    job: Job, allocation: str, transitions: TransitionPlan | None, weights: WeightPlan | None
) -> Shares:
    """Sparsity by layer and module, and by layer and A_log, for the plans' sparsities over all of them.

    A_log and the weights have a budget each; {} for an allocation that measures nothing.
    """
    if allocation not in MEASURES:
        return {}
    found = run_pass(job, MEASURES[allocation](transitions, weights))
    shares: dict[tuple[int, str], float] = {}
    for plan, ours in ((transitions, lambda name: name == "A_log"), (weights, lambda name: name != "A_log")):
        if plan is not None:
            parts = {
                (layer, name): measured
                for layer, outcome in found.items() for name, measured in outcome.record.items() if ours(name)
            }  # fmt: skip
            sparsity = plan.pattern.sparsity
            if allocation == "loss":
                shares |= cheapest(parts, sparsity, 1.0 if plan is transitions else MOST)
            elif plan is transitions:  # Mamba-2 has a handful of entries a layer
                shares |= in_whole_entries({part: size for part, (size, _) in parts.items()}, budget(parts, sparsity))
            else:
                shares |= budget(parts, sparsity)
    return shares
