"""The derivatives of the selective scan over a few time steps, compiled by numba: some channels of one sample.

As in the scan itself 16 channels compute side by side, one in each lane of a vector. One state after the other goes through
the steps twice: forward for the states, which stay in the first-level cache, and back for the derivatives.
"""

from __future__ import annotations

from numba import njit

from sparsessm.kernels.lanes import LANES, fill, fill_from, floats, fma, load, power, put, store, take


@njit(nogil=True)
def gradient_piece(piece, shape, dt, x, gp, B, C, A, A2, entered, carried, gdt, gx, gA, gB, gC):
    """All arrays are flat: dt, x, gp, gdt, gx (B,T,D), B, C (B,T,N), A, A2 (D,N), entered, carried, gA (B,D,N), gB, gC
    (tasks,T,N).

    Args:
        piece: number of the task, sample, first and last channel. x: the input. gp: derivatives by the outputs, without D
            and gate. A2: A times log2 e. entered: states before the first step.
        carried: derivatives by the states after the last step, and then by those before the first.
        gdt, gx: filled with the derivatives by the time steps, and by the input. gA: added to. gB, gC: filled, for these
            channels.
    """
    task, sample, first, last = piece
    T, D, N = shape
    step = T * LANES
    dts, xs, gps, gdts, gxs = floats(step), floats(step), floats(step), floats(step), floats(step)
    hs, decays = floats(step), floats(step)
    gBs, gCs = floats(N * step), floats(N * step)  # [n][step][lane], of all groups of channels
    columns = floats(5 * N * LANES)  # [n][lane]: A2, A, entered, carried, gA
    for c in range(first, last, LANES):
        width, per = min(LANES, last - c), N * LANES
        columns[:] = 0
        for lane in range(width):
            for n in range(N):
                at, d, k = n * LANES + lane, (c + lane) * N + n, (sample * D + c + lane) * N + n
                columns[at], columns[per + at] = A2[d], A[d]
                columns[2 * per + at], columns[3 * per + at] = entered[k], carried[k]
        for t in range(T):
            at, to = (sample * T + t) * D + c, t * LANES
            store(dts, to, take(dt, at, width))
            store(xs, to, take(x, at, width))
            store(gps, to, take(gp, at, width))
        gdts[:], gxs[:] = 0, 0
        for n in range(N):
            m, row = n * LANES, n * step
            a2, h = load(columns, m), load(columns, 2 * per + m)
            for t in range(T):
                i, k = t * LANES, (sample * T + t) * N + n
                decay = power(load(dts, i), a2)
                h = fma(decay, h, load(dts, i) * load(xs, i) * fill_from(B, k))
                store(decays, i, decay)
                store(hs, i, h)
            a, g, of_A = load(columns, per + m), load(columns, 3 * per + m), fill(0.0)
            for back in range(T):
                t = T - 1 - back
                i, k = t * LANES, (sample * T + t) * N + n
                b = fill_from(B, k)
                dt_t, x_t, out = load(dts, i), load(xs, i), load(gps, i)
                g = fma(fill_from(C, k), out, g)
                store(gCs, row + i, fma(load(hs, i), out, load(gCs, row + i)))
                store(gBs, row + i, fma(g * dt_t, x_t, load(gBs, row + i)))
                before = load(hs, i - LANES) if t > 0 else load(columns, 2 * per + m)
                g_decayed = g * load(decays, i)
                of_exponent = g_decayed * before
                of_A = fma(of_exponent, dt_t, of_A)
                gb = g * b
                store(gdts, i, fma(of_exponent, a, fma(gb, x_t, load(gdts, i))))
                store(gxs, i, fma(gb, dt_t, load(gxs, i)))
                g = g_decayed
            store(columns, 3 * per + m, g)
            store(columns, 4 * per + m, of_A)
        for t in range(T):
            at, to = (sample * T + t) * D + c, t * LANES
            put(gdt, at, width, load(gdts, to))
            put(gx, at, width, load(gxs, to))
        for lane in range(width):
            for n in range(N):
                at, k = n * LANES + lane, (sample * D + c + lane) * N + n
                carried[k] = columns[3 * per + at]
                gA[k] += columns[4 * per + at]
    for t in range(T):
        for n in range(N):
            of_B, of_C = 0.0, 0.0
            for lane in range(LANES):
                of_B += gBs[n * step + t * LANES + lane]
                of_C += gCs[n * step + t * LANES + lane]
            gB[(task * T + t) * N + n], gC[(task * T + t) * N + n] = of_B, of_C
