"""One HTML page of many runs: tables and pictures, in a single file that needs no network.

Whatever comes from a file of a run is escaped by the template (page.html) or by the writer of the pictures, and the page's
own policy lets no script run but page.js, by its hash.
"""

from __future__ import annotations

import base64
import hashlib
import math
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from urllib.parse import quote

from sparsessm.errors import InputError, storing
from sparsessm.files import write_whole
from sparsessm.report.charts import Picture, dense_perplexities, pictures, protocol
from sparsessm.report.looks import Looks
from sparsessm.report.maps import run_maps
from sparsessm.report.plots import svg
from sparsessm.report.results import Record, Runs
from sparsessm.report.wording import bytes_text, figure_text, grouped, number_text, percent_text, plural

_HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Column:
    """value: what a row is sorted by, None for nothing. kind: "number", or what the template shows in another way."""

    head: str
    value: Callable[[Record], Any]
    show: Callable[[Any], str] = str
    kind: str = "number"

    def cell(self, record: Record) -> dict[str, str]:
        """As JavaScript's Number reads the value, to the last digit, and as people do."""
        value = self.value(record)
        if value is None or (isinstance(value, float) and math.isnan(value)):
            return {"value": "", "text": "–" if value is None else "not a number"}
        exact = str(value).replace("inf", "Infinity") if isinstance(value, float) else str(value)
        return {"value": exact, "text": self.show(value)}


