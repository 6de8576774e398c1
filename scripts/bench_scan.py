"""The fused CPU scan against the torch loop, stock transformers' fallback, and what the machine can do.

    python scripts/bench_scan.py [--shape 130m] [--batch 8] [--steps 512] [--states 16] [--threads 2] [--rounds 5]

All scan the same float32 input. `loop` is the reference of sparsessm.kernels.selective_scan: one vectorised torch step
after the other. `stock` is what transformers runs on a CPU. The limits are measured in the same run, on numbers in the
first-level cache, by as many threads: `exp` is the rate of the scan's own exponential, `torch.exp` that of torch,
`step` that of an exponential with the products and sums of one state, `edge` that of the softplus and the gate of one
channel, `fma` that of one product and sum; `copy` is the rate of reading and writing main memory. "limit" is the time
that the arithmetic of a scan takes at these rates (its states at `step`, its channels at `edge`, what its sums add at
`fma`), or its bytes at `copy`, whichever is longer; "gap" is the time of the scan over that, "gap exp" over that of the
exponentials alone.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from functools import partial

import benchmarking
import numpy as np
import torch
from benchmarking import SHAPES, in_turn, machine, median_ratio
from numba import njit
from transformers.models.mamba.modeling_mamba import mamba_selective_scan

from sparsessm.kernels.functions import power, silu, softplus
from sparsessm.kernels.selective_scan import (
    ScanStatistics,
    force_kernel,
    selective_scan,
    selective_scan_ref,
)
from sparsessm.lanes import LANES, fill, fma, load, store
from sparsessm.layerwise.memory import keep_freed
from sparsessm.report.tables import text_table
from sparsessm.threads import for_each

CACHED = 1 << 11  # numbers that stay in the first-level cache
REPEATS = 40_000


@njit(nogil=True)
def exponentials(x, y, out, times):
    """out = 2^(x y), over and over."""
    for _ in range(times):
        for i in range(0, x.size, LANES):
            store(out, i, power(load(x, i), load(y, i)))


@njit(nogil=True)
def recurrences(x, y, h, out, times):
    """h = 2^(x y) h + y and out += x h: what a scan does for a state, without the memory that it takes it from."""
    for _ in range(times):
        for i in range(0, x.size, LANES):
            a, b = load(x, i), load(y, i)
            new = fma(power(a, b), load(h, i), a * b)
            store(h, i, new)
            store(out, i, fma(a, new, load(out, i)))


@njit(nogil=True)
def edges(x, y, out, times):
    """out = softplus(x) and silu(y): what a scan does for a channel."""
    for _ in range(times):
        for i in range(0, x.size, LANES):
            store(out, i, softplus(load(x, i)) + silu(load(y, i)))


@njit(nogil=True)
def products(x, y, out, times):
    """Sums of x y for four vectors of each, against each other."""
    for _ in range(times):
        zero = fill(0.0)
        a0, a1, a2, a3, a4, a5, a6, a7 = zero, zero, zero, zero, zero, zero, zero, zero
        b0, b1, b2, b3, b4, b5, b6, b7 = zero, zero, zero, zero, zero, zero, zero, zero
        for i in range(0, x.size, 4 * LANES):
            x0, x1, x2, x3 = load(x, i), load(x, i + LANES), load(x, i + 2 * LANES), load(x, i + 3 * LANES)
            y0, y1, y2, y3 = load(y, i), load(y, i + LANES), load(y, i + 2 * LANES), load(y, i + 3 * LANES)
            a0, a1, a2, a3 = fma(x0, y0, a0), fma(x0, y1, a1), fma(x0, y2, a2), fma(x0, y3, a3)
            a4, a5, a6, a7 = fma(x1, y0, a4), fma(x1, y1, a5), fma(x1, y2, a6), fma(x1, y3, a7)
            b0, b1, b2, b3 = fma(x2, y0, b0), fma(x2, y1, b1), fma(x2, y2, b2), fma(x2, y3, b3)
            b4, b5, b6, b7 = fma(x3, y0, b4), fma(x3, y1, b5), fma(x3, y2, b6), fma(x3, y3, b7)
        a = a0 + a1 + a2 + a3 + a4 + a5 + a6 + a7
        store(out, 0, a + b0 + b1 + b2 + b3 + b4 + b5 + b6 + b7)


def scan_inputs(B: int, L: int, D: int, N: int) -> dict[str, torch.Tensor]:
    g = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=g)

    return {
        "u": draw(B, L, D), "delta": draw(B, L, D), "A": -torch.exp(draw(D, N)), "B": draw(B, L, N), "C": draw(B, L, N),
        "D": draw(D), "z": draw(B, L, D), "delta_bias": draw(D) - 4,
    }  # fmt: skip


def stock(values: dict[str, torch.Tensor]) -> torch.Tensor:
    """The scan of transformers, in its layout (B,D,L)."""
    swapped = {name: values[name].transpose(1, 2) for name in ("u", "delta", "B", "C", "z")}
    return mamba_selective_scan(
        swapped["u"], swapped["delta"], values["A"], swapped["B"], swapped["C"], D=values["D"], z=swapped["z"],
        delta_bias=values["delta_bias"], delta_softplus=True,
    )  # fmt: skip


Limits = dict[str, tuple[Callable[[], object], int]]  # what measures a rate, and how many of it a call makes


def limits(threads: int) -> Limits:
    """Operations on numbers in the first-level cache, by our own polynomials."""
    x, y = -np.random.rand(CACHED).astype(np.float32), np.random.rand(CACHED).astype(np.float32)
    buffers = [np.zeros((2, CACHED), np.float32) for _ in range(threads)]

    def step(buffer: np.ndarray) -> None:
        buffer[:] = 0
        recurrences(x, y, *buffer, REPEATS)

    count = threads * CACHED * REPEATS
    kernels = {
        "exp": (lambda buffer: exponentials(x, y, buffer[0], REPEATS), count),
        "step": (step, count),
        "edge": (lambda buffer: edges(x, y, buffer[0], REPEATS), count),
        "fma": (lambda buffer: products(x, y, buffer[0], REPEATS), 4 * count),
    }
    return {name: (partial(for_each, kernel, buffers, threads), n) for name, (kernel, n) in kernels.items()}


def torch_limits(threads: int) -> Limits:
    """Exponentials of numbers in the first-level cache by torch, and bytes that a copy of main memory moves."""
    source, target = torch.ones(1 << 27), torch.empty(1 << 27)
    small = torch.full((CACHED * threads,), -0.5)
    cached, repeats = torch.empty_like(small), REPEATS // 16

    def exp() -> None:
        for _ in range(repeats):
            torch.exp(small, out=cached)

    return {"torch.exp": (exp, small.numel() * repeats), "copy": (lambda: target.copy_(source), 2 * source.nbytes)}


def bench(*, shape: str, batch: int, steps: int, states: int, threads: int, rounds: int) -> None:
    """Prints the tables."""
    torch.set_num_threads(threads)
    keep_freed()  # as the command does
    B, L, D, N = batch, steps, 2 * SHAPES[shape][0], states
    values = scan_inputs(B, L, D, N)
    fused = partial(selective_scan, **values, delta_softplus=True)
    loop = partial(selective_scan_ref, **values, delta_softplus=True)

    def sums(*needs: str) -> ScanStatistics:
        return ScanStatistics.zeros(needs, L, D, N, "cpu")

    backends = {
        "fused": fused,
        "fused, h2": partial(fused, statistics=sums("h2")),
        "fused, h2 and abar": partial(fused, statistics=sums("h2", "abar")),
        "fused, gram": partial(fused, statistics=sums("gram")),
        "loop": loop,
        "loop, h2": partial(loop, statistics=sums("h2")),
        "stock": partial(stock, values),
    }
    machine_limits = limits(threads) | torch_limits(threads)
    with force_kernel("cpu"):
        seconds = in_turn(backends | {name: call for name, (call, _) in machine_limits.items()}, rounds, twice=True)

    rates = {name: count / statistics.median(seconds[name]) for name, (_, count) in machine_limits.items()}
    states, channels, word = B * L * D * N, B * L * D, 4
    streams = word * (4 * B * L * D + 2 * B * L * N)  # u, delta, z and y; B and C
    moved_by_sum = 2 * 8 * L * D * N  # a sum in float64 is read and written
    bounds = {  # bytes moved, and products for each state beside its step
        "fused": (streams, 0), "fused, h2": (streams + moved_by_sum, 1),
        "fused, h2 and abar": (streams + 2 * moved_by_sum, 2),
        "fused, gram": (streams, 3 + (N + 1) / 2),
    }  # fmt: skip
    rows = []
    for name in backends:
        median = statistics.median(seconds[name])
        cells = {"scan": name, "ms": f"{median * 1e3:.1f}", "G states/s": f"{states / median / 1e9:.2f}"}
        for other in ("loop", "loop, h2", "stock"):
            cells[f"x {other}"] = f"{median_ratio(seconds[other], seconds[name]):.1f}"
        if name in bounds:
            moved, added = bounds[name]
            arithmetic = states / rates["step"] + channels / rates["edge"] + added * states / rates["fma"]
            limit = max(arithmetic, moved / rates["copy"])
            cells |= {"MB moved": f"{moved / 1e6:.0f}", "limit ms": f"{limit * 1e3:.1f}"}
            cells |= {"gap": f"{median / limit:.2f}", "gap exp": f"{median * rates['exp'] / states:.2f}"}
        rows.append(cells)
    print(machine())
    print(f"B {B}, L {L}, D {D}, N {N}, float32; medians of {rounds} rounds\n")
    print(text_table(rows))
    print(f"\nlimits: {rates['exp'] / 1e9:.1f} G exponentials/s (torch.exp {rates['torch.exp'] / 1e9:.1f}), "
          f"{rates['step'] / 1e9:.1f} G steps of a state/s, {rates['edge'] / 1e9:.1f} G edges of a channel/s, "
          f"{rates['fma'] / 1e9:.0f} G products/s, {rates['copy'] / 1e9:.0f} GB/s")  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="130m", choices=tuple(benchmarking.SHAPES))
    for flag, value in {"batch": 8, "steps": 512, "states": 16, "threads": 2, "rounds": 5}.items():
        parser.add_argument(f"--{flag}", type=int, default=value)
    bench(**vars(parser.parse_args()))
