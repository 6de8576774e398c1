"""The two phases of pruning, each one walk: the transitions A_log (section 3), then the weights (sections 3.4 and 4).

What to do is a plan, made from the options or by hand; what was done comes back as masks by parameter name.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from sparsessm.model.block import prune_transitions, remove_states
from sparsessm.pruning.aggregation import Aggregator
from sparsessm.pruning.obs import polish, prune_magnitude, prune_obs, prune_wanda
from sparsessm.pruning.patterns import Columns, Pattern, Unstructured
from sparsessm.pruning.saliency import SALIENCIES
from sparsessm.pruning.search import select
from sparsessm.pruning.sensitivity import GROUPS, sensitivity, sparsities
from sparsessm.statistics import Accumulator, Energy, Gram, TapGram, hessian
from sparsessm.walk import BlockView, Stream, walk

Masks = dict[str, Tensor]
Report = Callable[..., None]  # report(phase, layer, **figures), called once for each finished layer


class Progress(Protocol):
    """Where finished layers are recorded and, after an interruption, found again (reporting.journal.Journal)."""

    def load(self, phase: str, layer: int) -> tuple[Mapping[str, Tensor], Masks] | None: ...

    def store(self, phase: str, layer: int, values: Mapping[str, Tensor], masks: Masks) -> None: ...

    def load_figures(self, name: str) -> Any | None: ...

    def store_figures(self, name: str, figures: Any) -> None: ...


class NoProgress:
    """Records nothing and finds nothing."""

    def load(self, phase: str, layer: int) -> None:
        return None

    def store(self, phase: str, layer: int, values: Mapping[str, Tensor], masks: Masks) -> None:
        pass

    def load_figures(self, name: str) -> None:
        return None

    def store_figures(self, name: str, figures: Any) -> None:
        pass


NO_PROGRESS = NoProgress()


@dataclass(frozen=True)
class TransitionPlan:
    """How A_log is pruned. saliency and aggregate as in their tables; with `obs` A_log is solved as a matrix instead.

    search: how entries are chosen by a saliency that knows how they interact (pruning.search).
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


@dataclass(frozen=True)
class WeightPlan:
    """How linear and conv1d weights are pruned.

    Attributes:
        rule: "magnitude", "wanda" or "obs". modules: names of the modules to prune.
        alpha: how far sparsities spread with sensitivity, 0 for uniform ones.
        conv_hessian: "tap", one K x K Hessian per channel, or "channel", the released D x D one over channels.
        polish: iterations toward the best weights for the mask that OBS ends with.
    """

    pattern: Pattern
    rule: str
    modules: tuple[str, ...]
    alpha: float = 0.0
    conv_hessian: str = "tap"
    percdamp: float = 0.01
    blocksize: int = 128
    polish: int = 0


@torch.no_grad()
def prune_A_log(
    model: nn.Module,
    stream: Stream,
    plan: TransitionPlan,
    first: int,
    stop: int,
    report: Report,
    progress: Progress = NO_PROGRESS,
) -> Masks:
    """Prunes the transitions of the blocks first <= i < stop, each on what the pruned blocks before it put out.

    Returns masks (D,N), True = pruned. With a Columns pattern the masked states are removed and the masks tell which.
    """
    masks = {}
    for view in walk(model, stream, first, stop):
        name = view.parameter_name("A_log")
        before = progress.load("ssm", view.index)
        if before is not None:
            mask = before[1][name].to(stream.device)
            apply_transitions(view, mask, plan)
            view.A_log.copy_(before[0][name])
        else:
            mask = prune_block_A_log(view, plan)
            progress.store("ssm", view.index, {name: view.A_log}, {name: mask})
        masks[name] = mask.cpu()
        report("ssm", view.index, sparsity=float(mask.float().mean()))
    shrink_states(model, plan)
    return masks


def shrink_states(model: nn.Module, plan: TransitionPlan) -> None:
    """Lets the config of a model whose states were removed say how many are left."""
    if isinstance(plan.pattern, Columns):
        model.config.state_size = model.backbone.layers[0].mixer.A_log.shape[1]


