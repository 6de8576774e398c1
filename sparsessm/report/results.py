"""Run folders as plain records: what options.json, metrics.json and the files beside them say, checked once.

A run is a folder with options.json; it has finished when metrics.json is there as well. Files that older runs lack
(sparsity.json, events.jsonl, masks.safetensors) read as empty.
"""

from __future__ import annotations

import json
import math
import os
import re
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeGuard

from safetensors import SafetensorError, safe_open
from torch import Tensor

from sparsessm.commandline import words_of
from sparsessm.errors import InputError, first_line
from sparsessm.options import DEFAULTS, PLACES, without_own
from sparsessm.pruning.methods import METHODS, TIME_PARAMETERS, WHOLE
from sparsessm.pruning.saliency import SALIENCIES
from sparsessm.report.tables import with_infinite

MASKS = "masks.safetensors"

# Layer, and what it is called in it without the name of the mixer.
_PARAMETER = re.compile(r"(?:^|\.)[a-z]+\.(\d+)\.(?:\w+\.(?!weight$))?(.+?)(?:\.weight)?$")
_TIME_OPTIONS = {"power": "time_power", "discount": "time_discount", "window": "time_window"}

_SAID_APART = ("model", "dataset", *PLACES)

_MOST = 1e300  # no figure of a run is as large, and what draws it computes with powers of ten


