"""Run folders as plain records: what options.json, metrics.json and the files beside them say, checked once.

A run is a folder with options.json; it has finished when metrics.json is there as well. Files that older runs lack
(sparsity.json, events.jsonl, masks.safetensors) read as empty.
"""

from __future__ import annotations

import json
import os
import re
import shlex
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

import numpy as np
from safetensors import SafetensorError, safe_open

from sparsessm.commandline import words_of
from sparsessm.errors import InputError, first_line
from sparsessm.options import DEFAULTS, PLACES, without_own
from sparsessm.pruning.methods import AGGREGATES, METHODS, TIME_PARAMETERS, WHOLE, Method
from sparsessm.pruning.saliency import SALIENCIES
from sparsessm.report.tables import with_infinite

# Layer, and what it is called in it without the name of the mixer.
_PARAMETER = re.compile(r"(?:^|\.)[a-z]+\.(\d+)\.(?:\w+\.(?!weight$))?(.+?)(?:\.weight)?$")

_MOST = 1e300  # no figure of a run is as large, and what draws it computes with powers of ten


@dataclass(frozen=True)
class Record:
    """One finished run.

    Attributes:
        folder: of the run. name: the same below the folder that was searched, with forward slashes.
        options: with the defaults of those that the run did not know, and without what the method has by itself.
        metrics: the content of metrics.json, of "zero_shot" the accuracy by task, and "mean" over all of them.
        shares: pruned share by (layer, module), A_log among the modules.
        sensitivities: by module and layer, where the run took them.
        removals: perplexity on the calibration text after each removed layer or SSM, in the order of removal.
        memory_after: peak bytes so far, by phase and place, at the end of each phase of the process that ended the run.
    """

    folder: Path
    name: str
    options: dict[str, Any]
    metrics: dict[str, Any]
    shares: dict[tuple[int, str], float]
    sensitivities: dict[str, dict[int, float]]
    removals: dict[int, float]
    memory_after: dict[str, dict[str, float]]

    @property
    def model(self) -> str:
        return self.options["model"]

    @property
    def method(self) -> str:
        """The method's name; "dense" for a model that was measured as it is, "pruned before" if it was so already."""
        return self.options["method"] or ("pruned before" if any(self.metrics["sparsity"].values()) else "dense")

    @property
    def parts(self) -> tuple[str, ...]:
        """What was to be pruned: "A_log", "weights", both, or nothing."""
        named = {"A_log": "prune_A", "weights": "prune_layers"}
        return tuple(part for part, option in named.items() if self.options["method"] and self.options[option])

    @property
    def sparsity(self) -> float | None:
        """The share that was asked for; None where nothing was pruned."""
        n, m = self.options["prunen"], self.options["prunem"]
        return n / m if m else self.options["sparsity"]

    @property
    def pattern(self) -> str | None:
        """unstructured, N:M, structured (whole states), whole SSMs or whole blocks; None where nothing was pruned."""
        if not self.options["method"]:
            return None
        if self.options["prunem"]:
            return f"{self.options['prunen']}:{self.options['prunem']}"
        if _recipe(self.options).removes_parts:
            return "whole blocks" if self.options["prune_layers"] else "whole SSMs"
        return {"": "unstructured", "states": "structured"}.get(self.whole, self.whole)

    @property
    def whole(self) -> str:
        """What of A_log was removed whole, "states" or "heads", or nothing."""
        return WHOLE.get(self.options["structure"] or _recipe(self.options).structure, "") if self.options["prune_A"] else ""

    @property
    def aggregation(self) -> tuple[str, float | None] | None:
        """(rule, parameter) by which scores over time became one; None where no score was taken over time."""
        method = _recipe(self.options)
        saliency = SALIENCIES.get(self.options["saliency"] or method.saliency or "")
        rule = self.options["aggregate"] or method.aggregate
        over_time = saliency is not None and saliency.needs and not saliency.interacts and not method.obs_on_A_log
        if "A_log" not in self.parts or not over_time or rule not in AGGREGATES or self.options["seqlen"] < 2:
            return None
        return rule, self.options[f"time_{rule}"] if rule in TIME_PARAMETERS else None

    @property
    def command(self) -> str:
        """The arguments after `python` that repeat this run, without paths of outputs."""
        names = [name for name in DEFAULTS if name not in ("model", "dataset", *PLACES)]
        changed = {name: self.options[name] for name in names if self.options[name] not in (None, DEFAULTS[name])}
        return shlex.join(["main.py", self.model, str(self.options["dataset"]), *words_of(changed)])

    def masks(self) -> dict[int, np.ndarray]:
        """Masks of A_log by layer, (D,N) bool, True = pruned, of Mamba-2 (1,H); in the shape from before a removal.

        There are none where whole layers or their SSMs were removed, as no entries were chosen.

        Raises:
            InputError: the file cannot be read.
        """
        path = self.folder / "masks.safetensors"
        found: dict[int, np.ndarray] = {}
        if _recipe(self.options).removes_parts or not path.exists():
            return found
        try:
            with safe_open(path, "numpy") as file:
                for name in file.keys():  # noqa: SIM118  (the file itself is not iterable)
                    place, view = _PARAMETER.search(name), file.get_slice(name)
                    shape = view.get_shape()
                    if place and place[2] == "A_log" and view.get_dtype() == "BOOL" and len(shape) in (1, 2) and all(shape):
                        found[int(place[1])] = file.get_tensor(name).reshape(-1, shape[-1])
        except (OSError, SafetensorError) as error:
            raise InputError(f"{path.name} cannot be read ({error})") from None
        return dict(sorted(found.items()))


