"""A sweep of wandb without a server: the same YAML file, expanded to its points here.

A point is one run, spelled as wandb's agent spells it: what `command` says besides its macros, then --NAME=VALUE for
each parameter. --log_wandb in `command` is for the agent; `log_wandb=true` among the changes brings it back.
"""

from __future__ import annotations

import csv
import io
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from sparsessm.errors import InputError
from sparsessm.runs.grid import Cell, finished, resolved_dataset, resolved_model
from sparsessm.runs.paper_output import NOTHING, markdown_table, number

_RESOLVED = {"model_path": resolved_model, "dataset": resolved_dataset}


@dataclass(frozen=True)
class Sweep:
    """A grid of runs: its name, the parameters that take more than one value, and a cell and its values per point."""

    name: str
    varied: tuple[str, ...]
    points: tuple[tuple[Cell, dict[str, Any]], ...]

    @property
    def cells(self) -> list[Cell]:
        return [cell for cell, _ in self.points]


def load(file: Path, changes: Sequence[str] = ()) -> Sweep:
    """The points of a sweep file, the last parameter varying fastest.

    Args:
        changes: NAME=VALUE, instead of the file's parameter or as a further one; a value is YAML, and [a, b] is several.

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
    points = []
    for chosen in itertools.product(*values.values()):
        point = dict(zip(values, chosen, strict=True))
        label = ", ".join(f"{name} {point[name]}" for name in varied) or file.stem
        points.append((Cell(label, (*fixed, *(f"--{name}={value}" for name, value in point.items()))), point))
    refusals = [cell.refusal for cell, _ in points]
    if all(refusals):
        raise InputError(f"{file}: {refusals[0]}")
    return Sweep(str(config.get("name", file.stem)), varied, tuple(points))


def results(sweep: Sweep, base_dir: Path, failures: Mapping[Cell, str]) -> tuple[list[str], list[list[Any]]]:
    """Head and rows of the results: varied parameters, perplexities, pruned shares, seconds, state, run folder.

    A figure that is not there is None.
    """
    found = []
    for cell, point in sweep.points:
        folder = None if cell.refusal else finished(cell, base_dir)
        metrics = json.loads((folder / "metrics.json").read_text()) if folder else None
        found.append((cell, point, folder, metrics))
    datasets = list(dict.fromkeys(name for *_, metrics in found if metrics for name in metrics["perplexity"]))
    perplexities = [f"perplexity {Path(name).name}" for name in datasets]
    head = [*sweep.varied, *perplexities, "ssm", "layers", "seconds", "state", "run"]
    rows = []
    for cell, point, folder, metrics in found:
        figures = [None] * (len(datasets) + 3)
        if metrics:
            figures = [metrics["perplexity"].get(name) for name in datasets]
            shares, seconds = metrics["sparsity"], round(sum(metrics["seconds"].values()), 3)
            figures += [shares["ssm"], shares["layers"], seconds]
        state = "done" if folder else "failed" if cell in failures else "to do"
        rows.append([*(point[name] for name in sweep.varied), *figures, state, folder and str(folder)])
    return head, rows


def markdown(sweep: Sweep, head: Sequence[str], rows: Sequence[Sequence[Any]], failures: Mapping[Cell, str]) -> str:
    """The results as a page: figures rounded, failures with their reasons below."""
    width = len(sweep.varied)
    text = [[*map(str, row[:width]), *(_shown(value) for value in row[width:])] for row in rows]
    parts = [f"# Sweep {sweep.name}", markdown_table(head, text)]
    if failures:
        parts += ["## Failed", "\n".join(f"- {cell.label}: {reason}" for cell, reason in failures.items())]
    return "\n\n".join(parts) + "\n"


def comma_separated(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """The results as they are, unrounded; an empty cell for a figure that is not there."""
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows([head, *rows])
    return out.getvalue()


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


def _shown(value: Any) -> str:
    if value is None:
        return NOTHING
    return number(value) if isinstance(value, float) else str(value)
