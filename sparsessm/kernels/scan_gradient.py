"""The selective scan with gradients: the state that enters each piece of time is kept, all others are computed again.

Autograd through `selective_scan_ref` keeps several numbers for every state of every step; here memory grows with B L D, and
B D N for each piece of PIECE steps.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from sparsessm.compiled import kept, source_of
from sparsessm.kernels import lanes, scan_gradient_piece
from sparsessm.kernels.lanes import LANES, LOG2E
from sparsessm.kernels.scan_cpu import flat, selective_scan_cpu
from sparsessm.threads import for_each

# Time steps whose states are computed again together: those of 16 channels stay in the first-level cache.
PIECE = 64
# Tasks that the channels of a batch are cut into at the least: the threads that can share it.
_TASKS = 8


def _compiled(source: str) -> Callable[..., None]:
    def gradient(task: Any) -> None:
        if len(source) > 0:
            scan_gradient_piece.gradient_piece(*task)

    return kept(gradient)


_gradient = _compiled(source_of(lanes, scan_gradient_piece))


def scan_with_gradient(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    delta_bias: Tensor | None, delta_softplus: bool, h0: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`selective_scan_ref` in float32 for tensors in the memory of the CPU of which some want gradients, and A <= 0."""
    x, gate = u.float(), None if z is None else F.silu(z.float())
    dt = delta.float() if delta_bias is None else delta.float() + delta_bias.float()
    dt = F.softplus(dt) if delta_softplus else dt
    if h0 is None:
        h0 = x.new_zeros(u.shape[0], u.shape[2], A.shape[1])
    y, last = _Scan.apply(x, dt, A.float(), B.float(), C.float(), h0.float())
    if D is not None:
        y = y + x * D.float()
    return (y if gate is None else y * gate).to(u.dtype), last


class _Scan(torch.autograd.Function):
    """h_t = exp(dt_t A) h_{t-1} + dt_t B_t x_t, y_t = C_t h_t: x, dt (B,L,D), A (D,N), B, C (B,L,N), h0 (B,D,N), float32."""

    @staticmethod
    def forward(ctx: Any, *inputs: Tensor) -> tuple[Tensor, Tensor]:
        x, dt, A, B, C, state = (tensor.contiguous() for tensor in inputs)
        outputs, states = [], []
        for some in _pieces(x.shape[1]):
            states.append(state)
            y, state = selective_scan_cpu(x[:, some], dt[:, some], A, B[:, some], C[:, some], h0=state)
            outputs.append(y)
        ctx.save_for_backward(x, dt, A, B, C, torch.stack(states))
        return torch.cat(outputs, 1), state

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        x, dt, A, B, C, states = ctx.saved_tensors
        gy, carried = (gradient.contiguous() for gradient in gradients)
        batch, steps, D = x.shape
        N, carried = A.shape[1], carried.clone()
        gx, gdt, gA = torch.empty_like(x), torch.empty_like(x), torch.zeros_like(carried)
        gB, gC = torch.empty_like(B), torch.empty_like(C)
        width = -(-D // LANES // -(-_TASKS // batch)) * LANES
        tasks = [(b, d, min(d + width, D)) for b in range(batch) for d in range(0, D, width)]
        for some, entered in reversed(list(zip(_pieces(steps), states, strict=True))):
            T = some.stop - some.start
            cut = [flat(tensor[:, some]) for tensor in (dt, x, gy, B, C)]
            made = torch.empty(2, batch, T, D)
            sums = torch.empty(2, len(tasks), T, N)
            shared = (
                np.array((T, D, N)), *cut, flat(A), flat(A.double() * LOG2E), flat(entered), flat(carried), *map(flat, made),
                flat(gA), *map(flat, sums),
            )  # fmt: skip
            work = [(np.array((number, *task)), *shared) for number, task in enumerate(tasks)]
            for_each(_gradient, work, min(torch.get_num_threads(), len(work)))
            gdt[:, some], gx[:, some] = made
            gB[:, some], gC[:, some] = sums.view(2, batch, -1, T, N).sum(2)
        return gx, gdt, gA.sum(0), gB, gC, carried


def _pieces(steps: int) -> list[slice]:
    return [slice(start, min(start + PIECE, steps)) for start in range(0, steps, PIECE)]
