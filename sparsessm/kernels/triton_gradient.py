"""The gradient of the selective scan for CUDA, in Triton; `sparsessm.kernels.scan_gradient_cuda` launches it."""

from __future__ import annotations

import triton
import triton.language as tl

from sparsessm.kernels.triton_kernels import LOG2E


@triton.jit(do_not_specialize=["steps"])
def gradient(
    dt, x, gy, B, C, A, entered, carried, gA, gdt, gx, gB, gC, scratch, steps, channels, programs,
    N: tl.constexpr, BN: tl.constexpr, BD: tl.constexpr,
):  # fmt: skip
    """Grid: channels / BD, samples. All are contiguous: B, C (B,T,N); gB, gC (B,programs,T,N); scratch (B,T,D,N)."""
    program, b = tl.program_id(0), tl.program_id(1).to(tl.int64)
    d, n = program * BD + tl.arange(0, BD), tl.arange(0, BN)
    in_d, in_n = d < channels, n < N
    inside = in_n[:, None] & in_d[None, :]
    of_states = d[None, :] * N + n[:, None]  # (BN,BD)
    at = (b * channels) * N + of_states
    a = tl.load(A + of_states, mask=inside, other=0.0)
    first = tl.load(entered + at, mask=inside, other=0.0)
    row, column, kept = b * steps * channels + d, b * steps * N + n, (b * steps * channels) * N + of_states
    h = first
    for t in range(0, steps):
        step = tl.load(dt + row + t * channels, mask=in_d, other=0.0)
        u = tl.load(x + row + t * channels, mask=in_d, other=0.0)
        b_t = tl.load(B + column + t * N, mask=in_n, other=0.0)
        h = tl.exp2(step[None, :] * a * LOG2E) * h + (step * u)[None, :] * b_t[:, None]
        tl.store(scratch + kept + t * channels * N, h, mask=inside)
    g = tl.load(carried + at, mask=inside, other=0.0)
    of_A = tl.zeros([BN, BD], tl.float32)
    sums = (b * programs + program) * steps * N + n
    for back in range(0, steps):
        t = steps - 1 - back
        step = tl.load(dt + row + t * channels, mask=in_d, other=0.0)
        u = tl.load(x + row + t * channels, mask=in_d, other=0.0)
        out = tl.load(gy + row + t * channels, mask=in_d, other=0.0)
        b_t = tl.load(B + column + t * N, mask=in_n, other=0.0)
        c_t = tl.load(C + column + t * N, mask=in_n, other=0.0)
        now = tl.load(scratch + kept + t * channels * N, mask=inside, other=0.0)
        earlier = tl.maximum(t - 1, 0)
        before = tl.load(scratch + kept + earlier * channels * N, mask=inside, other=0.0)
        before = tl.where(t > 0, before, first)
        g += c_t[:, None] * out[None, :]
        tl.store(gC + sums + t * N, tl.sum(now * out[None, :], 1), mask=in_n)
        tl.store(gB + sums + t * N, tl.sum(g * (step * u)[None, :], 1), mask=in_n)
        decayed = g * tl.exp2(step[None, :] * a * LOG2E)
        exponent = decayed * before
        of_A += exponent * step[None, :]
        gb = g * b_t[:, None]
        tl.store(gdt + row + t * channels, tl.sum(exponent * a + gb * u[None, :], 0), mask=in_d)
        tl.store(gx + row + t * channels, tl.sum(gb * step[None, :], 0), mask=in_d)
        g = decayed
    tl.store(carried + at, g, mask=inside)
    tl.store(gA + at, tl.load(gA + at, mask=inside, other=0.0) + of_A, mask=inside)
