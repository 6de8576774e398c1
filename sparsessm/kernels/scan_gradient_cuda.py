"""The selective scan with gradients for CUDA: the state that enters each piece of time is kept, in Triton the rest of them.

A program has some channels of one sample. It computes the states of a piece again and keeps them in a scratch buffer, then
goes back through its steps. Sums over channels are added up over programs afterwards, in a fixed order.

With TRITON_INTERPRET=1 in the environment before triton is imported the kernel runs on the CPU, slowly, for tests.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor
from torch.autograd.function import once_differentiable

from sparsessm.kernels import scan_cuda
from sparsessm.kernels.selective_scan import selective_scan_ref
from sparsessm.kernels.triton_gradient import gradient

# Time steps whose states are computed again together.
PIECE = 64
_CHANNELS = 32


def scan_with_gradient(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    delta_bias: Tensor | None, delta_softplus: bool, h0: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`selective_scan_ref` in float32 for tensors of which some want gradients, and A <= 0; skip and gate are torch's.

    Where Triton does not work, torch finds the gradients by the reference.
    """
    if not scan_cuda.triton_works(u.device):
        return selective_scan_ref(u, delta, A, B, C, D, z, delta_bias, delta_softplus, h0)
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
            y, state = scan_cuda.scan_by_triton(x[:, some], dt[:, some], A, B[:, some], C[:, some], h0=state)
            outputs.append(y)
        ctx.save_for_backward(x, dt, A, B, C, torch.stack(states))
        return torch.cat(outputs, 1), state

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        x, dt, A, B, C, states = ctx.saved_tensors
        gy, carried = gradients[0].contiguous(), gradients[1].contiguous().clone()
        gx, gdt, gB, gC, gA = (torch.empty_like(tensor) for tensor in (x, x, B, C, carried))
        gA.zero_()
        for some, entered in reversed(list(zip(_pieces(x.shape[1]), states, strict=True))):
            steps, inputs, outputs, b, c = (tensor[:, some].contiguous() for tensor in (dt, x, gy, B, C))
            found = piece_gradient(steps, inputs, outputs, b, c, A, entered, carried, gA)
            gdt[:, some], gx[:, some], gB[:, some], gC[:, some] = found
        return gx, gdt, gA.sum(0), gB, gC, carried


def _pieces(steps: int) -> list[slice]:
    return [slice(start, min(start + PIECE, steps)) for start in range(0, steps, PIECE)]


def piece_gradient(
    dt: Tensor, x: Tensor, gy: Tensor, B: Tensor, C: Tensor, A: Tensor, entered: Tensor, carried: Tensor, gA: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Derivatives by dt, x (B,T,D), B and C (B,T,N), given those by the outputs, gy (B,T,D); all contiguous float32.

    Args:
        entered: (B,D,N), states before the first step. gA: (B,D,N), added to.
        carried: (B,D,N), derivatives by the states after the last step, replaced by those before the first.
    """
    (batch, T, D), N = x.shape, A.shape[1]
    programs = triton.cdiv(D, _CHANNELS)
    gdt, gx, states = torch.empty_like(x), torch.empty_like(x), x.new_empty(batch, T, D, N)
    gB, gC = x.new_empty(2, batch, programs, T, N)
    with torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext():
        scan_cuda.launch(
            gradient, (programs, batch),
            dt, x, gy, B, C, A.contiguous(), entered.contiguous(), carried, gA, gdt, gx, gB, gC, states, T, D, programs,
            N=N, BN=triton.next_power_of_2(N), BD=_CHANNELS,
        )  # fmt: skip
    return gdt, gx, gB.sum(1), gC.sum(1)
