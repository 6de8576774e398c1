"""The derivatives of the selective scan over a piece of time, for CPUs: `scan_gradient_piece` by several threads."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sparsessm.compiled import kept, source_of
from sparsessm.kernels import lanes, scan_gradient_piece
from sparsessm.kernels.lanes import LANES, LOG2E
from sparsessm.kernels.scan_cpu import flat
from sparsessm.threads import for_each

# Tasks that the channels of a batch are cut into at the least: the threads that can share it.
_TASKS = 8


def _compiled(source: str) -> Callable[..., None]:
    def gradient(task: Any) -> None:
        if len(source) > 0:
            scan_gradient_piece.gradient_piece(*task)

    return kept(gradient)


_gradient = _compiled(source_of(lanes, scan_gradient_piece))


def piece_gradient(
    dt: Tensor, x: Tensor, gy: Tensor, B: Tensor, C: Tensor, A: Tensor, entered: Tensor, carried: Tensor, gA: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Derivatives by dt, x (B,T,D), B and C (B,T,N), given those by the outputs, gy (B,T,D); all contiguous float32.

    Args:
        entered: (B,D,N), states before the first step. gA: (B,D,N), added to.
        carried: (B,D,N), derivatives by the states after the last step, replaced by those before the first.
    """
    (batch, T, D), N = x.shape, A.shape[1]
    width = -(-D // LANES // -(-_TASKS // batch)) * LANES
    tasks = [(b, d, min(d + width, D)) for b in range(batch) for d in range(0, D, width)]
    made, sums = torch.empty(2, batch, T, D), torch.empty(2, len(tasks), T, N)
    shared = (
        np.array((T, D, N)), *map(flat, (dt, x, gy, B, C, A)), flat(A.double() * LOG2E),
        *map(flat, (entered, carried, *made, gA, *sums)),
    )  # fmt: skip
    work = [(np.array((number, *task)), *shared) for number, task in enumerate(tasks)]
    for_each(_gradient, work, min(torch.get_num_threads(), len(work)))
    gB, gC = sums.view(2, batch, -1, T, N).sum(2)
    return made[0], made[1], gB, gC
