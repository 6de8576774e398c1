"""The effect of each difference from the released code on the demo model: the table of docs/FIDELITY.md.

    python scripts/fidelity.py MODEL DATASET [--seqlen 512 --nsamples 32 --eval_windows 64]

Every row prunes 50 % and changes one thing of the default procedure into what the released code does.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sparsessm.corpora import text
from sparsessm.layerwise.layer import Layer, each_layer
from sparsessm.layerwise.stream import Stream
from sparsessm.metrics.perplexity import perplexity
from sparsessm.models import checkpoint
from sparsessm.models.architecture import Layout
from sparsessm.models.tokenizing import load_tokenizer
from sparsessm.procedure.driver import Job, run_pass
from sparsessm.procedure.plan import TransitionPlan, WeightPlan
from sparsessm.procedure.transitions import PruneTransitions
from sparsessm.procedure.weights import PruneWeights, sensitive_shares
from sparsessm.pruning.aggregation import Aggregator
from sparsessm.pruning.methods import PRUNED_A_LOG
from sparsessm.pruning.patterns import NofM, Pattern, Unstructured
from sparsessm.pruning.saliency import SALIENCIES
from sparsessm.report.tables import text_table

HALF = Unstructured(0.5)


Prune = Callable[[Layout], object]


def squared_states(layer: Layer) -> Tensor:
    """sum_k h_k^2 (L,D,N) over the samples k."""
    return torch.cat([statistics.h2 for _, statistics in layer.scan_statistics(("h2",))])


def uneven_squared_states(layer: Layer) -> Tensor:
    """sum_k k h_k^2 (L,D,N): the released running sum, in which sample k weighs k times as much as the first."""
    total: Tensor | float = 0.0
    for k in range(len(layer.stream)):
        alone = dataclasses.replace(layer.stream, hidden=layer.stream.hidden[k : k + 1])
        total = total + (k + 1) * squared_states(layer.copy(layer.module, alone))
    return total


def vote(scores: Tensor, pattern: Pattern, first_step: bool) -> Tensor:
    """Votes over all steps at once, with or without the first, at which every score is zero."""
    aggregator = Aggregator("vote", len(scores), pattern)
    aggregator.update(scores, start=1 if first_step else 0)  # only a piece that starts at 0 drops its first step
    return pattern(aggregator.scores())


@torch.no_grad()
def prune_like(layout: Layout, stream: Stream, choose: Callable[[Layer], Tensor], during: str, after: str) -> None:
    """Prunes A_log; the stream continues with transition `during`, the model ends with transition `after`."""
    masks = []
    for layer in each_layer(layout, stream):
        masks.append(choose(layer))
        layer.write("A_log", layer.A_log.masked_fill(masks[-1], PRUNED_A_LOG[during]))
    for module, mask in zip(layout.layers, masks, strict=True):
        layout.mixer(module).A_log.masked_fill_(mask, PRUNED_A_LOG[after])


@torch.no_grad()
def without_skipped(layout: Layout, stream: Stream, plan: TransitionPlan, first: int) -> None:
    """Prunes the layers from `first` on, as if those before it passed nothing on."""
    change = PruneTransitions(plan)
    for layer in each_layer(layout, stream, start=first):
        change.visit(layer, None)


def fidelity(*, model: str, dataset: str, seqlen: int, nsamples: int, eval_windows: int) -> None:
    """Prints the table."""
    source = checkpoint.find(model)
    tokenizer = load_tokenizer(source)
    stream_ids = text.evaluation_stream(dataset, tokenizer, seqlen).ids
    windows = text.cut_windows(stream_ids, seqlen, eval_windows)
    calibration = text.calibration_windows(dataset, tokenizer, nsamples, seqlen, seed=0).ids
    layers = source.config.num_hidden_layers

    def embed(layout: Layout) -> Stream:
        return Stream.embed(layout, calibration, device="cpu", offload="cpu", batch=8)

    def measured(prune: Prune) -> str:
        layout = Layout(checkpoint.load(source))
        prune(layout)
        return f"{perplexity(layout, windows, device='cpu', offload='cpu', batch=8).value:.2f}"

    def transitions(pattern: Pattern = HALF, first: int = 0, **plan: object) -> Prune:
        change = PruneTransitions(TransitionPlan(pattern, **plan))
        return lambda m: run_pass(Job(m, lambda: embed(m), first, layers), change)

    def weights(modules: tuple[str, ...], alpha: float, conv: str, stale: bool) -> Prune:
        plan = WeightPlan(HALF, "obs", modules, alpha, conv)

        def prune(layout: Layout) -> None:
            once = embed(layout)  # used twice, it enters pass 2 as pass 1 left it: the last layer's outputs
            job = Job(layout, (lambda: once) if stale else (lambda: embed(layout)), 0, layers)
            run_pass(job, PruneWeights(plan, sensitive_shares(job, plan)))

        return prune

    def june(layer: Layer, first_step: bool = False) -> Tensor:
        return vote(SALIENCIES["a_log"].score(layer.A_log, squared_states(layer)), HALF, first_step)

    def uneven(layer: Layer) -> Tensor:
        return vote(SALIENCIES["a_log"].score(layer.A_log, uneven_squared_states(layer)), HALF, first_step=False)

    def like(choose: Callable[[Layer], Tensor], during: str = "zero", after: str = "zero") -> Prune:
        return lambda m: prune_like(m, embed(m), choose, during, after)

    paper = {"saliency": "a_log", "aggregate": "vote"}
    half = layers // 2
    every = ("in_proj", "conv1d", "x_proj", "dt_proj", "out_proj")
    linear = tuple(name for name in every if name != "conv1d")
    rows = [
        ("dense", lambda m: None),
        ("sparsessm, as here", transitions(**paper)),
        ("  layers recomputed with unit, evaluated with zero", like(june, during="unit")),
        ("  sample k weighs k", like(uneven)),
        ("  the first step votes too", like(lambda layer: june(layer, first_step=True))),
        ("  saved with raw zeros, as other runtimes run it", like(june, after="unit")),
        (f"sparsessm, layers {half} to {layers - 1}, as here", transitions(first=half, **paper)),
        ("  skipped layers pass nothing on", lambda m: without_skipped(m, embed(m), TransitionPlan(HALF, **paper), half)),
        ("sparsessm_dev, as here", transitions(saliency="transition", aggregate="power")),
        ("ts_semi 2:4, as here", transitions(NofM(2, 4), **paper)),
        ("  transition and window, as in October", transitions(NofM(2, 4), saliency="transition", aggregate="window")),
        ("gpt_extend, as here", transitions(obs=True)),
        ("linear and conv1d, alpha 0.04, as here", weights(every, 0.04, "tap", False)),
        ("  conv1d by the channel Hessian", weights(every, 0.04, "channel", False)),
        ("  pass 2 starts from the last layer's outputs", weights(every, 0.04, "tap", True)),
        ("  both", weights(every, 0.04, "channel", True)),
        ("linear alone, alpha 0.04, as here", weights(linear, 0.04, "tap", False)),
        ("  pass 2 starts from the last layer's outputs", weights(linear, 0.04, "tap", True)),
        ("  alpha 0", weights(linear, 0.0, "tap", False)),
    ]
    print(text_table([{"50 %": name, "perplexity": measured(prune)} for name, prune in rows]))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("dataset")
    for flag, value in {"seqlen": 512, "nsamples": 32, "eval_windows": 64}.items():
        parser.add_argument(f"--{flag}", type=int, default=value)
    fidelity(**vars(parser.parse_args()))
