"""Pruning A_log (section 3): scores from scan statistics, aggregated over time, chosen by a pattern."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from sparsessm.errors import NumericalError
from sparsessm.layerwise.layer import Layer
from sparsessm.procedure.driver import Change, Masks, Outcome, Shapes
from sparsessm.procedure.plan import TransitionPlan
from sparsessm.pruning.aggregation import Aggregator
from sparsessm.pruning.methods import PRUNED_A_LOG
from sparsessm.pruning.obs import prune_obs
from sparsessm.pruning.saliency import SALIENCIES
from sparsessm.pruning.search import marginal_costs, select, without


class PruneTransitions(Change):
    """Prunes the transitions of each layer on the outputs of the pruned layers before it."""

    name = "ssm"

    def __init__(self, plan: TransitionPlan) -> None:
        self.plan = plan

    def visit(self, layer: Layer, dense: Layer | None) -> Outcome:
        choice = choose_transitions(layer, self.plan)
        return self._applied(layer, choice)

    def _applied(self, layer: Layer, choice: Tensor) -> Outcome:
        masks, removed = apply_choice(layer, choice, self.plan)
        name = layer.full_name("A_log")
        values: Masks = {} if self.plan.pattern.removes else {name: layer.parameter("A_log")}
        return Outcome(masks, removed, {name: choice}, values, {"sparsity": float(choice.float().mean())})

    def expected(self, layer: Layer) -> tuple[Shapes, Shapes]:
        return expected_of(layer, self.plan)

    def restore(self, layer: Layer, values: Masks, choices: Masks) -> Outcome:
        outcome = self._applied(layer, choices[layer.full_name("A_log")].to(layer.stream.device))
        restore_values(layer, values)
        return outcome


def expected_of(layer: Layer, plan: TransitionPlan) -> tuple[Shapes, Shapes]:
    """Names and shapes of what is recorded of pruned transitions: values, and the choice in the shape of the scores."""
    name = layer.full_name("A_log")
    values = {} if plan.pattern.removes else {name: layer.parameter("A_log").shape}
    return values, {name: layer.mixer.scored(plan.structure).shape}


def shaped(layer: Layer, plan: TransitionPlan) -> Layer:
    """A layer in which parameters have the shapes that they will have after the plan; its values have no meaning."""
    if not plan.pattern.removes:
        return layer
    later = layer.copy(copy.deepcopy(layer.module))
    scores = later.mixer.scored(plan.structure)
    pattern = plan.pattern.within(later.mixer.competing(plan.structure), scores.shape[1])
    later.remove(plan.structure, pattern(scores.new_zeros(scores.shape))[0])
    return later


def restore_values(layer: Layer, values: Masks) -> None:
    for name, value in values.items():
        layer.write(layer.short_name(name), value)


def choose_transitions(layer: Layer, plan: TransitionPlan) -> Tensor:
    """The entries of A_log to prune, bool, shape of the scores (rows,cols). If A_log is solved, the solution is written."""
    with naming(layer.full_name("A_log")):
        return _solve(layer, plan) if plan.obs else _choose(layer, plan)


def apply_choice(layer: Layer, choice: Tensor, plan: TransitionPlan) -> tuple[Masks, Masks]:
    """Writes the plan's value of pruned transitions to a layer, or removes whole structures.

    Returns the mask of A_log, and masks of what was removed (see Outcome); one of both is empty.

    Entries that were pruned before this run stay as they are.
    """
    if plan.pattern.removes:
        return {}, layer.remove(plan.structure, choice[0])
    gone = layer.gone("A_log")
    new = choice if gone is None else choice & ~gone.view(choice.shape)
    layer.write("A_log", layer.A_log.masked_fill(new, PRUNED_A_LOG[plan.transition]))
    return {layer.full_name("A_log"): choice.reshape(layer.parameter("A_log").shape)}, {}


@contextmanager
def naming(parameter: str) -> Iterator[None]:
    """Adds the name of the parameter to a NumericalError."""
    try:
        yield
    except NumericalError as error:
        if parameter in str(error):
            raise
        raise type(error)(f"{parameter}: {error}: the model's weights or the calibration text are not usable") from error


def _choose(layer: Layer, plan: TransitionPlan) -> Tensor:
    assert plan.saliency is not None  # where A_log is not solved
    saliency, A_log = SALIENCIES[plan.saliency], layer.mixer.scored(plan.structure)
    gone = layer.gone("A_log")
    if gone is not None:
        gone = gone.reshape(layer.A_log.shape).expand(A_log.shape)
    pattern = plan.pattern.within(layer.mixer.competing(plan.structure), A_log.shape[1])
    if saliency.interacts:
        return select(output_gram(layer, plan), pattern, plan.search, gone)
    if not saliency.needs:
        return pattern.choose(saliency(layer.mixer.magnitudes(plan.structure), None)[0], gone)
    aggregator = Aggregator(plan.aggregate, layer.stream.hidden.shape[1], pattern, plan.parameter, gone)
    for start, statistics in layer.scan_statistics(saliency.needs, structure=plan.structure):
        aggregator.update(saliency(A_log, statistics), start)
    return aggregator.mask()


def transition_costs(layer: Layer, plan: TransitionPlan) -> Tensor:
    """What every step of pruning A_log costs at the layer's output, each row's own greedy order, as a running maximum."""
    G, gone = output_gram(layer, plan), layer.gone("A_log")
    if gone is not None:
        G = without(G, gone.view(G.shape[:2]))
    return marginal_costs(G)[1].cummax(-1).values.clamp_min(0)


def output_gram(layer: Layer, plan: TransitionPlan) -> Tensor:
    """G (groups,cols,cols): what the layer's output loses with the entries of each group, for the plan's transition."""
    effect = "removed" if plan.pattern.removes else plan.transition
    sums = layer.scan_statistics(("gram",), effect, plan.structure)
    gram: Any = sum(statistics.gram for _, statistics in sums)
    return layer.mixer.output_gram(gram)


def _solve(layer: Layer, plan: TransitionPlan) -> Tensor:
    """OBS on A_log as W (rows,cols), with H (cols,cols) the sum of products of states over samples, steps and rows."""
    H: Any = sum(statistics.hh for _, statistics in layer.scan_statistics(("hh",)))
    W, gone = layer.A_log, layer.gone("A_log")
    gone = None if gone is None else gone.view(W.shape)
    name = layer.full_name("A_log")
    new, mask = prune_obs(W, H.float(), plan.pattern, plan.blocksize, plan.percdamp, name, gone)
    layer.write("A_log", new if gone is None else torch.where(gone, W, new))
    return mask
