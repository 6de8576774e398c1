"""Pruning A_log at the shape of mamba-130m against a plain re-creation of the published procedure.

    python scripts/bench_prune.py [--shape 130m] [--layers 1] [--nsamples 16] [--seqlen 2048] [--threads 2] [--rounds 3]

The published procedure, as released: each layer takes one sample after the other, materialises the
transitions (L,D,N), steps through time in Python with every state in a list, adds the squares to a running sum, selects
with one topk per time step, and then runs all samples through the pruned layer once more. Both sides prune the same
random weights by the same formula at 50 %; the share of entries on which their masks agree is printed (the published
running sum weighs sample k by k; here it is plain, so that the masks can be compared). Each measurement runs in a separate
process: seconds are those of pruning alone, memory is the peak of the process less what it held before. `lean` is the same
command with --memory_budget 0: nothing is kept between the passes over a layer. The limit is the time for the projections
and the exponentials alone, at rates measured in the same run.
"""

from __future__ import annotations

import argparse
import statistics
import time

import benchmarking
import torch
from bench_scan import limits
from benchmarking import (
    SHAPES,
    alone,
    in_turn,
    machine,
    matrix_products,
    median_ratio,
    peak_memory,
    plain_mixer,
    projection_operations,
    prune_half,
    published_procedure,
    random_model,
)

from sparsessm.layerwise.memory import keep_freed
from sparsessm.report.tables import text_table


def measure(side: str, shape: str, layers: int, nsamples: int, seqlen: int, threads: int) -> dict[str, object]:
    """Seconds, peak bytes and masks of one side, on the same random weights and tokens."""
    torch.set_num_threads(threads)
    if side != "published":
        keep_freed()  # as the command does
    model = random_model(shape, layers, vocab=1024)
    windows = torch.randint(1024, (nsamples, seqlen), generator=torch.Generator().manual_seed(1))
    place = {"device": "cpu", "offload": "cpu"}
    prune_half(random_model(shape, 1, vocab=1024), windows[:1, :32], batch=1, **place)  # compiles the scan
    held, start = peak_memory(), time.perf_counter()
    if side == "published":
        masks = published_procedure(model, windows, plain_mixer, pruned=0.0)
    else:
        masks = prune_half(model, windows, batch=8, budget=0 if side == "lean" else None, **place)
    return {"seconds": time.perf_counter() - start, "bytes": peak_memory() - held, "masks": [m.numpy() for m in masks]}


def bench(*, shape: str, layers: int, nsamples: int, seqlen: int, threads: int, rounds: int) -> None:
    """Prints the table."""
    torch.set_num_threads(threads)
    runs: dict[str, list[dict[str, object]]] = {"here": [], "lean": [], "published": []}
    for _ in range(rounds):
        for side, found in runs.items():
            found.append(alone(measure, side, shape, layers, nsamples, seqlen, threads))
    print(machine())
    print(f"{shape}, {layers} layers, {nsamples} windows of {seqlen}; medians of {rounds} rounds\n")
    seconds = {side: [run["seconds"] for run in found] for side, found in runs.items()}
    peak = {side: statistics.median(run["bytes"] for run in found) for side, found in runs.items()}
    tokens = nsamples * seqlen * layers
    print(text_table([
        {
            "procedure": side, "seconds": f"{statistics.median(seconds[side]):.2f}",
            "us per token and layer": f"{1e6 * statistics.median(seconds[side]) / tokens:.1f}",
            "peak MiB": f"{peak[side] / 2**20:.0f}",
        }
        for side in runs
    ]))  # fmt: skip
    pairs = zip(runs["here"][0]["masks"], runs["published"][0]["masks"], strict=True)
    agree = statistics.mean(float((a == b).mean()) for a, b in pairs)
    print(f"\nmasks agree on {agree:.3%} of the entries")
    products, operations = matrix_products(SHAPES[shape][0])
    exponentials, count = limits(threads)["exp"]
    found = in_turn({"products": products, "exponentials": exponentials}, 5)
    rate, exp_rate = operations / statistics.median(found["products"]), count / statistics.median(found["exponentials"])
    block = random_model(shape, 1, vocab=1024).backbone.layers[0]
    limit = tokens * (projection_operations(block) / rate + 2 * block.mixer.A_log.numel() / exp_rate)
    for side in ("here", "lean"):
        ratio, share = median_ratio(seconds["published"], seconds[side]), peak[side] / peak["published"]
        print(f"{side}: {ratio:.1f} times faster than published, {share:.2f} of its memory")
    print(f"limit: once through all projections at {rate / 1e9:.0f} GFLOP/s, twice through the scan at "
          f"{exp_rate / 1e9:.0f} G exponentials/s: {1e6 * limit / tokens:.1f} us; "
          f"gap {statistics.median(seconds['here']) / limit:.2f}")  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="130m", choices=tuple(benchmarking.SHAPES))
    for flag, value in {"layers": 1, "nsamples": 16, "seqlen": 2048, "threads": 2, "rounds": 3}.items():
        parser.add_argument(f"--{flag}", type=int, default=value)
    bench(**vars(parser.parse_args()))
