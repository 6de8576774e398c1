"""Pieces of the CPU's Mamba-2, compiled by numba: the scan of some heads, the convolution, the gated norm.

The scan goes through LANES time steps at once, a chunk. In each it takes what the state that entered gives, what the
steps give one another, and the state that leaves, as small matrix products whose sums stay in registers: ROWS rows of two
vectors of channels. States are (n, channels) and wait in the second-level cache between chunks.
"""

from __future__ import annotations

import math

import numpy as np
from numba import njit

from sparsessm.kernels.functions import exp, silu
from sparsessm.lanes import LANES, fill, fill_from, floats, fma, load, put, store, take

ROWS = 4
FORGOTTEN = -128.0  # below it all is forgotten in float32; sums of larger ones would leave differences no digits


@njit(nogil=True)
def scan_piece(sample, first, last, shape, strides, u, dt, A, B, C, D, y, state):
    """Heads first to last, all of one group, of one sample; all arrays are flat float32.

    shape: L, H, P, N and the heads of a group. strides: of sample and time step, for u, dt, B, C and y, float32 (B,L,H,P),
    (B,L,H), (B,L,G,N) and (B,L,H,P). state: (B,H,P,N), before the first step, and then after the last.
    """
    steps, H, P, N, together = shape
    width = (P + 2 * LANES - 1) // (2 * LANES) * 2 * LANES
    rows = (N + ROWS - 1) // ROWS * ROWS
    group = first // together
    states = floats((last - first) * rows * width)
    for h in range(first, last):
        _turn(state, (sample * H + h) * P * N, states, (h - first) * rows * width, P, N, width, True)
    Bs, Cs = floats(LANES * rows), floats(LANES * rows)  # [step][n]
    turned, scores = floats(rows * LANES), floats(LANES * LANES)  # B as [n][step]; C . B as [step][step before]
    mixed, totals = floats(LANES * LANES), np.zeros(LANES)
    entering, leaving = floats(LANES), floats(LANES)
    x, left, out = floats(LANES * width), floats(LANES * width), floats(LANES * width)  # [step][channel]
    for start in range(0, steps, LANES):
        length = min(steps - start, LANES)
        for t in range(length):
            b_at = sample * strides[2, 0] + (start + t) * strides[2, 1] + group * N
            c_at = sample * strides[3, 0] + (start + t) * strides[3, 1] + group * N
            for n in range(N):
                Bs[t * rows + n], Cs[t * rows + n] = B[b_at + n], C[c_at + n]
                turned[n * LANES + t] = B[b_at + n]
        for t in range(length, LANES):  # steps that change nothing
            for n in range(N):
                Bs[t * rows + n], Cs[t * rows + n], turned[n * LANES + t] = 0, 0, 0
        for i in range(0, LANES, ROWS):
            s0, s1, s2, s3 = fill(0.0), fill(0.0), fill(0.0), fill(0.0)
            for n in range(N):
                column, c = load(turned, n * LANES), i * rows + n
                s0 = fma(fill_from(Cs, c), column, s0)
                s1 = fma(fill_from(Cs, c + rows), column, s1)
                s2 = fma(fill_from(Cs, c + 2 * rows), column, s2)
                s3 = fma(fill_from(Cs, c + 3 * rows), column, s3)
            store(scores, i * LANES, s0)
            store(scores, (i + 1) * LANES, s1)
            store(scores, (i + 2) * LANES, s2)
            store(scores, (i + 3) * LANES, s3)
        for h in range(first, last):
            total = 0.0
            for t in range(LANES):
                if t < length:
                    total += max(FORGOTTEN, np.float64(A[h]) * dt[sample * strides[1, 0] + (start + t) * strides[1, 1] + h])
                totals[t] = total
            for t in range(LANES):
                entering[t], leaving[t] = totals[t], total - totals[t]
                for j in range(LANES):
                    mixed[t * LANES + j] = totals[t] - totals[j] if j <= t else 4 * FORGOTTEN
            store(entering, 0, exp(load(entering, 0)))
            store(leaving, 0, exp(load(leaving, 0)))
            for t in range(LANES):
                store(mixed, t * LANES, exp(load(mixed, t * LANES)) * load(scores, t * LANES))
            for t in range(LANES):
                u_at = sample * strides[0, 0] + (start + t) * strides[0, 1] + h * P
                for p in range(0, P, LANES):
                    to, part = t * width + p, min(LANES, P - p)
                    if t < length:
                        step = fill_from(dt, sample * strides[1, 0] + (start + t) * strides[1, 1] + h)
                        value = take(u, u_at + p, part)
                        store(out, to, fill_from(D, h) * value)
                        store(x, to, step * value)
                        store(left, to, fill_from(leaving, t) * step * value)
                    else:
                        store(x, to, fill(0.0))
                        store(left, to, fill(0.0))
            at = (h - first) * rows * width
            for p in range(0, width, 2 * LANES):
                for i in range(0, length, ROWS):
                    _put_out(states, at + p, width, N, Cs, i, rows, entering, mixed, x, p, out)
                for n in range(0, N, ROWS):
                    _renew(states, at + n * width + p, width, math.exp(total), Bs, n, rows, left, p)
            for t in range(length):
                y_at = sample * strides[4, 0] + (start + t) * strides[4, 1] + h * P
                for p in range(0, P, LANES):
                    put(y, y_at + p, min(LANES, P - p), load(out, t * width + p))
    for h in range(first, last):
        _turn(state, (sample * H + h) * P * N, states, (h - first) * rows * width, P, N, width, False)


