"""Pruning that lets the weights that stay make up for those that go (docs/BEYOND.md).

One walk over the model that is pruned, with the dense one walked along on the same windows. In each block A_log is pruned
first, then the modules in the order in which data meets them. What out_proj is solved for is not its old weight but the
dense model's stream after the block: that repairs what this block and all before it have drifted.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparsessm.layerwise.statistics import PairGram
from sparsessm.layerwise.walk import BlockView, Stream, walk
from sparsessm.models.mamba1 import MODULES
from sparsessm.procedure.pipeline import (
    NO_PROGRESS,
    Masks,
    Progress,
    Report,
    TransitionPlan,
    WeightPlan,
    accumulator,
    apply_transitions,
    module_weight,
    prune_block_A_log,
    prune_module,
    shape_left,
    shrink_states,
)
from sparsessm.pruning.obs import polish
from sparsessm.pruning.refit import refit


@dataclass(frozen=True)
class CompensationPlan:
    """How the weights that stay make up for those that go.

    Attributes:
        refit: solve out_proj toward the dense model's stream after the block, whether it is pruned or not.
        sequential: modules of a block one after the other, each on what the pruned ones before it put out; otherwise
            all on what the block made of its inputs before any of them was pruned.
        ridge: pull of the refit toward the weights as they are, as a share of the Hessian's mean diagonal.
    """

    refit: bool = False
    sequential: bool = False
    ridge: float = 0.1

    def __bool__(self) -> bool:
        return self.refit or self.sequential


Shares = Mapping[tuple[int, str], float]  # sparsity by layer and module, or A_log; where it is not the plan's


@torch.no_grad()
def prune_compensated(
    model: nn.Module,
    embed: Callable[[], Stream],
    transitions: TransitionPlan | None,
    weights: WeightPlan | None,
    plan: CompensationPlan,
    first: int,
    stop: int,
    report: Report,
    progress: Progress = NO_PROGRESS,
    shares: Shares | None = None,
) -> Masks:
    """Prunes A_log, the weights or both in the blocks first <= i < stop; masks by parameter name, True = pruned.

    Args:
        embed: makes the stream that enters the first block; called for the pruned model and, with `refit`, for the dense.
    """
    masks: Masks = {}
    dense = embed() if plan.refit else None
    for view in walk(model, embed()):
        teacher = None if dense is None else BlockView(view.index, copy.deepcopy(view.block), dense)
        if first <= view.index < stop:
            masks |= _prune_block(view, teacher, transitions, weights, plan, report, progress, shares or {})
        if teacher is not None:
            teacher.advance()
    if transitions is not None:
        shrink_states(model, transitions)
    return masks


def _prune_block(
    view: BlockView,
    teacher: BlockView | None,
    transitions: TransitionPlan | None,
    weights: WeightPlan | None,
    plan: CompensationPlan,
    report: Report,
    progress: Progress,
    shares: Shares,
) -> Masks:
    A_log, modules = view.parameter_name("A_log"), () if weights is None else weights.modules
    masked = {view.parameter_name(f"{name}.weight"): module_weight(view, name).shape for name in modules}
    changed = dict(masked)
    if teacher is not None:
        changed[view.parameter_name("out_proj.weight")] = module_weight(view, "out_proj").shape
    if transitions is not None:
        masked[A_log], changed[A_log] = view.A_log.shape, shape_left(view, transitions)
    before = progress.load("compensated", view.index, changed, masked)
    if before is not None:
        values, masks = before
        if transitions is not None:
            apply_transitions(view, masks[A_log].to(view.stream.device), transitions)
        for name, value in values.items():
            view.write(_short(view, name), value)
    else:
        masks = {}
        if transitions is not None:
            masks[A_log] = prune_block_A_log(view, transitions, shares.get((view.index, "A_log")))
        for together in [(name,) for name in modules] if plan.sequential else [modules]:
            masks |= _prune_modules(view, teacher, together, weights, plan, shares)
        if teacher is not None and "out_proj" not in modules:
            pair = _aim(view, teacher)
            view.write("out_proj.weight", _solved(view, pair, plan))
        values = {name: view.block.mixer.get_parameter(_short(view, name)) for name in changed}
        progress.store("compensated", view.index, values, masks)
    figures = {}
    for part, names in {"ssm": masks.keys() & {A_log}, "layers": masks.keys() - {A_log}}.items():
        if names:
            figures[part] = sum(int(masks[name].sum()) for name in names) / sum(masks[name].numel() for name in names)
    report("compensated", view.index, **figures)
    return {name: mask.cpu() for name, mask in masks.items()}


def _prune_modules(
    view: BlockView,
    teacher: BlockView | None,
    names: tuple[str, ...],
    weights: WeightPlan,
    plan: CompensationPlan,
    shares: Shares,
) -> Masks:
    """Prunes modules that look at their inputs together."""
    made = {name: accumulator(view, name, weights) for name in names if name != "out_proj" or teacher is None}
    seen = {name: found for name, found in made.items() if found is not None}
    if seen:
        view.observe(seen)
    masks = {}
    for name in sorted(names, key=MODULES.index):
        sums, start = seen[name].total if name in seen else None, None
        if name == "out_proj" and teacher is not None:
            pair = _aim(view, teacher)
            start, sums = _solved(view, pair, plan), pair.total
            if weights.rule == "wanda":
                sums = sums.diagonal()
        masks[view.parameter_name(f"{name}.weight")] = prune_module(
            view, name, weights, sums, start, shares.get((view.index, name))
        )
    return masks


def _aim(view: BlockView, teacher: BlockView) -> PairGram:
    pair = PairGram(*module_weight(view, "out_proj").shape, view.stream.device)
    view.observe_aim(teacher, pair)
    return pair


def _solved(view: BlockView, pair: PairGram, plan: CompensationPlan) -> Tensor:
    """The weight of out_proj that comes nearest to the dense model's stream; what was pruned before stays zero."""
    best = refit(module_weight(view, "out_proj"), pair.total, pair.cross, plan.ridge)
    gone = view.gone("out_proj.weight")
    return best if gone is None else polish(best.masked_fill(gone, 0), gone, best, pair.total.to(best.dtype), plan.ridge)


def _short(view: BlockView, name: str) -> str:
    """The name of a parameter within its mixer."""
    return name.removeprefix(view.parameter_name(""))
