"""The row of a run, figures over seeds, and tables as plain text."""

from __future__ import annotations

import dataclasses
import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sparsessm.options import Options
from sparsessm.report.wording import figure_text, short_names

NOTHING = "–"


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
