"""The two phases of pruning, each one walk: the transitions A_log (section 3), then the weights (sections 3.4 and 4).

What to do is a plan, made from the options or by hand; what was done comes back as masks by parameter name.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from sparsessm.errors import NumericalError
from sparsessm.layerwise.statistics import Accumulator, Energy, Gram, TapGram, hessian
from sparsessm.layerwise.walk import BlockView, Stream, walk
from sparsessm.models.mamba1 import PRUNED_A_LOG
from sparsessm.pruning.aggregation import Aggregator
from sparsessm.pruning.obs import polish, prune_magnitude, prune_obs, prune_wanda
from sparsessm.pruning.patterns import Columns, Pattern, Unstructured, choose
from sparsessm.pruning.saliency import SALIENCIES
from sparsessm.pruning.search import select
from sparsessm.pruning.sensitivity import GROUPS, sensitivity, sparsities

WEIGHT_RULES, CONV_HESSIANS = ("magnitude", "wanda", "obs"), ("tap", "channel")

Masks = dict[str, Tensor]
Shapes = Mapping[str, Sequence[int]]
Report = Callable[..., None]  # report(phase, layer, **figures), called once for each finished layer


class Progress(Protocol):
    """Where finished layers are recorded and, after an interruption, found again (runs.journal.Journal)."""

    def load(self, phase: str, layer: int, values: Shapes, masks: Shapes) -> tuple[Mapping[str, Tensor], Masks] | None: ...

    def store(self, phase: str, layer: int, values: Mapping[str, Tensor], masks: Masks) -> None: ...

    def load_figures(self, name: str, check: Callable[[Any], bool]) -> Any | None: ...

    def store_figures(self, name: str, figures: Any) -> None: ...


class NoProgress:
    """Records nothing and finds nothing."""

    def load(self, phase: str, layer: int, values: Shapes, masks: Shapes) -> None:
        return None

    def store(self, phase: str, layer: int, values: Mapping[str, Tensor], masks: Masks) -> None:
        pass

    def load_figures(self, name: str, check: Callable[[Any], bool]) -> None:
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

    Raises:
        ValueError: a rule or a conv_hessian that nobody knows.
    """

    pattern: Pattern
    rule: str
    modules: tuple[str, ...]
    alpha: float = 0.0
    conv_hessian: str = "tap"
    percdamp: float = 0.01
    blocksize: int = 128
    polish: int = 0

    def __post_init__(self) -> None:
        for value, known in ((self.rule, WEIGHT_RULES), (self.conv_hessian, CONV_HESSIANS)):
            if value not in known:
                raise ValueError(f"unknown {value!r}, known are {', '.join(known)}")


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
        before = progress.load("ssm", view.index, {name: shape_left(view, plan)}, {name: view.A_log.shape})
        if before is not None:
            mask = before[1][name].to(stream.device)
            apply_transitions(view, mask, plan)
            view.write("A_log", before[0][name])
        else:
            mask = prune_block_A_log(view, plan)
            progress.store("ssm", view.index, {name: view.A_log}, {name: mask})
        masks[name] = mask.cpu()
        report("ssm", view.index, sparsity=float(mask.float().mean()))
    shrink_states(model, plan)
    return masks


def shape_left(view: BlockView, plan: TransitionPlan) -> tuple[int, int]:
    """The shape that A_log of a block has after pruning."""
    D, N = view.A_log.shape
    return D, N - round(plan.pattern.sparsity * N) if isinstance(plan.pattern, Columns) else N


def shrink_states(model: nn.Module, plan: TransitionPlan) -> None:
    """Lets the config of a model whose states were removed say how many are left."""
    if isinstance(plan.pattern, Columns):
        model.config.state_size = model.backbone.layers[0].mixer.A_log.shape[1]


def prune_block_A_log(view: BlockView, plan: TransitionPlan, sparsity: float | None = None) -> Tensor:
    """Prunes the transitions of one block, to `sparsity` where it is not the plan's, and returns the mask (D,N)."""
    if sparsity is not None:
        plan = replace(plan, pattern=Unstructured(sparsity))
    with naming(view.parameter_name("A_log")):
        mask = _solve_A_log(view, plan) if plan.obs else _choose_transitions(view, plan)
    apply_transitions(view, mask, plan)
    return mask


