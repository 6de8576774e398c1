"""The tables of the page: a row a run, with the exact value of each cell beside what it shows."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from sparsessm.report.charts import dense_perplexities, protocol
from sparsessm.report.looks import Variant, run_label
from sparsessm.report.results import Record
from sparsessm.report.wording import bytes_text, number_text, percent_text, perplexity_text, short_names

_PARTS = {"ssm": "A_log", "layers": "weights", "mlp": "MLP"}


class Column(NamedTuple):
    """value: what a row is sorted by, None for nothing; show: its text; kind: "number", "text", or how it is drawn."""

    head: str
    value: Callable[[Record], Any]
    show: Callable[[Any], str] = str
    kind: str = "number"


def results_table(records: Sequence[Record], looks: Mapping[str, Variant], links: Mapping[str, str]) -> dict[str, Any]:
    """What every run is and gave; links: to its folder."""
    models = short_names(record.model for record in records)
    numbers = {record.name: index for index, record in enumerate(records, 1)}
    dense = dense_perplexities(records)
    above = {
        record.name: {
            name: value - dense[key] for name, value in record.perplexity.items()
            if record.parts and (key := (record.model, name, protocol(record))) in dense
        } for record in records
    }  # fmt: skip
    columns = [
        Column("no.", lambda r: numbers[r.name], kind="run"),
        Column("model", lambda r: r.model, lambda v: models[v], kind="text"),
        Column("method", lambda r: r.method, kind="method"),
        Column("pruned", _pruned, kind="text"),
        Column("sparsity", lambda r: r.sparsity if r.parts else None, percent_text),
        Column("pattern", lambda r: r.pattern, kind="text"),
        Column("alpha", lambda r: r.options.get("alpha") if "weights" in r.parts else None, number_text),
        Column("other options", lambda r: looks[r.name].others or None, kind="text"),
        Column("seed", lambda r: r.options.get("seed")),
    ]
    for name, short in short_names(name for record in records for name in record.perplexity).items():
        columns.append(Column(f"perplexity {short}", _of(lambda r: r.perplexity, name), perplexity_text))
        columns.append(Column(f"above dense {short}", _of(lambda r: above[r.name], name), _signed))
    return _table(records, [
        *columns, Column("zero\u2011shot mean", lambda r: r.zero_shot_mean, lambda v: percent_text(v, 2)),
        Column("seconds", _together, lambda v: f"{v:.1f}"),
        *_memory(records, "peak memory", lambda r: r.metrics["peak_memory_bytes"]),
        Column("run folder", lambda r: (r.name, links[r.name]), kind="folder"),
    ])  # fmt: skip


def phase_table(records: Sequence[Record], looks: Mapping[str, Variant]) -> dict[str, Any]:
    """Seconds of each phase as numbers and as a bar, and the peak of memory when it ended."""
    phases = list(dict.fromkeys(["load", "prune", "eval", *(phase for record in records for phase in record.seconds)]))
    longest = max(map(_together, records)) or 1.0
    columns = [Column("run", lambda r: run_label(r, looks[r.name]), kind="text")]
    columns += [Column(phase, _of(lambda r: r.seconds, phase), lambda v: f"{v:.1f} s") for phase in phases]
    columns += [
        Column("together", _together, lambda v: f"{v:.1f} s"),
        Column("time", lambda r: (_together(r), [100 * r.seconds.get(p, 0) / longest for p in phases]), kind="times"),
    ]
    for phase in phases:
        columns += _memory(records, "peak", _of(lambda r: r.memory_after, phase), f" after {phase}")
    return _table(records, [*columns, Column("run folder", lambda r: r.name, kind="path")]) | {"phases": phases}


def _table(records: Sequence[Record], columns: Sequence[Column]) -> dict[str, Any]:
    """heads and rows for the template; a column in which no run has a value is left out."""
    kept = [column for column in columns if any(column.value(record) is not None for record in records)]
    return {"heads": kept, "rows": [(record, [_cell(column, record) for column in kept]) for record in records]}


def _cell(column: Column, record: Record) -> dict[str, Any]:
    value, more = found if isinstance(found := column.value(record), tuple) else (found, None)
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return {"kind": "none", "value": "", "text": "–" if value is None else "not a number"}
    exact = repr(value) if isinstance(value, float) else str(value)  # as JavaScript's Number reads it, to the last digit
    return {"kind": column.kind, "value": exact.replace("inf", "Infinity") if isinstance(value, float) else exact,
            "text": column.show(value), "more": more}  # fmt: skip


def _signed(value: float) -> str:
    return f"{value:+.2f}" if abs(value) < 1e5 else f"{value:+.1e}"


# What goes whole, by the pattern.
_WHOLE = {"structured": "states", "heads": "heads"}


def _pruned(record: Record) -> str:
    """What was pruned, as measured: A_log 50 %, weights 48.1 % (mixer 60 %, MLP 40 %); first what went whole, as asked."""
    said: dict[bool, list[str]] = {True: [], False: []}
    for name, share in record.metrics["sparsity"].items():
        if share and name != "model":
            said[name in ("mixer", "attention", "mlp")].append(f"{_PARTS.get(name, name)} {percent_text(share)}")
    if record.pattern in _WHOLE and record.sparsity is not None:
        said[False].insert(0, f"{_WHOLE[record.pattern]} {percent_text(record.sparsity)}")
    return (", ".join(said[False]) or "nothing") + (f" ({', '.join(said[True])})" if said[True] else "")


def _together(record: Record) -> float:
    return sum(record.seconds.values())


def _memory(records: Sequence[Record], head: str, peaks: Callable[[Record], Any], tail: str = "") -> list[Column]:
    """A column for each place that has a memory: the process, a device."""
    places = dict.fromkeys(place for record in records for place in peaks(record) or ())
    heads = {place: head if place == "process" else f"peak {place}" for place in places}
    return [Column(heads[place] + tail, _of(peaks, place), bytes_text) for place in places]


def _of(get: Callable[[Record], Any], key: str) -> Callable[[Record], Any]:
    """The value of a run's mapping, None where it has none."""
    return lambda record: (get(record) or {}).get(key)
