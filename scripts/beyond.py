"""The effect of each part of sparsessm_obs: the tables of docs/BEYOND.md.

    python scripts/beyond.py MODEL DATASET [--other DATASET ...] [--only parts sparsity patterns transfer samples seeds]

Perplexities on the first windows of the evaluation text; transfer evaluates on the other data sets as well, and
calibrates on the first of them.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from functools import cache
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from ladder import FORMER

from sparsessm.corpora import text
from sparsessm.layerwise.stream import Stream
from sparsessm.metrics.perplexity import perplexity
from sparsessm.models import checkpoint
from sparsessm.models.architecture import Layout
from sparsessm.models.tokenizing import load_tokenizer
from sparsessm.options import Options
from sparsessm.procedure.driver import Job
from sparsessm.procedure.plan import plan_of
from sparsessm.procedure.prune import prune
from sparsessm.report.tables import text_table

PLACE = {"device": "cpu", "offload": "cpu", "batch": 8}
# The steps before masks were exact and the budget in units of the loss; `ladder.py` has those.
OBS = {"method": "sparsessm_obs", **FORMER}
ALIKE = {**OBS, "allocation": "uniform"}
JUNE, OCTOBER, GPT = {"method": "sparsessm"}, {"method": "sparsessm_dev"}, {"method": "sparsegpt"}
A, WEIGHTS, BOTH = {"prune_A": True}, {"prune_layers": True}, {"prune_A": True, "prune_layers": True}
TWO_OF_FOUR = {"prunen": 2, "prunem": 4}


class Bench:
    """Prunes one model again and again and measures it."""

    def __init__(self, model: str, dataset: str, seqlen: int, nsamples: int, eval_windows: int) -> None:
        self.source, self.dataset = checkpoint.find(model), dataset
        self.tokenizer = load_tokenizer(self.source)
        self.sizes = (seqlen, nsamples, eval_windows)
        self.evaluation = cache(self._evaluation)
        self.calibration = cache(self._calibration)

    def _evaluation(self, dataset: str) -> torch.Tensor:
        seqlen, _, windows = self.sizes
        return text.cut_windows(text.evaluation_stream(dataset, self.tokenizer, seqlen).ids, seqlen, windows)

    def _calibration(self, dataset: str, nsamples: int, seed: int) -> torch.Tensor:
        return text.calibration_windows(dataset, self.tokenizer, nsamples, self.sizes[0], seed).ids

    def measure(
        self, *flags: dict[str, Any], on: tuple[str, ...] = (), calibrate: str | None = None,
        nsamples: int | None = None, seed: int = 0,
    ) -> list[float]:  # fmt: skip
        """Perplexities after pruning as the flags say, on the data sets `on`; without flags, of the dense model."""
        layout = Layout(checkpoint.load(self.source))
        if flags:
            chosen = Options(model="demo", dataset="demo", **{key: value for given in flags for key, value in given.items()})
            windows = self.calibration(calibrate or self.dataset, nsamples or self.sizes[1], seed)
            modules = layout.targets(chosen.target_modules, chosen.parts, chosen.module)
            job = Job(layout, lambda: Stream.embed(layout, windows, **PLACE), 0, len(layout.layers))
            prune(job, plan_of(chosen, modules), windows)
        return [perplexity(layout, self.evaluation(name), **PLACE).value for name in on or (self.dataset,)]

    def cell(self, *flags: dict[str, Any], **how: Any) -> str:
        return " / ".join(f"{value:.2f}" for value in self.measure(*flags, **how))


def parts(bench: Bench, other: list[str]) -> list[dict[str, str]]:
    """Each part of the preset left out, or replaced."""
    settings = {"A_log 80 %": {**A, "sparsity": 0.8}, "A_log 95 %": {**A, "sparsity": 0.95},
                "weights 50 %": {**WEIGHTS, "sparsity": 0.5}, "both 50 %": {**BOTH, "sparsity": 0.5}}  # fmt: skip
    alpha = {"alpha": 0.04}
    variants = {
        "sparsessm": [JUNE], "sparsessm_dev": [OCTOBER], "sparsessm_obs": [OBS],
        "  entries one by one": [OBS, {"search": "independent"}],
        "  exchange": [OBS, {"search": "exchange"}],
        "  exact sets": [OBS, {"search": "exact"}],
        "  no refit": [OBS, {"compensate": "none"}],
        "  modules in parallel": [OBS, {"module_order": "parallel"}],
        "  no refinement": [OBS, {"polish": 0}],
        "  uniform sparsity": [OBS, {"allocation": "uniform"}],
        "  only the saliency": [OBS, {"search": "independent", "compensate": "none", "allocation": "uniform",
                                      "module_order": "parallel", "polish": 0}],
    }  # fmt: skip
    of_weights = ("modules in parallel", "no refinement")
    rows = []
    for name, flags in variants.items():
        row = {"variant": name}
        for label, setting in settings.items():
            spread = alpha if name in ("sparsessm", "sparsessm_dev") and setting.get("prune_layers") else {}
            same = (setting is settings["weights 50 %"] and ("search" in flags[-1] and "polish" not in flags[-1])) or (
                not setting.get("prune_layers") and name.strip() in of_weights
            )
            row[label] = "as above" if same else bench.cell(*flags, setting, spread)
        rows.append(row)
        print(row, file=sys.stderr, flush=True)
    return rows


def sparsity(bench: Bench, other: list[str]) -> list[dict[str, str]]:
    rows = []
    for share in (0.5, 0.6, 0.7, 0.8, 0.9, 0.95):
        row = {"sparsity": f"{share:.0%}"}
        for label, flags in {"A_log sparsessm_dev": [OCTOBER, A], "A_log sparsessm_obs": [OBS, A]}.items():
            row[label] = bench.cell(*flags, {"sparsity": share})
        if share <= 0.8:
            more = {"weights sparsegpt": [GPT, WEIGHTS], "weights sparsessm_obs": [OBS, WEIGHTS],
                    "both sparsessm_dev": [OCTOBER, BOTH], "both sparsessm_obs": [OBS, BOTH]}  # fmt: skip
            for label, flags in more.items():
                row[label] = bench.cell(*flags, {"sparsity": share})
        rows.append(row)
    return rows


def patterns(bench: Bench, other: list[str]) -> list[dict[str, str]]:
    states = bench.source.config.state_size
    rows = [
        {"pattern": "A_log 2:4", "sparsessm": bench.cell({"method": "ts_semi"}, A, TWO_OF_FOUR),
         "sparsessm_obs": bench.cell(ALIKE, A, TWO_OF_FOUR)},
        {"pattern": "weights 2:4", "sparsegpt": bench.cell(GPT, WEIGHTS, TWO_OF_FOUR),
         "sparsessm_obs": bench.cell(ALIKE, WEIGHTS, TWO_OF_FOUR)},
    ]  # fmt: skip
    for share in (0.25, 0.5, 0.75):
        share_of = {"sparsity": share}
        rows.append({
            "pattern": f"{round(share * states)} of {states} states removed",
            "sparsessm": bench.cell({"method": "structure_ts"}, A, share_of),
            "sparsessm_obs": bench.cell(ALIKE, A, share_of, {"structure": "columns"}),
        })  # fmt: skip
    return rows


def transfer(bench: Bench, other: list[str]) -> list[dict[str, str]]:
    """Calibration on one text, evaluation on all."""
    on, rows = (bench.dataset, *other), []
    found = dict(zip(on, map("{:.2f}".format, bench.measure(on=on)), strict=True))
    rows.append({"pruned": "dense", "calibrated on": "-", **found})
    methods = {"sparsessm_dev": [OCTOBER], "sparsessm_obs": [OBS]}
    for text_name in (bench.dataset, *other[:1]):
        for label, setting in {"A_log 80 %": {**A, "sparsity": 0.8}, "weights 50 %": {**WEIGHTS, "sparsity": 0.5}}.items():
            for name, flags in methods.items():
                values = bench.measure(*flags, setting, on=on, calibrate=text_name)
                found = dict(zip(on, map("{:.2f}".format, values), strict=True))
                rows.append({"pruned": f"{label}, {name}", "calibrated on": text_name, **found})
    return rows


def samples(bench: Bench, other: list[str]) -> list[dict[str, str]]:
    rows = []
    for count in (4, 16, 32, 128):
        row = {"samples": str(count)}
        for label, setting in {"A_log 80 %": {**A, "sparsity": 0.8}, "weights 50 %": {**WEIGHTS, "sparsity": 0.5}}.items():
            for name, flags in {"sparsessm_dev": OCTOBER, "sparsessm_obs": OBS}.items():
                row[f"{label}, {name}"] = bench.cell(flags, setting, nsamples=count)
        rows.append(row)
    return rows


def seeds(bench: Bench, other: list[str]) -> list[dict[str, str]]:
    rows = []
    for label, setting in {"A_log 80 %": {**A, "sparsity": 0.8}, "weights 50 %": {**WEIGHTS, "sparsity": 0.5},
                           "both 50 %": {**BOTH, "sparsity": 0.5}}.items():  # fmt: skip
        row = {"pruned": label}
        for name, flags in {"sparsessm_dev": OCTOBER, "sparsessm_obs": OBS}.items():
            values = [bench.measure(flags, setting, seed=seed)[0] for seed in (0, 1, 2)]
            row[name] = f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}"
        rows.append(row)
    return rows


TABLES = {table.__name__: table for table in (parts, sparsity, patterns, transfer, samples, seeds)}


def beyond(*, model: str, dataset: str, other: list[str], only: list[str], **sizes: int) -> None:
    """Prints the tables."""
    bench = Bench(model, dataset, **sizes)
    print(f"dense {bench.cell()}", flush=True)
    for name in only:
        print(f"\n{name}\n{text_table(TABLES[name](bench, other))}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("dataset")
    parser.add_argument("--other", nargs="+", default=["demo"])
    parser.add_argument("--only", nargs="+", default=list(TABLES), choices=tuple(TABLES))
    for flag, value in {"seqlen": 512, "nsamples": 32, "eval_windows": 64}.items():
        parser.add_argument(f"--{flag}", type=int, default=value)
    beyond(**vars(parser.parse_args()))
