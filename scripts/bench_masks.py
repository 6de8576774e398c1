"""What exact masks cost: OBC against SparseGPT's blocks on the modules of a layer of mamba-130m's or another shape.

    python scripts/bench_masks.py [--hidden 768] [--rank 48] [--threads 2] [--rounds 3]

Random weights and inputs, half of each module; solvers in turn, medians, the ratio of each round. Seconds of this process on
all its threads, to which other work does not add. `polish` is the refinement that sparsessm_obs adds to either.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sparsessm.pruning.obc import prune_obc
from sparsessm.pruning.obs import prune_obs, refine
from sparsessm.pruning.patterns import Unstructured
from sparsessm.report.tables import text_table


def problem(rows: int, cols: int) -> tuple[Tensor, Tensor]:
    """A weight (rows,cols) and a Hessian with correlated inputs, the same in every run."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(cols, cols, generator=generator) / cols**0.5 + torch.eye(cols)
    inputs = mixing @ torch.randn(cols, 4096, generator=generator)
    return torch.randn(rows, cols, generator=generator), inputs @ inputs.T / 16


def bench(hidden: int, rank: int, threads: int, rounds: int) -> list[dict[str, str]]:
    torch.set_num_threads(threads)
    inner, half, table = 2 * hidden, Unstructured(0.5), []
    shapes = {"in_proj": (2 * inner, hidden), "x_proj": (rank + 32, inner)}
    shapes |= {"dt_proj": (inner, rank), "out_proj": (hidden, inner)}
    whole = {"blocks": 0.0, "OBC": 0.0}
    for name, (rows, cols) in shapes.items():
        W, H = problem(rows, cols)
        new, mask = prune_obc(W, H, half)  # compiled by then
        ways: dict[str, Callable[[], object]] = {
            "blocks": lambda W=W, H=H: prune_obs(W, H, half), "OBC": lambda W=W, H=H: prune_obc(W, H, half),
            "polish": lambda W=W, H=H, new=new, mask=mask: refine(new, mask, W, H),
        }  # fmt: skip
        took: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(rounds):
            for way, solve in ways.items():
                start = time.process_time()
                solve()
                took[way].append(time.process_time() - start)
        ratio = statistics.median(a / b for a, b in zip(took["OBC"], took["blocks"], strict=True))
        medians = {way: statistics.median(times) for way, times in took.items()}
        whole = {way: whole[way] + medians[way] for way in whole}
        table.append({"module": name, "size": f"{rows} x {cols}", **{way: f"{x:.3f} s" for way, x in medians.items()},
                      "OBC / blocks": f"{ratio:.2f}"})  # fmt: skip
    total = {way: f"{x:.3f} s" for way, x in whole.items()}
    return [*table, {"module": "layer", **total, "OBC / blocks": f"{whole['OBC'] / whole['blocks']:.2f}"}]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for flag, value in {"hidden": 768, "rank": 48, "threads": 2, "rounds": 3}.items():
        parser.add_argument(f"--{flag}", type=int, default=value)
    print(text_table(bench(**vars(parser.parse_args()))))
