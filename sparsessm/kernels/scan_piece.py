"""One piece of the CPU scan, compiled by numba: some channels of some samples through all time steps.

16 channels compute the recurrence side by side, one in each lane of a vector: everything but the sum over states is
the same work for every channel, and that sum then needs no exchange between lanes. Four states of one sample compute
CHUNK time steps in registers before the next four do; all else that they need is in the first-level cache by then, and
what comes from main memory was asked for while the sample before was computed.

Sums of a group of channels are in float32 for CHUNK steps of at most TOGETHER samples, and are added to the float64 sums
after that.
"""

from __future__ import annotations

import numpy as np
from numba import njit

from sparsessm.kernels.functions import exp, power, silu, softplus
from sparsessm.lanes import (
    LANES,
    add_transposed,
    add_wide,
    address,
    fill,
    fill_from,
    floats,
    fma,
    load,
    load_row,
    prefetch,
    put,
    store,
    store_row,
    take,
    transpose,
)

CHUNK = 16  # time steps
TOGETHER = 8  # samples

EFFECT_ZERO, EFFECT_UNIT, EFFECT_REMOVED = range(3)


@njit(nogil=True)
def scan_piece(
    piece, shape, strides, u, delta, z, B, C, y, A, skip, bias, with_softplus, with_gate, state,
    h2, abar, hh, gram, effect, counterfactual,
):  # fmt: skip
    """A piece (samples, channels) of a scan; all arrays are flat, those of size 0 are not wanted.

    strides: of sample and time step, for u, delta, z, B, C and y. A: (D,N), times log2 e. state, counterfactual: (B,D,N),
    from before the first step, and then after the last. hh: (N,N), of this piece alone.
    """
    first_sample, last_sample, first_channel, last_channel = piece
    _, steps, D, N = shape
    rows = (N + 3) // 4 * 4
    groups = (last_channel - first_channel + LANES - 1) // LANES
    batch = min(last_sample - first_sample, TOGETHER)
    with_h2, with_abar, with_hh, with_gram = h2.size > 0, abar.size > 0, hh.size > 0, gram.size > 0
    with_counterfactual = counterfactual.size > 0

    # Channels into lanes: a [group][n][lane], states [sample][group][n][lane].
    a = floats(groups * rows * LANES)
    skips, biases = floats(groups * LANES), floats(groups * LANES)
    for c in range(last_channel - first_channel):
        d, g, lane = first_channel + c, c // LANES, c % LANES
        skips[c], biases[c] = skip[d], bias[d]
        for n in range(N):
            a[(g * rows + n) * LANES + lane] = A[d * N + n]
    hs = floats((last_sample - first_sample) * a.size)
    _exchange(state, hs, piece, D, N, True)
    counterfactuals = floats(hs.size if with_counterfactual else 0)
    if with_counterfactual:
        _exchange(counterfactual, counterfactuals, piece, D, N, True)

    # Of one group and sample during CHUNK time steps: [step][lane].
    dts, dtxs = floats(CHUNK * LANES), floats(CHUNK * LANES)
    gates, outs = floats(CHUNK * LANES), floats(CHUNK * LANES)
    gates[:] = 1  # where there is none
    decays = floats(CHUNK * LANES if with_counterfactual else 0)
    # Of one group and all samples: [n][step][lane]; what one sample gives to products of states: [step][n][lane].
    h2_tile = floats(rows * CHUNK * LANES if with_h2 else 0)
    # not as far into a page as the other tile: a processor tells loads from stores by that at first
    abar_tile = floats((rows * CHUNK * LANES if with_abar else 0) + 8 * LANES)[8 * LANES :]
    entered = floats(rows * CHUNK * LANES if with_hh else 0)
    lost = floats(rows * CHUNK * LANES if with_gram else 0)
    pairs = rows // 4 * (rows // 4 + 1) // 2 * 16 * LANES
    hh_tile, hh_sums = floats(pairs if with_hh else 0), np.zeros(pairs if with_hh else 0)
    gram_tile, gram_sums = floats(pairs if with_gram else 0), np.zeros(groups * pairs if with_gram else 0)
    Bs, Cs = floats(batch * CHUNK * rows), floats(batch * CHUNK * rows)
    ahead = np.zeros((6, 2), np.int64)  # addresses to ask for, and how far apart in bytes they are for two steps

    for start in range(0, steps, CHUNK):
        length = min(steps - start, CHUNK)
        for sample in range(first_sample, last_sample, TOGETHER):
            count = min(last_sample - sample, TOGETHER)
            _copy(B, strides[3], Bs, sample, count, start, length, N, rows)
            _copy(C, strides[4], Cs, sample, count, start, length, N, rows)
            for g in range(groups):
                c = first_channel + g * LANES
                width = min(LANES, last_channel - c)
                sums_at = (start * D + c) * N
                for b in range(count):
                    k = ((sample - first_sample + b) * groups + g) * rows * LANES
                    at = (sample + b, c, width, start, length)
                    part = (sample, count, first_channel, groups, start, steps)
                    _look_ahead(ahead, part, g * count + b, strides, u, delta, z)
                    _look_for(ahead[0], y, strides[5], at)
                    if with_h2:
                        ahead[4] = address(h2, sums_at + b * rows * 2), D * N * 8
                    if with_abar:
                        ahead[5] = address(abar, sums_at + b * rows * 2), D * N * 8
                    _prepare(
                        at, strides, u, delta, z, load(biases, g * LANES), load(skips, g * LANES),
                        with_softplus, with_gate, dts, dtxs, gates, outs,
                    )  # fmt: skip
                    _advance(
                        length, rows, a, g * rows * LANES, hs, k, dts, dtxs, gates, outs, Bs, Cs, b * CHUNK * rows,
                        h2_tile, abar_tile, entered, lost, effect, ahead,
                    )  # fmt: skip
                    if with_counterfactual:
                        _part_from_counterfactual(
                            length, rows, counterfactuals, k, dts, dtxs, gates, Bs, Cs, b * CHUNK * rows, lost, decays
                        )
                    if with_hh:
                        _add_products(entered, length, rows, hh_tile)
                    if with_gram:
                        _add_products(lost, length, rows, gram_tile)
                    _put_out(at, strides[5], y, outs, gates)
                if with_h2:
                    _add_tile(h2_tile, h2, sums_at, D * N, length, N, width)
                if with_abar:
                    _add_tile(abar_tile, abar, sums_at, D * N, length, N, width)
                if with_hh:
                    add_wide(hh_tile, hh_sums, 0)
                if with_gram:
                    add_wide(gram_tile, gram_sums, g * pairs)

    _exchange(state, hs, piece, D, N, False)
    if with_counterfactual:
        _exchange(counterfactual, counterfactuals, piece, D, N, False)
    if with_hh:
        for lane in range(LANES):
            _add_pairs(hh_sums, lane, hh, 0, N)
    if with_gram:
        for c in range(last_channel - first_channel):
            _add_pairs(gram_sums, c // LANES * pairs + c % LANES, gram, (first_channel + c) * N * N, N)


@njit(nogil=True)
def _copy(whole, strides, to, sample, count, start, length, N, rows):
    """B or C of some samples and steps to [sample][step][n]."""
    for b in range(count):
        for t in range(length):
            at = (sample + b) * strides[0] + (start + t) * strides[1]
            for n in range(N):
                to[(b * CHUNK + t) * rows + n] = whole[at + n]


@njit(nogil=True)
def _look_ahead(ahead, part, index, strides, u, delta, z):
    """Where the inputs are that come next after the sample and group of an index; stays as it was at the very end."""
    sample, count, first_channel, groups, start, steps = part
    index += 1
    if index == groups * count:
        index, start = 0, start + CHUNK
    if start < steps:
        at = (sample + index % count, first_channel + index // count * LANES, LANES, start, CHUNK)
        _look_for(ahead[1], u, strides[0], at)
        _look_for(ahead[2], delta, strides[1], at)
        _look_for(ahead[3], z, strides[2], at)


@njit(nogil=True)
def _look_for(ahead, array, strides, at):
    sample, c, _, start, _ = at
    ahead[0], ahead[1] = address(array, sample * strides[0] + start * strides[1] + c), strides[1] * 4


@njit(nogil=True)
def _prepare(at, strides, u, delta, z, bias, skip, with_softplus, with_gate, dts, dtxs, gates, outs):
    """Time steps, inputs times time steps, gates, and what passes the states by."""
    sample, c, width, start, length = at
    for t in range(length):
        time, to = start + t, t * LANES
        x = take(u, sample * strides[0, 0] + time * strides[0, 1] + c, width)
        dt = take(delta, sample * strides[1, 0] + time * strides[1, 1] + c, width) + bias
        if with_softplus:
            dt = softplus(dt)
        store(dts, to, dt)
        store(dtxs, to, dt * x)
        store(outs, to, skip * x)
        if with_gate:
            store(gates, to, silu(take(z, sample * strides[2, 0] + time * strides[2, 1] + c, width)))


@njit(nogil=True)
def _put_out(at, strides, y, outs, gates):
    """Gated outputs to y."""
    sample, c, width, start, length = at
    for t in range(length):
        to = sample * strides[0] + (start + t) * strides[1] + c
        put(y, to, width, load(outs, t * LANES) * load(gates, t * LANES))


@njit(nogil=True)
def _add_tile(tile, sums, to, stride, length, N, channels):
    """Adds a tile [n][step][lane] to sums[to + step stride:] (channels,N), and empties it."""
    n8 = N // 8 * 8 if channels == LANES else 0
    for t in range(length):
        for n in range(0, n8, 8):
            add_transposed(sums, to + t * stride + n, N, tile, (n * CHUNK + t) * LANES, CHUNK * LANES)
        for lane in range(channels):
            for n in range(n8, N):
                sums[to + t * stride + lane * N + n] += tile[(n * CHUNK + t) * LANES + lane]
    tile[:] = 0


@njit(nogil=True)
def _advance(
    length, rows, a, a_at, hs, h_at, dts, dtxs, gates, outs, Bs, Cs, bc, h2, abar, entered, lost, effect, ahead
):  # fmt: skip
    """The recurrence of one sample and group over a chunk, four states at a time; adds to the sums that are wanted.

    lost is left without the counterfactual's part where the effect is unit. Asks for cache lines as it goes, at each step
    for one of each kind: at once they would be more than a core can wait for.
    """
    with_h2, with_abar, with_hh, with_gram = h2.size > 0, abar.size > 0, entered.size > 0, lost.size > 0
    step = CHUNK * LANES
    for n in range(0, rows, 4):
        m = n * LANES
        soon, h2_soon, abar_soon = ahead[n // 4 % 4, 0], ahead[4, 0] + n * 16, ahead[5, 0] + n * 16
        apart, sums_apart = ahead[n // 4 % 4, 1], ahead[4 if with_h2 else 5, 1]
        a0, a1, a2, a3 = load_row(a, a_at + m)
        s0, s1, s2, s3 = load_row(hs, h_at + m)
        for t in range(length):
            i, j, k, p = t * LANES, n * step + t * LANES, bc + t * rows + n, (t * rows + n) * LANES
            prefetch(soon + t * apart)
            dt, dtx = load(dts, i), load(dtxs, i)
            e0, e1, e2, e3 = power(dt, a0), power(dt, a1), power(dt, a2), power(dt, a3)
            if with_h2:
                prefetch(h2_soon + t * sums_apart)
                store(h2, j, fma(s0, s0, load(h2, j)))
                store(h2, j + step, fma(s1, s1, load(h2, j + step)))
                store(h2, j + 2 * step, fma(s2, s2, load(h2, j + 2 * step)))
                store(h2, j + 3 * step, fma(s3, s3, load(h2, j + 3 * step)))
            if with_abar:
                prefetch(abar_soon + t * sums_apart)
                store(abar, j, e0 + load(abar, j))
                store(abar, j + step, e1 + load(abar, j + step))
                store(abar, j + 2 * step, e2 + load(abar, j + 2 * step))
                store(abar, j + 3 * step, e3 + load(abar, j + 3 * step))
            if with_hh:
                store_row(entered, p, s0, s1, s2, s3)
            m0, m1, m2, m3 = e0 * s0, e1 * s1, e2 * s2, e3 * s3
            s0 = fma(e0, s0, dtx * fill_from(Bs, k))
            s1 = fma(e1, s1, dtx * fill_from(Bs, k + 1))
            s2 = fma(e2, s2, dtx * fill_from(Bs, k + 2))
            s3 = fma(e3, s3, dtx * fill_from(Bs, k + 3))
            c0, c1, c2, c3 = fill_from(Cs, k), fill_from(Cs, k + 1), fill_from(Cs, k + 2), fill_from(Cs, k + 3)
            store(outs, i, fma(c3, s3, fma(c2, s2, fma(c1, s1, fma(c0, s0, load(outs, i))))))
            if with_gram:
                gate = load(gates, i)
                if effect != EFFECT_ZERO:
                    m0, m1, m2, m3 = s0, s1, s2, s3
                store_row(lost, p, m0 * (c0 * gate), m1 * (c1 * gate), m2 * (c2 * gate), m3 * (c3 * gate))
        store_row(hs, h_at + m, s0, s1, s2, s3)


@njit(nogil=True)
def _part_from_counterfactual(length, rows, counterfactuals, h_at, dts, dtxs, gates, Bs, Cs, bc, lost, decays):
    """Takes what the recurrence with A = -1 gives from lost."""
    for t in range(length):
        store(decays, t * LANES, exp(fill(0.0) - load(dts, t * LANES)))
    for n in range(rows):
        h = load(counterfactuals, h_at + n * LANES)
        for t in range(length):
            i, k, p = t * LANES, bc + t * rows + n, (t * rows + n) * LANES
            h = fma(load(decays, i), h, load(dtxs, i) * fill_from(Bs, k))
            store(lost, p, load(lost, p) - h * (fill_from(Cs, k) * load(gates, i)))
        store(counterfactuals, h_at + n * LANES, h)


@njit(nogil=True)
def _pair_at(i, j):
    """Where the sums of products of states i >= j are: in squares of 4 x 4, row after row of the lower triangle."""
    return ((i // 4 * (i // 4 + 1) // 2 + j // 4) * 16 + i % 4 * 4 + j % 4) * LANES


@njit(nogil=True)
def _add_pairs(sums, at, to, to_at, N):
    """Adds one lane of sums of products to to[to_at:] (N,N)."""
    for i in range(N):
        for j in range(i + 1):
            total = sums[at + _pair_at(i, j)]
            to[to_at + i * N + j] += total
            if i != j:
                to[to_at + j * N + i] += total


@njit(nogil=True)
def _add_products(values, length, rows, sums):
    """sums += sum over the steps of values[i] values[j], for i >= j; values [step][n][lane], see `_pair_at` for sums."""
    to = 0
    for i in range(0, rows, 4):
        for j in range(0, i, 4):
            _add_square(values, i, j, length, rows, sums, to)
            to += 16 * LANES
        _add_triangle(values, i, length, rows, sums, to)
        to += 16 * LANES


@njit(nogil=True)
def _add_square(values, i, j, length, rows, sums, to):
    s00, s01, s02, s03 = load_row(sums, to)
    s10, s11, s12, s13 = load_row(sums, to + 64)
    s20, s21, s22, s23 = load_row(sums, to + 128)
    s30, s31, s32, s33 = load_row(sums, to + 192)
    for t in range(length):
        p, q = (t * rows + i) * LANES, (t * rows + j) * LANES
        x0, x1, x2, x3 = load_row(values, p)
        y0, y1, y2, y3 = load_row(values, q)
        s00, s01, s02, s03 = fma(x0, y0, s00), fma(x0, y1, s01), fma(x0, y2, s02), fma(x0, y3, s03)
        s10, s11, s12, s13 = fma(x1, y0, s10), fma(x1, y1, s11), fma(x1, y2, s12), fma(x1, y3, s13)
        s20, s21, s22, s23 = fma(x2, y0, s20), fma(x2, y1, s21), fma(x2, y2, s22), fma(x2, y3, s23)
        s30, s31, s32, s33 = fma(x3, y0, s30), fma(x3, y1, s31), fma(x3, y2, s32), fma(x3, y3, s33)
    store_row(sums, to, s00, s01, s02, s03)
    store_row(sums, to + 64, s10, s11, s12, s13)
    store_row(sums, to + 128, s20, s21, s22, s23)
    store_row(sums, to + 192, s30, s31, s32, s33)


@njit(nogil=True)
def _add_triangle(values, i, length, rows, sums, to):
    s00 = load(sums, to)
    s10, s11 = load(sums, to + 64), load(sums, to + 80)
    s20, s21, s22 = load(sums, to + 128), load(sums, to + 144), load(sums, to + 160)
    s30, s31, s32, s33 = load_row(sums, to + 192)
    for t in range(length):
        p = (t * rows + i) * LANES
        x0, x1, x2, x3 = load_row(values, p)
        s00 = fma(x0, x0, s00)
        s10, s11 = fma(x1, x0, s10), fma(x1, x1, s11)
        s20, s21, s22 = fma(x2, x0, s20), fma(x2, x1, s21), fma(x2, x2, s22)
        s30, s31, s32, s33 = fma(x3, x0, s30), fma(x3, x1, s31), fma(x3, x2, s32), fma(x3, x3, s33)
    store(sums, to, s00)
    store(sums, to + 64, s10)
    store(sums, to + 80, s11)
    store(sums, to + 128, s20)
    store(sums, to + 144, s21)
    store(sums, to + 160, s22)
    store_row(sums, to + 192, s30, s31, s32, s33)


@njit(nogil=True)
def _exchange(whole, lanes, piece, D, N, gather):
    """Copies states (B,D,N) of a piece to [sample][group][n][lane], or back."""
    first_sample, last_sample, first_channel, last_channel = piece
    rows = (N + 3) // 4 * 4
    groups = (last_channel - first_channel + LANES - 1) // LANES
    for b in range(last_sample - first_sample):
        for g in range(groups):
            c = first_channel + g * LANES
            n16 = N // LANES * LANES if c + LANES <= last_channel else 0
            k = (b * groups + g) * rows * LANES
            w = ((first_sample + b) * D + c) * N
            for n in range(0, n16, LANES):
                if gather:
                    transpose(whole, w + n, N, lanes, k + n * LANES, LANES)
                else:
                    transpose(lanes, k + n * LANES, LANES, whole, w + n, N)
            for lane in range(min(LANES, last_channel - c)):
                for n in range(n16, N):
                    if gather:
                        lanes[k + n * LANES + lane] = whole[w + lane * N + n]
                    else:
                        whole[w + lane * N + n] = lanes[k + n * LANES + lane]
