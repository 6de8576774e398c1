"""Whether our forward computes what stock `transformers` does: asked of every model before anything else is done with it.

A short batch goes through the stock model. Every layer is given the very input that the stock one got, in two pieces of
time, and its output is compared; so is what enters the first layer and what the head makes of the last. The first that
differs is named.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import transformers
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from sparsessm.errors import DivergenceError, InputError
from sparsessm.evaluation.perplexity import logits
from sparsessm.models.mamba1 import block_forward

# Windows and tokens of the batch: long enough for the convolution, the state and a seam between two pieces.
_BATCH, _STEPS, _SEAM = 2, 24, 9
# How far two roundings of the same computation may lie apart, |ours - stock| / |stock|, by dtype.
TOLERANCES = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class Parity:
    """The largest relative difference that was seen, where, and how long looking took."""

    difference: float
    where: str
    seconds: float


@torch.no_grad()
def check_parity(model: nn.Module, name: str, device: torch.device) -> Parity:
    """Compares our forward with the stock one on random tokens, layer by layer, on the device that will compute.

    Raises:
        InputError: a layer, what enters the first, or the head differs beyond the rounding of the dtype.
        DivergenceError: the stock model itself puts out values that are not finite.
    """
    start = time.perf_counter()
    backbone = model.backbone
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (_BATCH, _STEPS), generator=generator)
    tolerance = TOLERANCES[backbone.embeddings.weight.dtype]
    worst: list[Any] = [0.0, "nowhere"]
    last: list[Tensor] = []
    home = backbone.embeddings.weight.device

    def to_device(x: Any) -> Any:
        return x.to(device) if isinstance(x, Tensor) else x

    def compare(ours: Tensor, stock: Tensor, where: str, base: Tensor | None = None) -> None:
        if not torch.isfinite(stock).all():
            raise DivergenceError(f"{where} of {name} puts out values that are not finite: try --dtype float32")
        base = stock if base is None else base
        off = float((ours.float() - stock.float()).norm() / base.float().norm().clamp_min(1e-30))
        if not off <= tolerance:
            raise InputError(
                f"{name}: {where} differs from stock transformers {transformers.__version__} by {off:.1e} of its size: "
                "this model or version computes something that is not known here, and pruning it would measure another model"
            )
        if off > worst[0]:
            worst[:] = [off, where]

    def come(layer: nn.Module, inputs: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        layer.to(device)
        return tree_map(to_device, (inputs, keywords))

    def look(layer: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
        hidden, stock = inputs[0], output[0] if isinstance(output, tuple) else output
        index = layer.layer_idx
        if index == 0:
            compare(backbone.embeddings(ids).to(hidden), hidden, "what enters layer 0")
        first, carry = block_forward(layer, hidden[:, :_SEAM])
        second, _ = block_forward(layer, hidden[:, _SEAM:], carry=carry)
        compare(torch.cat([first, second], 1), stock, f"layer {index}", stock.float() - hidden.float())
        layer.to(home)
        output = tree_map(lambda x: x.to(home) if isinstance(x, Tensor) else x, output)
        last[:] = [output[0] if isinstance(output, tuple) else output]
        return output

    with ExitStack() as stack:
        stack.enter_context(stock_torch_path(model))
        for layer in backbone.layers:
            stack.callback(layer.register_forward_pre_hook(come, with_kwargs=True).remove)
            stack.callback(layer.register_forward_hook(look).remove)
            stack.callback(layer.to, home)
        stock_logits = model(ids, use_cache=False).logits
    compare(logits(model, last[0]).view_as(stock_logits), stock_logits, "the head")
    return Parity(*worst, time.perf_counter() - start)


@contextmanager
def stock_torch_path(model: nn.Module) -> Iterator[None]:
    """Makes stock `transformers` compute by torch alone for a while, whatever packages it found for its kernels.

    Where mamba-ssm can be imported its kernels are taken even for tensors on the CPU, where they fail; with it and without
    causal-conv1d, Mamba's training path fails on CUDA.
    """
    changed = []
    for module in {sys.modules[type(part).__module__] for part in model.modules()}:
        if not module.__name__.startswith("transformers."):
            continue
        for name, function in list(vars(module).items()):
            plain = getattr(function, "__wrapped__", None)
            if plain is not None and getattr(function, "__module__", None) == module.__name__ and not isinstance(function, type):
                changed.append((module, name, function))
                setattr(module, name, plain)
    try:
        yield
    finally:
        for module, name, function in changed:
            setattr(module, name, function)
