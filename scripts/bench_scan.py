"""The fused CPU scan against the torch loop, stock transformers' fallback, and what the machine can do.

    python scripts/bench_scan.py [--shape 130m] [--batch 8] [--steps 512] [--states 16] [--threads 2] [--rounds 5]

All scan the same float32 input. `loop` is the reference of sparsessm.model.scan: one vectorised torch step after the
other. `stock` is what transformers runs on a CPU. The limits are measured on the spot, on numbers in the first-level cache: `exp`
is the rate of the scan's own exponential, `torch.exp` that of torch, `step` that of an exponential with the products and
sums of one state; `copy` is the rate of reading and writing main memory. "gap" is the time of the fused scan over the
time that the steps alone take, or over that of the bytes it must move, whichever is longer; "gap exp" the same with the
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

from sparsessm.model.lanes import LANES, fma, load, power, store
from sparsessm.model.scan import ScanMoments, force_kernel, selective_scan, selective_scan_ref
from sparsessm.reporting.tables import text_table

CACHED = 1 << 11  # numbers that stay in the first-level cache


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


def limits(threads: int) -> dict[str, Callable[[], object]]:
    """What measures the machine: exponentials by our polynomial and by torch, a copy of main memory."""
    from concurrent.futures import ThreadPoolExecutor

    x, y = -np.random.rand(CACHED).astype(np.float32), np.random.rand(CACHED).astype(np.float32)
    pool = ThreadPoolExecutor(threads)
    source, target = torch.ones(1 << 27), torch.empty(1 << 27)
    small = torch.full((CACHED * threads,), -0.5)
    cached = torch.empty_like(small)

    def ours() -> None:
        list(pool.map(lambda out: exponentials(x, y, out, 10_000), [np.empty_like(x) for _ in range(threads)]))

    def theirs() -> None:
        for _ in range(2_000):
            torch.exp(small, out=cached)

    def steps() -> None:
        hs = [np.zeros_like(x) for _ in range(threads)]
        list(pool.map(lambda h: recurrences(x, y, h, np.zeros_like(x), 10_000), hs))

    return {"exp": ours, "step": steps, "torch.exp": theirs, "copy": lambda: target.copy_(source)}


def bench(*, shape: str, batch: int, steps: int, states: int, threads: int, rounds: int) -> None:
    """Prints the tables."""
    torch.set_num_threads(threads)
    B, L, D, N = batch, steps, 2 * SHAPES[shape][0], states
    values = scan_inputs(B, L, D, N)
    fused = partial(selective_scan, **values, delta_softplus=True)
    loop = partial(selective_scan_ref, **values, delta_softplus=True)

    def moments(*needs: str) -> ScanMoments:
        return ScanMoments.zeros(needs, L, D, N, "cpu")

    peers = {
        "fused": fused,
        "fused, h2": partial(fused, moments=moments("h2")),
        "fused, h2 and abar": partial(fused, moments=moments("h2", "abar")),
        "fused, gram": partial(fused, moments=moments("gram")),
        "loop": loop,
        "loop, h2": partial(loop, moments=moments("h2")),
        "stock": partial(stock, values),
    }
    with force_kernel("cpu"):
        seconds = in_turn(peers | limits(threads), rounds)

    rates = {
        "exp": threads * CACHED * 10_000 / statistics.median(seconds["exp"]),
        "step": threads * CACHED * 10_000 / statistics.median(seconds["step"]),
        "torch.exp": threads * CACHED * 2_000 / statistics.median(seconds["torch.exp"]),
        "copy": 2 * 4 * (1 << 27) / statistics.median(seconds["copy"]),
    }
    elements, word = B * L * D * N, 4
    streams = word * (4 * B * L * D + 2 * B * L * N)  # u, delta, z and y; B and C
    sums = 2 * 8 * L * D * N  # a sum in float64 is read and written
    moved = {"fused": streams, "fused, h2": streams + sums, "fused, h2 and abar": streams + 2 * sums, "fused, gram": streams}
    rows = []
    for name in peers:
        median = statistics.median(seconds[name])
        cells = {"scan": name, "ms": f"{median * 1e3:.1f}", "G states/s": f"{elements / median / 1e9:.2f}"}
        for other in ("loop", "loop, h2", "stock"):
            cells[f"x {other}"] = f"{median_ratio(seconds[other], seconds[name]):.1f}"
        if name in moved:
            cells["MB moved"] = f"{moved[name] / 1e6:.0f}"
            for label, rate in {"gap": "step", "gap exp": "exp"}.items():
                cells[label] = f"{median / max(elements / rates[rate], moved[name] / rates['copy']):.2f}"
        rows.append(cells)
    print(machine())
    print(f"B {B}, L {L}, D {D}, N {N}, float32; medians of {rounds} rounds\n")
    print(text_table(rows))
    print(f"\nlimits: {rates['exp'] / 1e9:.2f} G exponentials/s (torch.exp {rates['torch.exp'] / 1e9:.2f}), "
          f"{rates['step'] / 1e9:.2f} G steps of a state/s, "
          f"{rates['copy'] / 1e9:.1f} GB/s")  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="130m", choices=tuple(benchmarking.SHAPES))
    for flag, value in {"batch": 8, "steps": 512, "states": 16, "threads": 2, "rounds": 5}.items():
        parser.add_argument(f"--{flag}", type=int, default=value)
    bench(**vars(parser.parse_args()))
