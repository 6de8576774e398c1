"""Mamba-Shedder (arXiv 2501.17088), a baseline without training: whole SSMs or whole blocks go, greedily by perplexity.

Each step walks the calibration windows through the model once and tries the removal of every block that is left from
the stream that enters it: only the layers behind it are computed again, half the work of whole forward passes. Two
residual streams exist at a time, that of the model as it is and that of the removal on trial. To keep the streams of all
n layers for the next step would save no more than that one walk, 2/n of the work, for memory that grows with n. The
model is never copied: a trial leaves a block out of the walk, or sets a few rows to zero and back.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from sparsessm.errors import DivergenceError
from sparsessm.evaluation.perplexity import stream_loss
from sparsessm.layerwise import distributed as ranks
from sparsessm.layerwise.walk import BlockView, Stream, walk
from sparsessm.models.mamba1 import prune_transitions
from sparsessm.procedure.pipeline import NO_PROGRESS, Masks, Progress, Report
from sparsessm.pruning.shedder import greedy

# What a removal leaves of a block. ssm: its scan gives nothing, y = D u. mamba_block: nothing, it is the identity.
SHED_TARGETS = ("ssm", "mamba_block")


@dataclass(frozen=True)
class ShedPlan:
    """What is removed (one of SHED_TARGETS), what share of the blocks in range, and what a pruned transition is."""

    target: str
    sparsity: float
    transition: str = "zero"

    def steps(self, blocks: int) -> int:
        return round(self.sparsity * blocks)


@dataclass
class Shed:
    """What was removed.

    Attributes:
        removed_layers: blocks by their index in the model as it was, in the order of removal; none where SSMs went.
        masks: of parameters that are still there, True = pruned.
        gone: number of entries of each parameter that went with its block, by its name in the model as it was.
    """

    removed_layers: list[int] = field(default_factory=list)
    masks: Masks = field(default_factory=dict)
    gone: dict[str, int] = field(default_factory=dict)


@torch.no_grad()
def shed(
    model: nn.Module,
    embed: Callable[[], Stream],
    windows: Tensor,
    plan: ShedPlan,
    first: int,
    stop: int,
    report: Report,
    progress: Progress = NO_PROGRESS,
) -> Shed:
    """Removes the plan's share of the blocks first <= i < stop, or their SSMs, one after the other.

    Args:
        embed: makes the stream that enters the first block; called once for each step and once for the trials.
        windows: (n,L) token ids that the stream was made of, all processes' windows.
        report: called for each trial, and with the perplexity for each removal.
    """
    steps, done = plan.steps(stop - first), []
    while len(done) < steps:
        gone = [layer for layer, _ in done]
        before = progress.load_figures(_step_name(len(done)), lambda row: _fits(row, range(first, stop), gone))
        if before is None:
            break
        layer, value = before
        done.append((layer, math.inf if value is None else value))
    trials, found = _Trials(model, embed, windows, plan.target, report), Shed()
    rest = greedy(range(first, stop), trials.costs, steps, [layer for layer, _ in done])
    for step, (layer, value) in enumerate(chain(done, rest)):
        position = _position(layer, found.removed_layers)
        if plan.target == "ssm":
            block = model.backbone.layers[position]
            mask = torch.ones_like(block.mixer.A_log, dtype=torch.bool)
            prune_transitions(block, mask, plan.transition)
            _c_rows(block).zero_()
            found.masks[f"backbone.layers.{layer}.mixer.A_log"] = mask.cpu()
        else:
            sizes = model.backbone.layers[position].named_parameters()
            found.gone |= {f"backbone.layers.{layer}.{name}": parameter.numel() for name, parameter in sizes}
            found.removed_layers.append(layer)
            remove_block(model, position)
        progress.store_figures(_step_name(step), (layer, value))
        report("shed", layer, perplexity=value)
    return found


def remove_block(model: nn.Module, index: int) -> None:
    """Takes a block out of the model; those behind it move up by one, in their caches as well."""
    del model.backbone.layers[index]
    model.config.num_hidden_layers -= 1
    for place, block in enumerate(model.backbone.layers):
        block.layer_idx = block.mixer.layer_idx = place


def _fits(row: Any, layers: range, gone: Sequence[int]) -> bool:
    """Whether a recorded step is (layer, perplexity) of a layer that was still there; no perplexity is an endless one."""
    layer, value = row
    known = isinstance(layer, int) and layer in layers and layer not in gone
    return known and (value is None or (isinstance(value, float) and value > 0))


def _step_name(step: int) -> str:
    return f"shed-{step:04d}"


def _position(layer: int, removed: Sequence[int]) -> int:
    """Where a layer of the model as it was stands after the removal of others."""
    return layer - sum(gone < layer for gone in removed)


def _c_rows(block: nn.Module) -> Tensor:
    """The rows (N,D) of x_proj that make C. With C = 0 the scan puts out exactly D u, in every runtime."""
    return block.mixer.x_proj.weight.data[-block.mixer.A_log.shape[1] :]


@contextmanager
def _without_ssm(block: nn.Module) -> Iterator[None]:
    rows = _c_rows(block)
    before = rows.clone()
    rows.zero_()
    try:
        yield
    finally:
        rows.copy_(before)


class _Trials:
    """Takes the perplexity of the calibration windows with one block, or its SSM, left out."""

    def __init__(
        self, model: nn.Module, embed: Callable[[], Stream], windows: Tensor, target: str, report: Report
    ) -> None:
        self.model, self.embed, self.target, self.report = model, embed, target, report
        self.stream = embed()  # that of the removal on trial
        self.windows = ranks.share(windows, self.stream.batch)
        self.predicted = windows.shape[0] * (windows.shape[1] - 1)

    def costs(self, removed: tuple[int, ...], left: tuple[int, ...]) -> dict[int, float]:
        """Perplexity after the removal of each of `left`; infinite where it makes the model diverge."""
        gone = removed if self.target == "mamba_block" else ()
        layers = {_position(layer, gone): layer for layer in left}
        found = {}
        for view in walk(self.model, self.embed()):
            if view.index in layers:
                found[layers[view.index]] = self._try(view)
                self.report("shed", layers[view.index])
                if len(found) == len(layers):
                    break  # what comes behind the last of them is of no interest
        return found

    def _try(self, view: BlockView) -> float:
        for rows in self.stream.batches():
            self.stream.hidden[rows, :] = view.stream.hidden[rows, :]
        try:
            if self.target == "ssm":
                with _without_ssm(view.block):
                    self._finish(view.index)
            else:
                self._finish(view.index + 1)
            loss = self._loss()
        except DivergenceError:
            loss = torch.full((), math.inf, dtype=torch.float64, device=self.stream.device)
        ranks.all_sum(loss)  # also of a process whose windows diverged: the others wait for it
        mean = float(loss) / self.predicted
        return math.exp(mean) if mean < 700 else math.inf

    def _finish(self, start: int) -> None:
        """Takes the stream on trial from the block `start` through all the rest."""
        for _ in walk(self.model, self.stream, stop=0, start=start):
            pass

    def _loss(self) -> Tensor:
        """Negative log likelihood of this process's windows, () float64."""
        return stream_loss(self.model, self.stream, self.windows)