def prune_block_A_log(view: BlockView, plan: TransitionPlan, sparsity: float | None = None) -> Tensor:
    """Prunes the transitions of one block, to `sparsity` where it is not the plan's, and returns the mask (D,N)."""
    if sparsity is not None:
        plan = replace(plan, pattern=Unstructured(sparsity))
    mask = _solve_A_log(view, plan) if plan.obs else _choose_transitions(view, plan)
    apply_transitions(view, mask, plan)
    return mask


def apply_transitions(view: BlockView, mask: Tensor, plan: TransitionPlan) -> None:
    """Makes of a block what the plan says that pruned transitions are; with Columns the states are removed."""
    if isinstance(plan.pattern, Columns):
        remove_states(view.block, mask[0])
        view.forget()  # B and C are shorter now
    else:
        prune_transitions(view.block, mask, plan.transition)


def _choose_transitions(view: BlockView, plan: TransitionPlan) -> Tensor:
    saliency = SALIENCIES[plan.saliency]
    if saliency.interacts:
        return select(output_gram(view, plan), plan.pattern, plan.search)
    if not saliency.needs:
        return plan.pattern(saliency.score(view.A_log, None, None)[0])
    aggregator = Aggregator(plan.aggregate, view.stream.hidden.shape[1], plan.pattern, plan.parameter)
    for start, moments in view.observe_states(saliency.needs):
        aggregator.update(saliency.score(view.A_log, moments.h2, moments.abar), start)
    return plan.pattern(aggregator.scores())


def output_gram(view: BlockView, plan: TransitionPlan) -> Tensor:
    """G (D,N,N): what the block's output loses with the entries of each channel, pruned as the plan says."""
    effect = "removed" if isinstance(plan.pattern, Columns) else plan.transition
    gram = sum(moments.gram for _, moments in view.observe_states(("gram",), effect))
    return gram * module_weight(view, "out_proj").double().square().sum(0)[:, None, None]


def _solve_A_log(view: BlockView, plan: TransitionPlan) -> Tensor:
    """OBS on A_log as W (D,N), with H (N,N) = sum over samples, steps and channels of h_{t-1} h_{t-1}^T.

    Sets A_log to the solution and returns the mask.
    """
    H = sum(moments.hh for _, moments in view.observe_states(("hh",)))
    name = view.parameter_name("A_log")
    new, mask = prune_obs(view.A_log, H.float(), plan.pattern, plan.blocksize, plan.percdamp, name)
    view.A_log.copy_(new)
    return mask


@torch.no_grad()
def prune_weights(
    model: nn.Module,
    embed: Callable[[], Stream],
    plan: WeightPlan,
    first: int,
    stop: int,
    report: Report,
    progress: Progress = NO_PROGRESS,
) -> Masks:
    """Prunes the weights of plan.modules in the blocks first <= i < stop.

    Args:
        embed: makes the stream that enters the first block; called once for the sensitivities and once to prune.
    """
    share = _sensitive_sparsities(model, embed, plan, first, stop, report, progress) if plan.alpha else {}
    masks, stream = {}, embed()
    for view in walk(model, stream, first, stop):
        before = progress.load("layers", view.index)
        if before is not None:
            for name in plan.modules:
                module_weight(view, name).copy_(before[0][view.parameter_name(f"{name}.weight")])
            found = before[1]
        else:
            found = _prune_block(view, plan, share)
            values = {view.parameter_name(f"{name}.weight"): module_weight(view, name) for name in plan.modules}
            progress.store("layers", view.index, values, found)
        masks |= found
        sizes = [mask.numel() for mask in found.values()]
        report("layers", view.index, sparsity=sum(int(mask.sum()) for mask in found.values()) / sum(sizes))
    return masks


