"""A sweep of wandb without a server: the same YAML file, expanded to its points here.

A point is one run, spelled as wandb's agent spells it: what `command` says besides its macros, then --NAME=VALUE for
each parameter. --log_wandb in `command` is for the agent; `log_wandb=true` among the changes brings it back.
"""

from __future__ import annotations

import itertools
import json
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from sparsessm.errors import InputError
from sparsessm.report import tables
from sparsessm.report.tables import NOTHING, Figure, with_infinite
from sparsessm.report.wording import figure_text, short_names, slug
from sparsessm.runs.grid import Cell, finished, resolved_dataset, resolved_model

_OTHERS = ("ssm", "layers", "seconds", "state")
_RESOLVED = {"model_path": resolved_model, "dataset": resolved_dataset}


@dataclass(frozen=True)
class Point:
    """The values of a point's parameters, and its runs, one a seed."""

    values: dict[str, Any]
    cells: tuple[Cell, ...]


@dataclass(frozen=True)
class Sweep:
    """A grid of runs: its name, the parameters that take more than one value, and the points."""

    name: str
    varied: tuple[str, ...]
    points: tuple[Point, ...]

    @property
    def cells(self) -> list[Cell]:
        return [cell for point in self.points for cell in point.cells]


@dataclass(frozen=True)
class Result:
    """What was measured at a point: perplexities by data set; shares, seconds; done, failed or to do; the run folders."""

    point: Point
    perplexities: dict[str, Figure]
    others: dict[str, Figure]
    state: str
    runs: tuple[Path, ...]


def load(file: Path, changes: Sequence[str] = (), seeds: Sequence[int] | None = None) -> Sweep:
    """The points of a sweep file, the last parameter varying fastest.

    Args:
        changes: NAME=VALUE, instead of the file's parameter or as a further one; a value is YAML, and [a, b] is several.
        seeds: repeat every run with each.

    Raises:
        InputError: the file is no grid that can be expanded, or main.py would refuse every point.
    """
    try:
        config = yaml.safe_load(file.read_text())
    except (OSError, yaml.YAMLError) as error:
        raise InputError(f"{file} cannot be read as a sweep ({' '.join(str(error).split())})") from None
    if not isinstance(config, dict) or not isinstance(config.get("parameters"), dict):
        raise InputError(f"{file} is not a sweep: it has no parameters")
    if config.get("method") != "grid":
        raise InputError(f"{file}: method {config.get('method')} needs wandb's server; here only grid can run")
    values = {name: _values(file, name, said) for name, said in config["parameters"].items()}
    values |= dict(_change(change) for change in changes)
    values = {name: [_RESOLVED.get(name, _as_is)(value) for value in several] for name, several in values.items()}

    fixed = [str(word) for word in config.get("command", []) if not str(word).startswith("${") and word != "--log_wandb"]
    varied = tuple(name for name, several in values.items() if len(several) > 1)
    if seeds and "seed" in values:
        raise InputError(f"{file}: seed is a parameter already: leave --seeds out")
    shown = {name: short_names(map(str, several)) for name, several in values.items()}
    points = []
    for chosen in itertools.product(*values.values()):
        point = dict(zip(values, chosen, strict=True))
        label = ", ".join(f"{name} {shown[name][str(point[name])]}" for name in varied) or file.stem
        argv = (*fixed, *(f"--{name}={value}" for name, value in point.items()))
        cells = [Cell(f"{label}, seed {seed}", (*argv, f"--seed={seed}")) for seed in dict.fromkeys(seeds or ())]
        points.append(Point(point, tuple(cells or [Cell(label, argv)])))
    sweep = Sweep(str(config.get("name", file.stem)), varied, tuple(points))
    refusals = [cell.refusal for cell in sweep.cells]
    if all(refusals):
        raise InputError(f"{file}: {refusals[0]}")
    return sweep


def results(sweep: Sweep, base_dir: Path, failures: Mapping[Cell, str]) -> list[Result]:
    """What the run folders under base_dir hold of each point."""
    found = []
    for point in sweep.points:
        folders = [folder for cell in point.cells if not cell.refusal and (folder := finished(cell, base_dir))]
        metrics = [json.loads((folder / "metrics.json").read_text()) for folder in folders]
        sets = dict.fromkeys(name for one in metrics for name in one["perplexity"])
        perplexities = {}
        for name in sets:
            values = tuple(with_infinite(one["perplexity"])[name] for one in metrics)
            dense = [value for one in metrics if (value := with_infinite(one["dense_perplexity"]).get(name)) is not None]
            perplexities[name] = Figure(values, dense=statistics.fmean(dense) if dense else None)
        others = {kind: Figure(tuple(one["sparsity"][kind] for one in metrics)) for kind in ("ssm", "layers")}
        others["seconds"] = Figure(tuple(round(sum(one["seconds"].values()), 3) for one in metrics))
        failed = any(cell in failures for cell in point.cells)
        state = "done" if len(folders) == len(point.cells) else "failed" if failed else "to do"
        found.append(Result(point, perplexities, others, state, tuple(folders)))
    return found


def write(
    sweep: Sweep, found: Sequence[Result], folder: Path, base_dir: Path, failures: Mapping[Cell, str]
) -> list[Path]:
    """Writes NAME.md, .csv and .tex into a folder; each appears whole or not at all."""
    contents = {"md": markdown(sweep, found, base_dir, failures), "csv": comma_separated(sweep, found)}
    return tables.write(folder, sweep.name, contents | {"tex": latex(sweep, found)})


