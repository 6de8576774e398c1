"""Runs an experiment, and gives its table as text, Markdown, CSV, LaTeX and JSON, which lead from figures to run folders."""

from __future__ import annotations

import math
import os
import shlex
import sys
from argparse import Namespace
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from sparsessm.errors import Interrupted, storing
from sparsessm.files import strict_json, write_text
from sparsessm.report import tables
from sparsessm.report.tables import NOTHING, Figure, signed
from sparsessm.report.wording import slug
from sparsessm.runs.experiment import PERPLEXITY, SPENT, Experiment, Filled, fill_in
from sparsessm.runs.grid import Cell, fill

_COMPARED = ("published", "ours", "difference")


def carry_out(experiment: Experiment, known: Namespace, folder: str, index: int | None = None) -> int:
    """Runs what is missing; then, whatever came of it, writes and prints the table. Returns the exit code.

    Args:
        known: what `grid.parser` reads. folder: for the table, in its base_dir. index: run this cell alone, without a table.

    Raises:
        InputError: a folder cannot be written, or there cannot be that many workers.
        Interrupted: by a signal.
    """

    def tell(failures: Mapping[Cell, str]) -> None:
        if index is None:
            filled = fill_in(experiment, known.base_dir, failures)
            files = write(filled, known.out or known.base_dir / folder)
            print(text(filled), "", "tables:", *(f"  {file}" for file in files), sep="\n")
        for cell, reason in failures.items():
            print(f"failed: {cell.label}: {reason}", file=sys.stderr)

    cells = experiment.cells if index is None else [experiment.cells[index]]
    try:
        failures = fill(cells, known.base_dir, workers=known.workers, devices=known.devices, group=experiment.name)
    except Interrupted:
        tell({})
        raise
    tell(failures)
    return 1 if failures else 0


def write(filled: Filled, folder: Path) -> list[Path]:
    """Writes NAME.md, .csv, .tex and .json into a folder; each appears whole or not at all."""
    contents = {
        "md": markdown(filled, folder), "csv": comma_separated(filled), "tex": latex(filled),
        "json": strict_json(trace(filled), indent=2) + "\n",
    }  # fmt: skip
    files = {folder / f"{filled.experiment.name}.{suffix}": content for suffix, content in contents.items()}
    with storing(f"--out {folder}", "name another folder"):
        folder.mkdir(parents=True, exist_ok=True)
        for file, content in files.items():
            write_text(file, content)
    return list(files)


def text(filled: Filled) -> str:
    """A table for each part, for a terminal."""
    parts = [f"{part}:\n{tables.aligned(head, rows)}" for part, head, rows in _parts(filled)]
    return "\n\n".join(parts + _remarks(filled))


def markdown(filled: Filled, folder: Path) -> str:
    """A table for each part; numbers in brackets lead to the run folders below, which are given relative to `folder`."""
    about = filled.experiment
    folders = dict.fromkeys(run for row in filled.rows for run in row.folders.values())
    numbers = {run: f"[{number}]" for number, run in enumerate(folders, start=1)}
    runs = [" ".join(numbers[run] for run in row.folders.values()) or NOTHING for row in filled.rows]
    parts = [f"# {about.name}: {about.title}", f"Source: {about.source}."]
    for part, head, rows in _parts(filled):
        lines = [[*cells, mine] for cells, mine in zip(rows, runs, strict=True)]
        parts += [f"## {part}", tables.markdown_table([*head, "runs"], lines)]
    parts += _remarks(filled)
    failures = [f"- {cell.label}: {reason}" for row in filled.rows for cell, reason in row.failures.items()]
    if failures:
        parts += ["## Failed", "\n".join(failures)]
    if numbers:
        parts += ["## Runs", "\n".join(f"{i}. `{os.path.relpath(run, folder)}`" for i, run in enumerate(numbers, start=1))]
    return "\n\n".join(parts) + "\n"


def comma_separated(filled: Filled) -> str:
    """One line a figure, unrounded: table, the line's names, part and column, the figure, state and runs."""
    names = _names(filled)
    head = ["table", *names, "part", "column", *_described(Figure(())), "state", "runs"]
    rows = []
    for row in filled.rows:
        where, runs = [row.line.names.get(name) for name in names], ";".join(map(str, row.folders.values()))
        for key, figure in row.figures.items():
            rows.append([filled.experiment.name, *where, *key, *_described(figure).values(), row.state, runs])
    return tables.comma_separated(head, rows)


