"""One HTML page of many runs: tables and pictures, in a single file that needs no network.

Whatever comes from a file of a run is escaped by the template (page.html) or by the writer of the pictures, and the page's
own policy lets no script run but page.js, by its hash.
"""

from __future__ import annotations

import base64
import hashlib
import math
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from sparsessm.errors import InputError, storing
from sparsessm.files import write_whole
from sparsessm.report.looks import Looks
from sparsessm.report.pictures import Picture, dense_perplexities, pictures, protocol, run_maps
from sparsessm.report.plots import svg
from sparsessm.report.results import Record, Runs
from sparsessm.report.wording import bytes_text, figure_text, grouped, number_text, percent_text, plural

_HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Cell:
    """value: what its column is sorted by, None for nothing. kind: "number", or what the template shows in another way."""

    head: str
    value: Any
    show: Callable[[Any], str] = str
    kind: str = "number"

    @property
    def exact(self) -> str:
        """The value as JavaScript's Number reads it, to the last digit; empty for nothing and for NaN."""
        if self.value is None or self.value != self.value:
            return ""
        return str(self.value).replace("inf", "Infinity") if isinstance(self.value, float) else str(self.value)

    @property
    def text(self) -> str:
        return "–" if self.value is None else "not a number" if self.value != self.value else self.show(self.value)


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
    phases = list(dict.fromkeys(["load", "prune", "eval", *(phase for r in records for phase in r.metrics["seconds"])]))
    environment = Environment(
        loader=FileSystemLoader(_HERE), autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=StrictUndefined
    )
    page = environment.get_template("page.html").render(
        title=f"Pruning runs: {experiments.resolve().name}", records=records, left_out=left_out(runs),
        charts=charts, versions=versions, script=Markup(script), style=Markup((_HERE / "page.css").read_text()),
        digest=base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(), looks=looks, run_maps=run_maps,
        draw=lambda picture: Markup(draw(picture)), percent_text=percent_text, figure_text=figure_text,
        links=[_link(record.folder, target) for record in records],
        results=_filled(_results(records, looks)), costs=_filled(_costs(records, looks, phases)), phases=phases,
        filters={"model": looks.models, "method": {r.method: r.method for r in records}},
        longest=max(sum(r.metrics["seconds"].values()) for r in records) or 1.0,
        opened=next((i for i, r in enumerate(records, 1) if r.masks()), 0),
        infinite=[r.name for r in records if not all(map(math.isfinite, r.metrics["perplexity"].values()))],
    )  # fmt: skip
    with storing(f"-o {target}", "name another place"):
        write_whole(target, lambda file: file.write_text(page, encoding="utf-8", errors="replace"))


def _link(folder: Path, target: Path) -> str:
    """From the page to a folder; every odd character is quoted, so that no name can be taken for an address."""
    path = os.path.relpath(folder.resolve(), target.resolve().parent).replace(os.sep, "/")
    return "./" + quote(os.fsencode(path)) + "/"


def left_out(runs: Runs) -> str:
    """What is not in the page, in one line."""
    kinds = {"unfinished": runs.unfinished, "damaged": [f"{name} ({why})" for name, why in runs.damaged]}
    return "; ".join(f"{plural(len(all), f'{kind} run')}: {', '.join(all)}" for kind, all in kinds.items() if all)


def _results(records: Sequence[Record], looks: Looks) -> Iterator[list[Cell]]:
    """The table with a row for each run."""
    dense = dense_perplexities(records)
    places = dict.fromkeys(place for record in records for place in record.metrics["peak_memory_bytes"])
    for number, r in enumerate(records, 1):
        options = [words for words in looks.words(r) if words != r.pattern and not words.startswith("alpha ")]
        cells = [
            Cell("no.", number, kind="run"),
            Cell("model", r.model, lambda model: looks.models[model], "text"),
            Cell("method", r.method, kind="method"),
            Cell("pruned", _pruned(r), kind="text"),
            Cell("sparsity", r.sparsity if r.parts else None, percent_text),
            Cell("pattern", r.pattern, kind="text"),
            Cell("options", ", ".join(options) or None, kind="text"),
            Cell("alpha", r.options["alpha"] if "weights" in r.parts else None, number_text),
            Cell("seed", r.options["seed"]),
        ]
        for name, short in looks.sets.items():
            value, level = r.metrics["perplexity"].get(name), dense.get((r.model, name, protocol(r)))
            above = None if value is None or level is None or r.method == "dense" else value - level
            cells += [Cell(f"perplexity {short}", value, figure_text), Cell(f"above dense {short}", above, figure_text)]
        cells.append(Cell("zero\u2011shot mean", r.metrics["zero_shot"].get("mean"), lambda share: percent_text(share, 2)))
        cells.append(Cell("seconds", sum(r.metrics["seconds"].values()), "{:.1f}".format))
        for place in places:
            head = "peak memory" if place == "process" else f"peak {place}"
            cells.append(Cell(head, r.metrics["peak_memory_bytes"].get(place), bytes_text))
        yield [*cells, Cell("run folder", r.name, kind="folder")]


def _costs(records: Sequence[Record], looks: Looks, phases: Sequence[str]) -> Iterator[list[Cell]]:
    """The table of seconds of each phase, and of the peak of memory when it ended."""
    places = dict.fromkeys(place for record in records for place in record.memory_after.get("load", {}))
    for r in records:
        together, peaks = sum(r.metrics["seconds"].values()), r.memory_after
        cells = [Cell("run", looks.run(r), kind="text")]
        cells += [Cell(phase, r.metrics["seconds"].get(phase), "{:.1f} s".format) for phase in phases]
        cells += [Cell("together", together, "{:.1f} s".format), Cell("time", together, kind="bar")]
        for place in places:
            where = "" if place == "process" else f" {place}"
            cells += [Cell(f"peak{where} after {phase}", peaks.get(phase, {}).get(place), bytes_text) for phase in phases]
        yield [*cells, Cell("run folder", r.name, kind="path")]


def _filled(rows: Iterable[Sequence[Cell]]) -> list[tuple[Cell, ...]]:
    """Without the columns in which there is nothing."""
    columns = [column for column in zip(*rows, strict=True) if any(cell.value is not None for cell in column)]
    return list(zip(*columns, strict=True))


def _pruned(record: Record) -> str:
    """What went whole, as asked, and what was pruned, as measured: A_log 50 %, weights 48.1 %."""
    shares = record.metrics["sparsity"]
    named = {record.whole: record.whole and record.sparsity, "A_log": shares.get("ssm"), "weights": shares.get("layers")}
    return ", ".join(f"{name} {percent_text(share)}" for name, share in named.items() if share) or "nothing"
