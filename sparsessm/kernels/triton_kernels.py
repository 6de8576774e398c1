"""The kernels of the selective scan for CUDA, in Triton; `sparsessm.kernels.scan_cuda` launches them.

A program keeps the states of some channels (and samples) in registers and computes all time steps. States are the
first axis of a tile and channels the last: neighbouring threads then have neighbouring channels, so memory is read in
whole sectors, and the sum over states stays within a few threads. What a step reads is asked for one step before.

Sums are float64 of exact products. One program adds to each of them, in a fixed order: no number depends on which
program runs when.
"""

from __future__ import annotations

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
UNIT, REMOVED = tl.constexpr(1), tl.constexpr(2)  # places in scan.EFFECTS


@triton.jit
def _softplus(x):
    """max(x, 0) + log1p(v) with v = exp(-|x|) <= 1.

    log1p(v) = 2 artanh(s) with s = v / (2 + v) <= 1/3, whose series has a share of 1e-9 left after eight terms. (The
    logarithm of 1 + v would lose small time steps.)
    """
    v = tl.exp(-tl.abs(x))
    s = v / (2.0 + v)
    q = s * s
    series = 1.0 / 13.0 + q * (1.0 / 15.0)
    series = 1.0 / 9.0 + q * (1.0 / 11.0 + q * series)
    series = 1.0 / 5.0 + q * (1.0 / 7.0 + q * series)
    series = 1.0 + q * (1.0 / 3.0 + q * series)
    return tl.maximum(x, 0.0) + 2.0 * s * series


@triton.jit
def _silu(z):
    """z / (1 + exp(-z)) by an exponential that cannot overflow."""
    v = tl.exp(-tl.abs(z))
    return z * tl.where(z >= 0.0, 1.0, v) / (1.0 + v)


@triton.jit
def _read(u, delta, z, B, C, inside, bc_inside, WITH_GATE: tl.constexpr):
    """What one time step reads, zero outside of the tensors."""
    x = tl.load(u, mask=inside, other=0.0)
    raw = tl.load(delta, mask=inside, other=0.0)
    gate = x
    if WITH_GATE:
        gate = tl.load(z, mask=inside, other=0.0)
    return x, raw, gate, tl.load(B, mask=bc_inside, other=0.0), tl.load(C, mask=bc_inside, other=0.0)


@triton.jit
def _time_step(raw, bias, WITH_SOFTPLUS: tl.constexpr):
    dt = raw.to(tl.float32) + bias
    if WITH_SOFTPLUS:
        dt = _softplus(dt)
    return dt


# What is not wanted has a flag that is False, and a pointer that is not followed.


