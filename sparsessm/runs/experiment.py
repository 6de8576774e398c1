"""An experiment is lines of runs that are compared, a table of the paper or a sweep, and is filled with their figures.

What is filled in is read from the run folders, whoever ran them, so that a later call fills in the rest.
"""

from __future__ import annotations

import itertools
import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from sparsessm.corpora.names import DATASETS
from sparsessm.errors import InputError
from sparsessm.metrics.tasks import TASKS
from sparsessm.report.tables import Figure, with_infinite
from sparsessm.report.wording import grouped, short_names
from sparsessm.runs.grid import Cell, finished

# The parts of a table, which are the kinds of its figures.
_PARTS = PERPLEXITY, ACCURACY, SPENT = ("Perplexity", "Zero-shot accuracy, %", "Pruned share and time")
_BEFORE = " before pruning"  # behind a part: what --eval_dense measured of it


@dataclass(frozen=True, kw_only=True)
class Line:
    """A line of a table, and the runs that fill it, one a seed.

    Attributes:
        names: what tells it from the others, by head of column. model: lines of one model are compared, and with its line
        that prunes nothing. published: figures by column. What `fill_in` adds: folders of finished runs, and the reasons
        of failures; figures by part and column, the same in all lines.
    """

    names: Mapping[str, str]
    cells: tuple[Cell, ...]
    model: str = ""
    prunes: bool = True
    published: Mapping[str, float] = field(default_factory=dict)
    folders: Mapping[Cell, Path] = field(default_factory=dict)
    failures: Mapping[Cell, str] = field(default_factory=dict)
    figures: Mapping[str, Mapping[str, Figure]] = field(default_factory=dict)

    def state(self, *cells: Cell) -> str:
        """Of some of its cells together: failed, done, or to do."""
        if any(cell in self.failures for cell in cells):
            return "failed"
        return "done" if all(cell in self.folders for cell in cells) else "to do"


@dataclass(frozen=True)
class Experiment:
    """source: where it comes from. remarks: what a reader should know of the figures.

    Raises:
        InputError: there is no run, or main.py would refuse each.
    """

    name: str
    title: str
    source: str
    lines: Sequence[Line]
    remarks: Sequence[str] = ()

    def __post_init__(self) -> None:
        refusals = [cell.refusal for cell in self.cells] or [f"{self.name} asks for no run"]
        if all(refusals):
            raise InputError(str(refusals[0]))

    @property
    def cells(self) -> list[Cell]:
        return [cell for line in self.lines for cell in line.cells]

    @property
    def heads(self) -> list[str]:
        """Of the columns that tell the lines apart."""
        return list(dict.fromkeys(name for line in self.lines for name in line.names))


def repeated(label: str, argv: Sequence[str], seeds: Sequence[int] | None) -> tuple[Cell, ...]:
    """The run, or one for each seed."""
    each = [Cell(f"{label}, seed {seed}", (*argv, f"--seed={seed}")) for seed in dict.fromkeys(seeds or ())]
    return tuple(each or [Cell(label, tuple(argv))])


def crossed(vary: Mapping[str, Sequence[Any]]) -> Iterator[tuple[dict[str, Any], dict[str, str]]]:
    """Each choice of a value for each name, the last name varying fastest; and how it reads in a table."""
    shown = {name: short_names(map(str, values)) for name, values in vary.items()}
    for chosen in itertools.product(*vary.values()):
        point = dict(zip(vary, chosen, strict=True))
        yield point, {name: shown[name][str(value)] for name, value in point.items()}


def fill_in(experiment: Experiment, base_dir: Path, failures: Mapping[Cell, str]) -> Experiment:
    """The experiment with the figures in the run folders under base_dir, and the failures that `fill` returned."""
    able = [cell.options for cell in experiment.cells if not cell.refusal]
    texts = short_names(name for one in able for name in one.evaluation_sets)
    columns = dict.fromkeys((PERPLEXITY, text) for text in texts.values())
    measured, dense = [], dict[str, dict[tuple[str, str], list[float]]]()
    for line in experiment.lines:
        found = {cell: finished(cell, base_dir) for cell in line.cells if not cell.refusal}
        folders = {cell: folder for cell, folder in found.items() if folder}
        values = grouped(pair for folder in folders.values() for pair in _measured(folder, texts).items())
        measured.append((folders, values))
        accuracies = [column for column in line.published if column not in (*DATASETS, *texts.values())]
        columns |= dict.fromkeys([*((ACCURACY, column) for column in accuracies), *values])
        if not line.prunes:
            dense[line.model] = values
    lines = []
    for line, (folders, values) in zip(experiment.lines, measured, strict=True):
        figures: dict[str, dict[str, Figure]] = {}
        for part, column in [key for part in _PARTS for key in columns if key[0] == part]:
            level = dense.get(line.model, {}).get((part, column)) if line.prunes and part != SPENT else None
            beside = level or values.get((part + _BEFORE, column))
            ours, unpruned = values.get((part, column), ()), statistics.fmean(beside) if beside else None
            figures.setdefault(part, {})[column] = Figure(tuple(ours), line.published.get(column), unpruned)
        failed = {cell: failures[cell] for cell in line.cells if cell in failures}
        lines.append(replace(line, folders=folders, failures=failed, figures=figures))
    return replace(experiment, lines=lines)


def _measured(folder: Path, texts: Mapping[str, str]) -> dict[tuple[str, str], float]:
    """The figures of a run by part and column; accuracies as the published columns are called, and in percent.

    The published average is one over five tasks: a mean over others keeps its own column.
    """
    metrics = json.loads((folder / "metrics.json").read_text())
    scores, share = metrics.get("zero_shot", {}), metrics["sparsity"]
    mean = "average" if scores.keys() - {"mean"} == set(TASKS) else "mean"
    found = {(PERPLEXITY, texts[name]): value for name, value in with_infinite(metrics["perplexity"]).items()}
    dense = with_infinite(metrics.get("dense_perplexity", {}))
    found |= {(PERPLEXITY + _BEFORE, texts[name]): value for name, value in dense.items()}
    found |= {(ACCURACY, mean if task == "mean" else task): 100 * score["value"] for task, score in scores.items()}
    spent = {"A_log %": 100 * share["ssm"], "weights %": 100 * share["layers"], "seconds": sum(metrics["seconds"].values())}
    return found | {(SPENT, column): value for column, value in spent.items()}
