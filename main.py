"""Prune a Mamba language model in one shot, measure its perplexity, save it.

    python main.py MODEL DATASET --method sparsessm --prune_A --sparsity 0.5 --save OUT

Options -> load -> prune -> evaluate -> save -> report; each step is a call into `sparsessm`. See README.md.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import resource
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor

import sparsessm
from sparsessm import checkpoint, checks, memory, options, pipeline, ranks, saving, schedule, shedding, text
from sparsessm.errors import InputError
from sparsessm.evaluation import zero_shot
from sparsessm.evaluation.perplexity import perplexity
from sparsessm.evaluation.published import dense_warning
from sparsessm.model.block import MODULES
from sparsessm.options import Options
from sparsessm.reporting.journal import Journal
from sparsessm.reporting.tables import row, text_table
from sparsessm.reporting.tracking import Run, check_wandb
from sparsessm.walk import Stream

logger = logging.getLogger("sparsessm")


def run(chosen: Options, resumed: Path | None = None) -> dict[str, Any]:
    """One run from options to its row; returns what metrics.json holds.

    Args:
        resumed: the folder of an interrupted run with these options, to go on with.

    Raises:
        InputError: for whatever the user can mend, before the model is loaded where that can be known.
    """
    memory.keep_freed()
    device = _device(chosen.device)
    source = checkpoint.find(chosen.model)
    first, stop = checks.check_model(chosen, source.config)
    if chosen.method:
        text.check_dataset(chosen.dataset, chosen.data_dir, calibration=True)
    for name in chosen.evaluation_sets:
        text.check_dataset(name, chosen.data_dir, calibration=False)
    if chosen.save:
        saving.check_target(chosen.save, source)
    if chosen.log_wandb:
        check_wandb()
    _quiet()
    tasks = {}
    if chosen.eval_zero_shot:
        tasks = zero_shot.load_tasks(chosen.zero_shot_tasks, chosen.zero_shot_include, device)
    torch.manual_seed(chosen.seed)
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False

    device = ranks.start(device)
    speaks = ranks.is_main()
    log = Run(dataclasses.asdict(chosen), log_wandb=chosen.log_wandb, resumed=resumed, speaks=speaks)
    failed = True
    try:
        folder = Path(ranks.gather_text(str(log.folder))[0])
        journal = Journal(folder, writes=speaks)
        ranks.barrier()  # every process has read the journal before the first writes to it
        metrics = _Job(chosen, log, journal, folder, source, device, tasks).measure(first, stop)
        failed = False
        return metrics
    finally:
        log.close(failed)
        ranks.stop()


class _Job:
    """A run whose options have been checked: its inputs, its clock, and its steps in order."""

    def __init__(
        self, chosen: Options, log: Run, journal: Journal, folder: Path, source: checkpoint.Source, device: torch.device,
        tasks: dict[str, Any],
    ) -> None:  # fmt: skip
        self.chosen, self.log, self.journal, self.source, self.device = chosen, log, journal, source, device
        self.tasks = tasks
        budget = None if chosen.memory_budget is None else int(chosen.memory_budget * 2**30)
        offload = {"device": device, "cpu": "cpu", "disk": "disk"}[chosen.offload]
        self.placement = {"device": device, "offload": offload, "budget": budget, "scratch": folder}
        self.seconds = {"load": 0.0, "prune": 0.0, "eval": 0.0}
        self.shed = shedding.Shed()
        self.hashes: dict[str, str] = {}

    def measure(self, first: int, stop: int) -> dict[str, Any]:
        """All of the run; layers first <= i < stop are pruned."""
        chosen = self.chosen
        with self._timed("load"):
            self._read_texts()
            model = checkpoint.load(self.source, chosen.dtype)
            sizes = _sizes(model)
        logger.info(
            "model: %s, %d layers, %.1fM parameters", chosen.model, len(model.backbone.layers), sizes["model"] / 1e6
        )
        dense = {}
        if chosen.eval_dense or not chosen.method:
            with self._timed("eval"):
                dense = self._evaluate(model, "dense")
            self._compare_with_published(dense)
        with self._timed("prune"):
            masks = self._prune(model, first, stop)
        with self._timed("eval"):
            pruned = self._evaluate(model, "pruned") if chosen.method else dense
            accuracies = self._zero_shot(model)

        counts = {name: {"pruned": int(mask.sum()), "total": mask.numel()} for name, mask in masks.items()}
        counts |= {name: {"pruned": size, "total": size} for name, size in self.shed.gone.items()}
        self.log.write_json("sparsity.json", counts)
        self.log.write_tensors(
            "masks.safetensors", {name: mask for name, mask in masks.items() if name.endswith(".A_log")}
        )
        metrics = {
            "perplexity": pruned,
            "dense_perplexity": dense if chosen.eval_dense else {},
            "zero_shot": accuracies,
            "sparsity": _shares(sizes, counts),
            "seconds": {name: round(value, 3) for name, value in self.seconds.items()},
            "peak_memory_bytes": _peak_memory(self.device),
            "versions": _versions(),
            "data_sha256": self.hashes,
        }
        if self.shed.removed_layers:
            metrics["removed_layers"] = self.shed.removed_layers
        saved = self._save(model, masks, metrics) if chosen.save and ranks.is_main() else None
        self.log.finish(metrics, saved)
        self.journal.close()
        logger.info("run: %s", self.log.folder)
        return metrics

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        """Adds the time of a step to a phase; the clock is stopped only when the device is done."""
        start = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        took = time.perf_counter() - start
        self.seconds[phase] += took
        self.log.event("phase", phase=phase, took=round(took, 3), peak_memory_bytes=_peak_memory(self.device))

    def _read_texts(self) -> None:
        chosen = self.chosen
        self.tokenizer = checkpoint.load_tokenizer(self.source)
        self.windows: dict[str, Tensor] = {}
        for name in chosen.evaluation_sets:
            stream = text.evaluation_stream(name, self.tokenizer, chosen.seqlen, chosen.data_dir)
            self.windows[name] = text.cut_windows(stream.ids, chosen.seqlen, chosen.eval_windows)
            self.hashes[f"evaluation {name}"] = stream.sha256
            count = len(self.windows[name])
            logger.info("evaluation: %s; %d windows of %d tokens", stream.source, count, chosen.seqlen)
        for name, task in self.tasks.items():
            self.hashes[f"zero-shot {name}"] = zero_shot.documents_sha256(task)
            logger.info("zero-shot: %s; %d documents", name, len(task.eval_docs))
        if chosen.method:
            self.calibration = text.calibration_windows(
                chosen.dataset, self.tokenizer, chosen.nsamples, chosen.seqlen, chosen.seed, chosen.data_dir
            )
            self.hashes[f"calibration {chosen.dataset}"] = self.calibration.sha256
            source = self.calibration.source
            logger.info("calibration: %s; %d windows of %d tokens", source, chosen.nsamples, chosen.seqlen)
        self.journal.confirm("data_sha256", self.hashes, "the text")
        sizes = {file.name: file.stat().st_size for file in self.source.files}
        self.journal.confirm("weights", sizes, "the model")

    def _evaluate(self, model: torch.nn.Module, when: str) -> dict[str, float]:
        """Perplexity per data set; a figure that an interrupted run had taken is not taken again."""
        found = {}
        for index, (name, ids) in enumerate(self.windows.items()):
            value = self.journal.load_figures(f"{when}-{index}")
            if value is None:
                result = perplexity(model, ids, batch=self.chosen.eval_batch, report=self.log.report, **self.placement)
                value = result.value
                self.log.event("perplexity", when=when, dataset=name, value=value, windows=result.windows)
                self.journal.store_figures(f"{when}-{index}", value)
            found[name] = value
            logger.info("perplexity on %s: %.4f (%d windows)", name, value, len(ids))
        return found

    def _zero_shot(self, model: torch.nn.Module) -> dict[str, dict[str, Any]]:
        """Accuracies by task and their mean; {} where none is asked for and in all processes but the first."""
        if not self.tasks:
            return {}
        found = {}
        with zero_shot.first_process_works() as works:
            for index, (name, task) in enumerate(self.tasks.items() if works else ()):
                figure = self.journal.load_figures(f"zero-shot-{index}")
                if figure is None:
                    batch, device = self.chosen.zero_shot_batch, self.device
                    figure = zero_shot.accuracy(model, self.tokenizer, name, task, batch=batch, device=device)
                    self.log.event("zero_shot", task=name, **figure)
                    self.journal.store_figures(f"zero-shot-{index}", figure)
                found[name] = figure
                shown = f"{figure['metric']} {figure['value']:.4f} ({figure['documents']} documents)"
                logger.info("zero-shot %s: %s", name, shown)
        return zero_shot.with_mean(found) if found else {}

    def _compare_with_published(self, dense: dict[str, float]) -> None:
        for name, value in dense.items():
            full = self.chosen.eval_windows is None
            warning = dense_warning(self.chosen.model, name, value, seqlen=self.chosen.seqlen, all_windows=full)
            if warning:
                logger.warning("warning: %s", warning)

    def _prune(self, model: torch.nn.Module, first: int, stop: int) -> pipeline.Masks:
        chosen = self.chosen

        def embed() -> Stream:
            return Stream.embed(model, self.calibration.ids, batch=chosen.calib_batch, **self.placement)

        if chosen.method is None:
            return {}
        where = (first, stop, self.log.report, self.journal)
        if chosen.recipe.sheds:
            self.shed = shedding.shed(model, embed, self.calibration.ids, chosen.shed_plan(), *where)
            return self.shed.masks
        return schedule.prune(model, embed, *chosen.plans(), *where)

    def _save(self, model: torch.nn.Module, masks: pipeline.Masks, metrics: dict[str, Any]) -> Path:
        chosen = self.chosen
        kept = ("versions", "sparsity", "perplexity", "data_sha256", "removed_layers")
        record = {key: metrics[key] for key in kept if key in metrics}
        record["options"] = {
            key: value for key, value in dataclasses.asdict(chosen).items() if key not in options.PLACES
        }
        saved = saving.save(
            model, self.tokenizer, masks, record, chosen.save,
            layout=chosen.save_format, raw_zeros=chosen.raw_zeros,
            original_config=self.source.raw_config if self.source.layout == "state-spaces" else None,
        )  # fmt: skip
        logger.info("saved: %s", chosen.save)
        return saved


def _device(name: str) -> torch.device:
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError):
        raise InputError(f"--device {name} is not to be had here: use cpu, or a device that torch sees") from None
    return device


def _quiet() -> None:
    """Keeps the libraries' own bars and notices out of the log; ours says what there is to say."""
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "true")


