"""The paper's tables as data: which runs fill a table, and its figures once they are there.

tables/NAME.json describes a table: its title and source, its models and text, and its rows, each the flags of a
run. `vary` crosses every row that prunes with lists of values. Published figures are not in it: they stand under the
table's name in metrics/paper_tables.json, by model and row.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from sparsessm.commandline import words_of
from sparsessm.errors import InputError
from sparsessm.metrics.published import SEQLEN, bare_name, published_figures
from sparsessm.options import DEFAULTS
from sparsessm.report.wording import short_names
from sparsessm.runs.experiment import Experiment, Line, crossed, repeated
from sparsessm.runs.grid import resolved_dataset, resolved_model

FOLDER = Path(__file__).resolve().parent / "tables"
MODELS = {size: f"state-spaces/mamba-{size}-hf" for size in ("130m", "370m", "790m", "1.4b", "2.8b")}
MODELS |= {name: f"state-spaces/{name}" for name in ("mamba2-370m", "mamba2-780m")}

# What a row without a method takes too: how the perplexity is taken.
_EVALUATION = ("dataset", "ppl_datasets", "seqlen", "eval_windows")


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table as its file describes it.

    Attributes:
        models: names as MODELS has them, hub ids or folders. dataset: for calibration. ppl_datasets: for perplexity.
        flags: of every run that prunes. rows: name -> further flags; a row without flags is the dense model.
        vary: flag -> values. notes: what a reader should know of the published figures.
    """

    name: str
    title: str
    source: str
    models: Sequence[str]
    dataset: str
    ppl_datasets: Sequence[str]
    rows: Mapping[str, Mapping[str, Any]]
    flags: Mapping[str, Any] = field(default_factory=dict)
    vary: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    notes: Sequence[str] = ()


def names() -> list[str]:
    """The tables that there are."""
    return sorted(file.stem for file in FOLDER.glob("*.json"))


def load(name: str) -> Table:
    """Raises InputError for the name of no table."""
    if name not in names():
        raise InputError(f"there is no table {name}; there are: {', '.join(names())}")
    return Table(name=name, **json.loads((FOLDER / f"{name}.json").read_text()))


def model_names(models: Sequence[str]) -> dict[str, str]:
    """Each model -> its name in a table: the bare one, or more of its path where two would be called the same."""
    models = list(dict.fromkeys(models))
    bare = [bare_name(model) for model in models]
    whole = short_names(models)
    return {model: name if bare.count(name) == 1 else whole[model] for model, name in zip(models, bare, strict=True)}


def experiment(
    table: Table,
    *,
    models: Sequence[str] | None = None,
    dataset: Sequence[str] | None = None,
    ppl_datasets: Sequence[str] | None = None,
    only: Sequence[str] | None = None,
    seeds: Sequence[int] | None = None,
    flags: Mapping[str, Any] = MappingProxyType({}),
    argv: Sequence[str] = (),
) -> Experiment:
    """The runs of a table, with the changes of a caller.

    Args:
        models, dataset, ppl_datasets: instead of the table's; without ppl_datasets, dataset is evaluated as well.
        only: rows to keep, by name or method. seeds: repeat every run that prunes with each.
        flags: values of single options. argv: further arguments for main.py, as they are.

    Raises:
        InputError: for changes that the table has no place for, or that main.py refuses on every line.
    """
    for word in argv:
        if word.split("=")[0] in ("--save", "--base_dir", "--experiment_name", "--resume"):
            raise InputError(f"{word} would send all runs of the table to one place: leave it out")
    vary = dict(table.vary)
    for flag, value in flags.items():
        if flag in vary:
            raise InputError(f"{table.name} varies --{flag} itself: leave --{flag} {value} out")
    calibration = [resolved_dataset(name) for name in dataset or [table.dataset]]
    if dataset and "dataset" in vary:
        vary["dataset"] = calibration
    elif len(calibration) > 1:
        raise InputError(f"{table.name} is calibrated on one text: give --dataset one name")
    evaluation = [resolved_dataset(name) for name in ppl_datasets or dataset or table.ppl_datasets]
    shared = {"dataset": calibration[0], "ppl_datasets": evaluation, **table.flags}

    lines = []
    for model, shown in model_names([resolved_model(MODELS.get(model, model)) for model in models or table.models]).items():
        for row, own in _kept(table, only).items():
            prunes = "method" in own
            for varied, said in crossed(vary if prunes else {}):
                given = {**shared, **own, **varied, **flags}
                asked = given if prunes else given.keys() & _EVALUATION
                ordered = {flag: given[flag] for flag in sorted(asked, key=list(DEFAULTS).index)}  # as --help has them
                words = [model, ordered.pop("dataset"), *words_of(ordered), *argv]
                name = ", ".join([row, *(f"{flag} {value}" for flag, value in said.items())])
                cells = repeated(f"{shown}, {name}", words, seeds if prunes else None)  # a seed changes no dense run
                published = published_figures(table.name, bare_name(model), name)
                names = {"model": shown, "row": row} | said
                lines.append(Line(names=names, cells=cells, model=model, prunes=prunes, published=published))
    return Experiment(table.name, table.title, table.source, lines, _remarks(table, lines))


def _kept(table: Table, only: Sequence[str] | None) -> Mapping[str, Mapping[str, Any]]:
    """The rows that are asked for by name or method, or all."""
    only = list(table.rows) if only is None else only
    kept = {row: flags for row, flags in table.rows.items() if row in only or flags.get("method") in only}
    unknown = set(only) - kept.keys() - {flags.get("method") for flags in kept.values()}
    if unknown:
        raise InputError(f"{table.name} has no row {', '.join(sorted(unknown))}; it has: {', '.join(table.rows)}")
    return kept


def _remarks(table: Table, lines: Sequence[Line]) -> list[str]:
    """What the reader of the figures should know."""
    if not any(line.published for line in lines):
        return []
    unlike = []
    for one in [cell.options for line in lines for cell in line.cells if not cell.refusal]:
        unlike += [f"windows of {one.seqlen} tokens, not {SEQLEN}"] if one.seqlen != SEQLEN else []
        unlike += ["the first windows of the text only"] if one.eval_windows is not None else []
        if one.method and (one.nsamples, Path(one.dataset).name) != (table.flags["nsamples"], table.dataset):
            unlike.append(f"calibrated on {one.nsamples} windows of {Path(one.dataset).name}")
    said = f"Ours is not measured as the published figures were ({'; '.join(dict.fromkeys(unlike))})."
    return [*table.notes, *([said] if unlike else [])]