def latex(filled: Filled) -> str:
    """A table environment for each kind of figure; the run folders are comments above the lines."""
    about, labels = filled.experiment, len(_names(filled))
    parts = [f"% {remark}" for remark in (f"{about.name}: {about.title}. Source: {about.source}.", *about.remarks)]
    for part, head, rows in _parts(filled):
        if part == SPENT:
            continue
        columns, compares = filled.parts[part], _compares(filled, part)
        figures = [figure for row in filled.rows for (kind, _), figure in row.figures.items() if kind == part]
        caption = f"{about.title}. {part}; in bold the best of the pruned models." + tables.in_cells(figures)
        table = tables.latex_table(
            [*head[:labels], *(_COMPARED * len(columns) if compares else columns)], rows, caption=caption,
            label=slug(f"{about.name} {part.split(',')[0]}"), labels=labels, groups=columns if compares else (),
            best=_best(filled, part, labels), comments=[list(map(str, row.folders.values())) for row in filled.rows],
        )  # fmt: skip
        parts += ["", table.rstrip()]
    return "\n".join(parts) + "\n"


def trace(filled: Filled) -> dict[str, Any]:
    """Where every figure comes from: per line its figures, and per run the command, the folder, and whether it is done."""
    lines = []
    for row in filled.rows:
        runs = []
        for cell in row.line.cells:
            folder = row.folders.get(cell)
            state = "done" if folder else "failed" if cell in row.failures else "to do"
            command = shlex.join(["python", "main.py", *cell.argv])
            runs.append({"run": cell.label, "command": command, "folder": folder and str(folder), "state": state})
        figures: dict[str, dict[str, Any]] = {part: {} for part in filled.parts}
        for (part, column), figure in row.figures.items():
            figures[part][column] = _described(figure) | {"ours": list(figure.values), "mean": figure.mean}
        lines.append({**row.line.names, "figures": figures, "runs": runs})
    about = filled.experiment
    return {"table": about.name, "title": about.title, "source": about.source, "lines": lines}


def _described(figure: Figure) -> dict[str, Any]:
    """A figure in full, by the names that the files have."""
    return {
        "published": figure.published, "ours": figure.mean, "standard_deviation": figure.deviation,
        "seeds": len(figure.values), "difference": figure.over(figure.published),
        "difference_to_dense": figure.over(figure.dense),
    }  # fmt: skip


def _remarks(filled: Filled) -> list[str]:
    """What stands below the tables."""
    cells = tables.in_cells(figure for row in filled.rows for figure in row.figures.values())
    return [*filled.experiment.remarks, *filter(None, [cells.strip()])]


def _names(filled: Filled) -> list[str]:
    """Heads of the columns that tell the lines apart."""
    return list(dict.fromkeys(name for row in filled.rows for name in row.line.names))


def _parts(filled: Filled) -> Iterator[tuple[str, list[str], list[list[str]]]]:
    """Each part with its head and its rows of cells as text."""
    names = _names(filled)
    for part, columns in filled.parts.items():
        compares = _compares(filled, part)
        heads = [[f"{column} published", f"{column} ours", "difference"] if compares else [column] for column in columns]
        rows = []
        for row in filled.rows:
            cells = [row.line.names.get(name, NOTHING) for name in names]
            for column in columns:
                figure = row.figures[part, column]
                ours = "failed" if row.failures and figure.mean is None else figure.text
                published = NOTHING if figure.published is None else f"{figure.published:g}"
                over = figure.over(figure.published)
                difference = NOTHING if over is None else signed(over)
                cells += [published, ours, difference] if compares else [ours]
            rows.append(cells)
        yield part, [*names, *(head for group in heads for head in group)], rows


def _compares(filled: Filled, part: str) -> bool:
    """Whether there is a published figure in any of the columns."""
    return any(row.figures[part, column].published is not None for row in filled.rows for column in filled.parts[part])


def _best(filled: Filled, part: str, labels: int) -> set[tuple[int, int]]:
    """Where the best figures of each model's pruned lines stand, as (line, column); ours and published ones apart."""
    found: dict[tuple[str, int], list[tuple[float, int]]] = defaultdict(list)
    compares, sign = _compares(filled, part), 1 if part == PERPLEXITY else -1
    for i, row in enumerate(filled.rows):
        for j, column in enumerate(filled.parts[part] if row.line.prunes else ()):
            figure = row.figures[part, column]
            for k, value in enumerate([figure.published, figure.mean] if compares else [figure.mean]):
                if value is not None and math.isfinite(value):
                    found[row.line.model, labels + (3 * j if compares else j) + k].append((sign * value, i))
    return {(i, column) for (_, column), values in found.items() for value, i in values if value == min(values)[0]}
