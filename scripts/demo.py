"""Prunes the bundled demo model with three methods, offline, and prints one table with the dense model first."""

from __future__ import annotations

import multiprocessing
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sparsessm.options import Options
from sparsessm.report.tables import row, text_table

METHODS = (None, "magnitude", "sparsessm", "sparsessm_dev")
SETTINGS = {"seqlen": 512, "nsamples": 16, "eval_windows": 32, "experiment_name": "demo"}


def measure(method: str | None) -> dict[str, str]:
    """The row of one run on the demo model and the demo text; half of A_log is pruned."""
    from sparsessm.run import run

    pruning = {"method": method, "prune_A": True, "sparsity": 0.5} if method else {}
    chosen = Options(model="demo", dataset="demo", **SETTINGS, **pruning)
    return row(chosen, run(chosen))


def demo() -> None:
    # a process for each run, so that the peak of memory is that of the run
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        rows = [pool.apply(measure, (method,)) for method in METHODS]
    print()
    print(text_table(rows))


if __name__ == "__main__":
    demo()