@dataclass(frozen=True)
class Runs:
    """The runs below a folder: records of finished ones, names of unfinished ones, and (name, reason) of damaged ones."""

    finished: list[Record]
    unfinished: list[str]
    damaged: list[tuple[str, str]]


def read_runs(experiments: Path) -> Runs:
    """All runs below a folder: by model, what is pruned, sparsity, method and seed; dense ones first.

    Raises:
        InputError: there is no such folder, or a part of it cannot be listed.
    """
    if not experiments.is_dir():
        raise InputError(f"{experiments} is not a folder: give the folder of experiments (--base_dir of the runs)")
    runs = Runs([], [], [])
    for path, folders, files in os.walk(experiments, onerror=_cannot_list):
        folders.sort()
        if "options.json" in files:
            folders.clear()  # what a run holds (its journal, wandb's files) is not another run
            name = Path(path).relative_to(experiments).as_posix()
            try:
                if "metrics.json" in files:
                    runs.finished.append(read_run(Path(path), name))
                else:
                    runs.unfinished.append(name)
            except InputError as error:
                runs.damaged.append((name, str(error)))
    runs.finished.sort(key=_order)
    return runs


def read_run(folder: Path, name: str | None = None) -> Record:
    """One finished run; name: what to call it (default: the last two parts of its path).

    Raises:
        InputError: a file of it is missing or does not have the expected content.
    """
    options = {**DEFAULTS, "method": "", **_read_json(folder / "options.json")}  # no run leaves its method out
    metrics = {"zero_shot": {}, "dense_perplexity": {}, "versions": {}, **_read_json(folder / "metrics.json")}
    _check("options.json", options, _OPTIONS)
    _check("metrics.json", metrics, _METRICS)
    metrics |= {key: with_infinite(metrics[key]) for key in ("perplexity", "dense_perplexity")}
    tasks = {task: figure.get("value") for task, figure in metrics["zero_shot"].items() if isinstance(figure, dict)}
    record = Record(
        folder=folder, name=name or "/".join(folder.absolute().parts[-2:]), options=without_own(options),
        metrics=metrics | {"zero_shot": _numbers(tasks)}, shares=_read_shares(folder / "sparsity.json"),
        **_read_events(folder / "events.jsonl", _recipe(options).removes_parts),
    )  # fmt: skip
    record.masks()  # a file that cannot be read is found here, not when they are drawn
    return record


def _recipe(options: Mapping[str, Any]) -> Method:
    """The row of the method; of one that is not known, and of none, the defaults."""
    return METHODS.get(options["method"], Method(""))


