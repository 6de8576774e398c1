"""A filled table of the paper as Markdown, CSV, LaTeX and JSON: published figure, ours and the difference side by side."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import shlex
from collections.abc import Sequence
from pathlib import Path

from sparsessm.errors import storing
from sparsessm.files import write_text
from sparsessm.runs.grid import finished
from sparsessm.runs.paper import Figure, Filled, Line

NOTHING = "–"
_FAILED = "failed"
_LATEX = {"\\": r"\textbackslash{}", "_": r"\_", "%": r"\%", "&": r"\&", "#": r"\#", "–": "--", "±": r"$\pm$"}


def write(filled: Filled, folder: Path, base_dir: Path) -> list[Path]:
    """Writes NAME.md, .csv, .tex and .json into a folder; each appears whole or not at all."""
    name = filled.table.name
    contents = {
        f"{name}.md": markdown(filled, folder),
        f"{name}.csv": comma_separated(filled),
        f"{name}.tex": latex(filled),
        f"{name}.json": json.dumps(trace(filled, base_dir), indent=2) + "\n",
    }
    with storing(str(folder), "name another folder"):
        folder.mkdir(parents=True, exist_ok=True)
        for file, content in contents.items():
            write_text(folder / file, content)
    return [folder / file for file in contents]


def markdown(filled: Filled, folder: Path) -> str:
    """Perplexities, then accuracies where there are any; numbers in brackets lead to the run folders below.

    Args:
        folder: where the file will lie; the run folders are given relative to it.
    """
    table, numbers = filled.table, _numbers(filled)
    parts = [f"# {table.name}: {table.title}", f"Source: {table.source}."]
    for what, columns in _sections(filled):
        head = ["model", "row", *_heads(filled, columns), "runs"]
        rows = []
        for line in filled.lines:
            runs = " ".join(f"[{numbers[run]}]" for run in line.runs)
            rows.append([line.model, line.entry.row, *_cells(filled, line, columns), runs or NOTHING])
        parts += [f"## {what}", markdown_table(head, rows)]
    parts += filled.remarks
    failures = [f"- {failure}" for line in filled.lines for failure in line.failures]
    if failures:
        parts += ["## Failed", "\n".join(failures)]
    if numbers:
        parts += ["## Runs", "\n".join(f"{i}. `{os.path.relpath(run, folder)}`" for run, i in numbers.items())]
    return "\n\n".join(parts) + "\n"


def comma_separated(filled: Filled) -> str:
    """One line a figure, unrounded: table, model, row, column, published, ours, deviation, seeds, difference, runs."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(
        ["table", "model", "row", "column", "published", "ours", "standard_deviation", "seeds", "difference", "runs"]
    )
    for line in filled.lines:
        for column in [*filled.perplexities, *filled.accuracies]:
            figure = line.figures.get(column, Figure(None, ()))
            found = (figure.published, figure.mean, figure.deviation, len(figure.values), figure.difference)
            place = (filled.table.name, line.model, line.entry.row, column)
            writer.writerow([*place, *("" if x is None else x for x in found), ";".join(map(str, line.runs))])
    return out.getvalue()


def latex(filled: Filled) -> str:
    """A tabular for each kind of figure (needs booktabs); the run folders are comments above the lines."""
    parts = [f"% {filled.table.name}: {filled.table.title}. Source: {filled.table.source}."]
    parts += [f"% {remark}" for remark in filled.remarks]
    for what, columns in _sections(filled):
        wide = 3 if filled.compares else 1
        parts += [f"% {what}", rf"\begin{{tabular}}{{ll{'r' * wide * len(columns)}}}", r"\toprule"]
        if wide == 3:
            groups = [rf"\multicolumn{{3}}{{c}}{{{_escaped(column)}}}" for column in columns]
            parts.append(" & ".join(["", "", *groups]) + r" \\")
            heads = ["published", "ours", "difference"] * len(columns)
        else:
            heads = [_escaped(column) for column in columns]
        parts += [" & ".join(["model", "row", *heads]) + r" \\", r"\midrule"]
        for line in filled.lines:
            parts += [f"% {run}" for run in line.runs]
            cells = [line.model, line.entry.row, *_cells(filled, line, columns)]
            parts.append(" & ".join(map(_escaped, cells)) + r" \\")
        parts += [r"\bottomrule", r"\end{tabular}"]
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
                     "standard_deviation": figure.deviation, "difference": figure.difference}
            for column, figure in line.figures.items()
        }  # fmt: skip
        lines.append({"model": line.entry.model, "row": line.entry.row, "figures": figures, "runs": runs})
    return {"table": filled.table.name, "title": filled.table.title, "source": filled.table.source, "lines": lines}


def markdown_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of the text, with its bars escaped."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in lines)


def number(value: float) -> str:
    """Two digits after the point; powers of ten where most digits would mean nothing."""
    if not math.isfinite(value):
        return str(value)
    return f"{round(value, 2) + 0.0:.2f}" if abs(value) < 1e5 else f"{value:.2e}"  # + 0.0: no minus before a zero


def _sections(filled: Filled) -> list[tuple[str, list[str]]]:
    sections = [("Perplexity", filled.perplexities), ("Zero-shot accuracy, %", filled.accuracies)]
    return [(what, columns) for what, columns in sections if columns]


def _numbers(filled: Filled) -> dict[Path, int]:
    """Run folders by the number under which the Markdown gives them."""
    runs = dict.fromkeys(run for line in filled.lines for run in line.runs)
    return {run: i for i, run in enumerate(runs, start=1)}


def _heads(filled: Filled, columns: Sequence[str]) -> list[str]:
    if not filled.compares:
        return list(columns)
    return [head for column in columns for head in (f"{column} published", f"{column} ours", "difference")]


def _cells(filled: Filled, line: Line, columns: Sequence[str]) -> list[str]:
    """A line's figures as text, in the order of `_heads`."""
    cells = []
    for column in columns:
        figure = line.figures.get(column, Figure(None, ()))
        ours = NOTHING if not line.failures else _FAILED
        if figure.mean is not None:
            ours = number(figure.mean) + (f" ± {number(figure.deviation)}" if figure.deviation is not None else "")
        if not filled.compares:
            cells.append(ours)
            continue
        published = NOTHING if figure.published is None else f"{figure.published:g}"
        difference = NOTHING
        if figure.difference is not None:
            difference = number(figure.difference)
            difference = difference if difference.startswith("-") else f"+{difference}"
        cells += [published, ours, difference]
    return cells


def _escaped(text: str) -> str:
    return "".join(_LATEX.get(character, character) for character in text)
