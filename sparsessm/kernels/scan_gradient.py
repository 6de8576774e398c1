"""The selective scan with gradients: the state that enters each piece of time is kept, all others are computed again.

Autograd through `selective_scan_ref` keeps several numbers for every state of every step; here memory grows with B L D, and
B D N for each piece of PIECE steps. `selective_scan_gradient_ref` is written to be read. With a_t = exp(dt_t A), s = silu,
p_t the output before the gate, and g of something the derivative of the loss by it:

    gp_t = gy_t s(z_t)        gz_t = gy_t p_t s'(z_t)        gh_t = C_t gp_t + a_{t+1} gh_{t+1}
    gA = sum_t gh_t h_{t-1} a_t dt_t                         gdt_t = sum_n gh_t (h_{t-1} a_t A + B_t u_t)
    gB_t = sum_d gh_t dt_t u_t        gC_t = sum_d gp_t h_t        gu_t = dt_t sum_n gh_t B_t + D gp_t
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from sparsessm import lanes
from sparsessm.compiled import kept, source_of
from sparsessm.kernels import functions, scan_gradient_piece
from sparsessm.kernels.functions import LOG2E
from sparsessm.kernels.scan_cpu import flat, selective_scan_cpu, view_of
from sparsessm.kernels.scan_gradient_piece import PIECE
from sparsessm.lanes import LANES
from sparsessm.threads import for_each

# Tasks that the channels of a batch are cut into at the least: the threads that can share it.
TASKS = 8

Gradients = tuple[Tensor | None, ...]


def _compiled(source: str) -> Callable[..., None]:
    def gradient(task: Any) -> None:
        if len(source) > 0:
            scan_gradient_piece.gradient_piece(*task)

    return kept(gradient)


_gradient = _compiled(source_of(lanes, functions, scan_gradient_piece))


def scan_with_gradient(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
    delta_bias: Tensor | None, delta_softplus: bool, h0: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`selective_scan_ref` for tensors in the memory of the CPU of which some want gradients, where no state grows.

    The forward is that of `selective_scan_cpu`, to the bit. Gradients of gradients are refused.
    """
    return _Scan.apply(u, delta, A, B, C, D, z, delta_bias, delta_softplus, h0)


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, z: Tensor | None,
        delta_bias: Tensor | None, delta_softplus: bool, h0: Tensor | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        batch, steps, channels = u.shape
        state = torch.zeros(batch, channels, A.shape[1]) if h0 is None else h0.float()
        y, states = torch.empty_like(u, memory_format=torch.contiguous_format), []
        for start in range(0, steps, PIECE):
            some = slice(start, start + PIECE)
            states.append(state)
            y[:, some], state = selective_scan_cpu(
                u[:, some], delta[:, some], A, B[:, some], C[:, some], D, None if z is None else z[:, some], delta_bias,
                delta_softplus, state,
            )  # fmt: skip
        ctx.softplus = delta_softplus
        ctx.save_for_backward(u, delta, A, B, C, D, z, delta_bias, h0, torch.stack(states))
        return y, state

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gy: Tensor, glast: Tensor) -> Gradients:
        *inputs, states = ctx.saved_tensors
        found = selective_scan_gradient(gy, glast, states, *inputs[:8], delta_softplus=ctx.softplus)
        own = [None if x is None or g is None else g.to(x.dtype) for x, g in zip(inputs, found, strict=True)]
        return (*own[:8], None, own[8])


