"""A filled table of the paper as text, Markdown, CSV, LaTeX and JSON: published figure, ours and the difference."""

from __future__ import annotations

import json
import math
import os
import shlex
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from sparsessm.report import tables
from sparsessm.report.tables import NOTHING, Figure, signed
from sparsessm.report.wording import slug
from sparsessm.runs.grid import finished
from sparsessm.runs.paper import Filled, Line

_FAILED = "failed"


def write(filled: Filled, folder: Path, base_dir: Path) -> list[Path]:
    """Writes NAME.md, .csv, .tex and .json into a folder; each appears whole or not at all."""
    contents = {
        "md": markdown(filled, folder), "csv": comma_separated(filled), "tex": latex(filled),
        "json": json.dumps(trace(filled, base_dir), indent=2) + "\n",
    }  # fmt: skip
    return tables.write(folder, filled.table.name, contents)


def text(filled: Filled) -> str:
    """Perplexities, then accuracies where there are any, for a terminal."""
    parts = []
    for what, columns in _sections(filled):
        rows = [[*_label(filled, line), *_cells(filled, line, columns)] for line in filled.lines]
        parts += [f"{what}:", tables.aligned([*_names(filled), *_heads(filled, columns)], rows)]
    return "\n".join(parts + filled.remarks)


def markdown(filled: Filled, folder: Path) -> str:
    """Perplexities, then accuracies where there are any; numbers in brackets lead to the run folders below.

    Args:
        folder: where the file will lie; the run folders are given relative to it.
    """
    table, numbers = filled.table, _numbers(filled)
    parts = [f"# {table.name}: {table.title}", f"Source: {table.source}."]
    for what, columns in _sections(filled):
        head = [*_names(filled), *_heads(filled, columns), "runs"]
        rows = []
        for line in filled.lines:
            runs = " ".join(f"[{numbers[run]}]" for run in line.runs)
            rows.append([*_label(filled, line), *_cells(filled, line, columns), runs or NOTHING])
        parts += [f"## {what}", tables.markdown_table(head, rows)]
    parts += filled.remarks
    failures = [f"- {failure}" for line in filled.lines for failure in line.failures]
    if failures:
        parts += ["## Failed", "\n".join(failures)]
    if numbers:
        parts += ["## Runs", "\n".join(f"{i}. `{os.path.relpath(run, folder)}`" for run, i in numbers.items())]
    return "\n\n".join(parts) + "\n"


def comma_separated(filled: Filled) -> str:
    """One line a figure, unrounded: table, model, row, column, published, ours, deviation, seeds, differences, runs."""
    head = ["table", "model", "row", "column", "published", "ours", "standard_deviation", "seeds", "difference",
            "difference_to_dense", "runs"]  # fmt: skip
    rows = []
    for line in filled.lines:
        for column in [*filled.perplexities, *filled.accuracies]:
            one = line.figures.get(column, Figure(()))
            found = (one.published, one.mean, one.deviation, len(one.values), one.difference, one.over_dense)
            rows.append([filled.table.name, line.model, line.entry.row, column, *found, ";".join(map(str, line.runs))])
    return tables.comma_separated(head, rows)


def latex(filled: Filled) -> str:
    """A table environment for each kind of figure; the run folders are comments above the lines."""
    parts = [f"% {filled.table.name}: {filled.table.title}. Source: {filled.table.source}."]
    parts += [f"% {remark}" for remark in filled.remarks]
    labels = len(_names(filled))
    for what, columns in _sections(filled):
        figures = [line.figures[column] for line in filled.lines for column in columns if column in line.figures]
        caption = f"{filled.table.title}. {what}; in bold the best of the pruned models." + tables.in_cells(figures)
        compared = ["published", "ours", "difference"] * len(columns)
        table = tables.latex_table(
            [*_names(filled), *(compared if filled.compares else columns)],
            [[*_label(filled, line), *_cells(filled, line, columns)] for line in filled.lines],
            caption=caption, label=slug(f"{filled.table.name} {what.split(',')[0]}"), labels=labels,
            groups=columns if filled.compares else (), best=_best(filled, columns, labels),
            comments=[list(map(str, line.runs)) for line in filled.lines],
        )  # fmt: skip
        parts += ["", table.rstrip()]
    return "\n".join(parts) + "\n"


