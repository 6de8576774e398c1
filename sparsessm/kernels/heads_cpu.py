"""Mamba-2 between its linear modules for CPUs, compiled by numba: convolution, scan, gate and norm in one pass each.

Convolution and norm have gradients; the scan's are those of `kernels.heads_gradient`.
Work is cut by samples, heads and channels. No number depends on how many threads there are, for the cut does not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from sparsessm import lanes
from sparsessm.compiled import kept, source_of
from sparsessm.kernels import functions, heads_gradient_piece, heads_piece
from sparsessm.kernels.backends import wants_gradient
from sparsessm.kernels.scan_cpu import PIECES, flat, view_of
from sparsessm.lanes import LANES
from sparsessm.threads import for_each


def _compiled(source: str) -> tuple[Callable[[Any], None], ...]:
    def scan(task: Any) -> None:
        if len(source) > 0:
            heads_piece.scan_piece(*task)

    def conv(task: Any) -> None:
        if len(source) > 0:
            heads_piece.conv_piece(*task)

    def norm(task: Any) -> None:
        if len(source) > 0:
            heads_piece.norm_piece(*task)

    return kept(scan), kept(conv), kept(norm)


def _compiled_gradients(source: str) -> tuple[Callable[[Any], None], ...]:
    def conv_gradient(task: Any) -> None:
        if len(source) > 0:
            heads_gradient_piece.conv_gradient_piece(*task)

    def norm_gradient(task: Any) -> None:
        if len(source) > 0:
            heads_gradient_piece.norm_gradient_piece(*task)

    return kept(conv_gradient), kept(norm_gradient)


_scan, _conv, _norm = _compiled(source_of(lanes, functions, heads_piece))
_conv_gradient, _norm_gradient = _compiled_gradients(source_of(lanes, functions, heads_gradient_piece))


def scan_heads(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, h0: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`chunked_scan_ref` for float32 where no state grows, see there."""
    (batch, steps, H, P), (G, N) = u.shape, B.shape[2:]
    y = torch.empty(batch, steps, H * P)
    state = torch.zeros(batch, H, P, N) if h0 is None else h0.float().contiguous().clone()
    views, strides = zip(*(view_of(x) for x in (u.flatten(2), dt, B.flatten(2), C.flatten(2), y)), strict=True)
    skip = torch.zeros(H) if D is None else D
    heads = H // G
    width = -(-heads // -(-PIECES // (batch * G)))
    shape, apart = (steps, H, P, N, heads), np.array(strides)
    tasks = [
        (b, h, min(h + width, g + heads), shape, apart, *views[:2], flat(A), *views[2:4], flat(skip), views[4],
         flat(state))
        for b in range(batch) for g in range(0, H, heads) for h in range(g, g + heads, width)
    ]  # fmt: skip
    for_each(_scan, tasks, min(torch.get_num_threads(), len(tasks)))
    return y.view(u.shape), state


def conv_silu(x: Tensor, before: Tensor | None, weight: Tensor, bias: Tensor | None) -> Tensor:
    """silu of the causal convolution of x (B,L,D) that follows before (B,K-1,D); weight (D,1,K), bias (D,)."""
    if wants_gradient(x, before, weight, bias):
        return _ConvSilu.apply(x, before, weight, bias)
    return _conv_silu(x, before, weight, bias)


def _conv_silu(x: Tensor, before: Tensor | None, weight: Tensor, bias: Tensor | None) -> Tensor:
    out = torch.empty(x.shape)
    numbers, stride = view_of(x)
    tasks = _conv_tasks(x, before, weight, bias, (stride, numbers), flat(out))
    for_each(_conv, tasks, min(torch.get_num_threads(), len(tasks)))
    return out


def _conv_tasks(
    x: Tensor, before: Tensor | None, weight: Tensor, bias: Tensor | None, seen: tuple[Any, ...], *made: np.ndarray
) -> list[tuple[Any, ...]]:
    """seen: strides and memory of what is read of each step; made: memory that is filled."""
    (batch, steps, channels), K = x.shape, weight.shape[2]
    before = torch.zeros(batch, K - 1, channels) if before is None else before
    bias = torch.zeros(channels) if bias is None else bias
    width = -(-channels // LANES // -(-PIECES // batch)) * LANES
    rest = (steps, channels, K, *seen, flat(before), flat(weight[:, 0].T), flat(bias), *made)
    return [(b, c, min(c + width, channels), *rest) for b in range(batch) for c in range(0, channels, width)]


class _ConvSilu(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, before: Tensor | None, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, before, weight, bias)
        return _conv_silu(x, before, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gout: Tensor) -> tuple[Tensor | None, ...]:
        x, before, weight, bias = ctx.saved_tensors
        (batch, steps, channels), K = x.shape, weight.shape[2]
        views, strides = zip(*(view_of(tensor) for tensor in (x, gout)), strict=True)
        made = [torch.empty(batch, rows, channels) for rows in (steps, K - 1, K, 1)]
        tasks = _conv_tasks(x, before, weight, bias, (np.array(strides), *views), *map(flat, made))
        for_each(_conv_gradient, tasks, min(torch.get_num_threads(), len(tasks)))
        gx, gbefore, gweight, gbias = made
        return (
            gx, None if before is None else gbefore, gweight.sum(0).T[:, None], None if bias is None else gbias.sum((0, 1))
        )  # fmt: skip


def gated_norm(y: Tensor, z: Tensor, weight: Tensor, size: int, epsilon: float) -> Tensor:
    """q rsqrt(mean(q^2) + epsilon) weight for q = y silu(z), (B,L,D); the mean over groups of `size` channels."""
    if wants_gradient(y, z, weight):
        return _GatedNorm.apply(y, z, weight, size, epsilon)
    return _gated_norm(y, z, weight, size, epsilon)


def _gated_norm(y: Tensor, z: Tensor, weight: Tensor, size: int, epsilon: float) -> Tensor:
    batch, steps, channels = y.shape
    out = torch.empty(batch, steps, channels)
    views, strides = zip(*(view_of(tensor) for tensor in (y, z)), strict=True)
    rest = (steps, channels, size, epsilon, np.array(strides), *views, flat(weight), flat(out))
    tasks = [(*piece, *rest) for piece in _spans(batch, steps)]
    for_each(_norm, tasks, min(torch.get_num_threads(), len(tasks)))
    return out


def _spans(batch: int, steps: int) -> list[tuple[int, int, int]]:
    """Sample, first step and last of each task."""
    width = -(-steps // -(-PIECES // batch))
    return [(b, t, min(t + width, steps)) for b in range(batch) for t in range(0, steps, width)]


class _GatedNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, y: Tensor, z: Tensor, weight: Tensor, size: int, epsilon: float) -> Tensor:
        ctx.save_for_backward(y, z, weight)
        ctx.sizes = size, epsilon
        return _gated_norm(y, z, weight, size, epsilon)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gout: Tensor) -> tuple[Tensor | None, ...]:
        y, z, weight = ctx.saved_tensors
        batch, steps, channels = y.shape
        views, strides = zip(*(view_of(tensor) for tensor in (y, z, gout)), strict=True)
        spans = _spans(batch, steps)
        gy, gz, gweight = torch.empty(y.shape), torch.empty(y.shape), torch.empty(len(spans), channels)
        rest = (steps, channels, *ctx.sizes, np.array(strides), *views, flat(weight), *map(flat, (gy, gz, gweight)))
        tasks = [(number, *span, *rest) for number, span in enumerate(spans)]
        for_each(_norm_gradient, tasks, min(torch.get_num_threads(), len(tasks)))
        return gy, gz, gweight.sum(0), None, None
