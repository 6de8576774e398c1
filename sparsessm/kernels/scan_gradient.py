"""The selective scan with gradients: the state that enters each piece of time is kept, all others are computed again.

Autograd through `selective_scan_ref` keeps several numbers for every state of every step; here memory grows with B L D, and
B D N for each piece of PIECE steps.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsessm.kernels.selective_scan import selective_scan

# Time steps whose states are computed again together: on a CPU those of 16 channels stay in the first-level cache.
PIECE = 64


def scan_with_gradient(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    delta_bias: Tensor | None, delta_softplus: bool, h0: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`selective_scan_ref` in float32 for tensors of which some want gradients, and A <= 0."""
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
            y, state = selective_scan(x[:, some], dt[:, some], A, B[:, some], C[:, some], h0=state)
            outputs.append(y)
        ctx.save_for_backward(x, dt, A, B, C, torch.stack(states))
        return torch.cat(outputs, 1), state

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        x, dt, A, B, C, states = ctx.saved_tensors
        piece = importlib.import_module(f"sparsessm.kernels.scan_gradient_{x.device.type}").piece_gradient
        gy, carried = gradients[0].contiguous(), gradients[1].contiguous().clone()
        gx, gdt, gB, gC, gA = (torch.empty_like(tensor) for tensor in (x, x, B, C, carried))
        gA.zero_()
        for some, entered in reversed(list(zip(_pieces(x.shape[1]), states, strict=True))):
            cut = (tensor[:, some].contiguous() for tensor in (dt, x, gy, B, C))
            gdt[:, some], gx[:, some], gB[:, some], gC[:, some] = piece(*cut, A, entered, carried, gA)
        return gx, gdt, gA.sum(0), gB, gC, carried


def _pieces(steps: int) -> list[slice]:
    return [slice(start, min(start + PIECE, steps)) for start in range(0, steps, PIECE)]
