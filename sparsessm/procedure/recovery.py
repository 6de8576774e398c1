"""Recovery: what was not pruned is tuned until the pruned model computes again what the dense one did; no labels.

`blocks`: layer after layer, toward the dense layer's output on the dense stream. `model`: all layers together, toward the
dense model's predictions. Masks are fixed: the derivatives of pruned entries are zero, so Adam leaves them as they are, to
the bit. Some windows are set apart; the values that do best on those are kept.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsessm.kernels.selective_scan import SUM_DTYPE
from sparsessm.layerwise import distributed
from sparsessm.layerwise.backward import LOGITS_AT_ONCE, backward, wanting_gradients
from sparsessm.layerwise.layer import Layer, at_work, each_layer
from sparsessm.layerwise.stream import Stream
from sparsessm.models.architecture import Layout
from sparsessm.procedure.driver import Change, Job, Masks, Outcome, Shapes, run_pass
from sparsessm.procedure.plan import RecoveryPlan
from sparsessm.procedure.tuner import LOOKS, Tuner

MODEL = "recovery"  # the phase of the whole model in the files of a run folder


def recover(job: Job, dense: Job, masks: Masks, plan: RecoveryPlan) -> None:
    """Tunes a pruned model by what the dense one computes, as the plan says.

    Args:
        dense: the job of the dense model. masks: by full name, True = pruned, in the shape that the parameter has now;
            others are of what was removed.
    """
    frozen = _frozen(job.layout, masks)
    if "blocks" in plan.kinds:
        run_pass(dense, TuneBlocks(job.layout, frozen, plan))
    if "model" in plan.kinds:
        _tune_model(job, dense, frozen, plan)


def reports_of(job: Job, plan: RecoveryPlan) -> int:
    """How many times the job's report is called."""
    return ("blocks" in plan.kinds) * (job.stop - job.first) + ("model" in plan.kinds) * LOOKS


def _frozen(layout: Layout, masks: Masks) -> Masks:
    """What has to stay as it is: masks, and the rows that leave out the SSM of a layer where they do."""
    shapes = {name: parameter.shape for name, parameter in layout.model.named_parameters()}
    found = {name: mask for name, mask in masks.items() if shapes.get(name) == mask.shape}
    for index, module in enumerate(layout.layers):
        mixer = layout.mixer(module)
        if mixer is None:
            continue
        for name, rows in mixer.silenced().items():
            parameter = mixer.module.get_parameter(name)
            if not parameter[rows].any():
                full = f"{layout.layer_name(index)}.{layout.mixer_path(module)}.{name}"
                mask = found.get(full, torch.zeros(parameter.shape, dtype=torch.bool)).clone()
                mask[rows] = True
                found[full] = mask
    return found


class TuneBlocks(Change):
    """Tunes each layer of a pruned model, on the stream of the dense one and toward its outputs."""

    name = "blocks"

    def __init__(self, layout: Layout, frozen: Masks, plan: RecoveryPlan) -> None:
        self.layout, self.frozen, self.plan = layout, frozen, plan

    def concerns(self, layer: Layer) -> bool:
        return True

    def _parameters(self, index: int) -> dict[str, nn.Parameter]:
        """Of the pruned layer, by full name; those that layers share stay."""
        named = self.layout.layers[index].named_parameters()
        return {f"{self.layout.layer_name(index)}.{name}": p for name, p in named if not self.layout.is_shared(p)}

    def expected(self, layer: Layer) -> tuple[Shapes, Shapes]:
        return {name: parameter.shape for name, parameter in self._parameters(layer.index).items()}, {}

    @torch.no_grad()
    def restore(self, layer: Layer, values: Masks, choices: Masks) -> Outcome:
        parameters = self._parameters(layer.index)
        for name, value in values.items():
            parameters[name].copy_(value)
        return Outcome()

    def visit(self, layer: Layer, dense: Layer | None) -> Outcome:
        stream, plan = layer.stream, self.plan
        target = stream.beside(stream.hidden.shape[1], stream.hidden.shape[2], stream.hidden.dtype)
        size = torch.zeros((), dtype=SUM_DTYPE, device=stream.device)  # of what the dense layer adds to the stream
        for rows in stream.batches():
            hidden = stream.hidden[rows, :].to(stream.device)
            out = layer.forward(rows, hidden)
            target[rows, :] = out.to(stream.hidden.dtype)
            size += (out - hidden).square().sum(dtype=SUM_DTYPE)
        distributed.all_sum(size)
        scale = float(stream.total / size) if size > 0 else 1.0
        module, parameters = self.layout.layers[layer.index], self._parameters(layer.index)
        pruned = layer.copy(module)

        def error(rows: slice) -> Tensor:
            """Squared error of some windows, over the mean square of what the layer adds to the stream."""
            out = pruned.forward(rows, stream.hidden[rows, :].to(stream.device))
            return (out.float() - target[rows, :].to(stream.device).float()).square().sum() * scale

        training, apart = _divided(stream, plan.apart)
        each = distributed.largest(len(training))  # of a pass, in all processes: one with fewer sees some twice
        with at_work(module, stream.device), wanting_gradients(module, lambda name: True):
            tuner = Tuner(parameters, self.frozen, plan.block_rate, plan.passes * each)
            tuner.look(_mean(error, apart))
            for rows in _shuffled(training, tuner, plan.seed + layer.index):
                with torch.enable_grad():
                    error(rows).backward()
                tuner.step(_windows(rows))
                if tuner.done % each == 0:
                    tuner.look(_mean(error, apart))
            tuner.finish()
        figures = {"before": tuner.losses[0], "after": min(tuner.losses)}
        return Outcome(values={name: parameter.data for name, parameter in parameters.items()}, figures=figures)


