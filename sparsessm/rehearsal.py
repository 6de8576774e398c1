"""A dry run: what would be pruned, and the time and memory to expect, by a trial of one layer of each kind."""

from __future__ import annotations

import copy
import json
import os
import pickle
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from sparsessm.corpora import text
from sparsessm.errors import MemoryLimitError
from sparsessm.layerwise.memory import default_budget, keep_freed, peak_memory, placement
from sparsessm.layerwise.parity import check_parity
from sparsessm.layerwise.stream import Stream
from sparsessm.metrics.perplexity import perplexity
from sparsessm.models import checkpoint
from sparsessm.models.architecture import Layout
from sparsessm.models.tokenizing import load_tokenizer
from sparsessm.options import Options
from sparsessm.procedure.driver import Job
from sparsessm.procedure.fitting import Fit, fitted
from sparsessm.procedure.plan import Plan, plan_of
from sparsessm.procedure.prune import prune
from sparsessm.pruning.methods import WHOLE
from sparsessm.report.tables import text_table
from sparsessm.report.wording import bytes_text, percent_text, plural

# Tokens of the first trial, whose time does not count.
_WARM = 64
_REMOVED = {"ssm": "SSM branches", "mamba_block": "whole layers"}
# Bytes of a number of the residual stream.
_STREAM = 4


def rehearse(chosen: Options, source: checkpoint.Source, first: int, stop: int, device: torch.device) -> str:
    """Reads the text and the config, tries one layer of each kind with random weights, and says what a run would take.

    Nothing is written, and the weights of the model are not loaded.

    Args:
        first, stop: layers first <= i < stop would be pruned.

    Raises:
        InputError: the text cannot be read, or is too short.
    """
    tokenizer = load_tokenizer(source)
    windows = {
        name: text.evaluation_windows(name, tokenizer, chosen.seqlen, chosen.eval_windows, chosen.data_dir)
        for name in chosen.evaluation_sets
    }
    calibration = torch.empty(0, chosen.seqlen, dtype=torch.int64)
    if chosen.method:
        calibration = text.calibration_windows(
            chosen.dataset, tokenizer, chosen.nsamples, chosen.seqlen, chosen.seed, chosen.data_dir
        ).ids
    layout = Layout(checkpoint.skeleton(source))
    dtype = checkpoint.DTYPES.get(chosen.dtype) or getattr(source.config, "dtype", None) or torch.float32
    plan = plan_of(chosen, layout.targets(chosen.target_modules, chosen.parts, chosen.module))
    fit = fitted(chosen, plan, layout, device, len(calibration), max(map(len, windows.values()), default=0))
    size = _bytes(layout, dtype)
    told = ", ".join(f"{plural(len(ids), 'window')} of {name}" for name, ids in windows.items()) or "none"
    lines = [
        _what(chosen, layout, plan, first, stop),
        f"model: {chosen.model}, {plural(len(layout.layers), 'layer')}, {bytes_text(size)} in {str(dtype)[6:]}",
        f"text: {plural(len(calibration), 'window')} of {chosen.seqlen} tokens to calibrate, {told} to evaluate",
    ]
    if fit.told:
        lines.append(fit.told)
    if chosen.save:
        lines.append(f"saved: about {bytes_text(size)} in {chosen.save}")
    if plan.removal is not None or layout.row.without_layer is None:
        why = "it tries every removal" if plan.removal else f"layers of {source.config.model_type} share weights"
        lines.append(f"time and memory: not known before the run, because {why}")
    else:
        trial, missing = _trial(chosen, fit, layout, plan, device, dtype)
        width = layout.model.get_input_embeddings().weight.shape[1]
        lines += _expected(trial, missing, size, width, calibration, list(windows.values()))
    if plan.recovery.kinds:
        lines.append("recovery: not part of this; it keeps the dense model beside the pruned one")
    return "\n".join(lines)


def _bytes(layout: Layout, dtype: torch.dtype) -> int:
    parameters = layout.model.named_parameters()
    return sum(p.numel() * (4 if name.endswith(".A_log") else dtype.itemsize) for name, p in parameters)


def _pruned(layout: Layout, plan: Plan, first: int, stop: int) -> dict[str, Counter[str]]:
    """Of A_log, or what goes whole, and of each module that would be pruned: its layers and entries."""
    found: dict[str, Counter[str]] = {}
    for index in range(first, stop):
        layer = layout.layers[index]
        mixer, modules = layout.mixer(layer), layout.modules(layer)
        weights: dict[str, Tensor] = {}
        if mixer is not None and plan.transitions:
            structure = plan.transitions.structure
            scored = mixer.scored(structure)
            weights = {WHOLE.get(structure, "A_log"): scored if structure == "entries" else scored[0]}
        if plan.removal:
            weights = {_REMOVED[plan.removal.target]: torch.empty(1, device="meta")}
        for name in plan.weights.modules if plan.weights else ():
            if name in modules:
                weights[name] = layer.get_parameter(f"{modules[name].path}.weight")
        for name, weight in weights.items():
            found.setdefault(name, Counter()).update(layers=1, entries=weight.numel())
    return found


