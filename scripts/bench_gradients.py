"""Gradients of one layer at the shapes of mamba-130m and mamba2-130m against stock transformers' autograd of the same layer.

    python scripts/bench_gradients.py [--batch 4] [--seqlen 512] [--threads 2] [--rounds 5]

A step is a forward of the layer, and a backward that finds the gradients of its input and of all its parameters; weights are
random float32. Both sides are timed in turn in one process. Memory is the peak of a separate process for each side that
computes one step, less what it held at the start.
"""

from __future__ import annotations

import argparse
import statistics
from collections.abc import Callable
from functools import partial

import torch
from benchmarking import alone, in_turn, machine, median_ratio, peak_memory, random_heads, random_model, resident_memory
from torch import Tensor, nn

from sparsessm.layerwise.memory import keep_freed
from sparsessm.layerwise.visit import visit
from sparsessm.models.architecture import Layout
from sparsessm.report.tables import text_table

MODELS: dict[str, Callable[[], nn.Module]] = {
    "mamba-130m": lambda: random_model("130m", 1, vocab=64),
    "mamba2-130m": lambda: random_heads(1, vocab=64),
}
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


def peak_of(name: str, side: str, batch: int, seqlen: int, threads: int) -> int:
    """Bytes of one step."""
    torch.set_num_threads(threads)
    keep_freed()
    model = MODELS[name]()
    steps_of(model, 1, 16)[side]()  # compiles
    step, held = steps_of(model, batch, seqlen)[side], resident_memory()
    step()
    return peak_memory() - held


def bench(*, batch: int, seqlen: int, threads: int, rounds: int) -> None:
    """Prints the table."""
    torch.set_num_threads(threads)
    keep_freed()  # as the command does; it helps both sides
    # first: the peak of a process includes the memory of its parent at its start
    peaks = {
        name: {side: alone(peak_of, name, side, batch, seqlen, threads) for side in ("here", "stock")} for name in MODELS
    }
    rows = []
    for name, make in MODELS.items():
        steps, found = steps_of(make(), batch, seqlen), {}

        def call(side: str, steps: dict[str, Step] = steps, found: dict[str, dict[str, Tensor]] = found) -> None:
            found[side] = steps[side]()

        seconds = in_turn({side: partial(call, side) for side in steps}, rounds)
        off = max(float((found["here"][key] - value).norm() / value.norm()) for key, value in found["stock"].items())
        here, stock = (statistics.median(seconds[side]) for side in ("here", "stock"))
        rows.append({
            "layer of": name, "here ms": f"{1e3 * here:.0f}", "stock ms": f"{1e3 * stock:.0f}",
            "times faster": f"{median_ratio(seconds['stock'], seconds['here']):.1f}",
            "here MiB": f"{peaks[name]['here'] / 2**20:.0f}", "stock MiB": f"{peaks[name]['stock'] / 2**20:.0f}",
            "furthest gradient": f"{off:.0e}",
        })  # fmt: skip
    print(machine())
    print(f"one layer, {batch} windows of {seqlen}, float32, forward and backward; medians of {rounds} rounds\n")
    print(text_table(rows))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for flag, value in {"batch": 4, "seqlen": 512, "threads": 2, "rounds": 5}.items():
        parser.add_argument(f"--{flag}", type=int, default=value)
    bench(**vars(parser.parse_args()))
