"""The paper's tables as data: which runs fill a table, and its figures once they are there.

tables/NAME.json describes a table: its title and source, its models and text, and its rows, each the flags of a
run. `vary` crosses every row that prunes with lists of values. Published figures are not in it: `published` names the
table in metrics/paper_tables.json, where a row is found by model and name, or by what `published_rows` says.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sparsessm.commandline import words_of
from sparsessm.corpora.names import DATASETS
from sparsessm.errors import InputError
from sparsessm.metrics.published import SEQLEN, TABLES
from sparsessm.metrics.tasks import TASKS
from sparsessm.options import DEFAULTS
from sparsessm.report.tables import Figure, with_infinite
from sparsessm.report.wording import short_names
from sparsessm.runs.grid import Cell, finished, resolved_dataset, resolved_model

FOLDER = Path(__file__).resolve().parent / "tables"
MODELS = {size: f"state-spaces/mamba-{size}-hf" for size in ("130m", "370m", "790m", "1.4b", "2.8b")}
MODELS |= {name: f"state-spaces/{name}" for name in ("mamba2-370m", "mamba2-780m")}

# Flags that a row without a method takes too: how the perplexity is taken.
_EVALUATION = ("seqlen", "eval_windows")
_ORDER = {name: i for i, name in enumerate(DEFAULTS)}


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table as its file describes it.

    Attributes:
        models: names as MODELS has them, hub ids or folders. dataset: for calibration. ppl_datasets: for perplexity.
        flags: of every run that prunes. rows: name -> further flags; a row without flags is the dense model.
        vary: flag -> values. published: key in metrics/paper_tables.json. published_model: the one model that the
        published figures are of, where they are not kept by model. published_rows: row -> keys of its figures there.
        notes: what a reader should know of the published figures.
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
    published: str | None = None
    published_model: str | None = None
    published_rows: Mapping[str, Sequence[str]] = field(default_factory=dict)
    notes: Sequence[str] = ()

    def published_figures(self, model: str, row: str) -> dict[str, float]:
        """Published figures by column, of a model by its bare name (mamba-130m); empty where there are none."""
        if self.published is None or self.published_model not in (None, model):
            return {}
        first, second = self.published_rows.get(row, (model, row))
        return _published()["tables"][self.published]["rows"].get(first, {}).get(second, {})


def names() -> list[str]:
    """The tables that there are."""
    return sorted(file.stem for file in FOLDER.glob("*.json"))


def load(name: str) -> Table:
    """Raises InputError for the name of no table."""
    if name not in names():
        raise InputError(f"there is no table {name}; there are: {', '.join(names())}")
    return Table(name=name, **json.loads((FOLDER / f"{name}.json").read_text()))


def bare_name(model: str) -> str:
    """The name of a model in a table: the last part of its id or path, without -hf."""
    return Path(model).name.removesuffix("-hf")


def model_names(models: Sequence[str]) -> dict[str, str]:
    """Each model -> its name in a table: the bare one, or more of its path where two would be called the same."""
    models = list(dict.fromkeys(models))
    bare = [bare_name(model) for model in models]
    whole = short_names(models)
    return {model: name if bare.count(name) == 1 else whole[model] for model, name in zip(models, bare, strict=True)}


@dataclass(frozen=True)
class Entry:
    """A line of a table: a model, a row, the flags that vary, and the runs that fill it, one a seed."""

    model: str
    name: str
    varied: Mapping[str, str]
    prunes: bool
    cells: tuple[Cell, ...]

    @property
    def row(self) -> str:
        """The name with the flags that vary."""
        return ", ".join([self.name, *(f"{flag} {value}" for flag, value in self.varied.items())])


@dataclass(frozen=True, kw_only=True)
class Changes:
    """Changes of a caller to the table.

    Attributes:
        models, dataset, ppl_datasets: instead of the table's; without ppl_datasets, dataset is evaluated as well.
        only: rows to keep, by name or method. seeds: repeat every run that prunes with each.
        flags: values of single options. argv: further arguments for main.py, as they are.
    """

    models: Sequence[str] | None = None
    dataset: Sequence[str] | None = None
    ppl_datasets: Sequence[str] | None = None
    only: Sequence[str] | None = None
    seeds: Sequence[int] | None = None
    flags: Mapping[str, Any] = field(default_factory=dict)
    argv: Sequence[str] = ()


def entries(table: Table, changes: Changes) -> list[Entry]:
    """The lines of a table, in order.

    Raises:
        InputError: for changes that the table has no place for, or that main.py refuses on every line.
    """
    for word in changes.argv:
        if word.split("=")[0] in ("--save", "--base_dir", "--experiment_name", "--resume"):
            raise InputError(f"{word} would send all runs of the table to one place: leave it out")
    vary = {flag: list(values) for flag, values in table.vary.items()}
    for flag, value in changes.flags.items():
        if flag in vary:
            raise InputError(f"{table.name} varies --{flag} itself: leave --{flag} {value} out")
    calibration = [resolved_dataset(name) for name in changes.dataset or [table.dataset]]
    if "dataset" in vary:
        vary["dataset"] = calibration if changes.dataset else vary["dataset"]
    elif len(calibration) > 1:
        raise InputError(f"{table.name} is calibrated on one text: give --dataset one name")
    evaluation = changes.ppl_datasets or changes.dataset or table.ppl_datasets
    shared = {"dataset": calibration[0], "ppl_datasets": [resolved_dataset(name) for name in evaluation]}

    found = []
    models = model_names([resolved_model(MODELS.get(model, model)) for model in changes.models or table.models])
    for model in models:
        for name, varied, flags in _rows(table, vary, changes.only):
            if prunes := "method" in flags:
                flags = {**shared, **table.flags, **flags, **changes.flags}
                seeds: Sequence[int | None] = list(dict.fromkeys(changes.seeds or [])) or [None]
            else:
                flags = shared | flags | {key: value for key, value in changes.flags.items() if key in _EVALUATION}
                seeds = [None]  # nothing is drawn: a seed would change nothing
            entry = Entry(model, name, varied, prunes, ())
            cells = []
            for seed in seeds:
                argv = _argv(model, flags | ({} if seed is None else {"seed": seed})) + list(changes.argv)
                label = f"{models[model]}, {entry.row}" + ("" if seed is None else f", seed {seed}")
                cells.append(Cell(label, tuple(argv)))
            found.append(dataclasses.replace(entry, cells=tuple(cells)))
    refusals = [cell.refusal for entry in found for cell in entry.cells]
    if all(refusals):
        raise InputError(refusals[0])
    return found


def _rows(
    table: Table, vary: Mapping[str, Sequence[Any]], only: Sequence[str] | None
) -> list[tuple[str, dict[str, str], dict[str, Any]]]:
    """Name, varied flags as text, and all flags of each line; what varies is crossed with every row that prunes."""
    kept = {
        row: flags for row, flags in table.rows.items() if only is None or row in only or flags.get("method") in only
    }
    unknown = set(only or ()) - kept.keys() - {flags.get("method") for flags in kept.values()}
    if unknown:
        raise InputError(f"{table.name} has no row {', '.join(sorted(unknown))}; it has: {', '.join(table.rows)}")
    texts = short_names(vary.get("dataset", ()))
    lines = []
    for row, flags in kept.items():
        for values in itertools.product(*vary.values()) if "method" in flags else [()]:
            varied = dict(zip(vary, values, strict=False))  # no values for a row that is not pruned
            said = {flag: texts[value] if flag == "dataset" else str(value) for flag, value in varied.items()}
            lines.append((row, said, dict(flags) | varied))
    return lines


def _argv(model: str, flags: Mapping[str, Any]) -> list[str]:
    """The arguments of a run, flags in the order of --help."""
    names = sorted(flags.keys() - {"dataset"}, key=lambda name: (_ORDER.get(name, len(_ORDER)), name))
    return [model, flags["dataset"], *words_of({name: flags[name] for name in names})]


@dataclass(frozen=True)
class Line:
    """A line of a table with its figures by column, the run folders that they come from, and its failures."""

    entry: Entry
    model: str
    figures: dict[str, Figure]
    runs: tuple[Path, ...]
    failures: tuple[str, ...] = ()


@dataclass(frozen=True)
class Filled:
    """A table with what has been measured of it.

    Attributes:
        perplexities, accuracies: columns, by their keys in Line.figures; accuracies are percentages.
        remarks: lines to print below it.
    """

    table: Table
    perplexities: list[str]
    accuracies: list[str]
    lines: list[Line]
    remarks: list[str]

    @property
    def compares(self) -> bool:
        """Whether there is a published figure in any of the columns."""
        figures = [line.figures.get(column) for line in self.lines for column in self.perplexities + self.accuracies]
        return any(figure is not None and figure.published is not None for figure in figures)


def fill_in(table: Table, lines: Sequence[Entry], base_dir: Path, failures: Mapping[Cell, str]) -> Filled:
    """The table with the figures in the run folders under base_dir.

    Args:
        failures: of `grid.fill`; other cells without a finished run are still to be done.
    """
    able = [cell.options for entry in lines for cell in entry.cells if not cell.refusal]
    texts = short_names(name for one in able for name in one.evaluation_sets)
    models = model_names([entry.model for entry in lines])
    filled = [_line(table, entry, models[entry.model], texts, base_dir, failures) for entry in lines]
    dense = {line.entry.model: line.figures for line in filled if not line.entry.prunes}
    filled = [_with_dense(line, dense.get(line.entry.model, {})) if line.entry.prunes else line for line in filled]
    others = dict.fromkeys(column for line in filled for column in line.figures)
    accuracies = [column for column in others if column not in (*texts.values(), *DATASETS)]
    return Filled(table, list(dict.fromkeys(texts.values())), accuracies, filled, _remarks(table, filled))


def _line(
    table: Table, entry: Entry, model: str, texts: Mapping[str, str], base_dir: Path, failures: Mapping[Cell, str]
) -> Line:
    values: dict[str, list[float]] = {}
    folders = []
    for cell in entry.cells:
        folder = None if cell.refusal else finished(cell, base_dir)
        if folder is None:
            continue
        folders.append(folder)
        metrics = json.loads((folder / "metrics.json").read_text())
        perplexities = {texts[name]: value for name, value in with_infinite(metrics["perplexity"]).items()}
        for column, value in (perplexities | _accuracies(metrics["zero_shot"])).items():
            values.setdefault(column, []).append(value)
    published = table.published_figures(bare_name(entry.model), entry.row)
    figures = {name: Figure(tuple(values.get(name, ())), published.get(name)) for name in {**published, **values}}
    wrong = tuple(f"{cell.label}: {failures[cell]}" for cell in entry.cells if cell in failures)
    return Line(entry, model, figures, tuple(folders), wrong)


def _with_dense(line: Line, dense: Mapping[str, Figure]) -> Line:
    """The line, each figure beside that of the dense model."""
    base = {column: figure.mean for column, figure in dense.items()}
    figures = {name: dataclasses.replace(figure, dense=base.get(name)) for name, figure in line.figures.items()}
    return dataclasses.replace(line, figures=figures)


def _accuracies(zero_shot: Mapping[str, Mapping[str, Any]]) -> dict[str, float]:
    """metrics.json's zero-shot accuracies, as the published columns are called and in percent.

    The published average is one over five tasks: a mean over others keeps its own column.
    """
    mean = "average" if zero_shot.keys() - {"mean"} == set(TASKS) else "mean"
    return {mean if task == "mean" else task: 100 * figure["value"] for task, figure in zero_shot.items()}


def _remarks(table: Table, lines: Sequence[Line]) -> list[str]:
    """What the reader of the figures should know."""
    remarks: list[str] = []
    chosen = [cell.options for line in lines for cell in line.entry.cells if not cell.refusal]
    if any(figure.published is not None for line in lines for figure in line.figures.values()):
        remarks += table.notes
        unlike = [f"windows of {one.seqlen} tokens, not {SEQLEN}" for one in chosen if one.seqlen != SEQLEN]
        unlike += ["the first windows of the text only" for one in chosen if one.eval_windows is not None]
        for one in chosen:
            if one.method and (one.nsamples, Path(one.dataset).name) != (table.flags["nsamples"], table.dataset):
                unlike.append(f"calibrated on {one.nsamples} windows of {Path(one.dataset).name}")
        if unlike:
            remarks.append(f"Ours is not measured as the published figures were ({'; '.join(dict.fromkeys(unlike))}).")
    seeds = max((len(line.entry.cells) for line in lines), default=1)
    if seeds > 1:
        remarks.append(f"Mean ± standard deviation of the sample over {seeds} seeds; the dense model has none.")
    return remarks


def _published() -> dict[str, Any]:
    return json.loads(TABLES.read_text())