@triton.jit(do_not_specialize=["batch", "steps"])
def scan(
    u, delta, z, B, C, y, A, skip, bias, h0, state, h2, abar,
    batch, steps, channels,
    u_sample, u_step, delta_sample, delta_step, z_sample, z_step, B_sample, B_step, C_sample, C_step,
    N: tl.constexpr, BN: tl.constexpr, BB: tl.constexpr, BD: tl.constexpr,
    WITH_SKIP: tl.constexpr, WITH_BIAS: tl.constexpr, WITH_SOFTPLUS: tl.constexpr, WITH_GATE: tl.constexpr,
    WITH_H0: tl.constexpr, WITH_H2: tl.constexpr, WITH_ABAR: tl.constexpr,
):  # fmt: skip
    """BB samples of BD channels through all steps. Grid: channels / BD, batch / BB; the latter 1 where there are sums.

    u, delta, z: (B,L,D), B, C: (B,L,N), by the strides of sample and step. The others are contiguous: y (B,L,D); A
    (D,N); skip, bias (D,); h0, state (B,D,N), before the first step and after the last; h2, abar (L,D,N), added to.
    """
    b = tl.program_id(1) * BB + tl.arange(0, BB)
    d = tl.program_id(0) * BD + tl.arange(0, BD)
    n = tl.arange(0, BN)
    in_b, in_d, in_n = b < batch, d < channels, n < N
    b = b.to(tl.int64)
    rows = in_b[:, None] & in_d[None, :]  # (BB,BD)
    bc_rows = in_n[:, None] & in_b[None, :]  # (BN,BB)
    entries = in_n[:, None] & in_d[None, :]  # (BN,BD)
    states = entries[:, None, :] & in_b[None, :, None]  # (BN,BB,BD)

    u += b[:, None] * u_sample + d[None, :]
    delta += b[:, None] * delta_sample + d[None, :]
    z += b[:, None] * z_sample + d[None, :]
    y += b[:, None] * steps * channels + d[None, :]
    B += b[None, :] * B_sample + n[:, None]
    C += b[None, :] * C_sample + n[:, None]
    h2 += d[None, :] * N + n[:, None]
    abar += d[None, :] * N + n[:, None]
    state_at = (b[None, :, None] * channels + d[None, None, :]) * N + n[:, None, None]

    a = tl.load(A + d[None, :] * N + n[:, None], mask=entries, other=0.0) * LOG2E
    skips = tl.zeros([BD], tl.float32)
    if WITH_SKIP:
        skips = tl.load(skip + d, mask=in_d, other=0.0)
    biases = tl.zeros([BD], tl.float32)
    if WITH_BIAS:
        biases = tl.load(bias + d, mask=in_d, other=0.0)
    h = tl.zeros([BN, BB, BD], tl.float32)
    if WITH_H0:
        h = tl.load(h0 + state_at, mask=states, other=0.0)

    # tiles, for Triton's interpreter takes no mask that is made of a scalar
    last, bc_last = tl.zeros([BB, BD], tl.int32) + steps, tl.zeros([BN, BB], tl.int32) + steps
    x, raw, gate, b_t, c_t = _read(u, delta, z, B, C, rows, bc_rows, WITH_GATE)
    for t in tl.range(0, steps, loop_unroll_factor=2):
        u += u_step
        delta += delta_step
        z += z_step
        B += B_step
        C += C_step
        more, bc_more = rows & (t + 1 < last), bc_rows & (t + 1 < bc_last)
        next_x, next_raw, next_gate, next_b, next_c = _read(u, delta, z, B, C, more, bc_more, WITH_GATE)

        x32 = x.to(tl.float32)
        dt = _time_step(raw, biases[None, :], WITH_SOFTPLUS)  # (BB,BD)
        e = tl.exp2(dt[None, :, :] * a[:, None, :])  # (BN,BB,BD)
        if WITH_H2:
            entered = h.to(tl.float64)
            total = tl.load(h2, mask=entries, other=0.0) + tl.sum(entered * entered, 1)
            tl.store(h2, total, mask=entries)
            h2 += channels * N
        if WITH_ABAR:
            total = tl.load(abar, mask=entries, other=0.0)
            total += tl.sum(tl.where(in_b[None, :, None], e, 0.0).to(tl.float64), 1)
            tl.store(abar, total, mask=entries)
            abar += channels * N
        h = e * h + (dt * x32)[None, :, :] * b_t.to(tl.float32)[:, :, None]
        out = tl.sum(h * c_t.to(tl.float32)[:, :, None], 0) + x32 * skips[None, :]
        if WITH_GATE:
            out *= _silu(gate.to(tl.float32))
        tl.store(y, out.to(y.dtype.element_ty), mask=rows)
        y += channels
        x, raw, gate, b_t, c_t = next_x, next_raw, next_gate, next_b, next_c
    tl.store(state + state_at, h, mask=states)


@triton.jit
def _advance(h, counterfactual, dt, dtx, gate, a, b_t, c_t, EFFECT: tl.constexpr):
    """One step: h_t, h'_t, and what the gated output loses with each state pruned, as ScanStatistics.gram has it."""
    e = tl.exp2(dt * a)
    inflow = dtx * b_t
    lost = e * h
    h = lost + inflow
    if EFFECT == UNIT:
        counterfactual = tl.exp2(dt * -LOG2E) * counterfactual + inflow
        lost = h - counterfactual
    if EFFECT == REMOVED:
        lost = h
    return h, counterfactual, lost * c_t * gate


