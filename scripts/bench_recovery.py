"""Steps of --recover at the shape of a published model: their time and peak memory, and what a whole run would take.

    python scripts/bench_recovery.py [--shape 130m] [--layers 1 3] [--seqlen 512] [--batch 8] [--threads 2]

Random weights, half of the projections zero, learn from what they were. A step of `model` takes the same time more for each
layer, so two models of few layers tell what all take; with each step goes a look at a batch set apart, of which a run of 200
steps has ten. A step of `blocks` is one layer's. Each in a process of its own; memory is the peak less what the process held
before it began.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import statistics
import time

import torch
from benchmarking import HEADS, SHAPES, alone, machine, peak_memory, random_model, resident_memory

from sparsessm.layerwise.memory import keep_freed
from sparsessm.layerwise.stream import Stream
from sparsessm.models.architecture import Layout
from sparsessm.procedure.driver import Job
from sparsessm.procedure.plan import RecoveryPlan
from sparsessm.procedure.recovery import recover
from sparsessm.report.tables import text_table

STEPS = 10  # of the whole model, each with one of its ten looks


def measure(kind: str, shape: str, layers: int, seqlen: int, batch: int, threads: int) -> dict[str, float]:
    """Seconds of a step and bytes at the peak."""
    torch.set_num_threads(threads)
    keep_freed()
    dense = random_model(shape, layers, vocab=1024 if kind == "blocks" else 50288)
    model = copy.deepcopy(dense)
    masks = {}
    for name, parameter in model.named_parameters():
        if name.endswith("proj.weight"):
            masks[name] = torch.zeros(parameter.shape, dtype=torch.bool)
            masks[name][:, ::2] = True
            parameter.data[masks[name]] = 0
    windows = torch.randint(1024, (3 * batch, seqlen), generator=torch.Generator().manual_seed(1))
    looks: list[float] = []

    def job(one: torch.nn.Module) -> Job:
        layout = Layout(one)
        place = {"device": "cpu", "offload": "cpu", "batch": batch}
        report = lambda *_, **__: looks.append(time.perf_counter())  # noqa: E731
        return Job(layout, lambda: Stream.embed(layout, windows, **place), 0, layers, report)

    held, start = resident_memory(), time.perf_counter()
    passes = 3
    recover(job(model), job(dense), masks, RecoveryPlan((kind,), steps=STEPS, passes=passes))
    took = time.perf_counter() - start
    if kind == "model":
        took = statistics.median(b - a for a, b in itertools.pairwise(looks))
    else:
        took /= passes * 2 * layers  # two of three batches are learned from, one is looked at
    return {"seconds": took, "bytes": peak_memory() - held}


def bench(*, shape: str, layers: list[int], seqlen: int, batch: int, threads: int) -> None:
    """Prints the table and the projection."""
    torch.set_num_threads(threads)
    few, more = layers
    found = {
        ("blocks", 1): alone(measure, "blocks", shape, 1, seqlen, batch, threads),
        ("model", few): alone(measure, "model", shape, few, seqlen, batch, threads),
        ("model", more): alone(measure, "model", shape, more, seqlen, batch, threads),
    }
    print(machine())
    print(f"{shape}, float32, {batch} windows of {seqlen} a step\n")
    print(text_table([
        {
            "step of": kind, "layers": str(count), "seconds": f"{one['seconds']:.2f}",
            "peak MiB": f"{one['bytes'] / 2**20:.0f}",
        }
        for (kind, count), one in found.items()
    ]))  # fmt: skip
    all_layers = (SHAPES | HEADS)[shape][1]
    first, second = found["model", few]["seconds"], found["model", more]["seconds"]
    step = second + (second - first) / (more - few) * (all_layers - more)
    block = found["blocks", 1]["seconds"]
    whole, tuned = 200 * step / 60, all_layers * 10 * 128 / batch * block / 60
    print(f"\nall {all_layers} layers: a step of model {step:.1f} s, 200 of them {whole:.0f} min; "
          f"blocks, ten passes over 128 windows, {tuned:.0f} min")  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="130m", choices=(*SHAPES, *HEADS))
    parser.add_argument("--layers", type=int, nargs=2, default=[1, 3], metavar=("FEW", "MORE"))
    for flag, value in {"seqlen": 512, "batch": 8, "threads": 2}.items():
        parser.add_argument(f"--{flag}", type=int, default=value)
    bench(**vars(parser.parse_args()))