@dataclass(frozen=True)
class Record:
    """One finished run.

    Attributes:
        folder: of the run. name: the same below the folder that was searched, with forward slashes.
        options, metrics: the files' contents, of the options without what the method has by itself.
        counts: of sparsity.json, (pruned, total) by parameter. events: of events.jsonl, in order.
        layers_with_masks: layer -> parameter in masks.safetensors.
    """

    folder: Path
    name: str
    options: dict[str, Any]
    metrics: dict[str, Any]
    counts: dict[str, tuple[int, int]] = field(default_factory=dict)
    events: tuple[dict[str, Any], ...] = ()
    layers_with_masks: dict[int, str] = field(default_factory=dict)

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
        return tuple(part for part, option in named.items() if self.options.get(option)) if self.options["method"] else ()

    @property
    def sparsity(self) -> float | None:
        """The share that was asked for; None where nothing was pruned."""
        n, m = self.options.get("prunen") or 0, self.options.get("prunem") or 0
        return n / m if m else self.options.get("sparsity")

    @property
    def pattern(self) -> str | None:
        """unstructured, N:M, structured (whole states), whole SSMs or whole blocks; None where nothing was pruned."""
        if not self.options["method"]:
            return None
        if self.options.get("prunem"):
            return f"{self.options.get('prunen')}:{self.options['prunem']}"
        if self.removes_parts:
            return "whole blocks" if self.options.get("prune_layers") else "whole SSMs"
        return {"states": "structured"}.get(self.whole, self.whole) or "unstructured"

    @property
    def whole(self) -> str:
        """What of A_log was removed whole, "states" or "heads", or nothing."""
        method = METHODS.get(self.options["method"])
        structure = self.options.get("structure") or (method.structure if method else "")
        return WHOLE.get(structure, "") if self.options.get("prune_A") else ""

    @property
    def removes_parts(self) -> bool:
        """Whether whole layers or their SSMs were removed, so that there is no choice of entries to show."""
        method = METHODS.get(self.options["method"])
        return method is not None and method.removes_parts

    @property
    def perplexity(self) -> dict[str, float]:
        return self.metrics["perplexity"]

    @property
    def zero_shot(self) -> dict[str, float]:
        """Accuracy by task, and "mean" over all of them."""
        figures = self.metrics["zero_shot"].items()
        return {name: f["value"] for name, f in figures if isinstance(f, dict) and _is_number(f.get("value"))}

    @property
    def seconds(self) -> dict[str, float]:
        """Seconds of each phase of the process that ended the run."""
        return self.metrics["seconds"]

    @property
    def shares(self) -> dict[tuple[int, str], float]:
        """Pruned share by (layer, module), A_log among the modules."""
        found = {}
        for name, (pruned, total) in self.counts.items():
            place = _PARAMETER.search(name)
            if place and total:
                found[int(place[1]), place[2]] = pruned / total
        return found

    @property
    def sensitivities(self) -> dict[str, dict[int, float]]:
        """Sensitivity by module and layer, where the run took it."""
        found: dict[str, dict[int, float]] = {}
        for event in self.events:
            layer = event.get("layer")
            if event.get("event") == "layer" and event.get("phase") == "sensitivity" and _is_whole(layer):
                for module, value in event.items():
                    if _is_number(value) and abs(value) < _MOST and module not in ("seconds", "layer"):
                        found.setdefault(module, {})[layer] = value
        return found

    @property
    def removals(self) -> dict[int, float]:
        """Perplexity on the calibration text after each removed layer or SSM, in the order of removal."""
        found: dict[int, float] = {}
        for event in self.events if self.removes_parts else ():
            layer, value = event.get("layer"), event.get("perplexity", math.nan)
            if event.get("event") == "layer" and _is_whole(layer) and _is_number(value) and 0 < value < _MOST:
                found[layer] = float(value)
        return found

    @property
    def memory_after(self) -> dict[str, dict[str, float]]:
        """Peak bytes so far, by place, at the end of each phase of the process that ended the run."""
        found: dict[str, dict[str, float]] = {}
        for event in self.events:
            if event.get("event") == "phase" and isinstance(event.get("peak_memory_bytes"), dict):
                if event.get("phase") == "load":
                    found.clear()  # a resumed run starts again, in another process
                peaks = {where: peak for where, peak in event["peak_memory_bytes"].items() if _is_number(peak)}
                found[str(event.get("phase"))] = peaks
        return found

    @property
    def aggregation(self) -> tuple[str, float | None] | None:
        """(rule, parameter) by which scores over time became one; None where no score was taken over time."""
        method = METHODS.get(self.options["method"])
        if method is None or not self.options.get("prune_A") or method.obs_on_A_log:
            return None
        saliency = SALIENCIES.get(self.options.get("saliency") or method.saliency or "")
        rule = self.options.get("aggregate") or method.aggregate
        if saliency is None or saliency.interacts or not saliency.needs or rule is None:
            return None
        return rule, self.options.get(_TIME_OPTIONS.get(rule, ""), TIME_PARAMETERS.get(rule))

    @property
    def command(self) -> str:
        """The arguments after `python` that repeat this run, without paths of outputs."""
        known = {name: value for name, value in self.options.items() if name in DEFAULTS and name not in _SAID_APART}
        changed = {name: value for name, value in known.items() if value is not None and value != DEFAULTS[name]}
        return shlex.join(["main.py", self.model, str(self.options.get("dataset")), *words_of(changed)])

    def masks(self) -> dict[int, Tensor]:
        """Masks of A_log by layer, (D,N) bool, True = pruned, of Mamba-2 (1,H); in the shape from before a removal."""
        if not self.layers_with_masks:
            return {}
        with safe_open(self.folder / MASKS, "pt") as file:
            masks = {layer: file.get_tensor(name) for layer, name in sorted(self.layers_with_masks.items())}
        return {layer: mask.view(-1, mask.shape[-1]) for layer, mask in masks.items()}


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
        if "options.json" not in files:
            continue
        folders.clear()  # what a run holds (its journal, wandb's files) is not another run
        folder = Path(path)
        name = folder.relative_to(experiments).as_posix()
        if "metrics.json" not in files:
            runs.unfinished.append(name)
            continue
        try:
            runs.finished.append(read_run(folder, name))
        except InputError as error:
            runs.damaged.append((name, str(error)))
    runs.finished.sort(key=_order)
    return runs


