"""One HTML page of many runs: the table of results and the pictures, in a single file that needs no network.

Whatever comes from a file of a run is escaped where it enters markup (`svg.tag`, `svg.text`, `_words`), and the page's own
policy lets no script run but the one written here, by its hash.
"""

from __future__ import annotations

import base64
import hashlib
import html
import math
import os
from collections.abc import Collection, Sequence
from pathlib import Path
from urllib.parse import quote

from sparsessm.errors import InputError, storing
from sparsessm.files import write_whole
from sparsessm.report import figures, svg
from sparsessm.report.palette import DARK, HEAT, LIGHT, method_style
from sparsessm.report.report_tables import phase_table, results_table
from sparsessm.report.results import Record, Runs
from sparsessm.report.wording import percent_text, perplexity_text, plural, short_names

_HERE = Path(__file__).resolve().parent
_SHOWN = 4  # sensitivity charts in sight; further ones are folded

_SECTIONS = {
    "results": "Results",
    "perplexity": "Perplexity against sparsity",
    "states": "Which states or heads were pruned",
    "sensitivity": "Sensitivity by layer and module",
    "weights": "Weights over time",
    "cost": "Seconds and memory",
    "runs": "Run by run",
}


def write_report(runs: Runs, experiments: Path, target: Path) -> None:
    """Writes the page of the runs below `experiments`, whole or not at all.

    Raises:
        InputError: no run has finished, or the page cannot be written.
    """
    if not runs.finished:
        left = f" ({_left_out(runs)})" if runs.unfinished or runs.damaged else ""
        raise InputError(f"{experiments} holds no finished run, a folder with options.json and metrics.json{left}")
    if target.is_dir():
        raise InputError(f"-o {target} is a folder: name a file")
    page = report(runs, experiments, target)
    with storing(f"-o {target}", "name another place"):
        write_whole(target, lambda partial: partial.write_text(page, encoding="utf-8", errors="replace"))


def report(runs: Runs, experiments: Path, target: Path) -> str:
    """The page as text; links to run folders are relative to the folder of `target`."""
    records = runs.finished
    links = [_link(record.folder, target) for record in records]
    bodies = {
        "results": results_table(records, links),
        "perplexity": _perplexity(records),
        "states": _gallery(figures.state_charts(records)),
        "sensitivity": _gallery(figures.sensitivity_charts(records), folded=_SHOWN),
        "weights": _gallery(figures.weight_charts(records)),
        "cost": phase_table(records),
        "runs": _run_cards(records, links),
    }
    bodies = {key: body for key, body in bodies.items() if body}
    parts = [
        f'<section id="{key}" aria-labelledby="h-{key}"><div class="head"><h2 id="h-{key}">{_SECTIONS[key]}</h2>'
        f"{_leads()[key]}</div>{body}</section>\n"
        for key, body in bodies.items()
    ]
    script, style = (_HERE / "report.js").read_text(), _colours() + (_HERE / "report.css").read_text()
    policy = f"default-src 'none'; img-src data:; script-src '{_digest(script)}'; style-src '{_digest(style)}'"
    title = f"Pruning runs: {experiments.resolve().name}"
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n'
        f"<title>{_words(title)}</title>\n<style>{style}</style>\n</head>\n<body>\n"
        f"{_header(runs, title, bodies)}\n<main>\n{''.join(parts)}</main>\n<script>{script}</script>\n</body>\n</html>\n"
    )


def _words(value: object) -> str:
    return html.escape(str(value))


def _digest(content: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(content.encode()).digest()).decode()


def _link(folder: Path, target: Path) -> str:
    """From the page to a folder; every odd character is quoted, so that no name can be taken for an address."""
    path = os.path.relpath(folder.resolve(), target.resolve().parent).replace(os.sep, "/")
    return "./" + quote(os.fsencode(path)) + "/"


def _colours() -> str:
    """The palette as variables: light, dark, and light again on paper."""

    def rule(names: Sequence[str], where: str = ":root:root") -> str:
        return where + "{" + "".join(f"--s{i}:{colour};" for i, colour in enumerate(names)) + f"--heat:{HEAT}}}\n"

    return (
        rule(LIGHT, ":root")
        + "@media (prefers-color-scheme: dark) {" + rule(DARK) + "}\n@media print {" + rule(LIGHT) + "}\n"
        + "".join(f".c{i}{{--c:var(--s{i})}}" for i in range(len(LIGHT))) + "\n"
    )  # fmt: skip


def _header(runs: Runs, title: str, sections: Collection[str]) -> str:
    records = runs.finished
    counted = {
        "finished run": len(records),
        "model": len({record.model for record in records}),
        "method": len({record.method for record in records} - {"dense"}),
        "data set": len({name for record in records for name in record.perplexity}),
    }
    counts = "".join(
        f"<div><dt>{noun if count == 1 else noun + 's'}</dt><dd>{count}</dd></div>" for noun, count in counted.items()
    )
    found: dict[str, list[str]] = {}
    for record in records:
        for package, version in record.metrics["versions"].items():
            if str(version) not in found.setdefault(str(package), []):
                found[str(package)].append(str(version))
    versions = ", ".join(f"{package}&nbsp;{' or '.join(map(_words, each))}" for package, each in
                         ((_words(package), each) for package, each in found.items()))  # fmt: skip
    lines = [f'<p class="small"><b>Versions</b> {versions}</p>'] if versions else []
    if runs.unfinished or runs.damaged:
        lines.append(f'<p class="small"><b>Left out</b> {_words(_left_out(runs))}</p>')
    links = "".join(f'<li><a href="#{key}">{_SECTIONS[key]}</a></li>' for key in sections)
    return (
        f'<header><h1>{_words(title)}</h1><dl class="counts">{counts}</dl>{"".join(lines)}'
        f'<nav aria-label="Contents"><ul>{links}</ul></nav></header>'
    )