@triton.jit(do_not_specialize=["batch", "steps"])
def products(
    u, delta, z, B, C, A, bias, h0, counterfactual0, counterfactual, hh, gram,
    batch, steps, channels,
    u_sample, u_step, delta_sample, delta_step, z_sample, z_step, B_sample, B_step, C_sample, C_step,
    N: tl.constexpr, BI: tl.constexpr, BJ: tl.constexpr, BD: tl.constexpr,
    WITH_BIAS: tl.constexpr, WITH_SOFTPLUS: tl.constexpr, WITH_GATE: tl.constexpr, WITH_H0: tl.constexpr,
    WITH_HH: tl.constexpr, WITH_GRAM: tl.constexpr, EFFECT: tl.constexpr,
):  # fmt: skip
    """Products of BI states with BJ states of BD channels over all steps of all samples.

    Grid: channels / BD, N / BI, N / BJ. Both sets of states are computed here, so that threads exchange
    none. Arguments as in `scan`, and: counterfactual0, counterfactual (B,D,N), h' before and after, where EFFECT is UNIT;
    gram (D,N,N), added to; hh (channels / BD,N,N), the sums over each program's channels.
    """
    d = tl.program_id(0) * BD + tl.arange(0, BD)[None, None, :]
    i = tl.program_id(1) * BI + tl.arange(0, BI)[:, None, None]
    j = tl.program_id(2) * BJ + tl.arange(0, BJ)[None, :, None]
    in_d, in_i, in_j = d < channels, i < N, j < N
    a_i = tl.load(A + d * N + i, mask=in_d & in_i, other=0.0) * LOG2E  # (BI,1,BD)
    a_j = tl.load(A + d * N + j, mask=in_d & in_j, other=0.0) * LOG2E  # (1,BJ,BD)
    biases = tl.zeros([1, 1, BD], tl.float32)
    if WITH_BIAS:
        biases = tl.load(bias + d, mask=in_d, other=0.0)
    hh_sum = tl.zeros([BI, BJ, BD], tl.float64)
    gram_sum = tl.zeros([BI, BJ, BD], tl.float64)

    for _sample in range(batch):
        h_i = tl.zeros([BI, 1, BD], tl.float32)
        h_j = tl.zeros([1, BJ, BD], tl.float32)
        other_i, other_j = h_i, h_j
        if WITH_H0:
            h_i = tl.load(h0 + d * N + i, mask=in_d & in_i, other=0.0)
            h_j = tl.load(h0 + d * N + j, mask=in_d & in_j, other=0.0)
            if EFFECT == UNIT:
                other_i = tl.load(counterfactual0 + d * N + i, mask=in_d & in_i, other=0.0)
                other_j = tl.load(counterfactual0 + d * N + j, mask=in_d & in_j, other=0.0)
        u_t, delta_t, z_t, B_t, C_t = u, delta, z, B, C
        for _step in range(steps):
            x = tl.load(u_t + d, mask=in_d, other=0.0).to(tl.float32)
            dt = _time_step(tl.load(delta_t + d, mask=in_d, other=0.0), biases, WITH_SOFTPLUS)
            gate = tl.full([1, 1, BD], 1.0, tl.float32)
            if WITH_GATE:
                gate = _silu(tl.load(z_t + d, mask=in_d, other=0.0).to(tl.float32))
            b_i = tl.load(B_t + i, mask=in_i, other=0.0).to(tl.float32)
            b_j = tl.load(B_t + j, mask=in_j, other=0.0).to(tl.float32)
            c_i = tl.load(C_t + i, mask=in_i, other=0.0).to(tl.float32)
            c_j = tl.load(C_t + j, mask=in_j, other=0.0).to(tl.float32)
            if WITH_HH:
                hh_sum += h_i.to(tl.float64) * h_j.to(tl.float64)
            h_i, other_i, lost_i = _advance(h_i, other_i, dt, dt * x, gate, a_i, b_i, c_i, EFFECT)
            h_j, other_j, lost_j = _advance(h_j, other_j, dt, dt * x, gate, a_j, b_j, c_j, EFFECT)
            if WITH_GRAM:
                gram_sum += lost_i.to(tl.float64) * lost_j.to(tl.float64)
            u_t += u_step
            delta_t += delta_step
            z_t += z_step
            B_t += B_step
            C_t += C_step
        if EFFECT == UNIT:  # noqa: SIM102  (known when the kernel is compiled, the other is not)
            if tl.program_id(2) == 0:
                tl.store(counterfactual + d * N + i, other_i, mask=in_d & in_i)
        u += u_sample
        delta += delta_sample
        z += z_sample
        B += B_sample
        C += C_sample
        h0 += channels * N
        counterfactual0 += channels * N
        counterfactual += channels * N

    if WITH_GRAM:
        gram += (d.to(tl.int64) * N + i) * N + j
        inside = in_d & in_i & in_j
        tl.store(gram, tl.load(gram, mask=inside, other=0.0) + gram_sum, mask=inside)
    if WITH_HH:
        i = tl.program_id(1) * BI + tl.arange(0, BI)[:, None]
        j = tl.program_id(2) * BJ + tl.arange(0, BJ)[None, :]
        tl.store(hh + (tl.program_id(0).to(tl.int64) * N + i) * N + j, tl.sum(hh_sum, 2), mask=(i < N) & (j < N))