def selective_scan_gradient(
    gy: Tensor, glast: Tensor, states: Tensor, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor,
    D: Tensor | None, z: Tensor | None, delta_bias: Tensor | None, *, delta_softplus: bool,
) -> Gradients:  # fmt: skip
    """`selective_scan_gradient_ref` in float32, compiled, from states (pieces,B,D,N), those that enter each piece."""
    (batch, steps, channels), N = u.shape, A.shape[1]
    views, strides = zip(*(view_of(x) for x in (u, delta, u if z is None else z, B, C, gy)), strict=True)
    width = -(-channels // LANES // -(-TASKS // batch)) * LANES
    tasks = [(b, d, min(d + width, channels)) for b in range(batch) for d in range(0, channels, width)]
    carried = glast.float().contiguous().clone()
    gu, gdelta, gz = (torch.empty(batch, steps, channels if given else 0) for given in (True, True, z is not None))
    gA, gskip = torch.empty_like(carried), torch.empty(batch, channels)
    gB, gC = torch.empty(2, len(tasks), steps, N)
    skip, bias = (torch.zeros(channels) if x is None else x for x in (D, delta_bias))
    shared = (
        (batch, steps, channels, N), np.array(strides), *views, flat(A), flat(A.double() * LOG2E), flat(skip), flat(bias),
        delta_softplus, z is not None, flat(states), *map(flat, (carried, gu, gdelta, gz, gA, gskip, gB, gC)),
    )  # fmt: skip
    work = [((number, *task), *shared) for number, task in enumerate(tasks)]
    for_each(_gradient, work, min(torch.get_num_threads(), len(work)))
    gB, gC = (x.view(batch, -1, steps, N).sum(1) for x in (gB, gC))
    return (
        gu, gdelta, gA.sum(0), gB, gC, None if D is None else gskip.sum(0), None if z is None else gz,
        None if delta_bias is None else gdelta.sum((0, 1)), carried,
    )  # fmt: skip


def selective_scan_gradient_ref(
    gy: Tensor, glast: Tensor, h0: Tensor, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor,
    D: Tensor | None, z: Tensor | None, delta_bias: Tensor | None, *, delta_softplus: bool,
) -> Gradients:  # fmt: skip
    """One step of the recurrence after the other, and back, in the dtype of the inputs.

    Args:
        gy, glast: (B,L,D), (B,D,N), the derivatives of the loss by the outputs of the scan.
        h0: (B,D,N). The others are those of `selective_scan_ref`.

    Returns:
        The derivatives by u, delta, A, B, C, D, z, delta_bias and h0, in their shapes; None for what is not given.
    """
    raw = delta if delta_bias is None else delta + delta_bias
    dt = F.softplus(raw) if delta_softplus else raw
    skip, gate = torch.zeros_like(u[0, 0]) if D is None else D, torch.ones_like(u) if z is None else F.silu(z)
    states = [h0]
    for t in range(u.shape[1]):
        inflow = (dt[:, t] * u[:, t])[..., None] * B[:, t, None]  # (B,D,N)
        states.append(torch.exp(dt[:, t, :, None] * A) * states[-1] + inflow)
    h = torch.stack(states, 1)  # (B,1+L,D,N)
    gp = gy * gate
    gdt, gdtx, gB, gA, gh = torch.zeros_like(u), torch.zeros_like(u), torch.zeros_like(B), torch.zeros_like(A), glast
    for t in reversed(range(u.shape[1])):
        gh = gh + C[:, t, None] * gp[:, t, :, None]
        gdtx[:, t] = (gh * B[:, t, None]).sum(-1)
        gB[:, t] = (gh * (dt[:, t] * u[:, t])[..., None]).sum(1)
        gh = gh * torch.exp(dt[:, t, :, None] * A)
        gA += (gh * h[:, t] * dt[:, t, :, None]).sum(0)
        gdt[:, t] = (gh * h[:, t] * A).sum(-1)
    gdelta = (gdt + gdtx * u) * (torch.sigmoid(raw) if delta_softplus else 1)
    gz = None
    if z is not None:
        slope = torch.sigmoid(z) * (1 + z * (1 - torch.sigmoid(z)))
        gz = gy * ((h[:, 1:] @ C[..., None]).squeeze(-1) + skip * u) * slope
    return (
        gdtx * dt + skip * gp, gdelta, gA, gB, torch.einsum("btdn,btd->btn", h[:, 1:], gp),
        None if D is None else (gp * u).sum((0, 1)), gz, None if delta_bias is None else gdelta.sum((0, 1)), gh,
    )  # fmt: skip
