"""The tables of the page: a row a run, with the exact value of each cell beside what it shows."""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from sparsessm.report import svg
from sparsessm.report.figures import run_label
from sparsessm.report.palette import method_style
from sparsessm.report.results import Record
from sparsessm.report.wording import (
    bytes_text,
    number_text,
    percent_text,
    perplexity_text,
    short_names,
)

_ZERO_SHOT = "zero\u2011shot mean"  # with a hyphen that does not break
_PLACES = {"ssm": "A_log", "layers": "weights"}


@dataclass(frozen=True)
class Column:
    """value: what a row is sorted by, None for nothing; show: its markup (default: escaped); draw: of the run, instead."""

    head: str
    value: Callable[[Record], Any]
    show: Callable[[Any], str] = lambda value: html.escape(str(value))
    number: bool = True
    draw: Callable[[Record], str] | None = None


def results_table(records: Sequence[Record], links: Sequence[str]) -> str:
    """All runs, with the filters above; links: to the folder of each run."""
    models = short_names(record.model for record in records)
    sets = short_names(name for record in records for name in record.perplexity)
    link_of = dict(zip((record.name for record in records), links, strict=True))
    numbers = {record.name: index for index, record in enumerate(records, 1)}
    columns = [
        Column("no.", lambda r: numbers[r.name], lambda v: f'<a href="#run-{v}" aria-label="figures of run {v}">{v}</a>'),
        Column(
            "model", lambda r: r.model, number=False,
            show=lambda v: f'<span title="{html.escape(v)}">{html.escape(models[v])}</span>',
        ),
        Column("method", lambda r: r.method, lambda v: svg.swatch(method_style(v)) + html.escape(v), number=False),
        Column("pruned", _pruned, number=False),
        Column("sparsity", lambda r: r.sparsity if r.parts else None, percent_text),
        Column("pattern", lambda r: r.pattern, number=False),
        Column("alpha", lambda r: r.options.get("alpha") if "weights" in r.parts else None, number_text),
        Column("seed", lambda r: r.options.get("seed")),
        *(Column(f"perplexity {short}", _figure_of(name), perplexity_text) for name, short in sets.items()),
        Column(_ZERO_SHOT, lambda r: r.zero_shot_mean, lambda v: percent_text(v, 2)),
        Column("seconds", _together, lambda v: f"{v:.1f}"),
        *(
            Column("peak memory" if place == "process" else f"peak {place}", _peak_of(place), bytes_text)
            for place in _places(records, lambda r: r.metrics["peak_memory_bytes"])
        ),
        Column(
            "run folder", lambda r: r.name,
            lambda v: f'<a class="path" href="{html.escape(link_of[v])}">{html.escape(v)}</a>', number=False,
        ),
    ]  # fmt: skip
    columns = [column for column in columns if column.head != _ZERO_SHOT or any(map(column.value, records))]
    controls = _filter("model", models) + _filter("method", {r.method: r.method for r in records})
    return (
        f'<p class="controls" data-script hidden>{controls}<output id="shown" aria-live="polite"></output></p>'
        + _table("results-table", "All finished runs, a row each", columns, records)
    )


def phase_table(records: Sequence[Record]) -> str:
    """Seconds of each phase as numbers and as a bar, and the peak of memory when it ended."""
    phases = list(dict.fromkeys(["load", "prune", "eval", *(phase for record in records for phase in record.seconds)]))
    longest = max(_together(record) for record in records)

    def bar(record: Record) -> str:
        return svg.phase_bar([record.seconds.get(phase, 0.0) for phase in phases], longest)

    columns = [
        Column("run", run_label, number=False),
        *(Column(phase, _seconds_of(phase), lambda v: f"{v:.1f} s") for phase in phases),
        Column("together", _together, lambda v: f"{v:.1f} s"),
        Column("time", _together, draw=bar),
    ]
    for place in _places(records, lambda r: r.memory_after.get("load", {})):
        where = "" if place == "process" else f" {place}"
        columns += [
            Column(f"peak{where} after {phase}", _memory_of(phase, place), bytes_text)
            for phase in phases
            if any(phase in record.memory_after for record in records)
        ]
    name = Column("run folder", lambda r: r.name, lambda v: f'<span class="path">{html.escape(v)}</span>', number=False)
    key = "".join(f'<span class="key">{svg.phase_key(i)}{html.escape(phase)}</span>' for i, phase in enumerate(phases))
    table = _table("cost-table", "Seconds and peak memory of each phase", [*columns, name], records)
    return f'<p class="keys">{key}</p>{table}'


