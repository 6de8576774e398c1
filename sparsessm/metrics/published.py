"""The figures of the paper's tables; dense perplexities among them tell a broken set-up from a finding."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

TABLES = Path(__file__).resolve().parent / "paper_tables.json"
SEQLEN = 2048  # tokens per window in the published tables
TOLERANCE = 0.01

_CAUSES = (
    "another release of the data set or of `datasets` (compare data_sha256 in metrics.json), another tokenizer, "
    "another --dtype, or weights that are not the published ones"
)


@cache
def _tables() -> dict[str, Any]:
    return json.loads(TABLES.read_text())["tables"]


def published_figures(table: str, model: str, row: str) -> dict[str, float]:
    """Figures by column, of a model by its bare name (mamba-130m); empty where there are none."""
    return _tables().get(table, {"rows": {}})["rows"].get(model, {}).get(row, {})


def bare_name(model: str) -> str:
    """The name of a model in the tables: the last part of its id or path, without -hf."""
    return Path(model).name.removesuffix("-hf")


def published_dense(model: str, dataset: str) -> float | None:
    """The published dense perplexity of a model (mamba-130m, also as a hub id or with -hf) on a data set, if any."""
    both = [published_figures(table, bare_name(model), "dense") for table in ("ssm_50", "ssm_50_v2")]
    return next(filter(None, both), {}).get(dataset)  # the first lacks Mamba-2


def dense_warning(model: str, dataset: str, perplexity: float, *, seqlen: int, all_windows: bool) -> str | None:
    """A line to print where a measured dense perplexity is over 1 % off the published one; None where it is not.

    Only runs with the tables' window length over the whole text can be compared.
    """
    published = published_dense(model, dataset)
    if published is None or seqlen != SEQLEN or not all_windows:
        return None
    off = perplexity / published - 1
    if abs(off) <= TOLERANCE:
        return None
    return (
        f"dense perplexity of {model} on {dataset} is {perplexity:.2f}, published {published:.2f} ({off:+.1%}); "
        f"likely causes: {_CAUSES}"
    )
