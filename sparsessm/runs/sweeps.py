"""A sweep of wandb without a server: the same YAML file, expanded to its points here.

A point is one run, spelled as wandb's agent spells it: what `command` says besides its macros, then --NAME=VALUE for
each parameter. --log_wandb in `command` is for the agent; `log_wandb=true` among the changes brings it back.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from sparsessm.errors import InputError
from sparsessm.runs.experiment import Experiment, Line, crossed, repeated
from sparsessm.runs.grid import resolved_dataset, resolved_model

_RESOLVED = {"model_path": resolved_model, "dataset": resolved_dataset}
# wandb's agent would hand over a list or a null as one word that main.py does not understand.
_PLAIN = (str, int, float, bool)


def load(file: Path, changes: Sequence[str] = (), seeds: Sequence[int] | None = None) -> Experiment:
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
    values = {name: [_RESOLVED.get(name, str)(str(value)) for value in several] for name, several in values.items()}

    fixed = [str(word) for word in config.get("command", []) if not str(word).startswith("${") and word != "--log_wandb"]
    varied = [name for name, several in values.items() if len(several) > 1]
    if seeds and "seed" in values:
        raise InputError(f"{file}: seed is a parameter already: leave --seeds out")
    lines = []
    for point, shown in crossed(values):
        names = {name: shown[name] for name in varied}
        label = ", ".join(f"{name} {value}" for name, value in names.items()) or file.stem
        cells = repeated(label, [*fixed, *(f"--{name}={value}" for name, value in point.items())], seeds)
        lines.append(Line(names=names or {"sweep": file.stem}, cells=cells, model=point.get("model_path", "")))
    name = str(config.get("name", file.stem)).replace("/", "-")  # the table's files have it
    try:
        return Experiment(name, f"Sweep over {' and '.join(varied) or 'one point'}", str(file), lines)
    except InputError as error:
        raise InputError(f"{file}: {error}") from None


def _values(file: Path, name: str, said: Any) -> list[Any]:
    """The values of a parameter of the file."""
    said = said if isinstance(said, dict) else {}
    values = said.get("values", [said["value"]] if "value" in said else [])
    if not isinstance(values, list) or not values:
        raise InputError(f"{file}: parameter {name} needs value or a list values")
    for value in values:
        if not isinstance(value, _PLAIN):
            raise InputError(f"{file}: a value of {name} is {value!r}: give strings, numbers, true or false")
    return values


def _change(text: str) -> tuple[str, list[Any]]:
    name, _, said = text.partition("=")
    try:
        value = yaml.safe_load(said)
    except yaml.YAMLError:
        value = None
    values = value if isinstance(value, list) else [value]
    if not (name and values and all(isinstance(one, _PLAIN) for one in values)):
        raise InputError(f"--set {text} is not NAME=VALUE or NAME=[VALUE, VALUE]")
    return name, values