def _table(name: str, caption: str, columns: Sequence[Column], records: Sequence[Record]) -> str:
    # On paper a head that holds a button would not be repeated on the next page: there its span stands for it.
    heads = "".join(
        f'<th scope="col" data-kind="{"number" if column.number else "text"}"{_class(column)}>'
        f'<button type="button">{html.escape(column.head)}</button><span>{html.escape(column.head)}</span></th>'
        for column in columns
    )
    rows = []
    for record in records:
        cells = "".join(_cell(column, record) for column in columns)
        rows.append(f'<tr data-model="{html.escape(record.model)}" data-method="{html.escape(record.method)}">{cells}</tr>')
    return (
        f'<div class="box" role="region" aria-labelledby="{name}" tabindex="0"><table class="sortable">'
        f'<caption id="{name}">{caption}</caption><thead><tr>{heads}</tr></thead>'
        f"<tbody>{''.join(rows)}</tbody></table></div>"
    )


def _cell(column: Column, record: Record) -> str:
    value = column.value(record)
    if value is None or (isinstance(value, float) and math.isnan(value)):
        shown = "–" if value is None else "not a number"
        return f'<td data-value=""{_class(column, "none")}>{shown}</td>'
    shown = column.draw(record) if column.draw else column.show(value)
    return f'<td data-value="{html.escape(_sortable(value))}"{_class(column)}>{shown}</td>'


def _sortable(value: Any) -> str:
    """As JavaScript's Number reads it, to the last digit."""
    if isinstance(value, float) and math.isinf(value):
        return "Infinity" if value > 0 else "-Infinity"
    return repr(value) if isinstance(value, float) else str(value)


def _class(column: Column, *more: str) -> str:
    names = " ".join((["number"] if column.number and not column.draw else []) + list(more))
    return f' class="{names}"' if names else ""


def _filter(name: str, values: dict[str, str]) -> str:
    options = "".join(f'<option value="{html.escape(v)}">{html.escape(shown)}</option>' for v, shown in values.items())
    return f'<label>{name} <select data-filter="{name}"><option value="">all</option>{options}</select></label>'


def _pruned(record: Record) -> str:
    """What was pruned, as measured: A_log 50 %, weights 48.1 %."""
    shares = {_PLACES.get(name, name): share for name, share in record.metrics["sparsity"].items() if name != "model"}
    return ", ".join(f"{name} {percent_text(share)}" for name, share in shares.items() if share) or "nothing"


def _together(record: Record) -> float:
    return sum(record.seconds.values())


def _places(records: Sequence[Record], peaks: Callable[[Record], dict[str, float]]) -> list[str]:
    return list(dict.fromkeys(place for record in records for place in peaks(record)))


def _figure_of(name: str) -> Callable[[Record], float | None]:
    return lambda record: record.perplexity.get(name)


def _peak_of(place: str) -> Callable[[Record], float | None]:
    return lambda record: record.metrics["peak_memory_bytes"].get(place)


def _seconds_of(phase: str) -> Callable[[Record], float | None]:
    return lambda record: record.seconds.get(phase)


def _memory_of(phase: str, place: str) -> Callable[[Record], float | None]:
    return lambda record: record.memory_after.get(phase, {}).get(place)
