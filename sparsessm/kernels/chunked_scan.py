"""The scan of Mamba-2 (Dao and Gu 2024), and sums over its states, without storing them.

`chunked_scan_ref` is written to be read; `chunked_scan` computes the same by matrix products in chunks of time: on CPUs
in a kernel of ours (kernels.heads_piece), elsewhere by torch, or by mamba-ssm on GPUs where no sums are wanted and it is
installed and agrees. H heads of P channels, N states, G groups of heads that share
B and C: head h reads group g = h // (H/G).

    S_t[h] = exp(dt_t[h] A[h]) S_{t-1}[h] + dt_t[h] u_t[h] B_t[g]^T    (P,N)        y_t[h] = S_t[h] C_t[g] + D[h] u_t[h]

No kernel returns S_t, and none has to. With q_t[h] = S_t[h] B_t[g], which is the y (without D) of the same scan with B in
the place of C, the squared norms follow a recurrence of one number a head, a = exp(dt A):

    |S_t|^2 = a^2 |S_{t-1}|^2 + 2 dt u_t . q_t - dt^2 |u_t|^2 |B_t|^2
"""

from __future__ import annotations

import functools
import importlib.util
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sparsessm.kernels.backends import agrees, wants_gradient
from sparsessm.kernels.selective_scan import FORGOTTEN, SUM_DTYPE, ScanSums, decays, kernel_for

# Time steps of a chunk: the products within a chunk grow with it, the states that are kept shrink.
CHUNK = 32
# Of mamba-ssm's kernels: the length that transformers configures for published checkpoints.
THEIR_CHUNK = 256


@dataclass
class HeadStatistics(ScanSums):
    """Sums over the states of heads.

    Attributes:
        h2: (T,1,H), sum over the batch of |S_{t-1}[h]|^2, the state that enters step t; by_state: (T,H,N), of each of its
            columns |S_{t-1}[h][:,n]|^2.
        abar: sum over the batch of exp(dt_t A), (T,1,H); by_state (T,H,1).
        hh: (H,H), sum over batch and steps of <S_{t-1}[h], S_{t-1}[k]> (the Hessian of SparseGPT on A_log).
        ch2: sum over the batch of |S_t[h][:,n]|^2 C_t[n]^2 (GHOST), summed over n, (T,1,H); by_state: (T,H,N).
        gram: (1,H,H), by_state (1,N,N): sum of products of what the mixer's output loses with each head or state; the
            mixer fills it (models.mamba2). effect says what pruned means, see ScanStatistics.
        counterfactual: (B,H,P,N), the state with A = -1 after the last step of the scan that ran last.
    """

    by_state: bool = False

    @classmethod
    def zeros(
        cls, needs: tuple[str, ...], steps: int, H: int, N: int, device: torch.device | str, *, effect: str = "zero",
        by_state: bool = False,
    ) -> HeadStatistics:  # fmt: skip
        """Empty sums for a scan of `steps` time steps; `needs` names the fields to be filled."""
        scores = (steps, H, N) if by_state else (steps, 1, H)
        shapes = {
            "h2": scores, "abar": (steps, H, 1) if by_state else scores, "hh": (H, H), "ch2": scores,
            "gram": (1, N, N) if by_state else (1, H, H),
        }  # fmt: skip
        return cls.filled(needs, shapes, device, effect=effect, by_state=by_state)


