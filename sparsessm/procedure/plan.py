"""The plan of a run, as data: made from the options, or by hand."""

from __future__ import annotations

from dataclasses import dataclass, replace

from sparsessm.errors import require_known
from sparsessm.options import Options
from sparsessm.pruning.methods import (
    ALLOCATIONS,
    CONV_HESSIANS,
    IMPORTANCES,
    PRUNED_A_LOG,
    RECOVERIES,
    REMOVAL_TARGETS,
    SEARCHES,
)
from sparsessm.pruning.patterns import Columns, NofM, Pattern, Unstructured
from sparsessm.pruning.saliency import SALIENCIES


@dataclass(frozen=True)
class TransitionPlan:
    """How A_log is pruned.

    Attributes:
        saliency, aggregate, search: of their tables; parameter: of the aggregate.
        obs: A_log is solved as a matrix instead. transition: what a pruned entry is (PRUNED_A_LOG).

    Raises:
        ValueError: a name that its table does not know.
    """

    pattern: Pattern
    saliency: str | None = None
    aggregate: str = "vote"
    search: str = "independent"
    parameter: float | None = None
    obs: bool = False
    transition: str = "zero"
    percdamp: float = 0.01
    blocksize: int = 128

    def __post_init__(self) -> None:
        if not self.obs:
            require_known("saliency", self.saliency, SALIENCIES)
        require_known("search", self.search, SEARCHES)
        require_known("transition", self.transition, PRUNED_A_LOG)

    @property
    def structure(self) -> str:
        """What its scores are of: "entries", or the structure that is removed whole."""
        return self.pattern.removes or "entries"

    def share(self, sparsity: float | None) -> TransitionPlan:
        """The plan for a layer with another sparsity."""
        return replace(self, pattern=self.pattern.share(sparsity))


@dataclass(frozen=True)
class WeightPlan:
    """How linear and conv1d weights are pruned.

    Attributes:
        rule: of procedure.rules.RULES. modules: names of the modules to prune.
        alpha: how far sparsities spread with sensitivity, 0 for uniform ones.
        conv_hessian: "tap", one K x K Hessian per channel, or "channel", the released D x D one over channels.
        refine_steps: iterations toward the best weights for the mask that OBS ends with.

    Raises:
        ValueError: a name that its table does not know.
    """

    pattern: Pattern
    rule: str
    modules: tuple[str, ...]
    alpha: float = 0.0
    conv_hessian: str = "tap"
    percdamp: float = 0.01
    blocksize: int = 128
    refine_steps: int = 0

    def __post_init__(self) -> None:
        require_known("conv_hessian", self.conv_hessian, CONV_HESSIANS)


@dataclass(frozen=True)
class CompensationPlan:
    """How the remaining weights compensate for the pruned ones.

    Attributes:
        refit: solve the mixer's last module toward the dense model's stream after the layer, whether it is pruned or not.
        sequential: modules of a layer one after the other, each on the outputs of the pruned ones before it; otherwise all
            on the activations of the layer before any of them was pruned.
        ridge: weight of the refit's ridge toward the weights as they are, as a share of the Hessian's mean diagonal.
    """

    refit: bool = False
    sequential: bool = False
    ridge: float = 0.1

    def __bool__(self) -> bool:
        return self.refit or self.sequential


@dataclass(frozen=True)
class RemovalPlan:
    """Greedy removal: the target (REMOVAL_TARGETS), the share of the layers in range, and what a pruned transition is."""

    target: str
    sparsity: float
    transition: str = "zero"

    def __post_init__(self) -> None:
        require_known("shed_target", self.target, REMOVAL_TARGETS)

    def steps(self, layers: int) -> int:
        return round(self.sparsity * layers)


@dataclass(frozen=True)
class RecoveryPlan:
    """How what was not pruned is tuned afterwards.

    Attributes:
        kinds: of RECOVERIES, one after the other. steps, model_rate: of Adam for the whole model. passes, block_rate: over
            the windows for each block. apart: share of the windows that are only looked at. seed: of their order.
    """

    kinds: tuple[str, ...] = ()
    steps: int = 200
    model_rate: float = 1e-3
    passes: int = 10
    block_rate: float = 2e-3
    apart: float = 0.125
    seed: int = 0

    def __post_init__(self) -> None:
        for kind in self.kinds:
            require_known("recover", kind, RECOVERIES)


@dataclass(frozen=True)
class Plan:
    """All that a run prunes: A_log, weights or both, with compensation, or whole parts.

    Attributes:
        allocation: of ALLOCATIONS. importance: of IMPORTANCES. seed: of the labels that it is measured by.
    """

    transitions: TransitionPlan | None = None
    weights: WeightPlan | None = None
    compensation: CompensationPlan = CompensationPlan()
    allocation: str = "uniform"
    importance: str = "none"
    seed: int = 0
    removal: RemovalPlan | None = None
    recovery: RecoveryPlan = RecoveryPlan()

    def __post_init__(self) -> None:
        require_known("allocation", self.allocation, ALLOCATIONS)
        require_known("importance", self.importance, IMPORTANCES)


def plan_of(options: Options, modules: tuple[str, ...]) -> Plan:
    """The plan that the options say; modules: names of those whose weights are pruned."""
    recipe = options.recipe
    if recipe is None:
        return Plan()
    recovery = RecoveryPlan(
        options.recover or (), options.recover_steps, options.recover_rate, options.recover_passes,
        options.recover_block_rate, seed=options.seed,
    )  # fmt: skip
    if recipe.removes_parts:
        removal = RemovalPlan(options.removal_target, options.share, options.pruned_transition)
        return Plan(removal=removal, recovery=recovery)
    pattern = NofM(options.prunen, options.prunem) if options.prunem else Unstructured(options.share)
    transitions = weights = None
    if options.prune_A:
        removes = recipe.structure != "entries"
        parameter = {"power": options.time_power, "discount": options.time_discount, "window": options.time_window}
        transitions = TransitionPlan(
            pattern=Columns(options.share, recipe.structure) if removes else pattern,
            saliency=recipe.saliency, aggregate=recipe.aggregate or "vote", search=recipe.search,
            parameter=parameter.get(recipe.aggregate or ""), obs=recipe.obs_on_A_log, transition=options.pruned_transition,
            percdamp=recipe.percdamp, blocksize=options.blocksize,
        )  # fmt: skip
    if options.prune_layers:
        assert recipe.weights is not None  # options without a rule are refused
        weights = WeightPlan(
            pattern=pattern, rule=recipe.weights, modules=modules,
            alpha=options.alpha if recipe.allocation == "sensitivity" else 0.0, conv_hessian=options.conv_hessian,
            percdamp=recipe.percdamp, blocksize=options.blocksize, refine_steps=recipe.polish,
        )  # fmt: skip
    compensation = CompensationPlan(recipe.compensate == "out_proj", recipe.module_order == "sequential", options.ridge)
    return Plan(transitions, weights, compensation, recipe.allocation, recipe.importance, options.seed, recovery=recovery)