def _order(record: Record) -> tuple[Any, ...]:
    rank, alpha, seed = [*METHODS, record.method].index(record.method), record.options["alpha"], record.options["seed"]
    return record.model, record.parts, record.sparsity or 0.0, rank, record.method, alpha, seed, record.name


def _cannot_list(error: OSError) -> None:
    raise InputError(f"{error.filename} cannot be listed ({error.strerror}): make it readable")


def _is_number(value: Any) -> TypeGuard[float]:
    return (isinstance(value, float) and abs(value) < _MOST) or _is_whole(value)


def _is_whole(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << 63


def _numbers(values: Mapping[Any, Any]) -> dict[str, float]:
    return {name: value for name, value in values.items() if _is_number(value)}


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path.name} cannot be read ({first_line(error)})") from None
    if not isinstance(content, dict):
        raise InputError(f"{path.name} does not hold values by name")
    return content


# What is read here, the test that a value passes, and the same in words.
_Kinds = Sequence[tuple[tuple[str, ...], Callable[[Any], bool], str]]
_OPTIONS: _Kinds = (
    (("model",), lambda value: isinstance(value, str), "be a name"),
    (("method", "saliency", "aggregate", "structure"), lambda value: isinstance(value, str | None) and value != "",
     "be a name or null"),
    (("sparsity",), lambda value: value is None or (_is_number(value) and 0 <= value <= 1),
     "be a number from 0 to 1, or null"),
    (("prunen", "prunem", "seed", "seqlen"), _is_whole, "be a whole number"),
    (("alpha", "time_power", "time_discount", "time_window"), _is_number, "be a number"),
)  # fmt: skip
_METRICS: _Kinds = (
    (("perplexity", "dense_perplexity"), lambda value: isinstance(value, dict) and all(
        isinstance(each, float | None) or _is_whole(each) for each in value.values()), "hold numbers by name"),
    (("sparsity", "seconds", "peak_memory_bytes"), lambda value: isinstance(value, dict) and _numbers(value) == value,
     "hold numbers by name"),
    (("zero_shot", "versions"), lambda value: isinstance(value, dict), "hold values by name"),
)  # fmt: skip


def _check(file: str, content: Mapping[str, Any], kinds: _Kinds) -> None:
    for names, fits, words in kinds:
        for name in names:
            if not fits(content.get(name)):
                raise InputError(f"{file}: {name} should {words}")


def _read_shares(path: Path) -> dict[tuple[int, str], float]:
    content, found = _read_json(path) if path.exists() else {}, {}
    try:
        for name, count in content.items():
            pruned, total, place = int(count["pruned"]), int(count["total"]), _PARAMETER.search(name)
            if place and total:
                found[int(place[1]), place[2]] = pruned / total
    except (TypeError, KeyError, ValueError, OverflowError):
        raise InputError(f"{path.name} should hold pruned and total of each parameter") from None
    return found


def _read_events(path: Path, removes: bool) -> dict[str, dict[Any, Any]]:
    """What a record has of its events, whatever else a killed run left; removes: whether its method removes whole parts."""
    sensitivities: dict[str, dict[int, float]] = defaultdict(dict)
    removals: dict[int, float] = {}
    memory_after: dict[str, dict[str, float]] = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else ():
        try:
            event = json.loads(line)
        except (ValueError, RecursionError):
            continue
        match event:
            case {"event": "layer", "phase": "sensitivity", "layer": layer, **figures} if _is_whole(layer):
                for module, value in _numbers(figures).items():
                    if module != "seconds":
                        sensitivities[module][layer] = value
            case {"event": "layer", "layer": layer, "perplexity": value} if removes and _is_whole(layer):
                removals |= {layer: value} if _is_number(value) and value > 0 else {}
            case {"event": "phase", "phase": phase, "peak_memory_bytes": dict(peaks)}:
                if phase == "load":
                    memory_after.clear()  # a resumed run starts again, in another process
                memory_after[str(phase)] = _numbers(peaks)
    return {"sensitivities": dict(sensitivities), "removals": removals, "memory_after": memory_after}