def write_report(runs: Runs, experiments: Path, target: Path, draw: Callable[[Picture], str] = svg) -> None:
    """Writes the page of the runs below `experiments`, whole or not at all; draw: a picture as <svg>.

    Raises:
        InputError: no run has finished, or the page cannot be written.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined
    from markupsafe import Markup

    if not runs.finished:
        left = f" ({left_out(runs)})" if left_out(runs) else ""
        raise InputError(f"{experiments} holds no finished run, a folder with options.json and metrics.json{left}")
    if target.is_dir():
        raise InputError(f"-o {target} is a folder: name a file")
    records, looks = runs.finished, Looks(runs.finished)
    script = (_HERE / "page.js").read_text()
    charts = grouped((picture.kind, picture) for picture in pictures(records, of_runs=False))
    versions = grouped(pair for record in records for pair in record.metrics["versions"].items())
    environment = Environment(
        loader=FileSystemLoader(_HERE), autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined
    )
    environment.filters |= {"draw": lambda picture: Markup(draw(picture)), "percent": percent_text, "figure": figure_text}
    page = environment.get_template("page.html").render(
        title=f"Pruning runs: {experiments.resolve().name}", records=records, left_out=left_out(runs),
        charts=charts, versions=versions, script=Markup(script), style=Markup((_HERE / "page.css").read_text()),
        digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(), looks=looks, run_maps=run_maps,
        links=[_link(record.folder, target) for record in records],
        results=_filled(_results(records, looks), records), costs=_filled(_costs(records, looks), records),
        phases=_phases(records),
        filters={"model": looks.models, "method": {r.method: r.method for r in records}},
        longest=max(map(_together, records)) or 1.0,
        opened=next((i for i, r in enumerate(records, 1) if r.layers_with_masks and not r.removes_parts), 0),
        infinite=[r.name for r in records if not all(map(math.isfinite, r.perplexity.values()))],
    )  # fmt: skip
    with storing(f"-o {target}", "name another place"):
        write_whole(target, lambda partial: partial.write_text(page, encoding="utf-8", errors="replace"))


def _link(folder: Path, target: Path) -> str:
    """From the page to a folder; every odd character is quoted, so that no name can be taken for an address."""
    path = os.path.relpath(folder.resolve(), target.resolve().parent).replace(os.sep, "/")
    return "./" + quote(os.fsencode(path)) + "/"


def left_out(runs: Runs) -> str:
    """What is not in the page, in one line."""
    kinds = {"unfinished": runs.unfinished, "damaged": [f"{name} ({why})" for name, why in runs.damaged]}
    return "; ".join(f"{plural(len(all), f'{kind} run')}: {', '.join(all)}" for kind, all in kinds.items() if all)


def _results(records: Sequence[Record], looks: Looks) -> list[Column]:
    """The columns of the table with a row for each run."""
    numbers = {record.name: index for index, record in enumerate(records, 1)}
    dense = dense_perplexities(records)

    def above(name: str, record: Record) -> float | None:
        value, level = record.perplexity.get(name), dense.get((record.model, name, protocol(record)))
        return None if value is None or level is None or record.method == "dense" else value - level

    columns = [
        Column("no.", lambda r: numbers[r.name], kind="run"),
        Column("model", lambda r: r.model, lambda v: looks.models[v], "text"),
        Column("method", lambda r: r.method, kind="method"),
        Column("pruned", _pruned, kind="text"),
        Column("sparsity", lambda r: r.sparsity if r.parts else None, percent_text),
        Column("pattern", lambda r: r.pattern, kind="text"),
        Column("options", lambda r: ", ".join(w for w in looks.words(r) if not w.startswith("alpha ")) or None, kind="text"),
        Column("alpha", lambda r: r.options.get("alpha") if "weights" in r.parts else None, number_text),
        Column("seed", lambda r: r.options.get("seed")),
    ]
    for name, short in looks.sets.items():
        columns.append(Column(f"perplexity {short}", partial(_at, ("perplexity", name)), figure_text))
        columns.append(Column(f"above dense {short}", partial(above, name), figure_text))
    columns += [
        Column("zero\u2011shot mean", lambda r: r.zero_shot.get("mean"), lambda v: percent_text(v, 2)),
        Column("seconds", _together, lambda v: f"{v:.1f}"),
    ]
    for place in dict.fromkeys(place for record in records for place in record.metrics["peak_memory_bytes"]):
        head = "peak memory" if place == "process" else f"peak {place}"
        columns.append(Column(head, partial(_at, ("peak_memory_bytes", place)), bytes_text))
    return [*columns, Column("run folder", lambda r: r.name, kind="folder")]


def _costs(records: Sequence[Record], looks: Looks) -> list[Column]:
    """The columns of the table of seconds of each phase, and of the peak of memory when it ended."""
    phases = _phases(records)
    columns = [Column("run", looks.run, kind="text")]
    columns += [Column(phase, partial(_at, ("seconds", phase)), lambda v: f"{v:.1f} s") for phase in phases]
    columns += [Column("together", _together, lambda v: f"{v:.1f} s"), Column("time", _together, kind="bar")]
    for place in dict.fromkeys(place for record in records for place in record.memory_after.get("load", {})):
        where = "" if place == "process" else f" {place}"
        columns += [Column(f"peak{where} after {phase}", partial(_peak, phase, place), bytes_text) for phase in phases]
    return [*columns, Column("run folder", lambda r: r.name, kind="path")]


def _filled(columns: Sequence[Column], records: Sequence[Record]) -> list[Column]:
    return [column for column in columns if any(column.value(record) is not None for record in records)]


def _at(where: tuple[str, str], record: Record) -> float | None:
    return record.metrics[where[0]].get(where[1])


def _peak(phase: str, place: str, record: Record) -> float | None:
    return record.memory_after.get(phase, {}).get(place)


def _phases(records: Sequence[Record]) -> list[str]:
    return list(dict.fromkeys(["load", "prune", "eval", *(phase for record in records for phase in record.seconds)]))


def _pruned(record: Record) -> str:
    """What went whole, as asked, and what was pruned, as measured: A_log 50 %, weights 48.1 %."""
    shares = record.metrics["sparsity"]
    named = {record.whole: record.whole and record.sparsity, "A_log": shares.get("ssm"), "weights": shares.get("layers")}
    return ", ".join(f"{name} {percent_text(share)}" for name, share in named.items() if share) or "nothing"


def _together(record: Record) -> float:
    return sum(record.seconds.values())
