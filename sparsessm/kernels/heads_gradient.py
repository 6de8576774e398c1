"""The scan of Mamba-2 with gradients: the state that enters each piece of time is kept, all others are computed again.

Forward is `kernels.chunked_scan.chunked_scan` over one piece after the other, backward by matrix products in chunks over the
pieces in reverse; memory is that of the inputs, a state a piece, and what one piece needs. In a chunk, for one head, with
x = dt u, c_i the sum of dt A until step i, L_ij = exp(c_i - c_j) for j <= i, and S the state that enters:

    y_i = sum_j L_ij (C_i . B_j) x_j + exp(c_i) S C_i          S' = exp(c_Q) S + sum_j exp(c_Q - c_j) x_j B_j^T

The derivative by dt_t A is a sum over all that crosses step t: pairs j < t <= i, readings of S at i >= t, what flows into S'
at j < t, and S in S'. Each is summed as such: differences of longer sums would lose the small among them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from sparsessm.kernels.selective_scan import FORGOTTEN

# Time steps whose states are computed again together, and those of a chunk.
PIECE, CHUNK = 256, 64


def scan_with_gradient(
    scan: Callable[..., tuple[Tensor, Tensor]], u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None,
    h0: Tensor | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`scan`, which is `chunked_scan`, for tensors of which some want gradients; gradients of gradients are refused."""
    return _Scan.apply(scan, u, dt, A, B, C, D, h0)


class _Scan(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, scan: Callable[..., tuple[Tensor, Tensor]], u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor,
        D: Tensor | None, h0: Tensor | None,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        batch, steps, H, P = u.shape
        state = torch.zeros(batch, H, P, B.shape[3], device=u.device) if h0 is None else h0.float()
        y, states = torch.empty(u.shape, device=u.device), []
        for some in _pieces(steps):
            states.append(state)
            y[:, some], state = scan(u[:, some], dt[:, some], A, B[:, some], C[:, some], D, state)
        ctx.save_for_backward(u, dt, A, B, C, D, h0, torch.stack(states))
        return y, state

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gy: Tensor, glast: Tensor) -> tuple[Tensor | None, ...]:
        u, dt, A, B, C, D, h0, states = ctx.saved_tensors
        gu, gdt, gB, gC = (torch.empty_like(x, memory_format=torch.contiguous_format) for x in (u, dt, B, C))
        gA, gD = torch.zeros_like(A), torch.zeros_like(A)
        for some, state in reversed(list(zip(_pieces(u.shape[1]), states, strict=True))):
            piece = _Piece(u[:, some], dt[:, some], A, B[:, some], C[:, some], state)
            of_u, of_dt, of_A, gB[:, some], gC[:, some], glast = piece.gradients(gy[:, some], glast)
            gdt[:, some] = of_dt
            gA += of_A
            if D is not None:
                gD += torch.linalg.vecdot(gy[:, some], u[:, some].float()).sum((0, 1))
                of_u = of_u.addcmul_(gy[:, some], D.float()[:, None])
            gu[:, some] = of_u
        return None, gu, gdt, gA, gB, gC, None if D is None else gD.to(D.dtype), None if h0 is None else glast.to(h0.dtype)


def _pieces(steps: int) -> list[slice]:
    return [slice(start, min(start + PIECE, steps)) for start in range(0, steps, PIECE)]


