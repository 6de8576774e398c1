"""One HTML page of many runs: the tables and the pictures, in a single file that needs no network.

The template escapes whatever comes from a file of a run, and the page's own policy lets no script run but the one written
here, by its hash.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import math
import os
from collections import defaultdict
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import quote

from sparsessm.errors import InputError, storing
from sparsessm.files import write_whole
from sparsessm.report import plots
from sparsessm.report.charts import LineChart, overviews, removals
from sparsessm.report.looks import DARK, LIGHT, Variant, run_label, variants
from sparsessm.report.maps import HeatMap, run_maps, share_map
from sparsessm.report.report_tables import phase_table, results_table
from sparsessm.report.results import Record, Runs
from sparsessm.report.wording import percent_text, perplexity_text, plural, short_names

if TYPE_CHECKING:
    from jinja2 import Template

_HERE = Path(__file__).resolve().parent

Draw = Callable[[LineChart | HeatMap, str], str]


def write_report(runs: Runs, experiments: Path, target: Path, draw: Draw = plots.svg) -> None:
    """Writes the page of the runs below `experiments`, whole or not at all.

    Args:
        draw: a picture and the name of its ids -> markup.

    Raises:
        InputError: no run has finished, or the page cannot be written.
    """
    if not runs.finished:
        left = f" ({_left_out(runs)})" if runs.unfinished or runs.damaged else ""
        raise InputError(f"{experiments} holds no finished run, a folder with options.json and metrics.json{left}")
    if target.is_dir():
        raise InputError(f"-o {target} is a folder: name a file")
    page = _report(runs, experiments, target, draw)
    with storing(f"-o {target}", "name another place"):
        write_whole(target, lambda partial: partial.write_text(page, encoding="utf-8", errors="replace"))


def _report(runs: Runs, experiments: Path, target: Path, draw: Draw) -> str:
    records, looks = runs.finished, variants(runs.finished)
    links = {record.name: _link(record.folder, target) for record in records}
    galleries: dict[str, list[dict[str, str]]] = defaultdict(list)
    numbers = itertools.count()

    def drawn(picture: LineChart | HeatMap) -> dict[str, str]:
        note = picture.note if isinstance(picture, LineChart) else ""
        return {"title": picture.title, "note": note, "svg": draw(picture, f"g{next(numbers)}")}

    for picture in overviews(records):
        galleries[picture.kind].append(drawn(picture))
    styles = {style: f"look-{index}" for index, style in enumerate(dict.fromkeys(look.style for look in looks.values()))}
    script = (_HERE / "report.js").read_text(encoding="utf-8")
    colours = ("".join(f"--s{i}:{colour};" for i, colour in enumerate(each)) for each in (LIGHT, DARK))
    return _template().render(
        title=f"Pruning runs: {experiments.resolve().name}", script=script, light=next(colours), dark=next(colours),
        digest="sha256-" + base64.b64encode(hashlib.sha256(script.encode()).digest()).decode(),
        style=(_HERE / "report.css").read_text(encoding="utf-8"), records=records, versions=_versions(records),
        models=short_names(record.model for record in records), left_out=_left_out(runs), galleries=galleries,
        swatches={name: plots.swatch(style, name) for style, name in styles.items()},
        infinite=[record.name for record in records if not all(map(math.isfinite, record.perplexity.values()))],
        results=results_table(records, looks, links), costs=phase_table(records, looks), links=links,
        labels={record.name: run_label(record, looks[record.name]) for record in records},
        facts={record.name: _facts(record, looks[record.name]) for record in records},
        opened=next((r.name for r in records if r.layers_with_masks and not r.removes_parts), ""),
        own={record.name: list(map(drawn, run_maps(record))) for record in records},
        look={name: styles[look.style] for name, look in looks.items()},
        figures=_perplexities(records),
    )  # fmt: skip


@cache
def _template() -> Template:
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    return Environment(
        loader=FileSystemLoader(_HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    ).get_template("report.html")


def _link(folder: Path, target: Path) -> str:
    """From the page to a folder; every odd character is quoted, so that no name can be taken for an address."""
    path = os.path.relpath(folder.resolve(), target.resolve().parent).replace(os.sep, "/")
    return "./" + quote(os.fsencode(path)) + "/"


def _versions(records: Sequence[Record]) -> dict[str, str]:
    found: dict[str, dict[str, None]] = defaultdict(dict)
    for record in records:
        for package, version in record.metrics["versions"].items():
            found[str(package)][str(version)] = None
    return {package: " or ".join(each) for package, each in found.items()}


def _left_out(runs: Runs) -> str:
    """What is not in the page, in one line."""
    damaged = [f"{name} ({why})" for name, why in runs.damaged]
    kinds = {"unfinished run": runs.unfinished, "damaged run": damaged}
    return "; ".join(f"{plural(len(names), kind)}: {', '.join(names)}" for kind, names in kinds.items() if names)


def _perplexities(records: Sequence[Record]) -> dict[str, str]:
    sets = short_names(name for record in records for name in record.perplexity)
    return {r.name: ", ".join(f"{perplexity_text(v)} on {sets[name]}" for name, v in r.perplexity.items()) for r in records}


def _facts(record: Record, look: Variant) -> dict[str, str]:
    shares = share_map(record)
    facts = {
        "options": ", ".join(words for _, words in look.options),
        "zero-shot": ", ".join(f"{name} {percent_text(value)}" for name, value in record.zero_shot.items()),
        "pruned": shares if isinstance(shares, str) else "",
        "removed": ", then ".join(f"layer {layer} ({perplexity_text(value)})" for layer, value in removals(record)),
    }
    return {name: fact for name, fact in facts.items() if fact}
