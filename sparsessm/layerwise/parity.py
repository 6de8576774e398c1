"""Whether our forward computes what stock `transformers` does: checked for every model before anything else.

The stock model and ours run on a short batch, layer by layer. Every layer of ours gets the same input that
the stock one got, in pieces of time, and its output is compared; so is what enters the first layer and what the head makes
of the last. The first that differs is named.
"""

from __future__ import annotations

import time
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from sparsessm.errors import DivergenceError, InputError
from sparsessm.layerwise.layer import each_layer
from sparsessm.layerwise.stream import Stream
from sparsessm.models.architecture import Layout
from sparsessm.models.stock import stock_torch_path

# Windows and tokens of the batch: long enough for the convolution, the state and a seam between two pieces.
_BATCH, _STEPS, _PIECE = 2, 24, 9
# How far two roundings of the same computation may lie apart, |ours - stock| / |stock|, by dtype.
TOLERANCES = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class Parity:
    """The largest relative difference that was seen, where, and how long looking took."""

    difference: float
    where: str
    seconds: float


@torch.no_grad()
def check_parity(layout: Layout, name: str, device: torch.device) -> Parity:
    """Compares our forward with the stock one on random tokens, layer by layer, on the device that will compute.

    Raises:
        InputError: a layer, what enters the first, or the head differs beyond the rounding of the dtype.
        DivergenceError: the stock model itself outputs values that are not finite.
    """
    start = time.perf_counter()
    words = layout.model.get_input_embeddings().weight
    ids = torch.randint(len(words), (_BATCH, _STEPS), generator=torch.Generator().manual_seed(0))
    tolerance = TOLERANCES[words.dtype]
    worst: list[Any] = [0.0, "nowhere"]

    def compare(ours: Tensor, stock: Tensor, where: str, base: Tensor | None = None) -> None:
        if not torch.isfinite(stock).all():
            raise DivergenceError(f"{where} of {name} outputs values that are not finite: try --dtype float32")
        base = stock if base is None else base
        off = float((ours.float() - stock.float()).norm() / base.float().norm().clamp_min(1e-30))
        if not off <= tolerance:
            raise InputError(
                f"{name}: {where} differs from stock transformers {transformers.__version__} by {off:.1e} of its size: "
                "this model or version computes something that is not known here, and pruning it would measure another model"
            )
        if off > worst[0]:
            worst[:] = [off, where]

    inputs, outputs, logits = _stock_pass(layout, ids, device)
    stream = Stream.embed(layout, ids, device=device, offload="cpu", batch=_BATCH, budget=0, steps=_PIECE, share=False)
    hidden = stream.hidden
    assert isinstance(hidden, Tensor)  # it is in main memory
    compare(hidden, inputs[0], "what enters layer 0")
    for layer in each_layer(layout, stream):
        entered, left = inputs[layer.index], outputs[layer.index]
        hidden.copy_(entered)
        layer.advance(check=False)
        compare(hidden, left, f"layer {layer.index}", left.float() - entered.float())
    with layout.outside_on(device):
        ours = layout.leave(outputs[-1].to(device).flatten(0, 1)).cpu()
    compare(ours.view_as(logits), logits, "the head")
    return Parity(worst[0], worst[1], time.perf_counter() - start)


def _stock_pass(layout: Layout, ids: Tensor, device: torch.device) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """What enters and leaves each layer of the stock model, and its logits; its layers compute on the device."""
    home, inputs, outputs = layout.home, [], []

    def moved(value: Any, place: torch.device) -> Any:
        return tree_map(lambda x: x.to(place) if isinstance(x, Tensor) else x, value)

    def come(layer: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        inputs.append((arguments[0] if arguments else keywords["hidden_states"]).cpu())
        layer.to(device)
        return moved((arguments, keywords), device)

    def go(layer: nn.Module, _: Any, output: Any) -> Any:
        layer.to(home)
        output = moved(output, home)
        outputs.append((output[0] if isinstance(output, tuple) else output).cpu())
        return output

    with ExitStack() as stack:
        stack.enter_context(stock_torch_path(layout.model))
        for layer in layout.layers:
            stack.callback(layer.register_forward_pre_hook(come, with_kwargs=True).remove)
            stack.callback(layer.register_forward_hook(go).remove)
            stack.callback(layer.to, home)
        logits = layout.model(ids.to(home), use_cache=False).logits.cpu()
    return inputs, outputs, logits