def chunked_scan_ref(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None, h0: Tensor | None = None,
    statistics: HeadStatistics | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """One step of the recurrence after the other, in float64 for float64 inputs and float32 for others.

    Args:
        u: (B,L,H,P). dt: (B,L,H), after softplus and limits. A, D: (H,). B, C: (B,L,G,N). h0: (B,H,P,N), zero if None.
        statistics: sums to add to, all but gram.

    Returns:
        y (B,L,H,P) and the last state (B,H,P,N), in the dtype of the computation.
    """
    dtype = torch.float64 if u.dtype == torch.float64 else torch.float32
    u, dt, A, B, C = (tensor.to(dtype) for tensor in (u, dt, A, B, C))
    (batch, steps, H, P), (G, N) = u.shape, B.shape[2:]
    B, C = (tensor.repeat_interleave(H // G, dim=2) for tensor in (B, C))  # (B,L,H,N)
    S = torch.zeros(batch, H, P, N, dtype=dtype, device=u.device) if h0 is None else h0.to(dtype)
    y = torch.empty_like(u)
    for t in range(steps):
        abar = torch.exp(dt[:, t] * A)  # (B,H)
        entered = S
        S = abar[..., None, None] * S + (dt[:, t, :, None] * u[:, t])[..., None] * B[:, t, :, None]  # (B,H,P,N)
        y[:, t] = (S @ C[:, t, :, :, None]).squeeze(-1)
        if statistics is not None:
            _add(statistics, t, entered.to(SUM_DTYPE), S.to(SUM_DTYPE), abar.to(SUM_DTYPE), C[:, t].to(SUM_DTYPE))
    return y if D is None else y + D.to(dtype)[:, None] * u, S


def _add(sums: HeadStatistics, t: int, entered: Tensor, left: Tensor, abar: Tensor, C: Tensor) -> None:
    """Adds the states (B,H,P,N) that enter and leave step t, its transitions (B,H) and C (B,H,N) to the sums."""
    if sums.h2 is not None:
        squares = entered.square().sum((0, 2))  # (H,N)
        sums.h2[t] += squares if sums.by_state else squares.sum(-1)
    if sums.abar is not None:
        sums.abar[t] += abar.sum(0)[:, None] if sums.by_state else abar.sum(0)
    if sums.hh is not None:
        sums.hh += torch.einsum("bhpn,bkpn->hk", entered, entered)
    if sums.ch2 is not None:
        read = (left.square().sum(2) * C.square()).sum(0)  # (H,N)
        sums.ch2[t] += read if sums.by_state else read.sum(-1)


def chunked_scan(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None = None, h0: Tensor | None = None,
    statistics: HeadStatistics | None = None,
    *, at_chunks: Callable[[int, Tensor], None] | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`chunked_scan_ref` by matrix products in chunks: same arguments, same results to rounding.

    at_chunks: called after each chunk with the index of its last step and the states (B,H,P,N) that leave it.
    """
    if u.dtype == torch.float64:
        if at_chunks is not None:
            raise ValueError("the reference does not stop at chunks")
        return chunked_scan_ref(u, dt, A, B, C, D, h0, statistics)
    if at_chunks is None and not (statistics is not None and statistics.tensors()):
        if wants_gradient(u, dt, A, B, C, D, h0):
            with_gradient = importlib.import_module("sparsessm.kernels.heads_gradient").scan_with_gradient
            return with_gradient(chunked_scan, u, dt, A, B, C, D, h0)
        theirs = _serving(u, B, C)
        if theirs is not None:
            return scan_by_mamba_ssm(theirs, u, dt, A, B, C, D, h0)
    u, dt, A, B, C = (tensor.float() for tensor in (u, dt, A, B, C))
    in_chunks = _Chunks(u, dt, A, B, h0) if at_chunks is not None or wants_gradient(u, dt, A, B, C, D, h0) else None
    scan = in_chunks or _scan_of(u, dt, A, B, h0)
    if statistics is not None:
        _statistics(scan, u, dt, A, B, C, h0, statistics)
    y = scan.read(C, None if D is None else D.float())
    if at_chunks is not None and in_chunks is not None:
        for t, states in in_chunks.ends():
            at_chunks(t, states)
    return y, scan.last


def _scan_of(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, h0: Tensor | None) -> _Chunks | _OnePass:
    kernels = compiled_kernels(u, dt, A, B)
    if kernels is None or not decays(A, dt):
        return _Chunks(u, dt, A, B, h0)
    return _OnePass(kernels, u, dt, A, B, h0)


def compiled_kernels(*tensors: Tensor) -> Any:
    """The module `kernels.heads_cpu` where it can compute with the tensors, None where torch has to."""
    plain = all(tensor.device.type == "cpu" and tensor.dtype == torch.float32 for tensor in tensors)
    if not plain or kernel_for("cpu") != "cpu":
        return None
    return importlib.import_module("sparsessm.kernels.heads_cpu")


def _serving(u: Tensor, B: Tensor, C: Tensor) -> Callable[..., Any] | None:
    """The scan of mamba-ssm where it can compute a scan of these tensors."""
    plain = u.device.type == "cuda" and u.dtype == B.dtype == C.dtype and kernel_for("cuda") == "cuda"
    return mamba_ssm_scan("cuda", u.dtype) if plain else None


@functools.cache
def mamba_ssm_scan(device: str, dtype: torch.dtype) -> Callable[..., Any] | None:
    """The chunked scan of mamba-ssm, if it is installed and agrees with ours on inputs of the dtype."""
    if importlib.util.find_spec("mamba_ssm") is None:
        return None

    def theirs(*arguments: Any, **options: Any) -> tuple[Tensor, Tensor]:
        from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

        return mamba_chunk_scan_combined(*arguments, **options)

    return theirs if agrees_with_ours(theirs, device, dtype) else None


def agrees_with_ours(theirs: Callable[..., Any], device: str, dtype: torch.dtype) -> bool:
    """Whether a function with the signature of mamba-ssm's mamba_chunk_scan_combined computes our scan; warns if not.

    More than one of their chunks, two groups, a state to start from, and heads of pruned transitions of both kinds.
    """
    (batch, steps, groups, heads, P, N), generator = (2, 300, 2, 8, 32, 16), torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator).to(device)

    u, B, C = draw(batch, steps, heads, P).to(dtype), *(draw(batch, steps, groups, N).to(dtype) for _ in range(2))
    dt, A, D, h0 = draw(batch, steps, heads).exp() / 8, -draw(heads).exp(), draw(heads), draw(batch, heads, P, N)
    A[1], A[6] = -math.exp(30), 0
    scan = _Chunks(u.float(), dt, A, B.float(), h0)
    ours = scan.read(C.float(), D), scan.last
    roundings = [torch.finfo(dtype).eps] * 2
    return agrees(
        "mamba-ssm", "the scan of heads", lambda: scan_by_mamba_ssm(theirs, u, dt, A, B, C, D, h0), ours, roundings
    )


def scan_by_mamba_ssm(
    theirs: Callable[..., Any], u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None, h0: Tensor | None
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Our scan by mamba-ssm's mamba_chunk_scan_combined, which rounds y to the dtype of u."""
    D, h0 = (None if tensor is None else tensor.float() for tensor in (D, h0))
    y, last = theirs(u, dt.float(), A.float(), B, C, THEIR_CHUNK, D=D, initial_states=h0, return_final_states=True)
    return y.float(), last.float()


class _OnePass:
    """The scans over the same u, dt, A, B and h0 by the kernel for CPUs: each reading goes through the states once.

    Attributes:
        last: (B,H,P,N), the state after the last step, once something was read.
    """

    def __init__(self, kernels: Any, u: Tensor, dt: Tensor, A: Tensor, B: Tensor, h0: Tensor | None) -> None:
        self._kernels = kernels
        self._given, self._h0 = (u, dt, A, B), h0
        self.last = u.new_empty(0)

    def read(self, C: Tensor, D: Tensor | None = None) -> Tensor:
        """y, (B,L,H,P), for a C (B,L,G,N)."""
        y, self.last = self._kernels.scan_heads(*self._given, C, D, self._h0)
        return y


class _Chunks:
    """What all scans over the same u, dt, A, B and h0 share; padded to whole chunks with steps that change nothing.

    Attributes:
        states: (B,c,G,hP,N), those that enter each chunk. last: (B,H,P,N), the one after the last step.
    """

    def __init__(self, u: Tensor, dt: Tensor, A: Tensor, B: Tensor, h0: Tensor | None) -> None:
        batch, self.steps, H, P = u.shape
        G, N, self._u = *B.shape[2:], u
        Q = min(CHUNK, self.steps)
        self.sizes = batch, -(-self.steps // Q), Q, G, H // G, P, N
        x = self._cut(u * dt[..., None])  # (B,c,Q,H,P)
        total = self._cut(dt.double() * A.double()).clamp_min(FORGOTTEN).cumsum(2)  # (B,c,Q,H)
        self.x = x
        decay = (total[:, :, :, None] - total[:, :, None]).masked_fill_(_later(Q, u.device), -torch.inf)  # (B,c,i,j,H)
        self.within = decay.float().exp_().permute(0, 1, 4, 2, 3).unflatten(2, (G, -1))  # (B,c,G,h,i,j)
        self.entering = total.float().exp_()  # (B,c,Q,H)
        leaving = (total[:, :, -1:] - total).float().exp_()
        whole = total[:, :, -1].float().exp_()  # (B,c,H)
        self.B = self._cut(B)  # (B,c,Q,G,N)
        weighted = (x * leaving[..., None]).unflatten(3, (G, -1)).flatten(4)  # (B,c,Q,G,hP)
        # what flows in with each chunk, until the state that enters it takes its place
        self.states = weighted.permute(0, 1, 3, 4, 2) @ self.B.transpose(2, 3)  # (B,c,G,hP,N)
        state = self.x.new_zeros(self.states[:, 0].shape) if h0 is None else h0.float().reshape(self.states[:, 0].shape)
        for c in range(self.states.shape[1]):
            decay = whole[:, c].view(batch, G, -1, 1).expand(-1, -1, -1, P).reshape(batch, G, -1, 1)
            after = torch.addcmul(self.states[:, c], decay, state)
            self.states[:, c] = state
            state = after
        self.last = state.view(batch, H, P, N)

    def _cut(self, tensor: Tensor) -> Tensor:
        """(B,L,...) -> (B,c,Q,...)."""
        batch, chunks, Q = self.sizes[:3]
        missing = chunks * Q - self.steps
        if missing:
            tensor = torch.cat([tensor, tensor.new_zeros(batch, missing, *tensor.shape[2:])], 1)
        return tensor.unflatten(1, (chunks, Q))

    def read(self, C: Tensor, D: Tensor | None = None) -> Tensor:
        """y, (B,L,H,P), for a C (B,L,G,N)."""
        _, _, _, G, heads, P, _ = self.sizes
        C = self._cut(C)
        scores = C.transpose(2, 3) @ self.B.permute(0, 1, 3, 4, 2)  # (B,c,G,i,j)
        mixed = self.within * scores[:, :, :, None]  # (B,c,G,h,i,j)
        x = self.x.unflatten(3, (G, heads)).permute(0, 1, 3, 4, 2, 5)  # (B,c,G,h,Q,P)
        y = (mixed @ x).permute(0, 1, 4, 2, 3, 5).flatten(3, 4)  # (B,c,Q,H,P)
        before = (C.transpose(2, 3) @ self.states.transpose(3, 4)).unflatten(4, (heads, P))  # (B,c,G,Q,h,P)
        before = before.transpose(2, 3).flatten(3, 4)  # (B,c,Q,H,P)
        y = torch.addcmul(y, before, self.entering[..., None])
        y = y.flatten(1, 2)[:, : self.steps]
        return y if D is None else y.addcmul_(D[:, None], self._u)

    def ends(self) -> Iterator[tuple[int, Tensor]]:
        """The last step of each chunk, and the states (B,H,P,N) that leave it."""
        _, chunks, Q, *_ = self.sizes
        for c in range(1, chunks):
            yield c * Q - 1, self.states[:, c].view(self.last.shape)
        yield self.steps - 1, self.last


def _later(Q: int, device: torch.device) -> Tensor:
    """(Q,Q,1): whether step j comes after step i."""
    return torch.ones(Q, Q, dtype=torch.bool, device=device).triu(1)[..., None]


def _statistics(
    scan: _Chunks | _OnePass, u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, h0: Tensor | None, sums: HeadStatistics
) -> None:
    """Adds to the sums, by recurrences over numbers instead of states."""
    wide = dt.to(SUM_DTYPE)
    abar = torch.exp(wide * A.to(SUM_DTYPE))  # (B,L,H)
    if sums.abar is not None:
        total = abar.sum(0)
        sums.abar += total[..., None] if sums.by_state else total[:, None]
    if sums.ch2 is not None or (sums.by_state and sums.h2 is not None):
        entered, left = _squares_of_states(u, dt, A, B, abar, h0)  # (B,L,H,N)
        if sums.by_state and sums.h2 is not None:
            sums.h2 += entered.sum(0)
        if sums.ch2 is not None:
            read = (left * C.to(SUM_DTYPE).square().repeat_interleave(u.shape[2] // B.shape[2], 2)).sum(0)  # (L,H,N)
            sums.ch2 += read if sums.by_state else read.sum(-1)[:, None]
    if sums.h2 is not None and not sums.by_state:
        sums.h2 += _squares(scan, u, wide, B, abar, h0)[:, None]
    if sums.hh is not None:
        sums.hh += _products(scan, u, wide, B, abar, h0)


def _recurrence(gain: Tensor, decay: Tensor, start: Tensor | float) -> tuple[Tensor, Tensor]:
    """e_t = decay_t e_{t-1} + gain_t over the second axis; what enters each step, and what leaves it."""
    left, e = torch.empty_like(gain), torch.zeros_like(gain[:, 0]) + start
    first = e
    for t in range(gain.shape[1]):
        e = torch.addcmul(gain[:, t], decay[:, t].expand_as(e), e, out=left[:, t])
    return torch.cat([first[:, None], left[:, :-1]], 1), left


def _squares(scan: _Chunks | _OnePass, u: Tensor, dt: Tensor, B: Tensor, abar: Tensor, h0: Tensor | None) -> Tensor:
    """(L,H): sum over the batch of |S_{t-1}[h]|^2."""
    q = scan.read(B)
    heads = u.shape[2] // B.shape[2]
    inner = (u * q).sum(-1, dtype=SUM_DTYPE)  # (B,L,H)
    own = u.square().sum(-1, dtype=SUM_DTYPE) * B.square().sum(-1, dtype=SUM_DTYPE).repeat_interleave(heads, 2)
    start = 0.0 if h0 is None else h0.to(SUM_DTYPE).square().sum((2, 3))
    entered, _ = _recurrence(2 * dt * inner - dt.square() * own, abar.square(), start)
    return entered.clamp_min(0).sum(0)


def _squares_of_states(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, abar: Tensor, h0: Tensor | None
) -> tuple[Tensor, Tensor]:
    """(B,L,H,N) each: |S_{t-1}[h][:,n]|^2 and |S_t[h][:,n]|^2.

    w_t = S_t^T u_t is the output of the scan with the roles of u and B exchanged.
    """
    B = B.repeat_interleave(u.shape[2] // B.shape[2], 2)  # (B,L,H,N)
    w = _scan_of(B, dt, A, u, None if h0 is None else h0.transpose(2, 3)).read(u)
    step = dt.to(SUM_DTYPE)[..., None]
    wide = B.to(SUM_DTYPE)
    gain = 2 * step * wide * w - step.square() * u.square().sum(-1, keepdim=True, dtype=SUM_DTYPE) * wide.square()
    start = 0.0 if h0 is None else h0.to(SUM_DTYPE).square().sum(2)
    entered, left = _recurrence(gain, abar.square()[..., None], start)
    return entered.clamp_min_(0), left.clamp_min_(0)


def _products(scan: _Chunks | _OnePass, u: Tensor, dt: Tensor, B: Tensor, abar: Tensor, h0: Tensor | None) -> Tensor:
    """(H,H): sum over batch and steps of <S_{t-1}[h], S_{t-1}[k]>.

    With X_k^g = a_k S_{t-1}[k] B^g, which is q_k^g - dt_k u_k (B^g(k) . B^g) of the scan with B^g for every head,
    <S_t[h],S_t[k]> = a_h a_k <S_{t-1}[h],S_{t-1}[k]> + dt_k u_k . X_h^g(k) + dt_h u_h . X_k^g(h)
                      + dt_h dt_k (u_h . u_k)(B^g(h) . B^g(k)).
    """
    (batch, steps, H, _), G = u.shape, B.shape[2]
    heads = H // G
    wide, step = u.to(SUM_DTYPE), dt[..., None]
    x = step * wide  # (B,L,H,P)
    inner = torch.einsum("blgn,blkn->blgk", B.to(SUM_DTYPE), B.to(SUM_DTYPE)).repeat_interleave(heads, 2)  # (B,L,H,G)
    cross = wide.new_empty(batch, steps, H, H)  # dt_h u_h . X_k^g(h)
    for g in range(G):
        q = scan.read(B[:, :, g : g + 1].expand_as(B))
        X = q.to(SUM_DTYPE) - x * inner[..., g, None]  # (B,L,H,P)
        mine = slice(g * heads, (g + 1) * heads)
        cross[:, :, mine] = x[:, :, mine] @ X.transpose(2, 3)
    own = (x @ x.transpose(2, 3)) * inner.repeat_interleave(heads, 3)
    start = 0.0 if h0 is None else torch.einsum("bhpn,bkpn->bhk", h0.to(SUM_DTYPE), h0.to(SUM_DTYPE))
    gain, decay = cross + cross.transpose(2, 3) + own, abar[..., :, None] * abar[..., None, :]
    return _recurrence(gain, decay, start)[0].sum((0, 1))