def comma_separated(sweep: Sweep, found: Sequence[Result]) -> str:
    """The results unrounded: for each data set the mean, the deviation over seeds, and the difference to the dense model."""
    sets = _sets(found)
    parts = {"": lambda one: one.mean}
    if any(len(point.cells) > 1 for point in sweep.points):
        parts[" standard_deviation"] = lambda one: one.deviation
    if any(figure.dense is not None for one in found for figure in one.perplexities.values()):
        parts[" difference_to_dense"] = lambda one: one.over_dense
    head = [*sweep.varied, *(f"perplexity {short}{part}" for short in sets.values() for part in parts), *_OTHERS, "run"]
    rows = []
    for one in found:
        figures = [part(one.perplexities.get(name, Figure(()))) for name in sets for part in parts.values()]
        figures += [figure.mean for figure in one.others.values()]
        values = [one.point.values[name] for name in sweep.varied]
        rows.append([*values, *figures, one.state, ";".join(map(str, one.runs))])
    return tables.comma_separated(head, rows)


def text(sweep: Sweep, found: Sequence[Result]) -> str:
    """The results for a terminal."""
    return tables.aligned(*_shown(sweep, found))


def markdown(sweep: Sweep, found: Sequence[Result], base_dir: Path, failures: Mapping[Cell, str]) -> str:
    """The results as a page: figures rounded, run folders below base_dir, failures with their reasons below."""
    head, rows = _shown(sweep, found)
    runs = ["; ".join(str(run.relative_to(base_dir)) for run in one.runs) or NOTHING for one in found]
    lines = [[*row, run] for row, run in zip(rows, runs, strict=True)]
    parts = [f"# Sweep {sweep.name}", tables.markdown_table([*head, "run"], lines), f"Run folders are under `{base_dir}`."]
    if failures:
        parts += ["## Failed", "\n".join(f"- {cell.label}: {reason}" for cell, reason in failures.items())]
    return "\n\n".join(parts) + "\n"


def latex(sweep: Sweep, found: Sequence[Result]) -> str:
    """The results as a table for a paper: parameters and perplexities; the run folders are comments above the lines."""
    sets, labels = _sets(found), max(1, len(sweep.varied))
    best = set()
    for j, name in enumerate(sets):
        means = [one.perplexities.get(name, Figure(())).mean for one in found]
        finite = [mean for mean in means if mean is not None and math.isfinite(mean)]
        best |= {(i, labels + j) for i, mean in enumerate(means) if finite and mean == min(finite)}
    head, rows = _shown(sweep, found)
    caption = f"Perplexity over {' and '.join(sweep.varied) or 'one point'}; in bold the best."
    caption += tables.in_cells(figure for one in found for figure in one.perplexities.values())
    return tables.latex_table(
        head[: labels + len(sets)], [row[: labels + len(sets)] for row in rows], caption=caption,
        label=slug(f"sweep {sweep.name}"), labels=labels, best=best, comments=[list(map(str, one.runs)) for one in found],
    )  # fmt: skip


def _sets(found: Sequence[Result]) -> dict[str, str]:
    """Data sets by name -> short name."""
    return short_names(name for one in found for name in one.perplexities)


def _shown(sweep: Sweep, found: Sequence[Result]) -> tuple[list[str], list[list[str]]]:
    """Head and rows as text; a sweep of one point has its name in front."""
    sets = _sets(found)
    short = {name: short_names(str(one.point.values[name]) for one in found) for name in sweep.varied}
    rows = []
    for one in found:
        values = [short[name][str(one.point.values[name])] for name in sweep.varied] or [sweep.name]
        figures = [one.perplexities.get(name, Figure(())).text for name in sets]
        rows.append([*values, *figures, *(NOTHING if x.mean is None else figure_text(x.mean) for x in one.others.values()),
                     one.state])  # fmt: skip
    return [*(sweep.varied or ["sweep"]), *(f"perplexity {name}" for name in sets.values()), *_OTHERS], rows


def _values(file: Path, name: str, said: Any) -> list[Any]:
    """The values of a parameter of the file."""
    if isinstance(said, dict) and isinstance(said.get("values"), list) and said["values"]:
        values = said["values"]
    elif isinstance(said, dict) and "value" in said:
        values = [said["value"]]
    else:
        raise InputError(f"{file}: parameter {name} needs value or a list values")
    for value in values:
        # wandb's agent would hand over a list or a null as one word that main.py does not understand
        if not isinstance(value, (str, int, float, bool)):
            raise InputError(f"{file}: a value of {name} is {value!r}: give strings, numbers, true or false")
    return values


def _change(text: str) -> tuple[str, list[Any]]:
    name, equals, said = text.partition("=")
    try:
        value = yaml.safe_load(said)
    except yaml.YAMLError:
        value = None
    values = value if isinstance(value, list) else [value]
    if not (name and equals and values and all(isinstance(one, (str, int, float, bool)) for one in values)):
        raise InputError(f"--set {text} is not NAME=VALUE or NAME=[VALUE, VALUE]")
    return name, values


def _as_is(value: Any) -> Any:
    return value
