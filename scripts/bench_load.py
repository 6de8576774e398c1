"""What a second thread brings, alone and beside other work: a pruning run of one thread and of two, in turn.

    python scripts/bench_load.py [--busy 0 2] [--rounds 3] [--model demo] [--text demo] [-- FLAGS]

The command prunes half of A_log; FLAGS are further flags of it. --busy: how many other processes compute all the while.
"torch's waiting" is two threads as torch has them by itself, which look for work for milliseconds before they sleep.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from benchmarking import machine, median_ratio

from sparsessm.report.tables import text_table

MAIN = Path(__file__).resolve().parent.parent / "main.py"
SIDES = {
    "one thread": {"OMP_NUM_THREADS": "1"},
    "two threads": {"OMP_NUM_THREADS": "2"},
    "two, torch's waiting": {"OMP_NUM_THREADS": "2", "GOMP_SPINCOUNT": "300000"},  # turns of the loop, as by default
}


def seconds(side: str, command: list[str]) -> float:
    """Of the command by this side, in a folder of its own."""
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        subprocess.run(
            [*command, "--base_dir", folder], env=os.environ | SIDES[side], check=True, stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )  # fmt: skip
        return time.perf_counter() - start


def bench(*, busy: list[int], rounds: int, model: str, text: str, flags: list[str]) -> None:
    """Prints the table."""
    shape = "--method sparsessm --prune_A --sparsity 0.5 --nsamples 48 --seqlen 512 --eval_windows 48".split()
    command = [sys.executable, str(MAIN), model, text, *shape, *flags]
    seconds("two threads", command)  # compiles what is not yet on disk
    rows = []
    for number in busy:
        others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(number)]
        found: dict[str, list[float]] = {side: [] for side in SIDES}
        try:
            for _ in range(rounds):
                for side, times in found.items():
                    times.append(seconds(side, command))
        finally:
            for other in others:
                other.kill()
        one = found["one thread"]
        rows += [
            {
                "other processes": str(number), "run": side, "seconds": f"{statistics.median(times):.1f}",
                "from, to": f"{min(times):.1f}, {max(times):.1f}", "times one thread": f"{median_ratio(times, one):.2f}",
            }
            for side, times in found.items()
        ]  # fmt: skip
    print(machine())
    print(" ".join(command[2:]), "\n")
    print(text_table(rows))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--busy", nargs="+", type=int, default=[0, 2])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--text", default="demo")
    parser.add_argument("flags", nargs="*")
    bench(**vars(parser.parse_args()))
