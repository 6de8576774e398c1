"""What each step of sparsessm_obs brings, alone and together: perplexities by model, sparsity and seed on two texts.

    python scripts/ladder.py TEXT OTHER MODEL... --cells FILE [--rows NAME ...] [--sparsities 0.5 2:4 ...] [--seeds 5 6 7]

Prunes A_log and all weights of each model (2:4: the weights alone), calibrated on the first text. FILE gets a JSON line for
each cell; cells that it has are not computed again, and the table of all that it has is printed at the end.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import operator
import statistics
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import sparsessm
from sparsessm.report.tables import text_table

BOTH = ("nn.Linear", "nn.Conv1d")
LIGHT: dict[str, Any] = {"percdamp": 0.01, "target_modules": BOTH}
FORMER = {"weights": "obs", "importance": "none", "allocation": "output", **LIGHT}
# By name: the method, its flags, and how many calibration windows; a value of None leaves the method's own.
ROWS: dict[str, tuple[str, dict[str, Any], int]] = {
    "magnitude": ("magnitude", {}, 32),
    "sparsegpt": ("sparsegpt", {}, 32),
    "sparsessm": ("sparsessm", {}, 32),
    "former": ("sparsessm_obs", FORMER, 32),
    "exact": ("sparsessm_obs", {**FORMER, "weights": "obc"}, 32),
    "fisher": ("sparsessm_obs", {**FORMER, "importance": "rows"}, 32),
    "exact, fisher": ("sparsessm_obs", {**FORMER, "weights": "obc", "importance": "rows"}, 32),
    "exact, fisher, budget": ("sparsessm_obs", {"importance": "rows", **LIGHT}, 32),
    "+ tokens": ("sparsessm_obs", LIGHT, 32),
    "sparsessm_obs": ("sparsessm_obs", {}, 32),
    "sparsessm_obs, 128": ("sparsessm_obs", {}, 128),
    "+ blocks": ("sparsessm_obs", {"recover": ("blocks",)}, 128),
    "+ model": ("sparsessm_obs", {"recover": ("model",)}, 128),
    "+ both": ("sparsessm_obs", {"recover": ("blocks", "model")}, 128),
    "magnitude + model": ("magnitude", {"recover": ("model",)}, 128),
}


def flags_of(row: str, sparsity: str) -> dict[str, Any]:
    method, flags, _ = ROWS[row]
    if ":" not in sparsity:
        return {"method": method, "sparsity": float(sparsity), "parts": ("A_log", "weights"), **flags}
    n, m = map(int, sparsity.split(":"))
    uniform = {"allocation": "uniform"} if "allocation" in flags else {}
    return {"method": method, "prunen": n, "prunem": m, "parts": ("weights",), **flags, **uniform}


def ladder(
    text: str, other: str, models: list[str], cells: Path, rows: list[str], sparsities: list[str], seeds: list[int],
    seqlen: int, eval_windows: int,
) -> None:  # fmt: skip
    known = [json.loads(line) for line in cells.read_text().splitlines()] if cells.exists() else []
    done = {(cell["model"], cell["sparsity"], cell["row"], cell["seed"]) for cell in known}
    for name in models:
        dense, tokenizer = sparsessm.load(name)
        tests = [sparsessm.evaluation(which, tokenizer, seqlen=seqlen, windows=eval_windows) for which in (text, other)]
        todo = [("0", "dense", 0), *((p, row, seed) for seed, p, row in itertools.product(seeds, sparsities, rows))]
        for sparsity, row, seed in todo:
            if (Path(name).name, sparsity, row, seed) in done:
                continue
            model, start = copy.deepcopy(dense), time.perf_counter()
            if row != "dense":
                windows = sparsessm.calibration(text, tokenizer, nsamples=ROWS[row][2], seqlen=seqlen, seed=seed)
                sparsessm.prune(model, windows, **flags_of(row, sparsity), seed=seed)
            took = time.perf_counter() - start
            figures = [round(sparsessm.perplexity(model, test), 3) for test in tests]
            cell = {"model": Path(name).name, "sparsity": sparsity, "row": row, "seed": seed, "seconds": round(took, 1)}
            known.append(cell | {"perplexity": figures})
            with cells.open("a") as file:
                file.write(json.dumps(known[-1]) + "\n")
    print(text_table(table(known)))


def table(cells: list[dict[str, Any]]) -> list[dict[str, str]]:
    """A line for each model and row, a column for each sparsity: means over the seeds on both texts, and a spread."""
    lines: dict[tuple[str, str], dict[str, str]] = {}
    order = ["dense", *ROWS]
    cells = sorted(cells, key=lambda cell: (cell["model"], order.index(cell["row"]), cell["sparsity"]))
    for (model, row, sparsity), some in itertools.groupby(cells, operator.itemgetter("model", "row", "sparsity")):
        found = list(some)
        first, second = zip(*(cell["perplexity"] for cell in found), strict=True)
        spread = f" ± {statistics.stdev(first):.2f}" if len(found) > 1 else ""
        line = lines.setdefault((model, row), {"model": model, "row": row})
        line[sparsity] = f"{statistics.mean(first):.2f}{spread} / {statistics.mean(second):.1f}"
    return list(lines.values())


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("text")
    parser.add_argument("other")
    parser.add_argument("models", nargs="+")
    parser.add_argument("--cells", type=Path, required=True)
    parser.add_argument("--rows", nargs="+", default=list(ROWS), choices=tuple(ROWS))
    parser.add_argument("--sparsities", nargs="+", default=["0.5", "0.6", "0.7", "0.8", "2:4"])
    parser.add_argument("--seeds", nargs="+", type=int, default=[5])
    parser.add_argument("--seqlen", type=int, default=256)
    parser.add_argument("--eval_windows", type=int, default=96)
    ladder(**vars(parser.parse_args()))
