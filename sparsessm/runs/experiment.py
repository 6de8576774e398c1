"""An experiment is lines of runs that are compared, a table of the paper or a sweep, and is filled with their figures.

What is filled in is read from the run folders, whoever ran them, so that a later call fills in the rest.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparsessm.corpora.names import DATASETS
from sparsessm.errors import InputError
from sparsessm.metrics.tasks import TASKS
from sparsessm.report.tables import Figure, with_infinite
from sparsessm.report.wording import short_names
from sparsessm.runs.grid import Cell, finished

# The parts of a table, which are the kinds of its figures.
PERPLEXITY, ACCURACY, SPENT = "Perplexity", "Zero-shot accuracy, %", "Pruned share and time"


@dataclass(frozen=True, kw_only=True)
class Line:
    """A line of a table, and the runs that fill it, one a seed.

    Attributes:
        names: what tells it from the others, by head of column. model: lines of one model are compared, and with its line
        that prunes nothing. published: figures by column.
    """

    names: Mapping[str, str]
    cells: tuple[Cell, ...]
    model: str = ""
    prunes: bool = True
    published: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Experiment:
    """source: where it comes from. remarks: what a reader should know of the figures.

    Raises:
        InputError: main.py would refuse every run.
    """

    name: str
    title: str
    source: str
    lines: Sequence[Line]
    remarks: Sequence[str] = ()

    def __post_init__(self) -> None:
        refusals = [cell.refusal for cell in self.cells]
        if all(refusals):
            raise InputError(str(refusals[0]))

    @property
    def cells(self) -> list[Cell]:
        return [cell for line in self.lines for cell in line.cells]


@dataclass(frozen=True)
class Row:
    """A line with its figures by (part, column), and by cell the folders of finished runs and the reasons of failures."""

    line: Line
    figures: dict[tuple[str, str], Figure]
    folders: dict[Cell, Path]
    failures: dict[Cell, str]

    @property
    def state(self) -> str:
        if self.failures:
            return "failed"
        return "done" if len(self.folders) == len(self.line.cells) else "to do"


@dataclass(frozen=True)
class Filled:
    """An experiment with what has been measured of it; parts: the columns of each part of the table that there is."""

    experiment: Experiment
    rows: list[Row]
    parts: dict[str, list[str]]


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


def fill_in(experiment: Experiment, base_dir: Path, failures: Mapping[Cell, str]) -> Filled:
    """The figures in the run folders under base_dir; failures: of `fill`. Other cells without a run are still to be done."""
    able = [cell.options for cell in experiment.cells if not cell.refusal]
    texts = short_names(name for one in able for name in one.evaluation_sets)
    rows = [_row(line, texts, base_dir, failures) for line in experiment.lines]
    dense = {row.line.model: row.figures for row in rows if not row.line.prunes}
    keys = dict.fromkeys((PERPLEXITY, text) for text in texts.values())
    keys |= dict.fromkeys(key for row in rows for key in row.figures)
    for row in rows:
        level = {key: figure.mean for key, figure in dense.get(row.line.model, {}).items() if key[0] != SPENT}
        for key in keys:
            figure = row.figures.pop(key, Figure(()))  # all rows get the columns of all, in one order
            beside = figure.dense if level.get(key) is None else level[key]
            row.figures[key] = dataclasses.replace(figure, dense=beside) if row.line.prunes else figure
    parts = {what: [column for part, column in keys if part == what] for what in (PERPLEXITY, ACCURACY, SPENT)}
    return Filled(experiment, rows, {what: columns for what, columns in parts.items() if columns})


def _row(line: Line, texts: Mapping[str, str], base_dir: Path, failures: Mapping[Cell, str]) -> Row:
    found = {cell: finished(cell, base_dir) for cell in line.cells if not cell.refusal}
    folders = {cell: folder for cell, folder in found.items() if folder}
    metrics = [json.loads((folder / "metrics.json").read_text()) for folder in folders.values()]
    values: dict[tuple[str, str], list[float]] = {}
    for column in line.published:  # a table has them in its order; perplexities only of the texts that are evaluated
        if column in texts.values() or column not in DATASETS:
            values[PERPLEXITY if column in texts.values() else ACCURACY, column] = []
    for one in metrics:
        for key, value in _measured(one, texts).items():
            values.setdefault(key, []).append(value)
    own = [(texts[name], x) for one in metrics for name, x in with_infinite(one.get("dense_perplexity", {})).items()]
    figures = {}
    for (part, column), mine in values.items():
        dense = [value for name, value in own if (part, name) == (PERPLEXITY, column)]
        figures[part, column] = Figure(
            tuple(mine), None if part == SPENT else line.published.get(column), statistics.fmean(dense) if dense else None
        )
    return Row(line, figures, folders, {cell: failures[cell] for cell in line.cells if cell in failures})


def _measured(metrics: Mapping[str, Any], texts: Mapping[str, str]) -> dict[tuple[str, str], float]:
    """The figures of metrics.json by (part, column); accuracies as the published columns are called, and in percent.

    The published average is one over five tasks: a mean over others keeps its own column.
    """
    scores, share = metrics["zero_shot"], metrics["sparsity"]
    mean = "average" if scores.keys() - {"mean"} == set(TASKS) else "mean"
    found = {(PERPLEXITY, texts[name]): value for name, value in with_infinite(metrics["perplexity"]).items()}
    found |= {(ACCURACY, mean if task == "mean" else task): 100 * score["value"] for task, score in scores.items()}
    spent = {"A_log %": 100 * share["ssm"], "weights %": 100 * share["layers"], "seconds": sum(metrics["seconds"].values())}
    return found | {(SPENT, column): value for column, value in spent.items()}