def _what(chosen: Options, layout: Layout, plan: Plan, first: int, stop: int) -> str:
    """The table of what would be pruned."""
    if chosen.method is None:
        return "nothing would be pruned: there is no --method"
    share = chosen.prunen / chosen.prunem if chosen.prunem else chosen.share
    rows = [
        {"what": name, "layers": str(count["layers"]), "entries": f"{count['entries']:,}", "goes": percent_text(share)}
        for name, count in _pruned(layout, plan, first, stop).items()
    ]
    return f"would be pruned by {chosen.method}, nothing was written:\n{text_table(rows)}"


class _Clock:
    """Seconds by phase and layer, as a run reports them."""

    def __init__(self) -> None:
        self.took: dict[tuple[str, int], float] = {}
        self.last = time.perf_counter()

    def __call__(self, phase: str, layer: int, **_: float) -> None:
        now = time.perf_counter()
        self.took[phase, layer] = self.took.get((phase, layer), 0.0) + now - self.last
        self.last = now


@dataclass
class _Trial:
    """A run on a model of one layer of each kind, with random weights.

    Attributes:
        counts: how many layers of the whole model each of them stands for.
    """

    chosen: Options
    fit: Fit
    plan: Plan
    config: Any
    counts: Sequence[int]
    dtype: torch.dtype
    device: torch.device

    def alone(self, calibration: Tensor, windows: Sequence[Tensor]) -> dict[str, Any]:
        """`run` in a process of its own, whose memory nothing was in before."""
        given = pickle.dumps((self, calibration.clone(), [ids.clone() for ids in windows]))
        place = os.pathsep.join(filter(None, (str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH"))))
        done = subprocess.run(
            [sys.executable, "-m", __name__], input=given, capture_output=True, env=os.environ | {"PYTHONPATH": place},
            start_new_session=True,
        )  # fmt: skip
        if done.returncode:
            last = (done.stderr.decode(errors="replace").strip().splitlines() or [f"it ended with {done.returncode}"])[-1]
            raise MemoryLimitError(f"the trial of a layer failed ({last[:200]}): lower --calib_batch and --eval_batch")
        found: dict[str, Any] = json.loads(done.stdout)
        return found

    def run(self, calibration: Tensor, windows: Sequence[Tensor]) -> dict[str, Any]:
        """Seconds for all layers of the whole model to prune, and to evaluate each text; peaks of memory after each."""
        model = AutoModelForCausalLM.from_config(self.config, dtype=self.dtype).eval()
        checkpoint.widen_A_log(model.requires_grad_(False))
        layout = Layout(model)
        check_parity(layout, self.chosen.model, self.device)
        found: dict[str, Any] = {"prune": 0.0, "eval": []}
        if len(calibration):
            self._prune(layout, calibration[:1, :_WARM], _Clock())  # kernels are compiled or loaded
            found["prune"] = self._seconds(lambda clock: self._prune(layout, calibration, clock))
        found["peak"] = peak_memory(self.device)
        place = placement(self.device, self.fit.offload, self.chosen.memory_budget) | {"batch": self.fit.eval_batch}
        for ids in windows:
            found["eval"].append(self._seconds(partial(_evaluate, layout, ids, place)))
        return found | {"peak_eval": peak_memory(self.device)}

    def _seconds(self, run: Callable[[_Clock], Any]) -> float:
        clock = _Clock()
        start = clock.last
        run(clock)
        layers = sum(took * self.counts[layer] for (_, layer), took in clock.took.items())
        return layers + time.perf_counter() - start - sum(clock.took.values())

    def _prune(self, layout: Layout, windows: Tensor, clock: _Clock) -> None:
        place = placement(self.device, self.fit.offload, self.chosen.memory_budget) | {"batch": self.fit.calib_batch}
        if self.plan.transitions and self.plan.transitions.pattern.removes:
            layout = Layout(copy.deepcopy(layout.model))  # it can be removed once
        prune(Job(layout, lambda: Stream.embed(layout, windows, **place), 0, len(self.counts), clock), self.plan, windows)


def _evaluate(layout: Layout, ids: Tensor, place: dict[str, Any], clock: _Clock) -> None:
    perplexity(layout, ids, report=clock, **place)


def _trial(
    chosen: Options, fit: Fit, layout: Layout, plan: Plan, device: torch.device, dtype: torch.dtype
) -> tuple[_Trial, int]:
    """A trial of the first layer of each kind, and the bytes of weights and masks that its model is short of."""
    kinds = [
        (type(layer).__name__, *((name, tuple(weight.shape)) for name, weight in layer.named_parameters()))
        for layer in layout.layers
    ]
    kept = sorted({kinds.index(kind) for kind in kinds})

    def size(layout: Layout) -> int:
        pruned = _pruned(layout, plan, 0, len(layout.layers)).values()
        return _bytes(layout, dtype) + sum(count["entries"] for count in pruned)  # a mask has a byte for each entry

    whole = size(layout)
    small = Layout(copy.deepcopy(layout.model))
    for index in reversed(range(len(kinds))):
        if index not in kept:
            small.remove_layer(index)
    counts = [kinds.count(kinds[index]) for index in kept]
    return _Trial(chosen, fit, plan, small.model.config, counts, dtype, device), whole - size(small)


def _expected(
    trial: _Trial, missing: int, size: int, width: int, calibration: Tensor, windows: Sequence[Tensor]
) -> list[str]:
    """The lines about time and memory, for windows (n,L) of calibration and of each text.

    missing: bytes of the whole model that the trial's has not. size: bytes of its weights. width: of the stream.
    """
    chosen, fit, start = trial.chosen, trial.fit, time.perf_counter()
    stream = 0 if fit.offload == "disk" else chosen.seqlen * width * _STREAM  # of a window
    parts = [ids[: fit.eval_batch] for ids in windows]
    counts = sorted({min(fit.calib_batch * times, len(calibration)) for times in (1, 2)})
    runs = [trial.alone(calibration[:count], parts if count == counts[-1] else []) for count in counts]
    pruning, peak = runs[-1]["prune"], runs[-1]["peak"]["process"]
    if more := len(calibration) - counts[-1]:  # there were two runs
        step = counts[1] - counts[0]
        # of the time per window neither less than nothing nor more than all can be found
        pruning += min(max(0.0, pruning - runs[0]["prune"]) / step, pruning / counts[1]) * more
        waiting = stream * (2 if trial.plan.compensation else 1)
        kept = max(0.0, (peak - runs[0]["peak"]["process"]) / step - waiting) * more
        budget = default_budget(trial.device) if chosen.memory_budget is None else chosen.memory_budget * 2**30
        peak += int(waiting * more + min(kept, budget))
    twice = 1 + (chosen.eval_dense and chosen.method is not None)
    pairs = list(zip(windows, parts, runs[-1]["eval"], strict=True))
    evaluation = sum(took * len(ids) / len(part) * twice for ids, part, took in pairs)
    after = [runs[-1]["peak_eval"]["process"] + stream * (len(ids) - len(part)) for ids, part, _ in pairs]
    reading = peak_memory(trial.device)["process"]  # of this process, which made tokens of the text as a run does
    peak = max([peak, *after, reading]) + missing
    lines = [
        f"time: about {_clock_text(pruning + evaluation)} on this machine, {_clock_text(pruning)} of it to prune and "
        f"{_clock_text(evaluation)} to evaluate; loading and saving are not counted",
        f"memory: about {bytes_text(peak)} of the process, {bytes_text(size)} of it the weights",
    ]
    if trial.device.type == "cuda":
        lines.append(f"memory of the device: about {bytes_text(runs[-1]['peak_eval']['cuda'])}")
    if fit.offload == "disk":
        rows = max([len(calibration), *map(len, windows)])
        lines.append(f"disk: {bytes_text(rows * chosen.seqlen * width * _STREAM)} in the run folder while it runs")
    spent = f"{len(trial.counts)} of {sum(trial.counts)} layers with random weights on {plural(counts[-1], 'window')}"
    return [*lines, f"by a trial of {spent}, which took {_clock_text(time.perf_counter() - start)}"]


def _clock_text(seconds: float) -> str:
    """12 s, 3 min 20 s, 2 h 5 min."""
    whole = max(1, round(seconds))
    if whole < 60:
        return f"{whole} s"
    return f"{whole // 60} min {whole % 60} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60} min"


def _answer() -> None:
    """Runs the trial that stands on the standard input, and prints what it found."""
    keep_freed()
    trial, calibration, windows = pickle.load(sys.stdin.buffer)
    torch.manual_seed(0)
    print(json.dumps(trial.run(calibration, windows)))


if __name__ == "__main__":
    _answer()
