"""The driver: the passes of a plan one after the other, and within a pass, layer by layer: measure, choose, write, finish.

    for each pass of the plan:
        for each layer, on the present outputs of the layers before it:
            restore it from an interrupted run, or
                measure what the pass needs of its inputs, choose what to prune, write the rest
            finish: record it, report it
            move the stream on through the layer as it now is

A pass is a class with `visit`; it decides what to measure, choose and write. Resume and report are here alone.
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from sparsessm.layerwise.layer import Layer, each_layer
from sparsessm.layerwise.stream import Stream
from sparsessm.models.architecture import Layout

Masks = dict[str, Tensor]
Shapes = Mapping[str, Sequence[int]]


class Journal(Protocol):
    """Where finished layers are recorded and, after an interruption, found again (runs.journal)."""

    def load(self, phase: str, layer: int, values: Shapes, masks: Shapes) -> tuple[Masks, Masks] | None: ...

    def store(self, phase: str, layer: int, values: Mapping[str, Tensor], masks: Masks) -> None: ...

    def load_figures(self, name: str, check: Callable[[Any], bool]) -> Any | None: ...

    def store_figures(self, name: str, figures: Any) -> None: ...


class NoJournal:
    """Records nothing and finds nothing."""

    def load(self, phase: str, layer: int, values: Shapes, masks: Shapes) -> None:
        return None

    def store(self, phase: str, layer: int, values: Mapping[str, Tensor], masks: Masks) -> None:
        pass

    def load_figures(self, name: str, check: Callable[[Any], bool]) -> None:
        return None

    def store_figures(self, name: str, figures: Any) -> None:
        pass


def no_report(phase: str, layer: int, **figures: float) -> None:
    """Says nothing."""


@dataclass
class Job:
    """A model and what its passes share.

    Attributes:
        embed: makes the stream that enters the first layer. first, stop: layers first <= i < stop are pruned.
        report: called for each finished layer, report(phase, layer, **figures).
    """

    layout: Layout
    embed: Callable[[], Stream]
    first: int
    stop: int
    report: Callable[..., None] = no_report
    journal: Journal = field(default_factory=NoJournal)

    def indices(self, work: Pass | None = None) -> list[int]:
        """The layers in range that a pass has work in; without one, those that hold a mixer."""
        layers = (Layer(self.layout, i, self.layout.layers[i]) for i in range(self.first, self.stop))
        return [layer.index for layer in layers if (layer.has_mixer if work is None else work.concerns(layer))]


@dataclass
class Outcome:
    """The result of a pass for one layer.

    Attributes:
        masks: by full name in the shape that the parameter has then, True = pruned. removed: masks of what was removed
            from parameters, in the shape from before.
        choices: what is recorded of the masks; `restore` makes them from it. values: parameters that changed.
        figures: for the report. record: figures that a later pass needs, as JSON.
    """

    masks: Masks = field(default_factory=dict)
    removed: Masks = field(default_factory=dict)
    choices: Masks = field(default_factory=dict)
    values: Masks = field(default_factory=dict)
    figures: Mapping[str, float] = field(default_factory=dict)
    record: Any = None


class Pass(ABC):
    """One pass over the layers.

    Attributes:
        name: under which layers are recorded and reported.
        dense: whether a copy of each layer as it was is visited beside it, on a separate stream.
    """

    name: str
    dense: bool = False

    @abstractmethod
    def visit(self, layer: Layer, dense: Layer | None) -> Outcome:
        """Measures, chooses and writes."""

    def concerns(self, layer: Layer) -> bool:
        """Whether there is anything to do in a layer."""
        return layer.has_mixer


class Change(Pass):
    """A pass that changes layers."""

    @abstractmethod
    def expected(self, layer: Layer) -> tuple[Shapes, Shapes]:
        """Names and shapes of the values and choices that `visit` will make of a layer."""

    @abstractmethod
    def restore(self, layer: Layer, values: Masks, choices: Masks) -> Outcome:
        """Gives a layer the state that an interrupted run had given it."""


class Measurement(Pass):
    """A pass that leaves the layers as they are."""

    @abstractmethod
    def fits(self, layer: Layer, record: Any) -> bool:
        """Whether a recorded figure of a layer can be this pass's."""


@torch.no_grad()
def run_pass(job: Job, work: Pass) -> dict[int, Outcome]:
    """Runs a pass over the layers of a job; the outcome of each."""
    found: dict[int, Outcome] = {}
    indices = job.indices(work)
    if isinstance(work, Measurement) and (recorded := _recorded(job, work)) is not None:
        return recorded
    dense = job.embed() if work.dense else None
    for layer in each_layer(job.layout, job.embed()):
        before = None if dense is None else layer.copy(copy.deepcopy(layer.module), dense)
        if layer.index in indices:
            found[layer.index] = finish_layer(job, work, layer, before)
        if before is not None:
            before.advance()
    return found


def finish_layer(job: Job, work: Pass, layer: Layer, dense: Layer | None) -> Outcome:
    """Restores a layer that an interrupted run had finished, or visits and records it; reports it either way."""
    if isinstance(work, Change):
        restored = job.journal.load(work.name, layer.index, *work.expected(layer))
        outcome = work.visit(layer, dense) if restored is None else work.restore(layer, *restored)
        if restored is None:
            job.journal.store(work.name, layer.index, outcome.values, outcome.choices or outcome.masks)
    else:
        assert isinstance(work, Measurement)
        record = _record(job, work, layer)
        outcome = work.visit(layer, dense) if record is None else Outcome(record=record)
        if record is None:
            job.journal.store_figures(_record_name(work, layer), outcome.record)
    job.report(work.name, layer.index, **outcome.figures)
    outcome.masks = {name: mask.cpu() for name, mask in outcome.masks.items()}
    outcome.removed = {name: mask.cpu() for name, mask in outcome.removed.items()}
    return outcome


def _record_name(work: Measurement, layer: Layer) -> str:
    return f"{work.name}-{layer.index:04d}"


def _record(job: Job, work: Measurement, layer: Layer) -> Any | None:
    return job.journal.load_figures(_record_name(work, layer), lambda record: work.fits(layer, record))


def _recorded(job: Job, work: Measurement) -> dict[int, Outcome] | None:
    """The measurements of an interrupted run, if they are complete; nothing is computed then."""
    found = {}
    for index in job.indices(work):
        record = _record(job, work, Layer(job.layout, index, job.layout.layers[index]))
        if record is None:
            return None
        found[index] = Outcome(record=record)
    for index in found:
        job.report(work.name, index)
    return found


def masks_of(outcomes: Mapping[int, Outcome]) -> Masks:
    return {name: mask for outcome in outcomes.values() for name, mask in outcome.masks.items()}


def removed_of(outcomes: Mapping[int, Outcome]) -> Masks:
    return {name: mask for outcome in outcomes.values() for name, mask in outcome.removed.items()}
