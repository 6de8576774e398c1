"""Mamba-Shedder (arXiv 2501.17088), a baseline without training: whole SSM branches or whole blocks, greedily by perplexity.

Each step runs the calibration windows through the model once and tries the removal of every block that is left from the
stream that enters it: only the layers behind it are computed again, half the work of whole forward passes. Two residual
streams exist at a time, that of the model as it is and that of the removal on trial. Keeping the streams of all n layers
for the next step would save only that one pass, 2/n of the work, for memory that grows with n. The model is never
copied: a trial skips a block, or sets a few rows to zero and restores them.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from sparsessm.errors import DivergenceError
from sparsessm.layerwise import distributed
from sparsessm.layerwise.layer import Layer, each_layer
from sparsessm.metrics.perplexity import stream_loss
from sparsessm.models.history import Cut
from sparsessm.models.mixer import Mixer
from sparsessm.procedure.driver import Job, Masks
from sparsessm.procedure.plan import RemovalPlan
from sparsessm.pruning.methods import PRUNED_A_LOG
from sparsessm.pruning.removal import greedy

PHASE = "shed"  # its name in the files of a run folder


@dataclass
class RemovedParts:
    """What was removed.

    Attributes:
        layers: blocks by their index in the model as it was, in the order of removal; empty where SSM branches were removed.
        masks: of parameters that are still there, True = pruned, in the shape from before the run.
        cuts: what was removed from parameters.
        gone: number of entries of each parameter that was removed with its block, by its name in the model as it was.
    """

    layers: list[int] = field(default_factory=list)
    masks: Masks = field(default_factory=dict)
    cuts: dict[str, Cut] = field(default_factory=dict)
    gone: dict[str, int] = field(default_factory=dict)


@torch.no_grad()
def remove_parts(job: Job, windows: Tensor, plan: RemovalPlan) -> RemovedParts:
    """Removes the plan's share of the blocks of a job, or their SSM branches, one after the other.

    The report is called for each trial, and with the perplexity for each removal.

    Args:
        windows: (n,L) token ids that the stream was made of, all processes' windows.
    """
    layout, found = job.layout, RemovedParts()
    candidates = job.indices()
    steps = plan.steps(len(candidates))
    done: list[tuple[int, float]] = []
    while len(done) < steps:
        removed = [layer for layer, _ in done]
        before = job.journal.load_figures(_step_name(len(done)), partial(_fits, candidates=candidates, gone=removed))
        if before is None:
            break
        layer, value = before
        done.append((layer, math.inf if value is None else value))
    trials = _Trials(job, windows, plan.target)
    rest = greedy(candidates, trials.costs, steps, [layer for layer, _ in done])
    for step, (layer, value) in enumerate(chain(done, rest)):
        position = _position(layer, found.layers)
        if plan.target == "ssm":
            module = layout.layers[position]
            mixer, path = layout.mixer(module), layout.mixer_path(module)
            assert mixer is not None  # candidates have one
            mixer.A_log.fill_(PRUNED_A_LOG[plan.transition])
            for rows in _output_rows(mixer):
                rows.zero_()
            A_log = mixer.module.get_parameter("A_log")
            found.masks[f"{layout.layer_name(layer)}.{path}.A_log"] = torch.ones(A_log.shape, dtype=torch.bool)
        else:
            sizes = layout.layers[position].named_parameters()
            found.gone |= {f"{layout.layer_name(layer)}.{name}": parameter.numel() for name, parameter in sizes}
            found.layers.append(layer)
            layout.remove_layer(position)
        job.journal.store_figures(_step_name(step), (layer, value))
        job.report(PHASE, layer, perplexity=value)
    return found


def _fits(row: Any, candidates: Sequence[int], gone: Sequence[int]) -> bool:
    """Whether a recorded step is (layer, perplexity) of a layer that was left; no perplexity means infinite."""
    layer, value = row
    known = isinstance(layer, int) and layer in candidates and layer not in gone
    return known and (value is None or (isinstance(value, float) and value > 0))


def _step_name(step: int) -> str:
    return f"{PHASE}-{step:04d}"


def _position(layer: int, removed: Sequence[int]) -> int:
    """The present index of a layer of the original model, after the removal of others."""
    return layer - sum(gone < layer for gone in removed)


def _output_rows(mixer: Mixer) -> list[Tensor]:
    """The rows of parameters that make C. With C = 0 the output of the scan is exactly D u, in every runtime."""
    return [mixer.module.get_parameter(name).data[rows] for name, rows in mixer.silenced().items()]


@contextmanager
def _without_ssm(mixer: Mixer) -> Iterator[None]:
    before = [(rows, rows.clone()) for rows in _output_rows(mixer)]
    for rows, _ in before:
        rows.zero_()
    try:
        yield
    finally:
        for rows, content in before:
            rows.copy_(content)


class _Trials:
    """Measures the perplexity of the calibration windows with one block, or its SSM branch, left out."""

    def __init__(self, job: Job, windows: Tensor, target: str) -> None:
        self.job, self.layout, self.target = job, job.layout, target
        self.stream = job.embed()  # that of the removal on trial
        self.windows = distributed.share(windows, self.stream.batch)
        self.predicted = windows.shape[0] * (windows.shape[1] - 1)

    def costs(self, removed: tuple[int, ...], left: tuple[int, ...]) -> dict[int, float]:
        """Perplexity after the removal of each of `left`; infinite where it makes the model diverge."""
        gone = removed if self.target == "mamba_block" else ()
        layers = {_position(layer, gone): layer for layer in left}
        found = {}
        for layer in each_layer(self.layout, self.job.embed()):
            if layer.index in layers:
                found[layers[layer.index]] = self._try(layer)
                self.job.report(PHASE, layers[layer.index])
                if len(found) == len(layers):
                    break  # layers behind the last of them are not needed
        return found

    def _try(self, layer: Layer) -> float:
        for rows in self.stream.batches():
            self.stream.hidden[rows, :] = layer.stream.hidden[rows, :]
        try:
            if self.target == "ssm":
                with _without_ssm(layer.mixer):
                    self._finish(layer.index)
            else:
                self._finish(layer.index + 1)
            loss = stream_loss(self.layout, self.stream, self.windows)
        except DivergenceError:
            loss = torch.full((), math.inf, dtype=torch.float64, device=self.stream.device)
        distributed.all_sum(loss)  # also of a process whose windows diverged: the others wait for it
        mean = float(loss) / self.predicted
        return math.exp(mean) if mean < 700 else math.inf

    def _finish(self, start: int) -> None:
        """Runs the stream on trial through the layer `start` and all after it."""
        for _ in each_layer(self.layout, self.stream, stop=0, start=start):
            pass