@njit(nogil=True)
def _turn(whole, at, states, to, P, N, width, gather):
    """Copies a state (P,N) to [n][channel], or back."""
    for p in range(P):
        for n in range(N):
            if gather:
                states[to + n * width + p] = whole[at + p * N + n]
            else:
                whole[at + p * N + n] = states[to + n * width + p]


@njit(nogil=True)
def _put_out(states, at, width, N, Cs, i, rows, entering, mixed, x, p, out):
    """Adds to ROWS steps of out, from i on, what the state that entered gives them and what they give one another."""
    a0, b0, a1, b1 = fill(0.0), fill(0.0), fill(0.0), fill(0.0)
    a2, b2, a3, b3 = fill(0.0), fill(0.0), fill(0.0), fill(0.0)
    for n in range(N):
        s, r, c = load(states, at + n * width), load(states, at + n * width + LANES), i * rows + n
        c0, c1, c2, c3 = fill_from(Cs, c), fill_from(Cs, c + rows), fill_from(Cs, c + 2 * rows), fill_from(Cs, c + 3 * rows)
        a0, b0, a1, b1 = fma(c0, s, a0), fma(c0, r, b0), fma(c1, s, a1), fma(c1, r, b1)
        a2, b2, a3, b3 = fma(c2, s, a2), fma(c2, r, b2), fma(c3, s, a3), fma(c3, r, b3)
    c0, c1, c2, c3 = (
        fill_from(entering, i),
        fill_from(entering, i + 1),
        fill_from(entering, i + 2),
        fill_from(entering, i + 3),
    )
    to = i * width + p
    a0, b0 = fma(c0, a0, load(out, to)), fma(c0, b0, load(out, to + LANES))
    to += width
    a1, b1 = fma(c1, a1, load(out, to)), fma(c1, b1, load(out, to + LANES))
    to += width
    a2, b2 = fma(c2, a2, load(out, to)), fma(c2, b2, load(out, to + LANES))
    to += width
    a3, b3 = fma(c3, a3, load(out, to)), fma(c3, b3, load(out, to + LANES))
    for j in range(i + ROWS):
        s, r, c = load(x, j * width + p), load(x, j * width + p + LANES), i * LANES + j
        c0, c1 = fill_from(mixed, c), fill_from(mixed, c + LANES)
        c2, c3 = fill_from(mixed, c + 2 * LANES), fill_from(mixed, c + 3 * LANES)
        a0, b0, a1, b1 = fma(c0, s, a0), fma(c0, r, b0), fma(c1, s, a1), fma(c1, r, b1)
        a2, b2, a3, b3 = fma(c2, s, a2), fma(c2, r, b2), fma(c3, s, a3), fma(c3, r, b3)
    to = i * width + p
    _store_tile(out, to, width, a0, b0, a1, b1, a2, b2, a3, b3)


