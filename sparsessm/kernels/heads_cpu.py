"""Mamba-2 between its linear modules for CPUs, compiled by numba: convolution, scan, gate and norm in one pass each.

Work is cut by samples, heads and channels. No number depends on how many threads there are, for the cut does not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparsessm.compiled import kept, source_of
from sparsessm.kernels import heads_piece, lanes
from sparsessm.kernels.lanes import LANES
from sparsessm.kernels.scan_cpu import PIECES, flat, view_of
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


_scan, _conv, _norm = _compiled(source_of(lanes, heads_piece))


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
    batch, steps, channels = x.shape
    K = weight.shape[2]
    out = torch.empty(batch, steps, channels)
    before = torch.zeros(batch, K - 1, channels) if before is None else before
    numbers, stride = view_of(x)
    bias = torch.zeros(channels) if bias is None else bias
    width = -(-channels // LANES // -(-PIECES // batch)) * LANES
    rest = (steps, channels, K, stride, numbers, flat(before), flat(weight[:, 0].T), flat(bias), flat(out))
    tasks = [(b, c, min(c + width, channels), *rest) for b in range(batch) for c in range(0, channels, width)]
    for_each(_conv, tasks, min(torch.get_num_threads(), len(tasks)))
    return out


def gated_norm(y: Tensor, z: Tensor, weight: Tensor, size: int, epsilon: float) -> Tensor:
    """q rsqrt(mean(q^2) + epsilon) weight for q = y silu(z), (B,L,D); the mean over groups of `size` channels."""
    batch, steps, channels = y.shape
    out = torch.empty(batch, steps, channels)
    (ys, y_stride), (zs, z_stride) = view_of(y), view_of(z)
    width = -(-steps // -(-PIECES // batch))
    rest = (steps, channels, size, epsilon, np.array((y_stride, z_stride)), ys, zs, flat(weight), flat(out))
    tasks = [(b, t, min(t + width, steps), *rest) for b in range(batch) for t in range(0, steps, width)]
    for_each(_norm, tasks, min(torch.get_num_threads(), len(tasks)))
    return out