def _left_out(runs: Runs) -> str:
    """What is not in the page, in one line."""
    parts = []
    if runs.unfinished:
        parts.append(f"{plural(len(runs.unfinished), 'unfinished run')}: {', '.join(runs.unfinished)}")
    if runs.damaged:
        parts.append(
            f"{plural(len(runs.damaged), 'damaged run')}: {', '.join(f'{name} ({why})' for name, why in runs.damaged)}"
        )
    return "; ".join(parts)


def _leads() -> dict[str, str]:
    """What a reader has to know of each part."""
    text = {
        "results": "A row a run; its number leads to its pictures. A click on a column’s head sorts by it. The filters "
        "hold for every part below that lists single runs.",
        "perplexity": "Lower is better. Every marker is a run; lines connect the means of runs that differ in the seed "
        "alone. Figures share a chart only if they were measured on the same windows.",
        "states": "The share of the channels in which A_log was pruned, by index of the state (of Mamba-2: the share of the "
        "layers, by index of the head). A level line means that none is preferred.",
        "sensitivity": "s = Σ H<sub>ii</sub>² / columns, from the inputs of each module before weights are pruned. The "
        "most sensitive modules keep more, the least sensitive lose more (alpha).",
        "weights": "How much the score of each step of a window counts for what is pruned. With vote every step but the "
        "first has one vote. What lies below a ten-thousandth of the even weight is not drawn.",
        "cost": "Seconds of each phase, and the peak of memory so far when the phase had ended. Of a resumed run: of the "
        "process that ended it.",
        "runs": "What each run pruned, layer by layer, and the command that repeats it."
        '<span class="screen"> Only runs that are open are printed.</span>',
    }
    return {key: f'<p class="lead">{words}</p>' for key, words in text.items()}


def _figure(picture: str, title: str, note: str = "") -> str:
    small = f"<small>{_words(note)}</small>" if note else ""
    return f"<figure><figcaption>{_words(title)}{small}</figcaption>{picture}</figure>"


def _gallery(charts: Sequence[figures.LineChart], folded: int | None = None) -> str:
    """Charts side by side; those beyond `folded` in a fold."""
    drawn = [_figure(svg.line_chart(chart), chart.title, chart.note) for chart in charts]
    if not drawn:
        return ""
    first = f'<div class="grid">{"".join(drawn[:folded])}</div>'
    rest = drawn[folded:] if folded else []
    if not rest:
        return first
    more = f'<summary>{len(rest)} more</summary><div class="grid">{"".join(rest)}</div>'
    return f'{first}<details class="more">{more}</details>'


def _perplexity(records: Sequence[Record]) -> str:
    infinite = [record for record in records if not all(map(math.isfinite, record.perplexity.values()))]
    names = ", ".join(record.name for record in infinite)
    note = f'<p class="small">Not drawn, because it is not finite: {_words(names)}</p>' if infinite else ""
    return _gallery(figures.perplexity_charts(records)) + note


def _run_cards(records: Sequence[Record], links: Sequence[str]) -> str:
    sets = short_names(name for record in records for name in record.perplexity)
    models = short_names(record.model for record in records)
    open_one = next((record for record in records if record.layers_with_masks and not record.removes_parts), None)
    cards = [
        _run_card(number, record, link, models[record.model], sets, record is open_one)
        for number, (record, link) in enumerate(zip(records, links, strict=True), 1)
    ]
    button = '<p class="controls" data-script hidden><button type="button" class="plain" id="open-all">Open all</button></p>'
    return button + "".join(cards)


def _run_card(number: int, record: Record, link: str, model: str, sets: dict[str, str], is_open: bool) -> str:
    figure = ", ".join(f"{perplexity_text(value)} on {sets[name]}" for name, value in record.perplexity.items())
    summary = (
        f"{svg.swatch(method_style(record.method))}"
        f'<span class="what">{_words(figures.run_label(record))}</span><span class="how">{_words(model)}'
        f'{", perplexity " + _words(figure) if figure else ""}</span><span class="path">{_words(record.name)}</span>'
    )
    facts = {"command": f"<code>python {_words(record.command)}</code>"}
    if record.zero_shot:
        facts["zero-shot"] = ", ".join(f"{_words(name)} {percent_text(value)}" for name, value in record.zero_shot.items())
    shares, pictures = figures.share_map(record), []
    if isinstance(shares, str):
        facts["pruned"] = _words(shares)
    elif shares is not None:
        pictures.append(_figure(svg.heat_map(shares), shares.title))
    states, masks = figures.state_map(record), figures.mask_map(record)
    if states is not None:
        pictures.append(_figure(svg.heat_map(states), states.title))
    if masks is not None:
        pictures.append(_figure(svg.mask_map(masks), masks.title))
    facts["folder"] = f'<a href="{_words(link)}"><span class="path">{_words(record.folder)}</span></a>'
    listed = "".join(f"<dt>{name}</dt><dd>{value}</dd>" for name, value in facts.items())
    grid = f'<div class="grid">{"".join(pictures)}</div>' if pictures else ""
    return (
        f'<details class="run" id="run-{number}" data-model="{_words(record.model)}" data-method="{_words(record.method)}"'
        f"{' open' if is_open else ''}>"
        f'<summary>{summary}</summary><div class="body"><dl class="facts">{listed}</dl>{grid}</div></details>'
    )
