"""The selective scan for CPUs, compiled by numba: `sparsessm.model.scan.selective_scan_ref` in one pass.

16 channels go through the recurrence side by side, one in each lane of a vector: everything but the sum over states is
the same work for every channel, and that sum then needs no exchange between lanes. Nothing of size (B,L,D,N) is ever
made: a piece of CHUNK time steps by some channels goes through all phases while it is in cache.

Work is cut along channels, and along the batch where no sums tie it together. No number depends on how many threads
there are, for the cut does not.
"""

from __future__ import annotations

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from numba import njit
from torch import Tensor

from sparsessm.model import lanes
from sparsessm.model.lanes import (
    LANES,
    LOG2E,
    add_products,
    add_tile,
    double,
    fill,
    fill_from,
    fma,
    load,
    load_part,
    pair_at,
    power,
    prefetch,
    silu,
    softplus,
    store,
    store_part,
)
from sparsessm.model.scan import EFFECTS, ScanMoments, selective_scan_ref

CHUNK = 16  # time steps
# States of the channels that go through CHUNK steps together: with what they read and write they stay in a core's cache.
BLOCK_BYTES = 1 << 17
# Pieces that a scan is cut into at the least: the threads that can share it.
PIECES = 8

EFFECT_ZERO, EFFECT_UNIT, EFFECT_REMOVED = range(3)


