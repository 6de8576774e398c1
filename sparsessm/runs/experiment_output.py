"""Runs an experiment, and gives its table as text, Markdown, CSV, LaTeX and JSON, which lead from figures to run folders."""

from __future__ import annotations

import csv
import io
import math
import os
import re
import shlex
import sys
from argparse import Namespace
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from sparsessm.errors import Interrupted, storing
from sparsessm.files import strict_json, write_text
from sparsessm.report.tables import NOTHING, Figure, aligned, signed
from sparsessm.report.wording import slug
from sparsessm.runs.experiment import PERPLEXITY, SPENT, Experiment, fill_in
from sparsessm.runs.grid import Cell, fill

_LATEX = str.maketrans({
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}",
    ">": r"\textgreater{}", "|": r"\textbar{}", "–": "--", "±": r"$\pm$", **{mark: "\\" + mark for mark in "_%&#${}"},
})  # fmt: skip


class _Part(NamedTuple):
    """A part of the table as text; groups: the columns, where each shows the published figure, ours and the difference."""

    title: str
    groups: list[str]
    head: list[str]
    rows: list[list[str]]
    best: set[tuple[int, int]]
    """The best figures of each model's pruned lines, as (row, cell); ours and published ones apart."""


def carry_out(experiment: Experiment, known: Namespace, folder: str, index: int | None = None) -> int:
    """Runs what is missing; then, and when a signal stops it, writes and prints the table. Returns the exit code.

    Args:
        known: what `grid.parser` reads. folder: for the table, in its base_dir. index: run this cell alone, without a table.

    Raises:
        InputError, Interrupted: as `fill`. StorageError: the table cannot be written.
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


def write(filled: Experiment, folder: Path) -> list[Path]:
    """Writes NAME.md, .csv, .tex and .json into a folder; each appears whole or not at all."""
    forms = {"md": markdown(filled, folder), "csv": comma_separated(filled), "tex": latex(filled), "json": as_json(filled)}
    files = {folder / f"{filled.name}.{suffix}": content for suffix, content in forms.items()}
    with storing(f"--out {folder}", "name another folder"):
        folder.mkdir(parents=True, exist_ok=True)
        for file, content in files.items():
            write_text(file, content)
    return list(files)


def text(filled: Experiment) -> str:
    """A table for each part, for a terminal."""
    parts = [f"{part.title}:\n{aligned(part.head, part.rows)}" for part in _parts(filled)]
    return "\n\n".join(filter(None, parts + _remarks(filled)))


def markdown(filled: Experiment, folder: Path) -> str:
    """A table for each part; numbers in brackets lead to the run folders below, which are given relative to `folder`."""
    folders = dict.fromkeys(run for line in filled.lines for run in line.folders.values())
    numbers = {run: f"[{number}]" for number, run in enumerate(folders, start=1)}
    runs = [" ".join(numbers[run] for run in line.folders.values()) or NOTHING for line in filled.lines]
    parts = [f"# {filled.name}: {filled.title}", f"Source: {filled.source}."]
    for part in _parts(filled):
        head = [*part.head, "runs"]
        rows = [head, ["---"] * len(head), *([*cells, mine] for cells, mine in zip(part.rows, runs, strict=True))]
        lines = ["| " + " | ".join(cell.replace("|", r"\|") for cell in cells) + " |" for cells in rows]
        parts += [f"## {part.title}", "\n".join(lines)]
    parts += _remarks(filled)
    below = {
        "Failed": [f"- {cell.label}: {reason}" for line in filled.lines for cell, reason in line.failures.items()],
        "Runs": [f"{number}. `{os.path.relpath(run, folder)}`" for number, run in enumerate(folders, start=1)],
    }
    for title, lines in below.items():
        parts += [f"## {title}", "\n".join(lines)] if lines else []
    return "\n\n".join(filter(None, parts)) + "\n"


def comma_separated(filled: Experiment) -> str:
    """One line a figure, unrounded: table, the line's names, part and column, the figure, state and runs."""
    names, rows = filled.heads, []
    head = ["table", *names, "part", "column", *_described(Figure(())), "state", "runs"]
    for line in filled.lines:
        where, runs = [line.names.get(name) for name in names], ";".join(map(str, line.folders.values()))
        for part, figures in line.figures.items():
            for column, figure in figures.items():
                rows.append([filled.name, *where, part, column, *_described(figure).values(), line.state(*line.cells), runs])
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows([head, *rows])
    return out.getvalue()


def latex(filled: Experiment) -> str:
    """A table for each kind of figure; the run folders are comments above the lines."""
    lines = [f"% {remark}" for remark in (f"{filled.name}: {filled.title}. Source: {filled.source}.", *filled.remarks)]
    for part in _parts(filled):
        if part.title != SPENT:
            lines += ["", *_environment(filled, part)]
    return "\n".join(lines) + "\n"


