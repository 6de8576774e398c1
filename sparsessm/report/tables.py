"""The row of a run, figures over seeds, and tables as plain text, Markdown, CSV and LaTeX."""

from __future__ import annotations

import csv
import dataclasses
import io
import math
import re
import statistics
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sparsessm.options import Options
from sparsessm.report.wording import figure_text, short_names

NOTHING = "–"

_LATEX = str.maketrans({
    "\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "<": r"\textless{}",
    ">": r"\textgreater{}", "|": r"\textbar{}", "–": "--", "±": r"$\pm$", **{mark: "\\" + mark for mark in "_%&#${}"},
})  # fmt: skip


@dataclass(frozen=True)
class Figure:
    """A figure of a table: one value a seed, what was published, and that of the dense model."""

    values: tuple[float, ...]
    published: float | None = None
    dense: float | None = None

    @property
    def mean(self) -> float | None:
        return statistics.fmean(self.values) if self.values else None

    @property
    def deviation(self) -> float | None:
        """Standard deviation of the sample (n - 1); None for fewer than two runs, or where one is not finite."""
        usable = len(self.values) > 1 and all(map(math.isfinite, self.values))
        return statistics.stdev(self.values) if usable else None

    def over(self, other: float | None) -> float | None:
        """The mean minus another figure; None where one is not known, or both are infinite."""
        if self.mean is None or other is None or (math.isinf(other) and self.mean == other):
            return None
        return self.mean - other

    @property
    def text(self) -> str:
        """As 28.33 ± 1.53 (+7.72): mean, deviation, and the difference to the dense model."""
        if self.mean is None:
            return NOTHING
        spread, above = self.deviation, self.over(self.dense)
        words = figure_text(self.mean) + ("" if spread is None else f" ± {figure_text(spread)}")
        return words if above is None else f"{words} ({signed(above)})"


def with_infinite(perplexities: Mapping[str, float | None]) -> dict[str, float]:
    """The perplexities of metrics.json, where an infinite one is null."""
    return {name: math.inf if value is None else value for name, value in perplexities.items()}


def signed(value: float) -> str:
    text = figure_text(value)
    return text if text.startswith("-") else f"+{text}"


def variant(chosen: Options) -> str:
    """The method and what is unlike its defaults, as: sparsessm, aggregate sum, seed 1."""
    usual = {spec.name: spec.default for spec in dataclasses.fields(Options)}
    names = list(usual)
    pruning = ["seed", *names[names.index("prunen") : names.index("data_dir")]]  # the groups of --help that are of pruning
    changed = {name: getattr(chosen, name) for name in pruning if getattr(chosen, name) != usual[name]}
    shown = {name: " ".join(value) if isinstance(value, tuple) else value for name, value in changed.items()}
    return ", ".join([str(chosen.method), *(name if value is True else f"{name} {value}" for name, value in shown.items())])


def row(chosen: Options, metrics: Mapping[str, Any]) -> dict[str, str]:
    """One row, as printed at the end of a run: method, sparsity, perplexity per data set, seconds, memory."""
    share, dense = metrics["sparsity"], with_infinite(metrics["dense_perplexity"])
    parts = [f"{key} {share[key]:.1%}" for key in ("ssm", "layers") if share[key]]
    unpruned = "pruned before" if parts else "dense"
    cells = {"method": variant(chosen) if chosen.method else unpruned, "sparsity": ", ".join(parts) or "0"}
    names = short_names([*metrics["perplexity"], *dense])
    for name, value in with_infinite(metrics["perplexity"]).items():
        cells[f"perplexity {names[name]}"] = Figure((value,), dense=dense.get(name)).text
    cells |= {f"dense {names[name]}": figure_text(value) for name, value in dense.items()}
    if metrics["zero_shot"]:
        cells["zero-shot"] = f"{metrics['zero_shot']['mean']['value']:.2%}"
    cells["seconds"] = f"{sum(metrics['seconds'].values()):.1f}"
    cells["memory"] = " + ".join(f"{peak / 2**20:.0f} MiB {where}" for where, peak in metrics["peak_memory_bytes"].items())
    return cells


