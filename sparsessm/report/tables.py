"""The row of a run, and rows as a plain-text table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def row(method: str | None, metrics: Mapping[str, Any]) -> dict[str, str]:
    """One row, as printed at the end of a run: method, sparsity, perplexity per data set, seconds, memory."""
    share = metrics["sparsity"]
    parts = [f"{key} {share[key]:.1%}" for key in ("ssm", "layers") if share[key]]
    cells = {"method": method or ("pruned before" if parts else "dense"), "sparsity": ", ".join(parts) or "0"}
    for kind, figures in (("perplexity", metrics["perplexity"]), ("dense", metrics["dense_perplexity"])):
        cells.update({f"{kind} {Path(name).name or name}": _figure(value) for name, value in figures.items()})
    if metrics["zero_shot"]:
        cells["zero-shot"] = f"{metrics['zero_shot']['mean']['value']:.2%}"
    cells["seconds"] = f"{sum(metrics['seconds'].values()):.1f}"
    cells["memory"] = " + ".join(f"{peak / 2**20:.0f} MiB {where}" for where, peak in metrics["peak_memory_bytes"].items())
    return cells


def _figure(value: float | None) -> str:
    return "inf" if value is None else f"{value:.2f}"


def text_table(rows: Sequence[Mapping[str, str]]) -> str:
    """Rows of cells as aligned columns; a row without a cell of that name shows a dash."""
    names = list(dict.fromkeys(name for cells in rows for name in cells))
    lines = [names, *([cells.get(name, "-") for name in names] for cells in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(names))]
    ruled = [lines[0], ["-" * width for width in widths], *lines[1:]]
    cells = [[cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in ruled]
    return "\n".join("  ".join(line).rstrip() for line in cells)
