"""Which passes a plan takes: the paper's two phases, or one pass that compensates, after sparsities are allocated."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from sparsessm.models.history import cut_between
from sparsessm.procedure.allocation import MEASURES, measured_shares
from sparsessm.procedure.compensation import PruneCompensated
from sparsessm.procedure.driver import Job, Outcome, Pass, masks_of, removed_of, run_pass
from sparsessm.procedure.importance import measured_importance
from sparsessm.procedure.plan import Plan
from sparsessm.procedure.recovery import reports_of
from sparsessm.procedure.removal import RemovedParts, remove_parts
from sparsessm.procedure.transitions import PruneTransitions
from sparsessm.procedure.weights import MeasureSensitivity, PruneWeights, sensitive_shares


def reports(job: Job, plan: Plan) -> int:
    """How many times the job's report is called while a plan is executed, with its recovery."""
    recovery = reports_of(job, plan.recovery)
    if plan.removal is not None:
        candidates = len(job.indices())
        return recovery + sum(candidates - step + 1 for step in range(plan.removal.steps(candidates)))
    works: list[Pass] = []
    if plan.allocation in MEASURES:
        works.append(MEASURES[plan.allocation](plan.transitions, plan.weights))
    if plan.compensation or works:
        works.append(PruneCompensated(plan.transitions, plan.weights, plan.compensation, {}))
    else:
        if plan.transitions is not None:
            works.append(PruneTransitions(plan.transitions))
        if plan.weights is not None:
            works += [MeasureSensitivity(plan.weights)] if plan.weights.alpha else []
            works.append(PruneWeights(plan.weights, {}))
    measured = (plan.importance != "none") * len(job.layout.layers)
    return recovery + measured + sum(len(job.indices(work)) for work in works)


def prune(job: Job, plan: Plan, windows: Tensor) -> RemovedParts:
    """Executes a plan, but for its recovery; masks by full name, True = pruned, and what was removed whole.

    Args:
        windows: (n,L) token ids that the stream of the job is made of, all processes' windows.
    """
    if plan.removal is not None:
        return remove_parts(job, windows, plan.removal)
    if plan.importance != "none":
        job = measured_importance(job, plan)
    shares = measured_shares(job, plan.allocation, plan.transitions, plan.weights)
    found: list[Mapping[int, Outcome]] = []
    if plan.compensation or shares:
        found.append(run_pass(job, PruneCompensated(plan.transitions, plan.weights, plan.compensation, shares)))
    else:
        if plan.transitions is not None:
            found.append(run_pass(job, PruneTransitions(plan.transitions)))
        if plan.weights is not None:
            found.append(run_pass(job, PruneWeights(plan.weights, sensitive_shares(job, plan.weights))))
    if plan.transitions is not None and plan.transitions.pattern.removes:
        job.layout.shrink(plan.transitions.structure)
    masks = {name: mask for outcomes in found for name, mask in masks_of(outcomes).items()}
    removed = {name: mask for outcomes in found for name, mask in removed_of(outcomes).items()}
    cuts = {name: cut_between(mask, job.layout.model.get_parameter(name).shape) for name, mask in removed.items()}
    for name, mask in removed.items():
        masks[name] = mask | cuts[name].whole(masks[name]) if name in masks else mask
    return RemovedParts(masks=masks, cuts=cuts)