@njit(nogil=True)
def _scan_piece(
    piece, shape, block, strides, u, delta, z, B, C, y, A, skip, bias, with_softplus, with_gate, state,
    h2, abar, hh, gram, effect, twin,
):  # fmt: skip
    """A piece (samples, channels) of a scan; all arrays are flat, those of size 0 are not wanted.

    strides: of sample and time step, for u, delta, z, B, C and y. A: (D,N), times log2 e. state, twin: (B,D,N), from
    before the first step, and then after the last. hh: (N,N), of this piece alone.
    """
    first_sample, last_sample, first_channel, last_channel = piece
    _, steps, D, N = shape
    batch, groups = last_sample - first_sample, (last_channel - first_channel + LANES - 1) // LANES
    rows = N + N % 2  # pairs of states are taken two by two
    with_sums = h2.size + abar.size + hh.size + gram.size > 0

    # Channels into lanes: a [group][n][lane], states [group][n][sample][lane].
    a = np.zeros(groups * N * LANES, np.float32)
    skips, biases = np.zeros(groups * LANES, np.float32), np.zeros(groups * LANES, np.float32)
    for c in range(last_channel - first_channel):
        d, g, lane = first_channel + c, c // LANES, c % LANES
        skips[c], biases[c] = skip[d], bias[d]
        for n in range(N):
            a[(g * N + n) * LANES + lane] = A[d * N + n]
    hs = np.zeros(groups * N * batch * LANES, np.float32)
    _exchange(state, hs, piece, D, N, True)
    twins = np.zeros(hs.size if twin.size else 0, np.float32)
    if twin.size:
        _exchange(twin, twins, piece, D, N, True)

    # What is kept of a block of channels during CHUNK time steps: [step][group][sample][lane].
    dts = np.empty(CHUNK * block * batch * LANES, np.float32)
    dtxs, gates = np.empty_like(dts), np.ones_like(dts)
    # [group][sample][step][n][lane], for the products of pairs of states.
    entered = np.zeros(block * batch * CHUNK * rows * LANES if hh.size else 0, np.float32)
    lost = np.zeros(block * batch * CHUNK * rows * LANES if gram.size else 0, np.float32)
    pairs = rows * (rows + 2) // 2 * LANES
    hh_sums, gram_sums = np.zeros(pairs if hh.size else 0), np.zeros(groups * pairs if gram.size else 0)

    for start in range(0, steps, CHUNK):
        stop = min(steps, start + CHUNK)
        for first in range(0, groups, block):
            last = min(first + block, groups)
            part = (first_sample, batch, first_channel, last_channel, start, stop, first, last)
            _prepare(part, strides, u, delta, z, biases, with_softplus, with_gate, dts, dtxs, gates)
            if with_sums:
                _steps_with_sums(
                    part, steps, D, N, strides, u, B, C, y, a, skips, dts, dtxs, gates, hs,
                    h2, abar, entered, lost, effect, twins,
                )  # fmt: skip
            else:
                _steps(part, N, strides, u, B, C, y, a, skips, dts, dtxs, gates, hs)
            for g in range(last - first):
                for b in range(batch):
                    at = (g * batch + b) * CHUNK * rows * LANES
                    if hh.size:
                        add_products(entered, at, stop - start, rows, hh_sums, 0)
                    if gram.size:
                        add_products(lost, at, stop - start, rows, gram_sums, (first + g) * pairs)

    _exchange(state, hs, piece, D, N, False)
    if twin.size:
        _exchange(twin, twins, piece, D, N, False)
    for i in range(N):
        for j in range(i + 1):
            at = pair_at(i, j)
            if hh.size:
                total = hh_sums[at : at + LANES].sum()
                hh[i * N + j] += total
                if i != j:
                    hh[j * N + i] += total
            if gram.size:
                for c in range(last_channel - first_channel):
                    total = gram_sums[c // LANES * pairs + at + c % LANES]
                    to = (first_channel + c) * N * N
                    gram[to + i * N + j] += total
                    if i != j:
                        gram[to + j * N + i] += total


def _cached(lanes_source: str):
    """`_scan_piece`, compiled once and kept on disk.

    numba looks only at the file of a function to tell whether what it kept is still good; what it closes over is part
    of the name, so a change of the vectors' source counts as well.
    """

    @njit(nogil=True, cache=True)
    def scan(task):
        if len(lanes_source) > 0:
            _scan_piece(*task)

    return scan


_scan = _cached(hashlib.sha256(Path(lanes.__file__).read_bytes()).hexdigest())


@njit(nogil=True)
def _prepare(part, strides, u, delta, z, biases, with_softplus, with_gate, dts, dtxs, gates):
    """Time steps, inputs times time steps, and gates of a part of a scan."""
    first_sample, batch, first_channel, last_channel, start, stop, first, last = part
    to = 0
    for time in range(start, stop):
        for g in range(first, last):
            c = first_channel + g * LANES
            count = min(LANES, last_channel - c)
            for s in range(first_sample, first_sample + batch):
                dt = load_part(delta, s * strides[1, 0] + time * strides[1, 1] + c, count) + load(biases, g * LANES)
                if with_softplus:
                    dt = softplus(dt)
                store(dts, to, dt)
                store(dtxs, to, dt * load_part(u, s * strides[0, 0] + time * strides[0, 1] + c, count))
                if with_gate:
                    store(gates, to, silu(load_part(z, s * strides[2, 0] + time * strides[2, 1] + c, count)))
                to += LANES


@njit(nogil=True)
def _steps(part, N, strides, u, B, C, y, a, skips, dts, dtxs, gates, hs):
    """The recurrence over a part of a scan of which no sums are wanted."""
    first_sample, batch, first_channel, last_channel, start, stop, first, last = part
    at = 0
    for time in range(start, stop):
        for g in range(first, last):
            c = first_channel + g * LANES
            count = min(LANES, last_channel - c)
            for b in range(batch):
                s = first_sample + b
                dt, dtx = load(dts, at), load(dtxs, at)
                bt, ct = s * strides[3, 0] + time * strides[3, 1], s * strides[4, 0] + time * strides[4, 1]
                out = load(skips, g * LANES) * load_part(u, s * strides[0, 0] + time * strides[0, 1] + c, count)
                for n in range(N):
                    k = ((g * N + n) * batch + b) * LANES
                    h = fma(power(dt, load(a, (g * N + n) * LANES)), load(hs, k), dtx * fill_from(B, bt + n))
                    store(hs, k, h)
                    out = fma(fill_from(C, ct + n), h, out)
                store_part(y, s * strides[5, 0] + time * strides[5, 1] + c, count, out * load(gates, at))
                at += LANES


@njit(nogil=True)
def _steps_with_sums(
    part, steps, D, N, strides, u, B, C, y, a, skips, dts, dtxs, gates, hs, h2, abar, entered, lost, effect, twins
):
    """The recurrence over a part of a scan, with what `ScanMoments` asks for; one state of all samples after the other."""
    first_sample, batch, first_channel, last_channel, start, stop, first, last = part
    h2_tile, abar_tile, outs = np.empty(N * LANES), np.empty(N * LANES), np.empty(batch * LANES, np.float32)
    rows = N + N % 2
    with_h2, with_abar, with_hh, with_gram = h2.size > 0, abar.size > 0, entered.size > 0, lost.size > 0
    at = 0
    for time in range(start, stop):
        for g in range(first, last):
            c = first_channel + g * LANES
            count = min(LANES, last_channel - c)
            for b in range(batch):
                x = load_part(u, (first_sample + b) * strides[0, 0] + time * strides[0, 1] + c, count)
                store(outs, b * LANES, load(skips, g * LANES) * x)
            ahead = ((time + 1) * D + c) * N if time + 1 < steps else 0
            for n in range(N):
                if with_h2:
                    prefetch(h2, ahead + n * LANES)
                    prefetch(h2, ahead + n * LANES + 8)
                if with_abar:
                    prefetch(abar, ahead + n * LANES)
                    prefetch(abar, ahead + n * LANES + 8)
                h2_sum = double(fill(0.0))
                abar_sum = double(fill(0.0))
                bt = first_sample * strides[3, 0] + time * strides[3, 1] + n
                ct = first_sample * strides[4, 0] + time * strides[4, 1] + n
                an = load(a, (g * N + n) * LANES)
                k = (g * N + n) * batch * LANES
                row = ((g - first) * batch * CHUNK + time - start) * rows * LANES + n * LANES
                for b in range(batch):
                    o = b * LANES
                    dt, h = load(dts, at + o), load(hs, k + o)
                    e = power(dt, an)
                    if with_h2:
                        wide = double(h)
                        h2_sum = fma(wide, wide, h2_sum)
                    if with_abar:
                        abar_sum = abar_sum + double(e)
                    if with_hh:
                        store(entered, row, h)
                    inflow = load(dtxs, at + o) * fill_from(B, bt)
                    cn = fill_from(C, ct)
                    missing = e * h
                    h = fma(e, h, inflow)
                    store(hs, k + o, h)
                    store(outs, o, fma(cn, h, load(outs, o)))
                    if with_gram:
                        if effect == EFFECT_UNIT:
                            other = fma(power(dt, fill(-LOG2E)), load(twins, k + o), inflow)
                            store(twins, k + o, other)
                            missing = h - other
                        elif effect == EFFECT_REMOVED:
                            missing = h
                        store(lost, row, missing * cn * load(gates, at + o))
                    row += CHUNK * rows * LANES
                    bt += strides[3, 0]
                    ct += strides[4, 0]
                store(h2_tile, n * LANES, h2_sum)
                store(abar_tile, n * LANES, abar_sum)
            for b in range(batch):
                to = (first_sample + b) * strides[5, 0] + time * strides[5, 1] + c
                store_part(y, to, count, load(outs, b * LANES) * load(gates, at + b * LANES))
            at += batch * LANES
            if with_h2:
                add_tile(h2_tile, h2, (time * D + c) * N, N, count)
            if with_abar:
                add_tile(abar_tile, abar, (time * D + c) * N, N, count)


@njit(nogil=True)
def _exchange(whole, lanes, piece, D, N, gather):
    """Copies states (B,D,N) of a piece to [group][n][sample][lane], or back."""
    first_sample, last_sample, first_channel, last_channel = piece
    batch = last_sample - first_sample
    for b in range(batch):
        for c in range(last_channel - first_channel):
            g, lane = c // LANES, c % LANES
            for n in range(N):
                k = ((g * N + n) * batch + b) * LANES + lane
                w = ((first_sample + b) * D + first_channel + c) * N + n
                if gather:
                    lanes[k] = whole[w]
                else:
                    whole[w] = lanes[k]


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
    moments: ScanMoments | None = None,
) -> tuple[Tensor, Tensor]:
    """`selective_scan_ref` for tensors in the memory of the CPU, see there.

    Float64 is left to the reference, and so are states that could grow (a positive or undefined A, a negative dt).
    """
    if u.dtype == torch.float64 or not _decays(A, delta, delta_bias, delta_softplus):
        return selective_scan_ref(u, delta, A, B, C, D, z, delta_bias, delta_softplus, h0, moments)
    moments = ScanMoments() if moments is None else moments
    batch, steps, channels = u.shape
    N = A.shape[1]
    y = torch.empty(batch, steps, channels)
    state = torch.zeros(batch, channels, N) if h0 is None else h0.to(torch.float32, copy=True).contiguous()
    twin = None
    if moments.needs_twin():
        twin = moments.first_twin(h0)
        twin = torch.zeros_like(state) if twin is None else twin.to(torch.float32, copy=True).contiguous()

    views, strides = zip(*(_view(x) for x in (u, delta, y if z is None else z, B, C, y)), strict=True)
    pieces = _cut(batch, channels, together=bool(moments.tensors()))
    hh = np.zeros((len(pieces), 0 if moments.hh is None else N * N))
    together = batch if moments.tensors() else 1  # samples of a piece
    block = max(1, BLOCK_BYTES // (LANES * 4 * N * together))
    _run([
        (
            piece, (batch, steps, channels, N), block, np.array(strides), *views, _flat(A.double() * LOG2E),
            _flat(torch.zeros(channels) if D is None else D),
            _flat(torch.zeros(channels) if delta_bias is None else delta_bias), delta_softplus, z is not None, _flat(state),
            _sums(moments.h2), _sums(moments.abar), part, _sums(moments.gram), EFFECTS.index(moments.effect),
            np.empty(0, np.float32) if twin is None else _flat(twin),
        )
        for piece, part in zip(pieces, hh, strict=True)
    ])  # fmt: skip
    if moments.hh is not None:
        moments.hh += torch.from_numpy(hh.sum(0)).view(N, N)
    if twin is not None:
        moments.twin = twin
    return y.to(u.dtype), state


def _decays(A, delta, bias, softplus) -> bool:
    if not bool((A <= 0).all()):
        return False
    return softplus or bool(((delta if bias is None else delta + bias) >= 0).all())


def _view(tensor: Tensor) -> tuple[np.ndarray, tuple[int, int]]:
    """The memory of a tensor (B,L,any), and how far apart its samples and time steps are there."""
    tensor = tensor.detach().float()
    if tensor.stride(2) != 1:
        tensor = tensor.contiguous()
    sample, step, _ = tensor.stride()
    span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.as_strided((span,), (1,)).numpy(), (sample, step)


def _flat(tensor: Tensor) -> np.ndarray:
    return tensor.detach().float().contiguous().view(-1).numpy()


def _sums(tensor: Tensor | None) -> np.ndarray:
    return np.empty(0) if tensor is None else tensor.view(-1).numpy()


def _cut(batch: int, channels: int, together: bool) -> list[tuple[int, int, int, int]]:
    """(first sample, last, first channel, last) of each piece; by the sizes alone, whatever threads there are."""
    samples = [(0, batch)] if together else [(b, b + 1) for b in range(batch)]
    groups = -(-channels // LANES)
    width = -(-groups // -(-PIECES // len(samples))) * LANES
    return [(*some, d, min(d + width, channels)) for some in samples for d in range(0, channels, width)]


_pool: tuple[tuple[int, int], ThreadPoolExecutor] | None = None


def _run(tasks: list[tuple]) -> None:
    """`_scan` of each task, by as many threads as torch has; this one is among them."""
    global _pool
    threads = min(torch.get_num_threads(), len(tasks))
    left = iter(tasks)

    def work() -> None:
        for task in left:
            _scan(task)

    if threads <= 1:
        return work()
    key = (os.getpid(), torch.get_num_threads())  # threads do not survive a fork
    if _pool is None or _pool[0] != key:
        _pool = key, ThreadPoolExecutor(key[1] - 1)
    others = [_pool[1].submit(work) for _ in range(threads - 1)]
    work()
    for other in others:
        other.result()