def _prune_block(view: BlockView, plan: WeightPlan, share: Mapping[tuple[int, str], float]) -> Masks:
    """Prunes the modules of one block; share: sparsities of modules that differ from the plan's."""
    accumulators = {name: made for name in plan.modules if (made := accumulator(view, name, plan)) is not None}
    if accumulators:
        view.observe(accumulators)
    masks = {}
    for name in plan.modules:
        seen = accumulators[name].total if name in accumulators else None
        mask = prune_module(view, name, plan, seen, sparsity=share.get((view.index, name)))
        masks[view.parameter_name(f"{name}.weight")] = mask.cpu()
    return masks


def _sensitive_sparsities(
    model: nn.Module,
    embed: Callable[[], Stream],
    plan: WeightPlan,
    first: int,
    stop: int,
    report: Report,
    progress: Progress,
) -> dict[tuple[int, str], float]:
    """Pass 1: walks the model as it is and sets the sparsity of each in_proj and out_proj by its sensitivity."""
    rows = progress.load_figures("sensitivity")
    if rows is None:
        rows = []
        for view in walk(model, embed(), first, stop):
            names = [name for name in GROUPS if name in plan.modules]
            energies = {name: Energy(module_weight(view, name).shape[1], view.stream.device) for name in names}
            view.observe(energies, advance=True)
            found = {n: sensitivity(hessian(energy.total, view.stream.total)) for n, energy in energies.items()}
            rows += [(view.index, name, value) for name, value in found.items()]
            report("sensitivity", view.index, **found)
        progress.store_figures("sensitivity", rows)
    return sparsities({(layer, name): value for layer, name, value in rows}, plan.pattern.sparsity, plan.alpha)


def module_weight(view: BlockView, name: str) -> Tensor:
    return view.block.mixer.get_submodule(name).weight.data


def accumulator(view: BlockView, name: str, plan: WeightPlan) -> Accumulator | None:
    """What the rule has to know of the module's inputs, or None."""
    if plan.rule == "magnitude":
        return None
    weight, device = module_weight(view, name), view.stream.device
    if name == "conv1d":
        D, _, K = weight.shape
        channelwise = plan.rule == "obs" and plan.conv_hessian == "channel"
        return Gram(D, skip=K - 1, device=device) if channelwise else TapGram(D, K, device)
    return Gram(weight.shape[1], device=device) if plan.rule == "obs" else Energy(weight.shape[1], device)


def prune_module(
    view: BlockView,
    name: str,
    plan: WeightPlan,
    seen: Tensor | None,
    start: Tensor | None = None,
    sparsity: float | None = None,
) -> Tensor:
    """Prunes one weight in place and returns its mask, in the weight's shape.

    Args:
        seen: what the accumulator of the plan's rule has summed. start: (rows,cols), the weights to prune instead of
            those that are there. sparsity: where it is not that of the plan.
    """
    pattern = plan.pattern if sparsity is None else Unstructured(sparsity)
    weight, conv = module_weight(view, name), name == "conv1d"
    W = start if start is not None else weight.squeeze(1) if conv else weight  # (D,1,K) -> (D,K)
    W = W.float()
    if plan.rule == "magnitude":
        new, mask = prune_magnitude(W, pattern)
    elif plan.rule == "wanda":
        new, mask = prune_wanda(W, seen.diagonal(dim1=-2, dim2=-1) if conv else seen, pattern)
    else:
        H = hessian(seen, view.stream.total)
        layout = {"tap": W.unsqueeze(1), "channel": W.T}[plan.conv_hessian] if conv else W  # (D,1,K) or (K,D)
        label = view.parameter_name(f"{name}.weight")
        new, mask = prune_obs(layout, H, pattern, plan.blocksize, plan.percdamp, label)
        if plan.polish:
            new = polish(new, mask, layout, H, plan.percdamp, plan.polish)
        if conv and plan.conv_hessian == "channel":
            new, mask = new.T, mask.T
    weight.copy_(new.reshape(weight.shape))
    return mask.reshape(weight.shape).contiguous()