def _environment(filled: Experiment, part: _Part) -> Iterator[str]:
    """The lines of one table, for booktabs and adjustbox; what is wider than the text, or longer than a page, is shrunk."""
    labels = len(filled.heads)  # columns of names, to the left of those of figures
    beside = _in_cells(figure for line in filled.lines for figure in line.figures[part.title].values())
    caption = " ".join([f"{filled.title}. {part.title}; in bold the best of the pruned models.", *beside])
    yield "% needs \\usepackage{booktabs} and \\usepackage{adjustbox}"
    yield from (r"\begin{table}[tbp]", r"\centering", rf"\caption{{{caption.translate(_LATEX)}}}")
    yield rf"\label{{tab:{slug(filled.name + ' ' + part.title.split(',')[0])}}}"
    yield r"\begin{adjustbox}{max width=\textwidth, max totalheight=0.85\textheight}"
    yield from (rf"\begin{{tabular}}{{{'l' * labels}{'r' * (len(part.head) - labels)}}}", r"\toprule")
    head = part.head
    if part.groups:
        groups = [rf"\multicolumn{{3}}{{c}}{{{column.translate(_LATEX)}}}" for column in part.groups]
        yield " & ".join([""] * labels + groups) + r" \\"
        yield " ".join(rf"\cmidrule(lr){{{start}-{start + 2}}}" for start in range(labels + 1, len(head), 3))
        head = [*filled.heads, *("published", "ours", "difference") * len(groups)]
    yield " & ".join(cell.translate(_LATEX) for cell in head) + r" \\"
    ruled = len({cells[0] for cells in part.rows}) < len(part.rows)  # between what the first names tell apart
    for i, (line, cells) in enumerate(zip(filled.lines, part.rows, strict=True)):
        if i == 0 or (ruled and cells[0] != part.rows[i - 1][0]):
            yield r"\midrule"
        yield from (f"% {folder}" for folder in line.folders.values())
        shown = [cell.translate(_LATEX) for cell in cells]
        shown[labels:] = [re.sub(r"(?<![\w.])-(?=[\w.])", "$-$", cell) for cell in shown[labels:]]  # signs, no hyphens
        yield " & ".join(rf"\textbf{{{cell}}}" if (i, j) in part.best else cell for j, cell in enumerate(shown)) + r" \\"
    yield from (r"\bottomrule", r"\end{tabular}", r"\end{adjustbox}", r"\end{table}")


def as_json(filled: Experiment) -> str:
    """Where every figure comes from: per line its figures, and per run the command, the folder, and whether it is done."""
    lines = []
    for line in filled.lines:
        runs = [{
            "run": cell.label, "command": shlex.join(["python", "main.py", *cell.argv]),
            "folder": str(line.folders[cell]) if cell in line.folders else None, "state": line.state(cell),
        } for cell in line.cells]  # fmt: skip
        figures = {
            part: {name: _described(one) | {"ours": list(one.values), "mean": one.mean} for name, one in columns.items()}
            for part, columns in line.figures.items()
        }
        lines.append({**line.names, "figures": figures, "runs": runs})
    table = {"table": filled.name, "title": filled.title, "source": filled.source, "lines": lines}
    return strict_json(table, indent=2) + "\n"


def _described(figure: Figure) -> dict[str, Any]:
    """A figure in full, by the names that the files have."""
    return {
        "published": figure.published, "ours": figure.mean, "standard_deviation": figure.deviation,
        "seeds": len(figure.values), "difference": figure.over(figure.published),
        "difference_to_dense": figure.over(figure.dense),
    }  # fmt: skip


def _remarks(filled: Experiment) -> list[str]:
    """What stands below the tables."""
    figures = (figure for line in filled.lines for part in line.figures.values() for figure in part.values())
    return [*filled.remarks, " ".join(_in_cells(figures))]


def _in_cells(figures: Iterable[Figure]) -> list[str]:
    """What stands in the cells beside the means of these figures."""
    figures = list(figures)
    shown = {
        "In parentheses the difference to the dense model.": [figure.over(figure.dense) for figure in figures],
        "Mean ± standard deviation of the sample over seeds.": [figure.deviation for figure in figures],
    }
    return [words for words, values in shown.items() if any(value is not None for value in values)]


def _parts(filled: Experiment) -> Iterator[_Part]:
    names = filled.heads
    for title, columns in filled.lines[0].figures.items():
        compares = any(figure.published is not None for line in filled.lines for figure in line.figures[title].values())
        head, rows = [*names], []
        for column in columns:
            head += [f"{column} published", f"{column} ours", "difference"] if compares else [column]
        numbers: dict[tuple[str, int], dict[int, float]] = defaultdict(dict)  # by model and cell, then by row
        for i, line in enumerate(filled.lines):
            cells = [line.names.get(name, NOTHING) for name in names]
            for figure in line.figures[title].values():
                for j, number in enumerate([figure.published, figure.mean] if compares else [figure.mean], start=len(cells)):
                    if line.prunes and number is not None and math.isfinite(number):
                        numbers[line.model, j][i] = number
                ours = "failed" if line.failures and figure.mean is None else figure.text
                published = NOTHING if figure.published is None else f"{figure.published:g}"
                over = figure.over(figure.published)
                difference = NOTHING if over is None else signed(over)
                cells += [published, ours, difference] if compares else [ours]
            rows.append(cells)
        if title == SPENT:  # neither the least nor the most is the best
            head, numbers = [*head, "state"], {}
            rows = [[*cells, line.state(*line.cells)] for line, cells in zip(filled.lines, rows, strict=True)]
        choose = min if title == PERPLEXITY else max
        best = {(i, j) for (_, j), found in numbers.items() for i in found if found[i] == choose(found.values())}
        yield _Part(title, list(columns) if compares else [], head, rows, best)