def in_cells(figures: Iterable[Figure]) -> str:
    """What stands in the cells beside the means of these figures, for a caption."""
    figures = list(figures)
    shown = {
        " In parentheses the difference to the dense model.": [figure.over(figure.dense) for figure in figures],
        " Mean ± standard deviation of the sample over seeds.": [figure.deviation for figure in figures],
    }
    return "".join(words for words, values in shown.items() if any(value is not None for value in values))


def text_table(rows: Sequence[Mapping[str, str]]) -> str:
    """Rows of cells as aligned columns; a row without a cell of that name shows a dash."""
    names = list(dict.fromkeys(name for cells in rows for name in cells))
    return aligned(names, [[cells.get(name, "-") for name in names] for cells in rows])


def aligned(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Head and rows as aligned columns of plain text."""
    rows = list(rows)
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    lines = [head, ["-" * width for width in widths], *rows]
    return "\n".join("  ".join(map(str.ljust, line, widths)).rstrip() for line in lines)


def markdown_table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table of the text, with its bars escaped."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in lines)


def comma_separated(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """The values as they are; an empty cell for None."""
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows([head, *rows])
    return out.getvalue()


def latex_table(
    head: Sequence[str], rows: Sequence[Sequence[str]], *, caption: str, label: str, labels: int,
    groups: Sequence[str] = (), best: Collection[tuple[int, int]] = (), comments: Sequence[Sequence[str]] = (),
) -> str:  # fmt: skip
    """A table environment for booktabs and adjustbox; what is wider than the text, or longer than a page, is shrunk.

    Args:
        labels: how many columns, from the left, are names; the others are figures. groups: heads over equal parts of the
            columns of figures. best: (row, column) of what is set in bold. comments: lines above each row.
    """
    columns = "l" * labels + "r" * (len(head) - labels)
    lines = [
        "% needs \\usepackage{booktabs} and \\usepackage{adjustbox}", r"\begin{table}[tbp]", r"\centering",
        rf"\caption{{{caption.translate(_LATEX)}}}", rf"\label{{tab:{label}}}",
        r"\begin{adjustbox}{max width=\textwidth, max totalheight=0.85\textheight}",
        rf"\begin{{tabular}}{{{columns}}}", r"\toprule",
    ]  # fmt: skip
    if groups:
        wide = (len(head) - labels) // len(groups)
        heads = [rf"\multicolumn{{{wide}}}{{c}}{{{one.translate(_LATEX)}}}" for one in groups]
        lines.append(" & ".join([""] * labels + heads) + r" \\")
        starts = [labels + 1 + wide * i for i in range(len(groups))]
        lines.append(" ".join(rf"\cmidrule(lr){{{start}-{start + wide - 1}}}" for start in starts))
    lines.append(" & ".join(cell.translate(_LATEX) for cell in head) + r" \\")
    grouped = len({cells[0] for cells in rows}) < len(rows)
    for i, cells in enumerate(rows):
        if i == 0 or (grouped and cells[0] != rows[i - 1][0]):
            lines.append(r"\midrule")
        lines += [f"% {comment}" for comment in (comments[i] if comments else ())]
        shown = [cell.translate(_LATEX) for cell in cells]
        shown[labels:] = [re.sub(r"(?<![\w.])-(?=[\w.])", "$-$", cell) for cell in shown[labels:]]  # signs, no hyphens
        lines.append(" & ".join(rf"\textbf{{{cell}}}" if (i, j) in best else cell for j, cell in enumerate(shown)) + r" \\")
    lines += [r"\bottomrule", r"\end{tabular}", r"\end{adjustbox}", r"\end{table}"]
    return "\n".join(lines) + "\n"
