"""The functions of 16 lanes that a selective scan is made of."""

from __future__ import annotations

import numpy as np
from llvmlite import ir
from numba import njit
from numba.extending import intrinsic

from sparsessm.lanes import LANES, fill, fma, larger

LOG2E = 1.4426950408889634
LOG2E_REST = LOG2E - float(np.float32(LOG2E))
ROUND = 12582912.0  # 1.5 2^23: adding it rounds to an integer, and leaves that in the low bits


@intrinsic
def scale(typingctx, value, rounded):
    """value 2^k of float32 lanes for k = rounded - ROUND; 0 where the result would be below 2^-125.5."""

    def generate(context, builder, sig, args):
        bits = ir.VectorType(ir.IntType(32), LANES)
        exponent = builder.shl(builder.bitcast(args[1], bits), ir.Constant(bits, [23] * LANES))
        scaled = builder.add(builder.bitcast(args[0], bits), exponent)
        vanishes = builder.fcmp_ordered("<", args[1], ir.Constant(args[1].type, [ROUND - 125.0] * LANES))
        return builder.bitcast(builder.select(vanishes, ir.Constant(bits, None), scaled), args[0].type)

    return value(value, value), generate


@njit(nogil=True)
def power(x, y):
    """2^(x y) of float32 lanes for x y <= 0: to 2e-7 of the unrounded product, 1 at 0, 0 below 2^-125.5."""
    rounded = fma(x, y, fill(ROUND))
    return _power(rounded, fma(x, y, fill(ROUND) - rounded))


@njit(nogil=True)
def _power(rounded, f):
    """2^(k + f) for k = rounded - ROUND and |f| <= 1/2; the polynomial is 2^f to 1e-7."""
    p = fma(f, fill(0.0013264661), fill(0.0096715664))
    p = fma(f, p, fill(0.055507344))
    p = fma(f, p, fill(0.24022241))
    p = fma(f, p, fill(0.69314698))
    p = fma(f, p, fill(1.0))
    return scale(p, rounded)


@njit(nogil=True)
def exp(x):
    """e^x of float32 lanes for x <= 88."""
    rounded = fma(x, fill(LOG2E), fill(ROUND))
    f = fma(x, fill(LOG2E), fill(ROUND) - rounded)
    return _power(rounded, fma(x, fill(LOG2E_REST), f))


@njit(nogil=True)
def softplus(x):
    """log(1 + e^x), as log(1 + w) = 2 artanh(w / (2 + w))."""
    w = exp(fill(0.0) - larger(x, fill(0.0) - x))  # e^-|x|
    s = w / (w + fill(2.0))
    q = s * s
    p = fma(q, fill(0.14012229), fill(0.13999571))
    p = fma(q, p, fill(0.2001085))
    p = fma(q, p, fill(0.33333207))
    p = fma(q, p, fill(1.0))
    return fma(s + s, p, larger(x, fill(0.0)))


@njit(nogil=True)
def silu(x):
    x = larger(x, fill(-88.0))  # where it is -5e-37
    return x / (fill(1.0) + exp(fill(0.0) - x))


@njit(nogil=True)
def sigmoid(x):
    return fill(1.0) / (fill(1.0) + exp(fill(0.0) - larger(x, fill(-88.0))))


@njit(nogil=True)
def silu_slope(x):
    """The derivative of `silu`."""
    x = larger(x, fill(-88.0))
    s = sigmoid(x)
    return s * fma(x, fill(1.0) - s, fill(1.0))
