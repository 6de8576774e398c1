"""Which walks a set of plans takes: the paper's two phases, or one walk that compensates, after sparsities are allocated."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from sparsessm.layerwise.walk import Stream
from sparsessm.procedure.allocation import output_shares
from sparsessm.procedure.compensation import CompensationPlan, prune_compensated
from sparsessm.procedure.pipeline import (
    NO_PROGRESS,
    Masks,
    Progress,
    Report,
    TransitionPlan,
    WeightPlan,
    prune_A_log,
    prune_weights,
)


def prune(
    model: nn.Module,
    embed: Callable[[], Stream],
    transitions: TransitionPlan | None,
    weights: WeightPlan | None,
    compensation: CompensationPlan,
    allocate: bool,
    first: int,
    stop: int,
    report: Report,
    progress: Progress = NO_PROGRESS,
) -> Masks:
    """Prunes A_log, the weights or both in the blocks first <= i < stop; masks by parameter name, True = pruned.

    Args:
        embed: makes the stream that enters the first block. allocate: sparsities by measured errors, not the plans'.
    """
    where = (first, stop, report, progress)
    shares = output_shares(model, embed, transitions, weights, *where) if allocate else None
    if compensation or shares:
        return prune_compensated(model, embed, transitions, weights, compensation, *where, shares=shares)
    masks = prune_A_log(model, embed(), transitions, *where) if transitions else {}
    return masks | (prune_weights(model, embed, weights, *where) if weights else {})
