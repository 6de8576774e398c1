"""Time and peak memory of pruning A_log against the number of samples, their length, the layers and the processes.

    python scripts/bench_scaling.py [--shape 130m] [--nsamples 8] [--seqlen 512] [--layers 2] [--offload disk]
    python scripts/bench_scaling.py --shape 2.8b --only layers --full_layers 64

One of the four is varied at a time. Each measurement runs in a separate process (or several, by torchrun, of one thread
each) that loads a checkpoint of random float32 weights from disk and prunes half of A_log. Seconds are those of pruning,
memory is the peak of the whole process. The exponent is the slope of the logarithms; memory is fitted by a line, which
--full_layers follows to the depth of a whole model.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import benchmarking
import numpy as np
import torch
from benchmarking import alone, machine, peak_memory, prune_half, random_model

from sparsessm.layerwise import distributed
from sparsessm.layerwise.memory import keep_freed
from sparsessm.models import checkpoint
from sparsessm.report.tables import text_table

FACTORS = {"nsamples": (1, 2, 4, 8), "seqlen": (1, 2, 4, 8), "layers": (1, 2, 3), "processes": (1, 2)}
RESULT = "result "


def prune(folder: str, nsamples: int, seqlen: int, offload: str, budget: int | None) -> dict[str, float]:
    """Loads the checkpoint and prunes it; of several processes the first reports."""
    keep_freed()  # as the command does
    device = distributed.start(torch.device("cpu"))
    model = checkpoint.load(checkpoint.find(folder))
    windows = torch.randint(1024, (nsamples, seqlen), generator=torch.Generator().manual_seed(1))
    placement = {"device": device, "offload": offload, "batch": 4, "budget": budget, "scratch": folder}
    few = windows[: 4 * int(os.environ.get("WORLD_SIZE", "1")), :2]
    prune_half(model, few, layers=0, **placement)  # compiles the scan and prunes no layer
    distributed.barrier()
    start = time.perf_counter()
    prune_half(model, windows, **placement)
    found = {"seconds": time.perf_counter() - start, "bytes": peak_memory()}
    if distributed.is_main() and "RANK" in os.environ:
        print(RESULT + json.dumps(found), flush=True)
    distributed.stop()
    return found


def by_torchrun(processes: int, *arguments: object) -> dict[str, float]:
    """`prune` in several processes of one thread each."""
    launcher = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}", "--standalone"]
    done = subprocess.run(
        [*launcher, __file__, "--worker", *map(str, arguments)], capture_output=True, text=True, check=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    (line,) = (line for line in done.stdout.splitlines() if line.startswith(RESULT))
    return json.loads(line.removeprefix(RESULT))


def write_checkpoint(shape: str, layers: int, folder: Path) -> None:
    random_model(shape, layers, vocab=50280 if shape == "2.8b" else 1024).save_pretrained(folder)


def bench(
    *, shape: str, nsamples: int, seqlen: int, layers: int, offload: str, memory_budget: float | None, only: list[str],
    full_layers: int | None,
) -> None:  # fmt: skip
    """Prints a table and its fits for each quantity that is varied."""
    budget = None if memory_budget is None else int(memory_budget * 2**30)
    base = {"nsamples": nsamples, "seqlen": seqlen, "layers": layers, "processes": 1}
    work = Path(tempfile.mkdtemp(prefix="bench_scaling"))
    print(machine())
    try:
        for varied in only:
            rows, points = [], []
            for factor in FACTORS[varied]:
                sizes = base | {varied: base[varied] * factor}
                folder = work / f"{sizes['layers']}-layers"
                if not folder.is_dir():
                    alone(write_checkpoint, shape, sizes["layers"], folder)
                call = (str(folder), sizes["nsamples"], sizes["seqlen"], offload, budget)
                found = by_torchrun(sizes["processes"], *call) if varied == "processes" else alone(prune, *call)
                points.append((sizes[varied], found["seconds"], found["bytes"]))
                rows.append({
                    **{name: str(value) for name, value in sizes.items()}, "seconds": f"{found['seconds']:.2f}",
                    "peak MiB": f"{found['bytes'] / 2**20:.0f}",
                })  # fmt: skip
            x, seconds, peak = np.array(points, dtype=float).T
            exponent = np.polyfit(np.log(x), np.log(seconds), 1)[0]
            slope, offset = np.polyfit(x, peak / 2**20, 1)
            print(f"\n{shape}, --offload {offload}\n" + text_table(rows))
            print(f"time ~ {varied}^{exponent:.2f}; peak memory {offset:.0f} MiB + {slope:.2f} MiB per unit of {varied}")
            if varied == "layers" and full_layers:
                print(f"projected for {full_layers} layers: {(offset + slope * full_layers) / 1024:.1f} GiB, "
                      f"{seconds[-1] / x[-1] * full_layers:.0f} s")  # fmt: skip
    finally:
        shutil.rmtree(work, ignore_errors=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--worker"]:
        folder, nsamples, seqlen, offload, budget = sys.argv[2:]
        prune(folder, int(nsamples), int(seqlen), offload, None if budget == "None" else int(budget))
        sys.exit()
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="130m", choices=tuple(benchmarking.SHAPES))
    for flag, value in {"nsamples": 8, "seqlen": 512, "layers": 1}.items():
        parser.add_argument(f"--{flag}", type=int, default=value)
    parser.add_argument("--offload", default="disk", choices=("cpu", "disk"))
    parser.add_argument("--memory_budget", type=float)
    parser.add_argument("--only", nargs="+", default=list(FACTORS), choices=tuple(FACTORS))
    parser.add_argument("--full_layers", type=int)
    bench(**vars(parser.parse_args()))
