"""Cost of the checks at the start of a run: the comparison with stock transformers, and the hashes that --resume needs.

    python scripts/bench_checks.py [--shapes demo 130m] [--nsamples 64] [--seqlen 2048]

Each shape is loaded in separate processes, once with the checks and once without, for the peak of memory; then half of
its A_log is pruned on --nsamples windows by the command, and the checks are compared with the seconds of that run.
"""

from __future__ import annotations

import argparse
import json
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from benchmarking import SHAPES, alone, machine, peak_memory, random_model

from sparsessm.layerwise.parity import check_parity
from sparsessm.models import checkpoint
from sparsessm.models.architecture import Layout
from sparsessm.options import Options
from sparsessm.report.tables import text_table
from sparsessm.run import run


def load(folder: str, checks: bool) -> dict[str, float]:
    """Loads a checkpoint, with its checks or without; seconds of each check and the peak of the process."""
    model = checkpoint.load(checkpoint.find(folder))
    found = {}
    if checks:
        layout, cpu = Layout(model), torch.device("cpu")
        check_parity(layout, folder, cpu)  # compiles the scan, which every run needs anyway
        found["parity"] = check_parity(layout, folder, cpu).seconds
        start = time.perf_counter()
        checkpoint.fingerprint(model)
        found["hash"] = time.perf_counter() - start
    return {**found, "bytes": peak_memory()}


def prune(folder: str, nsamples: int, seqlen: int, base: str) -> dict[str, Any]:
    chosen = Options(
        model=folder, dataset="demo", method="sparsessm", prune_A=True, sparsity=0.5, nsamples=nsamples, seqlen=seqlen,
        eval_windows=8, base_dir=base,
    )  # fmt: skip
    return run(chosen)


def write_model(shape: str, folder: str) -> None:
    random_model(shape, SHAPES[shape][1], vocab=4096).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(checkpoint.DEMO / name, folder)


def bench(*, shapes: list[str], nsamples: int, seqlen: int) -> None:
    """Prints a row for each shape."""
    rows = []
    for shape in shapes:
        with tempfile.TemporaryDirectory() as work:
            folder = "demo" if shape == "demo" else f"{work}/model"
            if shape != "demo":
                alone(write_model, shape, folder)
            plain, checked = alone(load, folder, False), alone(load, folder, True)
            whole = alone(prune, folder, nsamples, seqlen, f"{work}/runs")
            (events,) = Path(work).glob("runs/default/*/events.jsonl")
            first = next(e for e in map(json.loads, events.read_text().splitlines()) if e["event"] == "parity")
            seconds = sum(whole["seconds"].values())
            rows.append({
                "shape": shape, "parity s": f"{checked['parity']:.3f}", "in the run s": f"{first['took']:.3f}",
                "hash s": f"{checked['hash']:.3f}", "run s": f"{seconds:.1f}",
                "share": f"{(checked['parity'] + checked['hash']) / seconds:.2%}",
                "peak MiB": f"{plain['bytes'] / 2**20:.0f} -> {checked['bytes'] / 2**20:.0f}",
                "of the run MiB": f"{whole['peak_memory_bytes']['process'] / 2**20:.0f}",
            })  # fmt: skip
    print(machine())
    print(f"{nsamples} windows of {seqlen}; half of A_log by sparsessm, 8 windows evaluated\n" + text_table(rows))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["demo", "130m"], choices=("demo", *SHAPES))
    parser.add_argument("--nsamples", type=int, default=64)
    parser.add_argument("--seqlen", type=int, default=2048)
    bench(**vars(parser.parse_args()))