@contextmanager
def naming(parameter: str) -> Iterator[None]:
    """Says of a computation without a result which parameter it was for."""
    try:
        yield
    except NumericalError as error:
        if parameter in str(error):
            raise
        raise type(error)(f"{parameter}: {error}: the model's weights or the calibration text are not usable") from error


def apply_transitions(view: BlockView, mask: Tensor, plan: TransitionPlan) -> None:
    """Makes of a block what the plan says that pruned transitions are; with Columns the states are removed.

    Entries that were pruned before this run stay as they are.
    """
    if isinstance(plan.pattern, Columns):
        view.remove_states(mask[0])
        return
    gone = view.gone("A_log")
    new = mask if gone is None else mask & ~gone
    view.write("A_log", view.A_log.masked_fill(new, PRUNED_A_LOG[plan.transition]))


def _choose_transitions(view: BlockView, plan: TransitionPlan) -> Tensor:
    saliency, gone = SALIENCIES[plan.saliency], view.gone("A_log")
    if saliency.interacts:
        return select(output_gram(view, plan), plan.pattern, plan.search, gone)
    if not saliency.needs:
        return choose(plan.pattern, saliency.score(view.A_log, None, None)[0], gone)
    aggregator = Aggregator(plan.aggregate, view.stream.hidden.shape[1], plan.pattern, plan.parameter, gone)
    for start, moments in view.observe_states(saliency.needs):
        aggregator.update(saliency.score(view.A_log, moments.h2, moments.abar), start)
    # of columns the aggregator has taken what is gone into account
    return choose(plan.pattern, aggregator.scores(), None if isinstance(plan.pattern, Columns) else gone)


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
    name, gone = view.parameter_name("A_log"), view.gone("A_log")
    new, mask = prune_obs(view.A_log, H.float(), plan.pattern, plan.blocksize, plan.percdamp, name, gone)
    view.write("A_log", new if gone is None else torch.where(gone, view.A_log, new))
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
        values = {view.parameter_name(f"{name}.weight"): module_weight(view, name) for name in plan.modules}
        shapes = {name: value.shape for name, value in values.items()}
        before = progress.load("layers", view.index, shapes, shapes)
        if before is not None:
            for name in plan.modules:
                view.write(f"{name}.weight", before[0][view.parameter_name(f"{name}.weight")])
            found = before[1]
        else:
            found = _prune_block(view, plan, share)
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
    rows = progress.load_figures("sensitivity", lambda rows: _fits(rows, plan, first, stop))
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


def _fits(rows: Any, plan: WeightPlan, first: int, stop: int) -> bool:
    """Whether recorded sensitivities are (layer, module, value) of every module that has one."""
    names = [name for name in GROUPS if name in plan.modules]
    keys = [(layer, name) for layer in range(first, stop) for name in names]
    return [tuple(row[:2]) for row in rows] == keys and all(math.isfinite(row[2]) and len(row) == 3 for row in rows)


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
    label = view.parameter_name(f"{name}.weight")
    gone = view.gone(f"{name}.weight")
    gone = None if gone is None else gone.view(W.shape)
    with naming(label):
        if plan.rule == "magnitude":
            new, mask = prune_magnitude(W, pattern, gone)
        elif plan.rule == "wanda":
            new, mask = prune_wanda(W, seen.diagonal(dim1=-2, dim2=-1) if conv else seen, pattern, gone)
        else:
            new, mask = _solve(W, hessian(seen, view.stream.total), plan, pattern, label, conv, gone)
    view.write(f"{name}.weight", new.reshape(weight.shape))
    return mask.reshape(weight.shape).contiguous()


def _solve(
    W: Tensor, H: Tensor, plan: WeightPlan, pattern: Pattern, label: str, conv: bool, gone: Tensor | None
) -> tuple[Tensor, Tensor]:
    """OBS on W (rows,cols), of a convolution (D,K)."""
    if conv and plan.conv_hessian == "channel":
        turned, mask = _solve(W.T, H, plan, pattern, label, False, None if gone is None else gone.T)
        return turned.T, mask.T
    if conv:
        W, gone = W.unsqueeze(1), None if gone is None else gone.unsqueeze(1)  # (D,1,K): a problem for each channel
    new, mask = prune_obs(W, H, pattern, plan.blocksize, plan.percdamp, label, gone)
    if plan.polish:
        new = polish(new, mask, W, H, plan.percdamp, plan.polish)
    return new, mask
