"""Perplexity of one batch of windows against stock transformers on the same machine.

    python scripts/bench_eval.py [--shape 130m] [--layers 24] [--batch 8] [--seqlen 512] [--threads 2] [--rounds 3]

Both take the cross entropy of the same windows from the same random float32 weights. The limit is the matrix rate of
the machine, measured in the same run at the largest product of a block: "gap" is the time here over what the matrix products
alone would take at that rate.
"""

from __future__ import annotations

import argparse
import statistics

import benchmarking
import torch
from benchmarking import (
    SHAPES,
    in_turn,
    machine,
    matrix_products,
    median_ratio,
    projection_operations,
    random_model,
    stock_perplexity,
)

from sparsessm.layerwise.memory import keep_freed
from sparsessm.metrics.perplexity import perplexity
from sparsessm.models.architecture import Layout
from sparsessm.report.tables import text_table


def bench(*, shape: str, layers: int, batch: int, seqlen: int, threads: int, rounds: int) -> None:
    """Prints the table."""
    torch.set_num_threads(threads)
    keep_freed()  # as the command does; it helps both sides
    model = random_model(shape, layers)
    windows = torch.randint(model.config.vocab_size, (batch, seqlen), generator=torch.Generator().manual_seed(1))
    tokens = batch * seqlen
    products, operations = matrix_products(SHAPES[shape][0])
    found: dict[str, float] = {}

    def here() -> None:
        found["here"] = perplexity(Layout(model), windows, device="cpu", offload="cpu", batch=batch).value

    def there() -> None:
        found["stock"] = stock_perplexity(model, windows)

    seconds = in_turn({"here": here, "stock": there, "products": products}, rounds)
    flops = tokens * (layers * projection_operations(model.backbone.layers[0]) + 2 * model.lm_head.weight.numel())
    rate = operations / statistics.median(seconds["products"])
    print(machine())
    print(f"{shape}, {layers} layers, {batch} windows of {seqlen}, float32; medians of {rounds} rounds\n")
    print(text_table([
        {
            "evaluation": side, "seconds": f"{statistics.median(seconds[side]):.2f}",
            "us per token": f"{1e6 * statistics.median(seconds[side]) / tokens:.0f}", "perplexity": f"{found[side]:.2f}",
        }
        for side in found
    ]))  # fmt: skip
    gap = statistics.median(seconds["here"]) / (flops / rate)
    print(f"\n{median_ratio(seconds['stock'], seconds['here']):.1f} times faster than stock transformers")
    print(f"limit: {rate / 1e9:.0f} GFLOP/s of matrix products, gap {gap:.2f}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="130m", choices=tuple(benchmarking.SHAPES))
    for flag, value in {"layers": 24, "batch": 8, "seqlen": 512, "threads": 2, "rounds": 3}.items():
        parser.add_argument(f"--{flag}", type=int, default=value)
    bench(**vars(parser.parse_args()))