class _Piece:
    """What the gradients of a piece need, in chunks: b samples, c chunks of Q steps, G groups of h heads of P channels.

    Padded to whole chunks with steps that change nothing. Products with states are those of all heads of a group at once,
    (Q,N) with (N,hP); within a chunk each head has its own, (Q,Q) with (Q,P).
    """

    def __init__(self, u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, state: Tensor) -> None:
        self.steps, (H, self.P), G = u.shape[1], u.shape[2:], B.shape[2]
        Q = min(CHUNK, self.steps)
        self.Q, self.heads, self.A = Q, (G, H // G), A.float()
        self.B, self.C = self._cut(B), self._cut(C)  # (b,c,G,Q,N)
        self.u, self.dt = self._cut(u.flatten(2)), self._cut(dt)  # (b,c,G,Q,hP), (b,c,G,Q,h)
        self.x = self.u * self._wide(self.dt)
        exponents = (self.dt.double() * A.double().view(G, 1, -1)).mT  # (b,c,G,h,Q)
        # as in the forward: what is less is as good as this, and does not depend on dt
        self.counts = exponents >= FORGOTTEN
        total = exponents.clamp_min(FORGOTTEN).cumsum(-1)
        self.lower = torch.ones(Q, Q, dtype=torch.bool, device=u.device).tril()
        apart = (total[..., :, None] - total[..., None, :]).masked_fill_(~self.lower, -torch.inf)
        self.within = apart.float().exp_()  # (b,c,G,h,Q,Q)
        self.entering = self._wide(total.mT.float().exp_())  # (b,c,G,Q,hP)
        self.leaving = self._wide((total[..., -1:] - total).mT.float().exp_())
        self.whole = total[..., -1].float().exp_()  # (b,c,G,h)
        self.decay = self._wide(self.whole)[..., None, :]  # (b,c,G,1,hP)
        inflow = self.B.mT @ (self.x * self.leaving)
        self.states = torch.empty_like(inflow)  # (b,c,G,N,hP), those that enter each chunk
        state = self._turned(state)
        for c in range(inflow.shape[1]):
            self.states[:, c] = state
            state = torch.addcmul(inflow[:, c], self.decay[:, c], state)

    def gradients(self, gy: Tensor, glast: Tensor) -> tuple[Tensor, ...]:
        """The derivatives by u without D, dt, A, B, C and the first state, from those by y and the last state."""
        gy = self._cut(gy.flatten(2))  # (b,c,G,Q,hP)
        entering = gy * self.entering
        read = self.C.mT @ entering
        gstates = torch.empty_like(read)  # those by the states that leave each chunk
        gstate = self._turned(glast)
        for c in reversed(range(read.shape[1])):
            gstates[:, c] = gstate
            gstate = torch.addcmul(read[:, c], self.decay[:, c], gstate)

        mixed = self.within * (self.C @ self.B.mT)[:, :, :, None]  # (b,c,G,h,Q,Q)
        by_head = self._by_head(gy)
        gmixed = by_head @ self._by_head(self.x).mT
        left = self.leaving * (self.B @ gstates)  # (b,c,G,Q,hP)
        gx = self._of_heads(mixed.mT @ by_head).add_(left)
        gscores = (gmixed * self.within).sum(3)  # (b,c,G,Q,Q)
        gB = gscores.mT @ self.C + (self.x * self.leaving) @ gstates.mT
        gC = gscores @ self.B + entering @ self.states.mT

        strict = self.lower.tril(-1)
        pairs = gmixed.mul_(mixed).masked_fill_(~strict, 0)
        # what crosses step t: pairs until t - 1 of the steps after t - 1
        crossing = F.pad(pairs.cumsum(-1).masked_fill_(~strict, 0).sum(-2)[..., :-1], (1, 0))  # (b,c,G,h,Q)
        later = self._sum(entering * (self.C @ self.states)).mT
        earlier = self._sum(self.x * left).mT
        through = self.whole * self._sum((self.states * gstates).sum(-2))
        gexponents = crossing + later.flip(-1).cumsum(-1).flip(-1) + (earlier.cumsum(-1) - earlier) + through[..., None]
        gexponents = torch.where(self.counts, gexponents, 0).mT  # (b,c,G,Q,h)
        gA = (gexponents * self.dt).sum((0, 1, 3)).flatten()
        gdt = self._sum(self.u * gx) + gexponents * self.A.view(self.heads[0], 1, -1)
        gu = self._joined(gx.mul_(self._wide(self.dt))).unflatten(2, (-1, self.P))
        gB, gC = (self._joined(x).unflatten(2, (self.heads[0], -1)) for x in (gB, gC))
        return gu, self._joined(gdt), gA, gB, gC, gstate.mT.reshape(glast.shape)

    def _cut(self, x: Tensor) -> Tensor:
        """(b,L,any) or (b,L,G,any) -> (b,c,G,Q,any/G) or (b,c,G,Q,any), float32."""
        x, missing = x.float().flatten(2), -self.steps % self.Q
        if missing:
            x = torch.cat([x, x.new_zeros(x.shape[0], missing, x.shape[2])], 1)
        return x.unflatten(1, (-1, self.Q)).unflatten(3, (self.heads[0], -1)).transpose(2, 3).contiguous()

    def _joined(self, x: Tensor) -> Tensor:
        """(b,c,G,Q,any) -> (b,L,G any)."""
        return x.transpose(2, 3).flatten(3).flatten(1, 2)[:, : self.steps]

    def _turned(self, state: Tensor) -> Tensor:
        """(b,H,P,N) -> (b,G,N,hP), float32."""
        return state.float().unflatten(1, self.heads).flatten(2, 3).mT

    def _wide(self, x: Tensor) -> Tensor:
        """(...,h) -> (...,hP)."""
        return x.repeat_interleave(self.P, -1)

    def _sum(self, x: Tensor) -> Tensor:
        """(...,hP) -> (...,h)."""
        return x.unflatten(-1, (-1, self.P)).sum(-1)

    def _by_head(self, x: Tensor) -> Tensor:
        """(b,c,G,Q,hP) -> (b,c,G,h,Q,P)."""
        return x.unflatten(-1, (-1, self.P)).transpose(3, 4).contiguous()

    def _of_heads(self, x: Tensor) -> Tensor:
        """(b,c,G,h,Q,P) -> (b,c,G,Q,hP)."""
        return x.transpose(3, 4).flatten(4)
