"""The derivative of a loss of the whole model, from the last layer to the first, with one layer's activations at a time.

What enters each layer is kept, in main memory unless the stream waits on the device; on the way back each layer is computed
again. Memory for a batch of windows is a hidden state a layer, and the activations of one layer.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from sparsessm.layerwise.layer import Layer, at_work
from sparsessm.layerwise.stream import Stream
from sparsessm.models.architecture import Layout
from sparsessm.models.mixer import Hooks

# Logits that exist at once: with a vocabulary of 50 thousand, those of 333 tokens.
LOGITS_AT_ONCE = 1 << 24


def no_hooks(layer: Layer) -> Hooks:
    return {}


@torch.no_grad()
def backward(
    layout: Layout,
    stream: Stream,
    rows: slice,
    loss: Callable[[Tensor, slice], Tensor],
    hooks_of: Callable[[Layer], Hooks] = no_hooks,
) -> Tensor:
    """The loss of some windows, (); parameters that require gradients have theirs added to `grad`.

    Args:
        stream: what enters the first layer; it stays. rows: the windows of a batch.
        loss: of logits (tokens,V) and which of the windows' tokens they are of, flat; its values are added.
        hooks_of: for each layer, see Layer.forward; they are called on the way back, with gradients.
    """
    layers = [Layer(layout, index, module, stream) for index, module in enumerate(layout.layers)]
    hidden, entered = stream.hidden[rows, :].to(stream.device), []
    for layer in layers:
        entered.append(hidden if stream.on_device else hidden.cpu())
        with at_work(layer.module, stream.device):
            hidden = layer.forward(rows, hidden).to(hidden.dtype)
    total, gradient = _head(layout, stream, hidden, loss)
    for layer in reversed(layers):
        hidden = entered.pop().to(stream.device).detach().requires_grad_()
        with at_work(layer.module, stream.device), torch.enable_grad():
            torch.autograd.backward(layer.forward(rows, hidden, hooks_of(layer)), gradient)
        assert hidden.grad is not None  # every layer adds to the stream
        gradient = hidden.grad
    return total


def _head(
    layout: Layout, stream: Stream, hidden: Tensor, loss: Callable[[Tensor, slice], Tensor]
) -> tuple[Tensor, Tensor]:
    """The loss at what leaves the last layer, hidden (B,L,M), and its derivative by that."""
    flat, total = hidden.flatten(0, 1), torch.zeros((), dtype=torch.float64, device=hidden.device)
    gradient = torch.empty_like(flat)
    with layout.outside_on(stream.device), torch.enable_grad():
        for some in layout.parts_of(len(flat), LOGITS_AT_ONCE):
            part = flat[some].detach().requires_grad_()
            value = loss(layout.leave(part), some)
            value.backward()
            assert part.grad is not None  # logits depend on it
            gradient[some] = part.grad
            total += value.detach()
    return total, gradient.view_as(hidden)


@contextmanager
def wanting_gradients(model: nn.Module, wanted: Callable[[str], bool]) -> Iterator[dict[str, nn.Parameter]]:
    """Has the parameters of these names require gradients for a while, and no others; yields them by name."""
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    chosen = {name: parameter for name, parameter in model.named_parameters() if wanted(name)}
    try:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(name in chosen)
        yield chosen
    finally:
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(before[name])
            parameter.grad = None
