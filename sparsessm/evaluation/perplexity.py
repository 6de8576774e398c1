"""Perplexity of the model in memory on windows of held-out text."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sparsessm.errors import DivergenceError
from sparsessm.kernels.matmul import linear
from sparsessm.layerwise import distributed as ranks
from sparsessm.layerwise.walk import Stream, walk

# Logits that exist at once: with a vocabulary of 50 thousand, those of 667 tokens.
_LOGITS_AT_ONCE = 1 << 25


@dataclass(frozen=True)
class Perplexity:
    """exp(total negative log likelihood / predicted tokens), and over how much it was taken.

    note: why value is endless, None where it is a number.
    """

    value: float
    windows: int
    tokens: int
    note: str | None = None


@torch.no_grad()
def perplexity(
    model: nn.Module,
    windows: Tensor,
    *,
    report: Callable[..., None] = lambda phase, layer: None,
    **placement: Any,
) -> Perplexity:
    """Feeds each window (n,L) of token ids alone and predicts L-1 tokens in each.

    Log likelihoods are taken in float32 and summed in float64. `report("eval", layer)` is called after each layer;
    `placement` is what Stream.embed takes: device, offload, batch ...

    Raises:
        DivergenceError: a layer or the head puts out values that are not finite.
    """
    stream = Stream.embed(model, windows, **placement)
    for view in walk(model, stream):
        view.advance()
        report("eval", view.index)
    loss = stream_loss(model, stream, ranks.share(windows, stream.batch))
    ranks.all_sum(loss)
    tokens = windows.shape[0] * (windows.shape[1] - 1)
    mean = float(loss) / tokens
    if not math.isfinite(mean):
        raise DivergenceError("the head puts out values that are not finite: try --dtype float32")
    if mean >= 700:
        return Perplexity(math.inf, len(windows), tokens, f"beyond any number: {mean:.1f} nats per token")
    return Perplexity(math.exp(mean), len(windows), tokens)


@torch.no_grad()
def stream_loss(model: nn.Module, stream: Stream, windows: Tensor) -> Tensor:
    """Negative log likelihood of this process's windows (n,L) by what left the last block, () float64."""
    tail = (model.backbone.norm_f, model.lm_head)
    home = model.lm_head.weight.device
    for module in tail:
        module.to(stream.device)
    loss = torch.zeros((), dtype=torch.float64, device=stream.device)
    for rows in stream.batches():
        hidden = stream.hidden[rows, :].to(stream.device)
        loss += _negative_log_likelihood(model, hidden, windows[rows].to(stream.device))
    for module in tail:
        module.to(home)
    return loss


def _negative_log_likelihood(model: nn.Module, hidden: Tensor, ids: Tensor) -> Tensor:
    """Sum over the batch of -log p(token | tokens before it), () float64; hidden (B,L,M), ids (B,L)."""
    x = model.backbone.norm_f(hidden.to(model.backbone.norm_f.weight.dtype))[:, :-1].flatten(0, 1)  # (B*(L-1),M)
    targets = ids[:, 1:].flatten()
    rows = max(1, _LOGITS_AT_ONCE // model.lm_head.weight.shape[0])
    total = torch.zeros((), dtype=torch.float64, device=x.device)
    for part, target in zip(x.split(rows), targets.split(rows), strict=True):
        total += F.cross_entropy(_head(model, part).float(), target, reduction="none").double().sum()
    return total


def logits(model: nn.Module, hidden: Tensor) -> Tensor:
    """What the model says of hidden (...,M), what left its last block: (...,V)."""
    norm = model.backbone.norm_f
    return _head(model, norm(hidden.to(norm.weight.dtype)))


def _head(model: nn.Module, x: Tensor) -> Tensor:
    return linear(x, model.lm_head.weight, model.lm_head.bias)