def _sizes(model: torch.nn.Module) -> dict[str, int]:
    """Entries of A_log (ssm), of the weights of the five modules (layers), and of the whole model, tied ones once."""
    mixers = [layer.mixer for layer in model.backbone.layers]
    return {
        "ssm": sum(mixer.A_log.numel() for mixer in mixers),
        "layers": sum(mixer.get_submodule(name).weight.numel() for mixer in mixers for name in MODULES),
        "model": sum(parameter.numel() for parameter in model.parameters()),
    }


def _shares(sizes: dict[str, int], counts: dict[str, dict[str, int]]) -> dict[str, float]:
    """Pruned shares of what `_sizes` counted in the dense model; what was removed counts as pruned."""
    weights = tuple(f".mixer.{name}.weight" for name in MODULES)
    pruned = {
        "ssm": sum(count["pruned"] for name, count in counts.items() if name.endswith(".A_log")),
        "layers": sum(count["pruned"] for name, count in counts.items() if name.endswith(weights)),
        "model": sum(count["pruned"] for count in counts.values()),
    }
    return {name: pruned[name] / size for name, size in sizes.items()}


def _peak_memory(device: torch.device) -> dict[str, int]:
    """Peak of the process since it began, and of the device's allocator."""
    unit = 1 if sys.platform == "darwin" else 1024
    peak = {"process": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit}
    if device.type == "cuda":
        peak["cuda"] = torch.cuda.max_memory_allocated(device)
    return peak


def _versions() -> dict[str, str]:
    found = {"sparsessm": sparsessm.__version__, "python": sys.version.split()[0]}
    for package in ("torch", "transformers", "tokenizers", "safetensors", "numpy", "datasets", "mamba-ssm", "lm-eval"):
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found


def main(argv: Sequence[str]) -> int:
    """Exit code: 0, or 2 with one line that says what to do."""
    speaks = os.environ.get("RANK", "0") == "0"
    try:
        chosen, resumed = options.parse(argv)
        metrics = run(chosen, resumed)
    except InputError as error:
        if speaks:
            print(f"error: {error}", file=sys.stderr)
        return 2
    if speaks:
        print(text_table([row(chosen.method, metrics)]))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
