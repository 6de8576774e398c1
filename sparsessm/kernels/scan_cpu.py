"""The selective scan for CPUs, compiled by numba: `sparsessm.kernels.selective_scan.selective_scan_ref` in one pass.

Work is cut along channels, and along the batch where no sums tie it together. No number depends on how many threads
there are, for the cut does not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparsessm import lanes
from sparsessm.compiled import kept, source_of
from sparsessm.kernels import functions, scan_piece
from sparsessm.kernels.functions import LOG2E
from sparsessm.kernels.selective_scan import EFFECTS, ScanStatistics, decays, selective_scan_ref
from sparsessm.lanes import LANES
from sparsessm.threads import for_each

PROVIDES = frozenset({"h2", "abar", "hh", "gram"})

# Pieces that a scan is cut into at the least: the threads that can share it.
PIECES = 16


def _compiled(source: str) -> Callable[[Any], None]:
    def scan(task: Any) -> None:
        if len(source) > 0:
            scan_piece.scan_piece(*task)

    return kept(scan)


_scan = _compiled(source_of(lanes, functions, scan_piece))


def selective_scan_cpu(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    h0: Tensor | None = None,
    statistics: ScanStatistics | None = None,
) -> tuple[Tensor, Tensor]:
    """`selective_scan_ref` for tensors in the memory of the CPU, see there.

    Float64 is left to the reference, and so are states that could grow (a positive or undefined A, a negative dt).
    """
    if u.dtype == torch.float64 or not decays(A, delta, delta_bias, delta_softplus):
        return selective_scan_ref(u, delta, A, B, C, D, z, delta_bias, delta_softplus, h0, statistics)
    statistics = ScanStatistics() if statistics is None else statistics
    batch, steps, channels = u.shape
    N = A.shape[1]
    y = torch.empty(batch, steps, channels)
    state = torch.zeros(batch, channels, N) if h0 is None else h0.to(torch.float32, copy=True).contiguous()
    counterfactual = None
    if statistics.needs_counterfactual():
        counterfactual = statistics.first_counterfactual(h0)
        if counterfactual is None:
            counterfactual = torch.zeros_like(state)
        else:
            counterfactual = counterfactual.to(torch.float32, copy=True).contiguous()

    views, strides = zip(*(view_of(x) for x in (u, delta, y if z is None else z, B, C, y)), strict=True)
    pieces = _cut(batch, channels, together=bool(statistics.tensors()))
    hh = np.zeros((len(pieces), 0 if statistics.hh is None else N * N))
    skip = torch.zeros(channels) if D is None else D
    bias = torch.zeros(channels) if delta_bias is None else delta_bias
    inputs = (
        *views, flat(A.double() * LOG2E), flat(skip), flat(bias), delta_softplus, z is not None, flat(state),
        _sums(statistics.h2), _sums(statistics.abar),
    )  # fmt: skip
    effect = EFFECTS.index(statistics.effect)
    other = np.empty(0, np.float32) if counterfactual is None else flat(counterfactual)
    shape, strides, gram = (batch, steps, channels, N), np.array(strides), _sums(statistics.gram)
    tasks = [(piece, shape, strides, *inputs, part, gram, effect, other) for piece, part in zip(pieces, hh, strict=True)]
    for_each(_scan, tasks, min(torch.get_num_threads(), len(tasks)))
    if statistics.hh is not None:
        statistics.hh += torch.from_numpy(hh.sum(0)).view(N, N)
    if counterfactual is not None:
        statistics.counterfactual = counterfactual
    return y.to(u.dtype), state


def view_of(tensor: Tensor) -> tuple[np.ndarray, tuple[int, int]]:
    """The memory of a tensor (B,L,any), and how far apart its samples and time steps are there."""
    tensor = tensor.detach().float()
    if tensor.stride(2) != 1:
        tensor = tensor.contiguous()
    sample, step, _ = tensor.stride()
    span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.as_strided((span,), (1,)).numpy(), (sample, step)


def flat(tensor: Tensor) -> np.ndarray:
    """The memory of a float32 tensor that is contiguous, or of such a copy."""
    return tensor.detach().float().contiguous().view(-1).numpy()


def _sums(tensor: Tensor | None) -> np.ndarray:
    return np.empty(0) if tensor is None else tensor.view(-1).numpy()


def _cut(batch: int, channels: int, together: bool) -> list[tuple[int, int, int, int]]:
    """(first sample, last, first channel, last) of each piece; by the sizes alone, whatever threads there are."""
    samples = [(0, batch)] if together else [(b, b + 1) for b in range(batch)]
    groups = -(-channels // LANES)
    width = -(-groups // -(-PIECES // len(samples))) * LANES
    return [(*some, d, min(d + width, channels)) for some in samples for d in range(0, channels, width)]
