"""Pruning in which the remaining weights compensate for the pruned ones (docs/BEYOND.md).

One pass over the model that is pruned, with the dense one beside it on the same windows. In each layer A_log is pruned
first, then the modules in the order in which data meets them. The mixer's last module is solved toward the dense
model's stream after the layer, not its old weight: that repairs the drift of this layer and all before it.
"""

from __future__ import annotations

from torch import Tensor

from sparsessm.layerwise.layer import Layer
from sparsessm.layerwise.statistics import CrossGram
from sparsessm.procedure.driver import Change, Masks, Outcome, Shapes
from sparsessm.procedure.plan import CompensationPlan, TransitionPlan, WeightPlan
from sparsessm.procedure.rules import observed, prune_module
from sparsessm.procedure.transitions import apply_choice, choose_transitions, expected_of, restore_values, shaped
from sparsessm.procedure.weights import Shares, share_of
from sparsessm.pruning.obs import refine
from sparsessm.pruning.refit import refit


class PruneCompensated(Change):
    """Prunes A_log, the weights or both of each layer, and solves its last module toward the dense stream."""

    name = "compensated"

    def __init__(
        self, transitions: TransitionPlan | None, weights: WeightPlan | None, plan: CompensationPlan, shares: Shares
    ) -> None:
        self.transitions, self.weights, self.plan, self.shares = transitions, weights, plan, shares
        self.dense = plan.refit

    def _modules(self, layer: Layer) -> list[str]:
        return layer.those(() if self.weights is None else self.weights.modules)

    def _transitions(self, layer: Layer) -> TransitionPlan | None:
        return self.transitions if layer.has_mixer else None

    def _refitted(self, layer: Layer) -> str | None:
        """The mixer's last module, where it is solved toward the dense stream."""
        return layer.mixer.MODULES[-1] if self.dense and layer.has_mixer else None

    def concerns(self, layer: Layer) -> bool:
        return layer.has_mixer or bool(self._modules(layer))

    def visit(self, layer: Layer, dense: Layer | None) -> Outcome:
        choice, applied, weights = None, (Masks(), Masks()), Masks()
        if (transitions := self._transitions(layer)) is not None:
            plan = transitions.share(self.shares.get((layer.index, "A_log")))
            choice = choose_transitions(layer, plan)
            applied = apply_choice(layer, choice, plan)
        if self.weights is not None:
            modules = self._modules(layer)
            for together in [[name] for name in modules] if self.plan.sequential else [modules]:
                weights |= self._prune_modules(layer, dense, self.weights, together)
        last = self._refitted(layer)
        if dense is not None and last is not None and last not in self._modules(layer):
            layer.write(f"{last}.weight", self._solved(layer, _target(layer, dense)))
        return self._outcome(layer, choice, applied, weights)

    def _outcome(self, layer: Layer, choice: Tensor | None, applied: tuple[Masks, Masks], weights: Masks) -> Outcome:
        figures = {}
        if choice is not None:
            figures["ssm"] = float(choice.double().mean())
        if weights:
            figures["layers"] = share_of(weights)
        choices = weights if choice is None else {layer.full_name("A_log"): choice, **weights}
        values: Masks = {name: layer.parameter(layer.short_name(name)) for name in self._values(layer)}
        masks, removed = applied
        return Outcome({**masks, **weights}, removed, choices, values, figures)

    def _values(self, layer: Layer) -> Shapes:
        names = [f"{name}.weight" for name in self._modules(layer)]
        if (last := self._refitted(layer)) is not None:
            names.append(f"{last}.weight")
        if (transitions := self._transitions(layer)) is not None and not transitions.pattern.removes:
            names.append("A_log")
        return {layer.full_name(name): layer.parameter(name).shape for name in names}

    def expected(self, layer: Layer) -> tuple[Shapes, Shapes]:
        later = layer
        choices: Shapes = {}
        if (transitions := self._transitions(layer)) is not None:
            later, (_, choices) = shaped(layer, transitions), expected_of(layer, transitions)
        weights = {later.full_name(f"{name}.weight"): later.weight(name).shape for name in self._modules(layer)}
        return self._values(later), {**weights, **choices}

    def restore(self, layer: Layer, values: Masks, choices: Masks) -> Outcome:
        weights, applied, choice = dict(choices), (Masks(), Masks()), None
        if (transitions := self._transitions(layer)) is not None:
            choice = weights.pop(layer.full_name("A_log")).to(layer.stream.device)
            applied = apply_choice(layer, choice, transitions)
        restore_values(layer, values)
        return self._outcome(layer, choice, applied, weights)

    def _prune_modules(self, layer: Layer, dense: Layer | None, plan: WeightPlan, names: list[str]) -> Masks:
        """Prunes modules whose inputs are observed together."""
        last = self._refitted(layer)
        seen, masks = observed(layer, [name for name in names if name != last], plan), {}
        for name in names:
            sums, start = seen.get(name), None
            if name == last and dense is not None:
                gram = _target(layer, dense)
                start, sums = self._solved(layer, gram), gram.total
            share = self.shares.get((layer.index, name))
            masks[layer.full_name(f"{name}.weight")] = prune_module(layer, name, plan, sums, start, share)
        return masks

    def _solved(self, layer: Layer, gram: CrossGram) -> Tensor:
        """The last module's weight that comes nearest to the dense model's stream; what was pruned before stays zero."""
        last = layer.mixer.MODULES[-1]
        best = refit(layer.weight(last), gram.total, gram.cross, self.plan.ridge)
        gone = layer.gone(f"{last}.weight")
        if gone is None:
            return best
        return refine(best.masked_fill(gone, 0), gone, best, gram.total.to(best.dtype), self.plan.ridge)


def _target(layer: Layer, dense: Layer) -> CrossGram:
    rows, cols = layer.weight(layer.mixer.MODULES[-1]).shape
    gram = CrossGram(rows, cols, layer.stream.device)
    layer.observe_target(dense, gram)
    return gram
