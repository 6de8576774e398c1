"""The derivatives of a mixer's convolution and of Mamba-2's gated norm, compiled by numba."""

from __future__ import annotations

import math

from numba import njit

from sparsessm.kernels.functions import silu, silu_slope
from sparsessm.lanes import LANES, fill, floats, fma, load, put, store, take


@njit(nogil=True)
def conv_gradient_piece(
    sample, first, last, steps, channels, K, strides, x, gout, before, weight, bias, gx, gbefore, gw, gb
):  # fmt: skip
    """Of silu of the causal convolution, for channels first to last of one sample; see `heads_piece.conv_piece`.

    strides: of sample and time step, for x and gout (B,L,channels), the derivatives by the output. gx, gbefore: as x and
    before, whole. gw, gb: (B,K,channels), (B,channels), the sums of each sample. All are filled.
    """
    xs = floats((steps + K - 1) * LANES)  # before and x
    made = floats((steps + K - 1) * LANES)  # derivatives by what the convolution makes; zero after the last step
    for c in range(first, last, LANES):
        width = min(LANES, last - c)
        for t in range(K - 1):
            store(xs, t * LANES, take(before, (sample * (K - 1) + t) * channels + c, width))
        for t in range(steps):
            store(xs, (K - 1 + t) * LANES, take(x, sample * strides[0, 0] + t * strides[0, 1] + c, width))
        of_bias = fill(0.0)
        for t in range(steps):
            total = take(bias, c, width)
            for k in range(K):
                total = fma(take(weight, k * channels + c, width), load(xs, (t + k) * LANES), total)
            g = take(gout, sample * strides[1, 0] + t * strides[1, 1] + c, width) * silu_slope(total)
            of_bias = of_bias + g
            store(made, t * LANES, g)
        put(gb, sample * channels + c, width, of_bias)
        for k in range(K):
            of_weight = fill(0.0)
            for t in range(steps):
                of_weight = fma(load(made, t * LANES), load(xs, (t + k) * LANES), of_weight)
            put(gw, (sample * K + k) * channels + c, width, of_weight)
        for padded in range(steps + K - 1):
            total = fill(0.0)
            for k in range(min(K, padded + 1)):
                total = fma(take(weight, k * channels + c, width), load(made, (padded - k) * LANES), total)
            if padded < K - 1:
                put(gbefore, (sample * (K - 1) + padded) * channels + c, width, total)
            else:
                put(gx, (sample * steps + padded - (K - 1)) * channels + c, width, total)


@njit(nogil=True)
def norm_gradient_piece(
    task, sample, first, last, steps, channels, size, epsilon, strides, y, z, gout, weight, gy, gz, gw
):  # fmt: skip
    """Of the gated norm, for steps first to last of one sample; see `heads_piece.norm_piece`.

    strides: of sample and time step, for y, z and gout (B,L,channels), the derivatives by the output. gy, gz:
    (B,L,channels), filled. gw: (tasks,channels), filled with the sums over these steps.
    """
    squares, products, of_weight = floats(LANES), floats(LANES), floats(channels)
    for t in range(first, last):
        to = (sample * steps + t) * channels
        y_at, z_at = sample * strides[0, 0] + t * strides[0, 1], sample * strides[1, 0] + t * strides[1, 1]
        g_at = sample * strides[2, 0] + t * strides[2, 1]
        for group in range(0, channels, size):
            square, product = fill(0.0), fill(0.0)
            for c in range(group, group + size, LANES):
                width = min(LANES, group + size - c)
                q = take(y, y_at + c, width) * silu(take(z, z_at + c, width))
                square = fma(q, q, square)
                product = fma(q, take(gout, g_at + c, width) * take(weight, c, width), product)
            store(squares, 0, square)
            store(products, 0, product)
            r = 1 / math.sqrt(squares.sum() / size + epsilon)
            along = fill(products.sum() * r * r / size)
            for c in range(group, group + size, LANES):
                width = min(LANES, group + size - c)
                value, gate, g = take(y, y_at + c, width), take(z, z_at + c, width), take(gout, g_at + c, width)
                opened = silu(gate)
                q = value * opened
                gq = fill(r) * (g * take(weight, c, width) - q * along)
                put(gy, to + c, width, gq * opened)
                put(gz, to + c, width, gq * value * silu_slope(gate))
                put(of_weight, c, width, fma(g * q, fill(r), take(of_weight, c, width)))
    for c in range(channels):
        gw[task * channels + c] = of_weight[c]