def trace(filled: Filled, base_dir: Path) -> dict[str, object]:
    """Where every figure comes from: per line its figures, and per run the command, the folder, or why it failed."""
    lines = []
    for line in filled.lines:
        runs = []
        for cell in line.entry.cells:
            folder = None if cell.refusal else finished(cell, base_dir)
            failed = [failure for failure in line.failures if failure.startswith(f"{cell.label}: ")]
            runs.append(
                {
                    "run": cell.label,
                    "command": shlex.join(["python", "main.py", *cell.argv]),
                    "folder": folder and str(folder),
                    "state": "done" if folder else "failed" if failed else "to do",
                }
            )
        figures = {
            column: {"published": figure.published, "ours": list(figure.values), "mean": figure.mean,
                     "standard_deviation": figure.deviation, "difference": figure.difference,
                     "difference_to_dense": figure.over_dense}
            for column, figure in line.figures.items()
        }  # fmt: skip
        lines.append({"model": line.entry.model, "row": line.entry.row, "figures": figures, "runs": runs})
    return {"table": filled.table.name, "title": filled.table.title, "source": filled.table.source, "lines": lines}


def _sections(filled: Filled) -> list[tuple[str, list[str]]]:
    sections = [("Perplexity", filled.perplexities), ("Zero-shot accuracy, %", filled.accuracies)]
    return [(what, columns) for what, columns in sections if columns]


def _numbers(filled: Filled) -> dict[Path, int]:
    """Run folders by the number under which the Markdown gives them."""
    runs = dict.fromkeys(run for line in filled.lines for run in line.runs)
    return {run: i for i, run in enumerate(runs, start=1)}


def _names(filled: Filled) -> list[str]:
    """Heads of the columns that tell the lines apart: model, row, and the flags that vary."""
    return ["model", "row", *dict.fromkeys(flag for line in filled.lines for flag in line.entry.varied)]


def _label(filled: Filled, line: Line) -> list[str]:
    """A line's cells for `_names`."""
    varied = line.entry.varied
    return [line.model, line.entry.name, *(varied.get(flag, NOTHING) for flag in _names(filled)[2:])]


def _heads(filled: Filled, columns: Sequence[str]) -> list[str]:
    if not filled.compares:
        return list(columns)
    return [head for column in columns for head in (f"{column} published", f"{column} ours", "difference")]


def _cells(filled: Filled, line: Line, columns: Sequence[str]) -> list[str]:
    """A line's figures as text, in the order of `_heads`."""
    cells = []
    for column in columns:
        figure = line.figures.get(column, Figure(()))
        ours = _FAILED if line.failures and figure.mean is None else figure.text
        if not filled.compares:
            cells.append(ours)
            continue
        published = NOTHING if figure.published is None else f"{figure.published:g}"
        cells += [published, ours, NOTHING if figure.difference is None else signed(figure.difference)]
    return cells


def _best(filled: Filled, columns: Sequence[str], labels: int) -> set[tuple[int, int]]:
    """Where the best figures of each model's pruned lines stand, as (line, column); ours and published ones apart."""
    found: dict[tuple[str, int], list[tuple[float, int]]] = defaultdict(list)
    for i, line in enumerate(filled.lines):
        for j, column in enumerate(columns if line.entry.prunes else ()):
            figure = line.figures.get(column, Figure(()))
            sign = 1 if column in filled.perplexities else -1
            values = [figure.published, figure.mean] if filled.compares else [figure.mean]
            for k, value in enumerate(values):
                if value is not None and math.isfinite(value):
                    found[line.model, labels + (3 * j if filled.compares else j) + k].append((sign * value, i))
    return {(i, column) for (_, column), values in found.items() for value, i in values if value == min(values)[0]}