def read_run(folder: Path, name: str | None = None) -> Record:
    """One finished run; name: what to call it (default: the last two parts of its path).

    Raises:
        InputError: a file of it is missing or does not have the expected content.
    """
    options = _read_json(folder / "options.json")
    metrics = _read_json(folder / "metrics.json")
    _check_options(options)
    metrics = {"zero_shot": {}, "dense_perplexity": {}, "versions": {}, **metrics}
    for key in ("perplexity", "dense_perplexity"):
        if isinstance(metrics.get(key), dict):
            metrics[key] = with_infinite(metrics[key])
    for key in ("perplexity", "dense_perplexity", "sparsity", "seconds", "peak_memory_bytes"):
        may_be_infinite = key.endswith("perplexity")
        known = isinstance(metrics.get(key), dict) and all(map(_is_number, metrics[key].values()))
        if not known or not (may_be_infinite or all(map(math.isfinite, metrics[key].values()))):
            raise InputError(f"metrics.json: {key} should hold numbers by name")
    for key in ("zero_shot", "versions"):
        if not isinstance(metrics[key], dict):
            raise InputError(f"metrics.json: {key} should hold values by name")
    return Record(
        folder=folder, name=name or "/".join(folder.absolute().parts[-2:]), options=without_own(options), metrics=metrics,
        counts=_read_counts(folder / "sparsity.json"), events=_read_events(folder / "events.jsonl"),
        layers_with_masks=_read_mask_names(folder / MASKS),
    )  # fmt: skip


def _order(record: Record) -> tuple[Any, ...]:
    methods = list(METHODS)
    rank = methods.index(record.method) if record.method in METHODS else len(methods)
    alpha, seed = (record.options.get(name) or 0 for name in ("alpha", "seed"))
    return record.model, record.parts, record.sparsity or 0.0, rank, record.method, alpha, seed, record.name


def _cannot_list(error: OSError) -> None:
    raise InputError(f"{error.filename} cannot be listed ({error.strerror}): make it readable")


def _is_number(value: Any) -> TypeGuard[float]:
    return isinstance(value, float) or _is_whole(value)


def _is_whole(value: Any) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and abs(value) < 1 << 63


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path.name} cannot be read ({first_line(error)})") from None
    if not isinstance(content, dict):
        raise InputError(f"{path.name} does not hold values by name")
    return content


# Options that are read here, what they may be, and the same in words.
_KINDS: tuple[tuple[tuple[str, ...], Callable[[Any], bool], str], ...] = (
    (("model",), lambda value: isinstance(value, str), "a name"),
    (("method",), lambda value: value is None or (isinstance(value, str) and value != ""), "a name or null"),
    (("saliency", "aggregate", "structure"), lambda value: isinstance(value, (str, type(None))), "a name or null"),
    (("sparsity",), lambda value: value is None or (_is_number(value) and 0 <= value <= 1), "a number from 0 to 1, or null"),
    (("prunen", "prunem", "seed", "seqlen"), lambda value: _is_whole(value), "a whole number"),
    (("alpha", "time_power", "time_discount", "time_window"), lambda value: _is_number(value) and math.isfinite(value),
     "a number"),
)  # fmt: skip


def _check_options(options: Mapping[str, Any]) -> None:
    for names, fits, words in _KINDS:
        for name in names:
            if (name in options or name in ("model", "method")) and not fits(options.get(name, "")):
                raise InputError(f"options.json: {name} should be {words}")


def _read_counts(path: Path) -> dict[str, tuple[int, int]]:
    if not path.exists():
        return {}
    content = _read_json(path)
    try:
        return {name: (int(count["pruned"]), int(count["total"])) for name, count in content.items()}
    except (TypeError, KeyError, ValueError, OverflowError):
        raise InputError(f"{path.name} should hold pruned and total of each parameter") from None


def _read_events(path: Path) -> tuple[dict[str, Any], ...]:
    """The lines that are whole: a killed run may have left half a one."""
    events = []
    if path.exists():
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            try:
                event = json.loads(line)
            except (ValueError, RecursionError):
                continue
            if isinstance(event, dict):
                events.append(event)
    return tuple(events)


def _read_mask_names(path: Path) -> dict[int, str]:
    if not path.exists():
        return {}
    found = {}
    try:
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118  (the file itself is not iterable)
                place, view = _PARAMETER.search(name), file.get_slice(name)
                shape = view.get_shape()
                if place and place[2] == "A_log" and view.get_dtype() == "BOOL" and len(shape) in (1, 2) and all(shape):
                    found[int(place[1])] = name
    except (OSError, SafetensorError) as error:
        raise InputError(f"{path.name} cannot be read ({error})") from None
    return found
