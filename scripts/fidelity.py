"""What each difference from the released code is worth on the demo model: the table of docs/FIDELITY.md.

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
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sparsessm.calibration import text  # noqa: E402
from sparsessm.evaluation.perplexity import perplexity  # noqa: E402
from sparsessm.layerwise.walk import BlockView, Stream, walk  # noqa: E402
from sparsessm.models import checkpoint  # noqa: E402
from sparsessm.models.mamba1 import MODULES, prune_transitions  # noqa: E402
from sparsessm.models.tokenizing import load_tokenizer  # noqa: E402
from sparsessm.procedure.pipeline import (  # noqa: E402
    TransitionPlan,
    WeightPlan,
    prune_A_log,
    prune_weights,
)
from sparsessm.pruning.aggregation import Aggregator  # noqa: E402
from sparsessm.pruning.patterns import NofM, Pattern, Unstructured  # noqa: E402
from sparsessm.pruning.saliency import SALIENCIES  # noqa: E402
from sparsessm.report.tables import text_table  # noqa: E402

HALF = Unstructured(0.5)


def silent(*_: object, **__: object) -> None:
    """A report to nobody."""


def uneven_moments(view: BlockView) -> Tensor:
    """sum_k k h_k^2 (L,D,N): the released running sum, in which sample k weighs k times as much as the first."""
    total: Tensor | float = 0.0
    for k in range(len(view.stream)):
        alone = dataclasses.replace(view.stream, hidden=view.stream.hidden[k : k + 1])
        sample = BlockView(view.index, view.block, alone)
        total = total + (k + 1) * torch.cat([moments.h2 for _, moments in sample.observe_states(("h2",))])
    return total


def vote(scores: Tensor, pattern: Pattern, first_step: bool) -> Tensor:
    """Votes over all steps at once, with or without the first, at which every score is zero."""
    aggregator = Aggregator("vote", len(scores), pattern)
    aggregator.update(scores, start=1 if first_step else 0)  # only a piece that starts at 0 drops its first step
    return pattern(aggregator.scores())


@torch.no_grad()
def prune_like(model: nn.Module, stream: Stream, choose: Callable[[BlockView], Tensor], during: str, after: str) -> None:
    """Prunes A_log; the walk goes on with transition `during`, the model ends with transition `after`."""
    masks = []
    for view in walk(model, stream):
        masks.append(choose(view))
        prune_transitions(view.block, masks[-1], during)
    for block, mask in zip(model.backbone.layers, masks):
        prune_transitions(block, mask, after)


def without_skipped(model: nn.Module, stream: Stream, plan: TransitionPlan, first: int) -> None:
    """Prunes the layers from `first` on, as if those before it passed nothing on."""
    skipped = model.backbone.layers[:first]
    model.backbone.layers = model.backbone.layers[first:]
    prune_A_log(model, stream, plan, 0, len(model.backbone.layers), silent)
    model.backbone.layers = nn.ModuleList([*skipped, *model.backbone.layers])


def fidelity(*, model: str, dataset: str, seqlen: int, nsamples: int, eval_windows: int) -> None:
    """Prints the table."""
    source = checkpoint.find(model)
    tokenizer = load_tokenizer(source)
    stream_ids = text.evaluation_stream(dataset, tokenizer, seqlen).ids
    windows = text.cut_windows(stream_ids, seqlen, eval_windows)
    calibration = text.calibration_windows(dataset, tokenizer, nsamples, seqlen, seed=0).ids
    layers = source.config.num_hidden_layers

    def embed(loaded: nn.Module) -> Stream:
        return Stream.embed(loaded, calibration, device="cpu", offload="cpu", batch=8)

    def measured(prune: Callable[[nn.Module], object]) -> str:
        loaded = checkpoint.load(source)
        prune(loaded)
        return f"{perplexity(loaded, windows, device='cpu', offload='cpu', batch=8).value:.2f}"

    def transitions(pattern: Pattern = HALF, first: int = 0, **plan: object) -> Callable[[nn.Module], object]:
        return lambda m: prune_A_log(m, embed(m), TransitionPlan(pattern, **plan), first, layers, silent)

    def weights(modules: tuple[str, ...], alpha: float, conv: str, stale: bool) -> Callable[[nn.Module], object]:
        plan = WeightPlan(HALF, "obs", modules, alpha, conv)

        def prune(loaded: nn.Module) -> None:
            once = embed(loaded)  # handed out twice, it enters pass 2 as pass 1 left it: the last layer's outputs
            prune_weights(loaded, (lambda: once) if stale else (lambda: embed(loaded)), plan, 0, layers, silent)

        return prune

    def june(view: BlockView, first_step: bool = False) -> Tensor:
        moments = torch.cat([moments.h2 for _, moments in view.observe_states(("h2",))])
        return vote(SALIENCIES["a_log"].score(view.A_log, moments, None), HALF, first_step)

    def uneven(view: BlockView) -> Tensor:
        return vote(SALIENCIES["a_log"].score(view.A_log, uneven_moments(view), None), HALF, first_step=False)

    def like(
        choose: Callable[[BlockView], Tensor], during: str = "zero", after: str = "zero"
    ) -> Callable[[nn.Module], object]:
        return lambda m: prune_like(m, embed(m), choose, during, after)

    paper = {"saliency": "a_log", "aggregate": "vote"}
    half = layers // 2
    linear = tuple(name for name in MODULES if name != "conv1d")
    rows = [
        ("dense", lambda m: None),
        ("sparsessm, as here", transitions(**paper)),
        ("  layers recomputed with unit, evaluated with zero", like(june, during="unit")),
        ("  sample k weighs k", like(uneven)),
        ("  the first step votes too", like(lambda view: june(view, first_step=True))),
        ("  saved with raw zeros, as other runtimes run it", like(june, after="unit")),
        (f"sparsessm, layers {half} to {layers - 1}, as here", transitions(first=half, **paper)),
        ("  skipped layers pass nothing on", lambda m: without_skipped(m, embed(m), TransitionPlan(HALF, **paper), half)),
        ("sparsessm_dev, as here", transitions(saliency="transition", aggregate="power")),
        ("ts_semi 2:4, as here", transitions(NofM(2, 4), **paper)),
        ("  transition and window, as in October", transitions(NofM(2, 4), saliency="transition", aggregate="window")),
        ("gpt_extend, as here", transitions(obs=True)),
        ("linear and conv1d, alpha 0.04, as here", weights(MODULES, 0.04, "tap", False)),
        ("  conv1d by the channel Hessian", weights(MODULES, 0.04, "channel", False)),
        ("  pass 2 starts from the last layer's outputs", weights(MODULES, 0.04, "tap", True)),
        ("  both", weights(MODULES, 0.04, "channel", True)),
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
