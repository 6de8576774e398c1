"""Perplexity of the model in memory on windows of held-out text."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparsessm.errors import DivergenceError
from sparsessm.kernels.likelihood import negative_log_likelihood
from sparsessm.layerwise import distributed
from sparsessm.layerwise.layer import each_layer
from sparsessm.layerwise.stream import Stream
from sparsessm.models.architecture import Layout

# Logits that exist at once: with a vocabulary of 50 thousand, those of 667 tokens.
_LOGITS_AT_ONCE = 1 << 25


@dataclass(frozen=True)
class Perplexity:
    """exp(total negative log likelihood / predicted tokens), and over how much it was taken.

    note: why value is infinite, None where it is finite.
    """

    value: float
    windows: int
    tokens: int
    note: str | None = None


@torch.no_grad()
def perplexity(
    layout: Layout,
    windows: Tensor,
    *,
    report: Callable[..., None] = lambda phase, layer: None,
    **placement: Any,
) -> Perplexity:
    """Feeds each window (n,L) of token ids alone and predicts L-1 tokens in each.

    Log likelihoods are taken in float32 and summed in float64. `report("eval", layer)` is called after each layer;
    `placement` is what Stream.embed takes: device, offload, batch ...

    Raises:
        DivergenceError: a layer or the head outputs values that are not finite.
    """
    stream = Stream.embed(layout, windows, **placement)
    for layer in each_layer(layout, stream):
        layer.advance()
        report("eval", layer.index)
    loss = stream_loss(layout, stream, distributed.share(windows, stream.batch))
    distributed.all_sum(loss)
    tokens = windows.shape[0] * (windows.shape[1] - 1)
    mean = float(loss) / tokens
    if not math.isfinite(mean):
        raise DivergenceError("the head outputs values that are not finite: try --dtype float32")
    if mean >= 700:
        return Perplexity(math.inf, len(windows), tokens, f"too large for a number: {mean:.1f} nats per token")
    return Perplexity(math.exp(mean), len(windows), tokens)


@torch.no_grad()
def stream_loss(layout: Layout, stream: Stream, windows: Tensor) -> Tensor:
    """Negative log likelihood of this process's windows (n,L) from the outputs of the last layer, () float64."""
    loss = torch.zeros((), dtype=torch.float64, device=stream.device)
    with layout.outside_on(stream.device):
        for rows in stream.batches():
            hidden = stream.hidden[rows, :].to(stream.device)[:, :-1].flatten(0, 1)  # (B,L,M) -> (B*(L-1),M)
            targets = windows[rows].to(stream.device)[:, 1:].flatten()
            for some in layout.parts_of(len(hidden), _LOGITS_AT_ONCE):
                loss += negative_log_likelihood(layout.leave(hidden[some]), targets[some]).sum()
    return loss
