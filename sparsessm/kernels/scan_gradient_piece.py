"""The derivatives of the selective scan, compiled by numba: some channels of one sample, from the last step to the first.

As in the scan itself 16 channels compute side by side, one in each lane of a vector. Time is cut into pieces. Four states at
once go through the steps of a piece twice: forward for the states, which stay in the caches, and back for the derivatives.
"""

from __future__ import annotations

from numba import njit

from sparsessm.kernels.functions import power, sigmoid, silu, silu_slope, softplus
from sparsessm.lanes import LANES, fill, fill_from, floats, fma, load, load_row, put, store, store_row, take

PIECE = 64  # time steps


@njit(nogil=True)
def gradient_piece(
    piece, shape, strides, u, delta, z, B, C, gy, A, A2, skip, bias, with_softplus, with_gate, entered, carried,
    gu, gdelta, gz, gA, gskip, gB, gC,
):  # fmt: skip
    """All arrays are flat float32.

    Args:
        piece: number of the task, sample, first and last channel. strides: of sample and time step, for u, delta, z, B, C
            and gy (the derivatives by y).
        A, A2: (D,N), the latter times log2 e. entered: (pieces,B,D,N), the states before the first step of each.
        carried: (B,D,N), the derivatives by the states after the last step, and then by those before the first.
        gu, gdelta, gz: (B,L,D), filled; gz only with a gate. gA, gskip: (B,D,N), (B,D), filled.
        gB, gC: (tasks,L,N), filled, for these channels alone.
    """
    task, sample, first, last = piece
    batch, steps, D, N = shape
    rows = (N + 3) // 4 * 4
    groups, of_group, row = (last - first + LANES - 1) // LANES, rows * LANES, PIECE * LANES
    a, a2, before = floats(groups * of_group), floats(groups * of_group), floats(of_group)  # [group][n][lane]
    after, of_a, of_skip = floats(groups * of_group), floats(groups * of_group), floats(groups * LANES)
    for c in range(last - first):
        for n in range(N):
            at, d = (c // LANES * rows + n) * LANES + c % LANES, (first + c) * N + n
            a[at], a2[at], after[at] = A[d], A2[d], carried[sample * D * N + d]
    skips, biases = floats(groups * LANES), floats(groups * LANES)
    for c in range(last - first):
        skips[c], biases[c] = skip[first + c], bias[first + c]
    # Of one group and piece: [step][lane], and of four states [step][n][lane].
    dts, xs, gps, outs, gdts, gdtxs = floats(row), floats(row), floats(row), floats(row), floats(row), floats(row)
    hs, decays = floats(4 * row + 4 * LANES), floats(4 * row)
    Bs, Cs = floats(PIECE * rows), floats(PIECE * rows)
    gBs, gCs = floats(rows * row), floats(rows * row)  # [n / 4][step][n % 4][lane], of all groups
    for p in range((steps - 1) // PIECE, -1, -1):
        start = p * PIECE
        length = min(PIECE, steps - start)
        for t in range(length):
            for n in range(N):
                Bs[t * rows + n] = B[sample * strides[3, 0] + (start + t) * strides[3, 1] + n]
                Cs[t * rows + n] = C[sample * strides[4, 0] + (start + t) * strides[4, 1] + n]
        gBs[:], gCs[:] = 0, 0
        for g in range(groups):
            c = first + g * LANES
            width = min(LANES, last - c)
            before[:] = 0
            for lane in range(width):
                for n in range(N):
                    before[n * LANES + lane] = entered[((p * batch + sample) * D + c + lane) * N + n]
            at = (sample, c, width, start, length)
            _prepare(
                at, strides, u, delta, z, gy, load(biases, g * LANES), load(skips, g * LANES), with_softplus, with_gate,
                dts, xs, gps, outs, gdts, gdtxs,
            )  # fmt: skip
            for n in range(0, rows, 4):
                _forward(length, rows, n, before, a2, g * of_group, dts, xs, Bs, Cs, outs, hs, decays)
                _back(
                    length, rows, n, a, after, of_a, g * of_group, dts, xs, gps, Bs, Cs, hs, decays, gdts, gdtxs, gBs, gCs
                )
            store(of_skip, g * LANES, load(of_skip, g * LANES) + _sum_of_products(length, gps, xs))
            _put_out(
                at, strides, delta, z, gy, load(biases, g * LANES), load(skips, g * LANES), with_softplus, with_gate,
                steps, D, dts, xs, gps, outs, gdts, gdtxs, gu, gdelta, gz,
            )  # fmt: skip
        for t in range(length):
            for n in range(N):
                of_B, of_C, at = 0.0, 0.0, ((n // 4 * PIECE + t) * 4 + n % 4) * LANES
                for lane in range(LANES):
                    of_B += gBs[at + lane]
                    of_C += gCs[at + lane]
                gB[(task * steps + start + t) * N + n], gC[(task * steps + start + t) * N + n] = of_B, of_C
    for c in range(last - first):
        gskip[sample * D + first + c] = of_skip[c]
        for n in range(N):
            at, to = (c // LANES * rows + n) * LANES + c % LANES, (sample * D + first + c) * N + n
            carried[to], gA[to] = after[at], of_a[at]


@njit(nogil=True)
def _prepare(at, strides, u, delta, z, gy, bias, skip, with_softplus, with_gate, dts, xs, gps, outs, gdts, gdtxs):
    """Time steps, inputs, derivatives by the outputs before the gate, and what passes the states by."""
    sample, c, width, start, length = at
    for t in range(length):
        time, to = start + t, t * LANES
        x = take(u, sample * strides[0, 0] + time * strides[0, 1] + c, width)
        dt = take(delta, sample * strides[1, 0] + time * strides[1, 1] + c, width) + bias
        gp = take(gy, sample * strides[5, 0] + time * strides[5, 1] + c, width)
        if with_gate:
            gp = gp * silu(take(z, sample * strides[2, 0] + time * strides[2, 1] + c, width))
        store(dts, to, softplus(dt) if with_softplus else dt)
        store(xs, to, x)
        store(gps, to, gp)
        store(outs, to, skip * x)
        store(gdts, to, fill(0.0))
        store(gdtxs, to, fill(0.0))


@njit(nogil=True)
def _forward(length, rows, n, before, a2, a_at, dts, xs, Bs, Cs, outs, hs, decays):
    """Four states through the steps: hs [step + 1][n][lane], the first row from before; adds what is read to outs."""
    m = n * LANES
    a0, a1, a2_, a3 = load_row(a2, a_at + m)
    s0, s1, s2, s3 = load_row(before, m)
    store_row(hs, 0, s0, s1, s2, s3)
    for t in range(length):
        i, k, q = t * LANES, t * rows + n, 4 * t * LANES
        dt = load(dts, i)
        dtx = dt * load(xs, i)
        e0, e1, e2, e3 = power(dt, a0), power(dt, a1), power(dt, a2_), power(dt, a3)
        store_row(decays, q, e0, e1, e2, e3)
        s0 = fma(e0, s0, dtx * fill_from(Bs, k))
        s1 = fma(e1, s1, dtx * fill_from(Bs, k + 1))
        s2 = fma(e2, s2, dtx * fill_from(Bs, k + 2))
        s3 = fma(e3, s3, dtx * fill_from(Bs, k + 3))
        store_row(hs, q + 4 * LANES, s0, s1, s2, s3)
        c0, c1, c2, c3 = fill_from(Cs, k), fill_from(Cs, k + 1), fill_from(Cs, k + 2), fill_from(Cs, k + 3)
        store(outs, i, fma(c3, s3, fma(c2, s2, fma(c1, s1, fma(c0, s0, load(outs, i))))))


@njit(nogil=True)
def _back(length, rows, n, a, after, of_a, a_at, dts, xs, gps, Bs, Cs, hs, decays, gdts, gdtxs, gBs, gCs):
    """The derivatives by four states, from the last step to the first, and all that they give.

    after: those that reach the last step from later ones, and then those that reach the steps before. gdtxs: by dt x.
    """
    m = a_at + n * LANES
    a0, a1, a2, a3 = load_row(a, m)
    g0, g1, g2, g3 = load_row(after, m)
    w0, w1, w2, w3 = load_row(of_a, m)
    for back in range(length):
        t = length - 1 - back
        i, k, q, r = t * LANES, t * rows + n, 4 * t * LANES, (n // 4 * PIECE + t) * 4 * LANES
        dt, gp = load(dts, i), load(gps, i)
        dtx = dt * load(xs, i)
        g0, g1 = fma(fill_from(Cs, k), gp, g0), fma(fill_from(Cs, k + 1), gp, g1)
        g2, g3 = fma(fill_from(Cs, k + 2), gp, g2), fma(fill_from(Cs, k + 3), gp, g3)
        h0, h1, h2, h3 = load_row(hs, q + 4 * LANES)
        p0, p1, p2, p3 = load_row(gCs, r)
        store_row(gCs, r, fma(h0, gp, p0), fma(h1, gp, p1), fma(h2, gp, p2), fma(h3, gp, p3))
        p0, p1, p2, p3 = load_row(gBs, r)
        store_row(gBs, r, fma(g0, dtx, p0), fma(g1, dtx, p1), fma(g2, dtx, p2), fma(g3, dtx, p3))
        of_dtx = fma(fill_from(Bs, k), g0, fma(fill_from(Bs, k + 1), g1, load(gdtxs, i)))
        store(gdtxs, i, fma(fill_from(Bs, k + 2), g2, fma(fill_from(Bs, k + 3), g3, of_dtx)))
        e0, e1, e2, e3 = load_row(decays, q)
        g0, g1, g2, g3 = g0 * e0, g1 * e1, g2 * e2, g3 * e3
        h0, h1, h2, h3 = load_row(hs, q)
        d0, d1, d2, d3 = g0 * h0, g1 * h1, g2 * h2, g3 * h3  # by the exponents dt A
        w0, w1, w2, w3 = fma(d0, dt, w0), fma(d1, dt, w1), fma(d2, dt, w2), fma(d3, dt, w3)
        store(gdts, i, fma(d0, a0, fma(d1, a1, fma(d2, a2, fma(d3, a3, load(gdts, i))))))
    store_row(after, m, g0, g1, g2, g3)
    store_row(of_a, m, w0, w1, w2, w3)


@njit(nogil=True)
def _sum_of_products(length, one, other):
    total = fill(0.0)
    for t in range(length):
        total = fma(load(one, t * LANES), load(other, t * LANES), total)
    return total


@njit(nogil=True)
def _put_out(
    at, strides, delta, z, gy, bias, skip, with_softplus, with_gate, steps, D, dts, xs, gps, outs, gdts, gdtxs,
    gu, gdelta, gz,
):  # fmt: skip
    sample, c, width, start, length = at
    for t in range(length):
        time, i, to = start + t, t * LANES, (sample * steps + start + t) * D + c
        of_dtx = load(gdtxs, i)
        put(gu, to, width, fma(of_dtx, load(dts, i), skip * load(gps, i)))
        of_dt = fma(of_dtx, load(xs, i), load(gdts, i))
        if with_softplus:
            of_dt = of_dt * sigmoid(take(delta, sample * strides[1, 0] + time * strides[1, 1] + c, width) + bias)
        put(gdelta, to, width, of_dt)
        if with_gate:
            slope = silu_slope(take(z, sample * strides[2, 0] + time * strides[2, 1] + c, width))
            put(gz, to, width, take(gy, sample * strides[5, 0] + time * strides[5, 1] + c, width) * load(outs, i) * slope)
