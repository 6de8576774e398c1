"""The derivatives of the selective scan over a piece of time, for CUDA, in Triton.

A program has some channels of one sample. It computes the states of the piece again and keeps them in a scratch buffer, then
goes back through the steps. Sums over channels are added up over programs afterwards, in a fixed order.

With TRITON_INTERPRET=1 in the environment before triton is imported the kernel runs on the CPU, slowly, for tests.
"""

from __future__ import annotations

import contextlib

import torch
import triton
from torch import Tensor

from sparsessm.kernels import scan_cuda
from sparsessm.kernels.triton_gradient import gradient

_CHANNELS = 32


def piece_gradient(
    dt: Tensor, x: Tensor, gy: Tensor, B: Tensor, C: Tensor, A: Tensor, entered: Tensor, carried: Tensor, gA: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """As `scan_gradient_cpu.piece_gradient`."""
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
