"""How the weight of one module is pruned: a rule is a row. Each rule names the statistics of the inputs that it needs."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sparsessm.errors import require_known
from sparsessm.layerwise.layer import Layer
from sparsessm.layerwise.statistics import Accumulator, Gram, ShiftedGram, SquaredNorms, hessian
from sparsessm.procedure.plan import WeightPlan
from sparsessm.procedure.transitions import naming
from sparsessm.pruning.obc import prune_obc, traces
from sparsessm.pruning.obs import inverse_factor, prepared, prune_magnitude, prune_obs, prune_wanda, refine
from sparsessm.pruning.patterns import Pattern


@dataclass(frozen=True)
class Problem:
    """One weight to prune.

    Attributes:
        W: (rows,cols) float32, of a convolution (D,K). gone: pruned before, in the same shape. name: for messages.
        seen: the tensor that the rule's accumulator has summed, None without one. windows: over how many of calibration.
        importance: (rows,), what the squared error of each output counts for; None for all the same.
    """

    W: Tensor
    gone: Tensor | None
    name: str
    conv: bool
    seen: Any
    windows: int
    importance: Tensor | None
    plan: WeightPlan
    pattern: Pattern


@dataclass(frozen=True)
class Rule:
    """A row: `observes(layer, module, plan)` makes the accumulator or None, `solve(problem)` is (new weight, mask)."""

    observes: Callable[[Layer, str, WeightPlan], Accumulator | None]
    solve: Callable[[Problem], tuple[Tensor, Tensor]]


def _nothing(layer: Layer, module: str, plan: WeightPlan) -> None:
    return None


def _magnitude(problem: Problem) -> tuple[Tensor, Tensor]:
    return prune_magnitude(problem.W, problem.pattern, problem.gone)


def _norms(layer: Layer, module: str, plan: WeightPlan) -> Accumulator:
    weight, device = layer.weight(module), layer.stream.device
    if _is_conv(weight):
        return ShiftedGram(weight.shape[0], weight.shape[2], device)
    return SquaredNorms(weight.shape[1], device)


def _wanda(problem: Problem) -> tuple[Tensor, Tensor]:
    norms = problem.seen if problem.seen.dim() == 1 else problem.seen.diagonal(dim1=-2, dim2=-1)
    return prune_wanda(problem.W, norms, problem.pattern, problem.gone)


def _grams(layer: Layer, module: str, plan: WeightPlan) -> Accumulator:
    weight, device = layer.weight(module), layer.stream.device
    if not _is_conv(weight):
        return Gram(weight.shape[1], device=device)
    D, _, K = weight.shape
    return Gram(D, skip=K - 1, device=device) if plan.conv_hessian == "channel" else ShiftedGram(D, K, device)


def _solver(prune: Callable[..., tuple[Tensor, Tensor]]) -> Callable[[Problem], tuple[Tensor, Tensor]]:
    """A rule of prune_obs or prune_obc."""

    def solve(problem: Problem) -> tuple[Tensor, Tensor]:
        plan, turned = problem.plan, problem.conv and problem.plan.conv_hessian == "channel"
        W, H, gone = matrices(problem)
        importance = None if turned else problem.importance  # of rows, which are its columns
        new, mask = prune(W, H, problem.pattern, plan.blocksize, plan.percdamp, problem.name, gone, importance)
        if plan.refine_steps:
            new = refine(new, mask, W, H, plan.percdamp, plan.refine_steps)
        return (new.T, mask.T) if turned else (new, mask)

    return solve


def matrices(problem: Problem) -> tuple[Tensor, Tensor, Tensor | None]:
    """The weight, (rows,cols) or (G,rows,cols), its Hessian, and what was pruned before, as a solver takes them."""
    W, gone = problem.W, problem.gone
    if problem.conv and problem.plan.conv_hessian == "channel":  # (K,D): the released code's rows are the K weights
        W, gone = W.T, None if gone is None else gone.T
    elif problem.conv:  # (D,1,K): a problem for each channel
        W, gone = W.unsqueeze(1), None if gone is None else gone.unsqueeze(1)
    return W, hessian(problem.seen, problem.windows), gone


def step_costs(problem: Problem) -> Tensor:
    """What every step of pruning a weight by the rule "obc" costs, see pruning.obc.traces."""
    blocksize, name = problem.plan.blocksize, problem.name
    W, H, gone = prepared(*matrices(problem), problem.pattern, blocksize, name)
    U = inverse_factor(H, problem.plan.percdamp, name)
    return traces(W, U, problem.pattern, blocksize, gone, problem.importance)[1]


# By the names of pruning.methods.WEIGHT_RULES.
RULES = {
    "magnitude": Rule(_nothing, _magnitude), "wanda": Rule(_norms, _wanda),
    "obs": Rule(_grams, _solver(prune_obs)), "obc": Rule(_grams, _solver(prune_obc)),
}  # fmt: skip


def rule_of(plan: WeightPlan) -> Rule:
    """The plan's row.

    Raises:
        ValueError: there is none.
    """
    require_known("weight rule", plan.rule, RULES)
    return RULES[plan.rule]


def _is_conv(weight: Tensor) -> bool:
    return weight.dim() == 3


def observed(layer: Layer, modules: Iterable[str], plan: WeightPlan) -> dict[str, Tensor]:
    """The statistics of the inputs that the plan's rule needs, by module; none where it needs none."""
    made = {name: rule_of(plan).observes(layer, name, plan) for name in modules}
    seen = {name: sums for name, sums in made.items() if sums is not None}
    if seen:
        layer.observe(seen)
    return {name: sums.total for name, sums in seen.items()}


def prune_module(
    layer: Layer,
    module: str,
    plan: WeightPlan,
    seen: Tensor | None,
    start: Tensor | None = None,
    sparsity: float | None = None,
) -> Tensor:
    """Prunes one weight of a layer and returns its mask, in the weight's shape.

    Args:
        seen: what the accumulator of the plan's rule has summed. start: (rows,cols), the weights to prune instead of
            those that are there. sparsity: where it is not that of the plan.
    """
    problem = problem_of(layer, module, plan, seen, start, sparsity)
    with naming(problem.name):
        new, mask = rule_of(plan).solve(problem)
    layer.write(f"{module}.weight", new)
    return mask.reshape(layer.weight(module).shape).contiguous()


def problem_of(
    layer: Layer, module: str, plan: WeightPlan, seen: Tensor | None, start: Tensor | None = None,
    sparsity: float | None = None,
) -> Problem:  # fmt: skip
    """What there is to solve at a module of a layer, see prune_module."""
    weight, name = layer.weight(module), f"{module}.weight"
    W = start if start is not None else weight.squeeze(1) if _is_conv(weight) else weight  # (D,1,K) -> (D,K)
    gone, importance = layer.gone(name), layer.importance(module)
    return Problem(
        W=W.float(), gone=None if gone is None else gone.view(W.shape), name=layer.full_name(name), conv=_is_conv(weight),
        seen=seen, windows=layer.stream.total, plan=plan, pattern=plan.pattern.share(sparsity),
        importance=None if importance is None else importance.rows,
    )  # fmt: skip