@torch.no_grad()
def _tune_model(job: Job, dense: Job, frozen: Masks, plan: RecoveryPlan) -> None:
    layout, stream, known = job.layout, job.embed(), dense.embed()
    for layer in each_layer(dense.layout, known):
        layer.advance()  # what leaves the dense model's last layer says its predictions
    L = stream.hidden.shape[1]

    def divergence(rows: slice) -> Callable[[Tensor, slice], Tensor]:
        """Of the predictions from the dense model's, summed over some of the tokens of some windows."""
        target = known.hidden[rows, :].to(stream.device).flatten(0, 1)

        def loss(logits: Tensor, some: slice) -> Tensor:
            with torch.no_grad():
                wanted = dense.layout.leave(target[some]).float().log_softmax(-1)
            return F.kl_div(logits.float().log_softmax(-1), wanted, log_target=True, reduction="sum")

        return loss

    def look(rows: slice) -> Tensor:
        some = replace(stream, hidden=stream.hidden[rows, :].clone(), batch=rows.stop - rows.start, entered=stream.entered)
        for layer in each_layer(layout, some):
            layer.advance(check=False)
        total, loss = torch.zeros((), dtype=SUM_DTYPE, device=stream.device), divergence(rows)
        flat = some.hidden[:, :].to(stream.device).flatten(0, 1)
        with layout.outside_on(stream.device):
            for part in layout.parts_of(len(flat), LOGITS_AT_ONCE):
                total += loss(layout.leave(flat[part]), part)
        return total / L

    training, apart = _divided(stream, plan.apart)
    outside = layout.embeddings()
    wanted = wanting_gradients(layout.model, lambda name: name not in outside)
    with wanted as parameters, dense.layout.outside_on(stream.device):
        tuner = Tuner(parameters, frozen, plan.model_rate, plan.steps)
        if not tuner.resume(job.journal, MODEL):
            tuner.look(_mean(look, apart))
        for rows in _shuffled(training, tuner, plan.seed):
            backward(layout, stream, rows, divergence(rows))
            tuner.step(_windows(rows) * L)
            if tuner.looks_due():
                tuner.look(_mean(look, apart))
                tuner.store(job.journal, MODEL)
                job.report(MODEL, len(tuner.losses) - 2, divergence=tuner.losses[-1])
        tuner.finish()


def _divided(stream: Stream, share: float) -> tuple[list[slice], list[slice]]:
    """Batches to learn from, and the last, that are only looked at; where there is one, it is both."""
    batches = stream.batches()
    apart = min(len(batches) - 1, max(1, round(share * len(batches))))
    return (batches[:-apart], batches[-apart:]) if apart else (batches, batches)


def _windows(rows: slice) -> float:
    """Of all processes together."""
    count = torch.tensor(float(rows.stop - rows.start), dtype=SUM_DTYPE)
    distributed.all_sum(count)
    return float(count)


def _shuffled(batches: list[slice], tuner: Tuner, seed: int) -> Iterator[slice]:
    """Batches in a random order, each once before any comes again, for as long as it is worth it."""
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    done = tuner.done
    for step in range(tuner.steps):
        if not order:
            order = torch.randperm(len(batches), generator=generator).tolist()
        batch = batches[order.pop()]
        if step >= done and not tuner.hopeless():
            yield batch


@torch.no_grad()
def _mean(loss: Callable[[slice], Tensor], batches: list[slice]) -> float:
    """Per window, over all processes."""
    sums = torch.zeros(2, dtype=SUM_DTYPE)
    for rows in batches:
        sums += torch.tensor([float(loss(rows)), rows.stop - rows.start], dtype=SUM_DTYPE)
    distributed.all_sum(sums)
    return float(sums[0] / sums[1])