@njit(nogil=True)
def _renew(states, at, width, whole, Bs, n, rows, left, p):
    """ROWS states of two vectors of channels after the chunk."""
    decay = fill(whole)
    a0, b0 = decay * load(states, at), decay * load(states, at + LANES)
    a1, b1 = decay * load(states, at + width), decay * load(states, at + width + LANES)
    a2, b2 = decay * load(states, at + 2 * width), decay * load(states, at + 2 * width + LANES)
    a3, b3 = decay * load(states, at + 3 * width), decay * load(states, at + 3 * width + LANES)
    for t in range(LANES):
        s, r, c = load(left, t * width + p), load(left, t * width + p + LANES), t * rows + n
        c0, c1, c2, c3 = fill_from(Bs, c), fill_from(Bs, c + 1), fill_from(Bs, c + 2), fill_from(Bs, c + 3)
        a0, b0, a1, b1 = fma(c0, s, a0), fma(c0, r, b0), fma(c1, s, a1), fma(c1, r, b1)
        a2, b2, a3, b3 = fma(c2, s, a2), fma(c2, r, b2), fma(c3, s, a3), fma(c3, r, b3)
    _store_tile(states, at, width, a0, b0, a1, b1, a2, b2, a3, b3)


@njit(nogil=True)
def _store_tile(array, at, width, a0, b0, a1, b1, a2, b2, a3, b3):
    """ROWS rows of two vectors."""
    store(array, at, a0)
    store(array, at + LANES, b0)
    store(array, at + width, a1)
    store(array, at + width + LANES, b1)
    store(array, at + 2 * width, a2)
    store(array, at + 2 * width + LANES, b2)
    store(array, at + 3 * width, a3)
    store(array, at + 3 * width + LANES, b3)


@njit(nogil=True)
def conv_piece(sample, first, last, steps, channels, K, stride, x, before, weight, bias, out):
    """silu of the causal convolution, of channels first to last of one sample.

    stride: of sample and time step of x (B,L,channels). before: (B,K-1,channels). weight: (K,channels). out: as x, whole.
    """
    for t in range(steps):
        for c in range(first, last, LANES):
            width = min(LANES, last - c)
            total = take(bias, c, width)
            for k in range(K):
                from_ = t + k - (K - 1)
                if from_ < 0:
                    value = take(before, (sample * (K - 1) + from_ + K - 1) * channels + c, width)
                else:
                    value = take(x, sample * stride[0] + from_ * stride[1] + c, width)
                total = fma(take(weight, k * channels + c, width), value, total)
            put(out, (sample * steps + t) * channels + c, width, silu(total))


@njit(nogil=True)
def norm_piece(sample, first, last, steps, channels, size, epsilon, stride, y, z, weight, out):
    """q rsqrt(mean(q^2) + epsilon) weight for q = y silu(z), of steps first to last of one sample.

    The mean is over groups of so many channels. stride: of sample and time step, for y and z (B,L,channels).
    """
    squares = floats(LANES)
    for t in range(first, last):
        to = (sample * steps + t) * channels
        y_at, z_at = sample * stride[0, 0] + t * stride[0, 1], sample * stride[1, 0] + t * stride[1, 1]
        for group in range(0, channels, size):
            total = fill(0.0)
            for c in range(group, group + size, LANES):
                width = min(LANES, group + size - c)
                q = take(y, y_at + c, width) * silu(take(z, z_at + c, width))
                put(out, to + c, width, q)
                total = fma(q, q, total)
            store(squares, 0, total)
            r = fill(1.0) / fill(math.sqrt(squares.sum() / size + epsilon))
            for c in range(group, group + size, LANES):
                width = min(LANES, group + size - c)
                put(out, to + c, width, take(out, to + c, width) * r * take(weight, c, width))
