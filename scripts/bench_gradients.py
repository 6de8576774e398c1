"""Gradients of one layer at the shapes of mamba-130m and mamba2-130m against stock transformers' autograd of the same layer.

    python scripts/bench_gradients.py [--models mamba-130m mamba2-130m] [--batch 4] [--seqlen 512] [--threads 2] [--rounds 3]

A step is a forward of the layer, and a backward that finds the gradients of its input and of all its parameters; weights are
random float32. The sides take turns, each in a separate process: seconds are the median of a few steps, or those of one step
where it takes long; memory is the peak of the process less what it held at the start.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from benchmarking import alone, machine, median_ratio, peak_memory, random_model, resident_memory
from numpy.linalg import norm
from torch import Tensor, nn

from sparsessm.layerwise.memory import keep_freed
from sparsessm.layerwise.visit import visit
from sparsessm.models.architecture import Layout
from sparsessm.report.tables import text_table

MODELS: dict[str, Callable[[], nn.Module]] = {
    "mamba-130m": lambda: random_model("130m", 1, vocab=64),
    "mamba2-130m": lambda: random_model("mamba2-130m", 1, vocab=64),
}
# Steps of a process, and the seconds after which it takes no more.
STEPS, ENOUGH = 6, 10.0
Step = Callable[[], dict[str, Tensor]]


def steps_of(model: nn.Module, batch: int, seqlen: int) -> dict[str, Step]:
    """For each side a function that makes the gradients of its layer, by name."""
    layout = Layout(model.requires_grad_(True))
    layer = layout.layers[0]
    mixer, generator = layout.mixer(layer), torch.Generator().manual_seed(1)
    hidden, weigh = (torch.randn(batch, seqlen, model.config.hidden_size, generator=generator) for _ in range(2))

    def gradients(forward: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        leaf = hidden.clone().requires_grad_()
        layer.zero_grad()
        forward(leaf).backward(weigh)
        return {"input": leaf.grad} | {name: parameter.grad for name, parameter in layer.named_parameters()}

    def stock(x: Tensor) -> Tensor:
        out = layer(x)
        return out[0] if isinstance(out, tuple) else out

    return {"here": lambda: gradients(lambda x: visit(layer, mixer, x).out), "stock": lambda: gradients(stock)}


def measure(name: str, side: str, batch: int, seqlen: int, threads: int) -> dict[str, object]:
    """Seconds of a step, bytes at its peak, and its gradients."""
    torch.set_num_threads(threads)
    keep_freed()  # as the command does; it helps both sides
    model = MODELS[name]()
    steps_of(model, 1, 16)[side]()  # compiles
    step, held, seconds = steps_of(model, batch, seqlen)[side], resident_memory(), []
    while len(seconds) < STEPS and sum(seconds) < ENOUGH:
        start = time.perf_counter()
        gradients = step()
        seconds.append(time.perf_counter() - start)
    return {
        "seconds": statistics.median(seconds[1:] or seconds), "bytes": peak_memory() - held,
        "gradients": {key: value.numpy() for key, value in gradients.items()},
    }  # fmt: skip


def bench(*, models: list[str], batch: int, seqlen: int, threads: int, rounds: int) -> None:
    """Prints the table."""
    torch.set_num_threads(threads)
    print(machine())
    print(f"one layer, {batch} windows of {seqlen}, float32, forward and backward; medians of {rounds} rounds\n")
    rows = []
    for name in models:
        runs: dict[str, list[dict[str, Any]]] = {"here": [], "stock": []}
        for _ in range(rounds):
            for side, found in runs.items():
                found.append(alone(measure, name, side, batch, seqlen, threads))
        seconds = {side: [run["seconds"] for run in found] for side, found in runs.items()}
        peak = {side: statistics.median(run["bytes"] for run in found) / 2**20 for side, found in runs.items()}
        ours, theirs = (runs[side][0]["gradients"] for side in ("here", "stock"))
        off = max(float(norm(ours[key] - value) / norm(value)) for key, value in theirs.items())
        rows.append({
            "layer of": name, "here ms": f"{1e3 * statistics.median(seconds['here']):.0f}",
            "stock ms": f"{1e3 * statistics.median(seconds['stock']):.0f}",
            "times faster": f"{median_ratio(seconds['stock'], seconds['here']):.1f}", "here MiB": f"{peak['here']:.0f}",
            "stock MiB": f"{peak['stock']:.0f}", "times smaller": f"{peak['stock'] / peak['here']:.1f}",
            "furthest gradient": f"{off:.0e}",
        })  # fmt: skip
    print(text_table(rows))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    for flag, value in {"batch": 4, "seqlen": 512, "threads": 2, "rounds": 3}.items():
        parser.add_argument(f"--{flag}", type=int, default=value)
    bench(**vars(parser.parse_args()))
