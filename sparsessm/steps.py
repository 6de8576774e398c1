"""The steps of a run in order: load, check against stock, prune, evaluate, save, report."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from sparsessm.commandline import reproducing
from sparsessm.corpora import text
from sparsessm.corpora.names import HUB_IDS
from sparsessm.errors import InputError, NumericalError
from sparsessm.layerwise import distributed
from sparsessm.layerwise.memory import peak_memory, placement
from sparsessm.layerwise.parity import check_parity
from sparsessm.layerwise.stream import Stream
from sparsessm.metrics import zero_shot
from sparsessm.metrics.continuation import continuation
from sparsessm.metrics.perplexity import perplexity
from sparsessm.metrics.published import dense_warning
from sparsessm.models import checkpoint, history, saving
from sparsessm.models.architecture import Layout
from sparsessm.models.card import Facts, origin_of
from sparsessm.models.hub import push
from sparsessm.models.place import Place
from sparsessm.models.tokenizing import load_tokenizer, tokenizer_sha256
from sparsessm.options import Options
from sparsessm.procedure.driver import Job
from sparsessm.procedure.fitness import check_rest, without_ssm
from sparsessm.procedure.fitting import fitted
from sparsessm.procedure.plan import plan_of
from sparsessm.procedure.prune import prune, reports
from sparsessm.procedure.recovery import recover
from sparsessm.procedure.removal import RemovedParts
from sparsessm.result import Result, result_of, versions
from sparsessm.runs.journal import Journal, is_number
from sparsessm.runs.tracking import Run

logger = logging.getLogger("sparsessm")


class Steps:
    """A run whose options have been checked: its inputs, its clock, and its steps in order."""

    def __init__(
        self, chosen: Options, log: Run, journal: Journal, folder: Path, source: checkpoint.Source, device: torch.device,
        tasks: dict[str, Any],
    ) -> None:  # fmt: skip
        self.chosen, self.log, self.journal, self.source, self.device = chosen, log, journal, source, device
        self.tasks = tasks
        self.folder = folder
        self.seconds = {"load": 0.0, "prune": 0.0, "eval": 0.0}
        self.result = Result()
        self.hashes: dict[str, str] = {}
        self.texts: dict[str, str] = {}
        self.notes: dict[str, str] = {}
        self.place: Place | None = None

    def close(self) -> None:
        """Releases the place of the checkpoint."""
        if self.place is not None:
            self.place.close()

    def measure(self, first: int, stop: int) -> dict[str, Any]:
        """All of the run; layers first <= i < stop are pruned."""
        chosen = self.chosen
        with self._timed("load"):
            layout = self._load(first, stop)
            model = layout.model
        self.log.expect(self._reports(layout, first, stop))
        dense: dict[str, float] = {}
        written = {"before": self._written(model, "before")} if chosen.generate and chosen.method else {}
        if chosen.eval_dense or not chosen.method:
            with self._timed("eval"):
                dense = self._evaluate(layout, "dense")
            if not self.history:
                self._compare_with_published(dense)
        with self._timed("prune"):
            self.result = result_of(self.history, self.ledger, self._prune(layout, first, stop))
        if chosen.recover:
            with self._timed("recover"):
                self._recover(layout, first, stop)
        metrics = self._metrics()
        try:
            with self._timed("eval"):
                pruned = self._evaluate(layout, "pruned") if chosen.method else dense
        except NumericalError:
            self._save(model, metrics)  # a failing evaluation does not lose the pruned model
            raise
        metrics["perplexity"] = pruned
        metrics["dense_perplexity"] = dense if chosen.eval_dense else {}
        if self.notes:
            metrics["perplexity_notes"] = self.notes
        if chosen.generate:
            metrics["generated"] = written | {"after": self._written(model, "after")}
        self.log.write_json("sparsity.json", metrics.pop("counts"))
        self.log.write_tensors(
            "masks.safetensors", {name: mask for name, mask in self.result.masks.items() if name.endswith(".A_log")}
        )
        saved = self._save(model, metrics)
        if self.tasks:
            with self._timed("eval"):
                metrics["zero_shot"] = self._zero_shot(model)
            if saved is not None:
                facts = self._facts(metrics)
                saving.rewrite_card(saved, self._record(metrics), facts, model.config.model_type, chosen.save_format)
        metrics["seconds"] = {name: round(value, 3) for name, value in self.seconds.items()}
        metrics["peak_memory_bytes"] = peak_memory(self.device)
        self.log.finish(metrics, saved if chosen.wandb_checkpoint else None)
        self.journal.close()
        logger.info("run: %s", self.log.folder)
        if saved is not None and chosen.push_to_hub is not None:
            logger.info("pushed: %s", push(saved, chosen.push_to_hub, chosen.private))
        return metrics

    @contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        """Adds the time of a step to a phase; the clock is stopped only when the device is done."""
        start = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        took = time.perf_counter() - start
        self.seconds[phase] = self.seconds.get(phase, 0.0) + took
        self.log.event("phase", phase=phase, took=round(took, 3), peak_memory_bytes=peak_memory(self.device))

    def _load(self, first: int, stop: int) -> Layout:
        """Text, tokenizer and model, checked against each other, against stock and against the interrupted run."""
        chosen = self.chosen
        self.tokenizer = load_tokenizer(self.source)
        self._read_texts()
        model = checkpoint.load(self.source, chosen.dtype)
        self.model_hashes = {"weights": checkpoint.fingerprint(model), "tokenizer": tokenizer_sha256(self.tokenizer)}
        self.journal.confirm("model", self.model_hashes, "the model")
        layout = Layout(model)
        parity = check_parity(layout, chosen.model, self.device)
        self.log.event("parity", difference=parity.difference, where=parity.where, took=round(parity.seconds, 3))
        self.history = history.read_history(self.source.folder, layout)
        self.ledger = history.Ledger(layout, self.history)
        logger.info(
            "model: %s, %d layers, %.1fM parameters; as stock transformers computes it to %.0e (%.1f s)",
            chosen.model, len(layout.layers), self.ledger.sizes["model"] / 1e6, parity.difference, parity.seconds,
        )  # fmt: skip
        if self.history:
            shares = self.ledger.shares(history.counts_of(self.history.masks))
            told = ", ".join(f"{name} {share:.1%}" for name, share in shares.items() if share)
            logger.info("pruned before (%s): %s was pruned; it stays pruned, and counts", self.history, told)
        self.plan = plan_of(chosen, layout.targets(chosen.target_modules, chosen.parts, chosen.module))
        if self.plan.weights and (dense := layout.dense()):
            largest = sorted(dense, key=lambda name: -dense[name])[:3]
            logger.info(
                "stay dense, being shared by layers or no plain linear modules: %.2fM entries of %d weights, as %s",
                sum(dense.values()) / 1e6, len(dense), ", ".join(largest),
            )  # fmt: skip
        check_rest(chosen, self.plan, layout, self.history, first, stop)
        self._place(layout)
        if (self.plan.transitions or self.plan.removal) and (bare := without_ssm(layout, first, stop)):
            logger.info("layers without an SSM, whose A_log is not there to prune: %s", ", ".join(map(str, bare)))
        if chosen.save and distributed.is_main():
            self.place = Place(chosen.save, saving.size_needed(model))
            saving.write_tokenizer(self.tokenizer, self.place.staging)
        return layout

    def _place(self, layout: Layout) -> None:
        """Settles where block inputs wait, and how many windows are computed together."""
        calibration = len(self.calibration.ids) if self.chosen.method else 0
        largest = max(map(len, self.windows.values()), default=0)
        self.fit = fitted(self.chosen, self.plan, layout, self.device, calibration, largest)
        self.placement = placement(self.device, self.fit.offload, self.chosen.memory_budget) | {"scratch": self.folder}
        if self.fit.told:
            logger.info("%s", self.fit.told)

    def _read_texts(self) -> None:
        chosen = self.chosen
        self.windows: dict[str, Tensor] = {}
        for name in chosen.evaluation_sets:
            stream = text.evaluation_stream(name, self.tokenizer, chosen.seqlen, chosen.data_dir)
            self.windows[name] = text.cut_windows(stream.ids, chosen.seqlen, chosen.eval_windows)
            self.hashes[f"evaluation {name}"] = stream.sha256
            self.texts[f"evaluation {name}"] = stream.text_sha256
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
            same = [name for name, sha256 in self.texts.items() if sha256 == self.calibration.text_sha256]
            self.texts[f"calibration {chosen.dataset}"] = self.calibration.text_sha256
            source = self.calibration.source
            logger.info("calibration: %s; %d windows of %d tokens", source, chosen.nsamples, chosen.seqlen)
            if same:
                logger.warning("warning: calibrated on the text of %s: its perplexity says nothing of other text", same[0])
        rows = self.source.config.vocab_size
        for ids in (*self.windows.values(), *([self.calibration.ids] if chosen.method else [])):
            if int(ids.max()) >= rows:
                raise InputError(f"the text has the token id {int(ids.max())}, and the model's embedding {rows} rows")
        self.journal.confirm("data_sha256", self.hashes, "the text")

    def _evaluate(self, layout: Layout, when: str) -> dict[str, float]:
        """Perplexity per data set; a figure of an interrupted run is not computed again."""
        found = {}
        for index, (name, ids) in enumerate(self.windows.items()):
            figure = self.journal.load_figures(f"{when}-{index}", _is_perplexity)
            if figure is None:
                result = perplexity(layout, ids, batch=self.fit.eval_batch, report=self.log.report, **self.placement)
                figure = {"value": result.value if math.isfinite(result.value) else None, "note": result.note}
                self.log.event("perplexity", when=when, dataset=name, windows=result.windows, **figure)
                self.journal.store_figures(f"{when}-{index}", figure)
            found[name] = math.inf if figure["value"] is None else figure["value"]
            if figure["note"]:
                self.notes[f"{when} {name}"] = figure["note"]
            logger.info("perplexity on %s: %.4f (%d windows)", name, found[name], len(ids))
        return found

    def _written(self, model: PreTrainedModel, when: str) -> str:
        """How the model continues the text of --generate; "" in all processes but the first."""
        assert self.chosen.generate is not None
        with self._timed("eval"), distributed.first_process_works() as works:
            if not works:
                return ""
            text = continuation(model, self.tokenizer, self.chosen.generate, self.device)
            where = f"{when} pruning" if self.chosen.method else "by the model"
            logger.info("written %s: %s", where, json.dumps(text, ensure_ascii=False))
            return text

    def _zero_shot(self, model: torch.nn.Module) -> dict[str, dict[str, Any]]:
        """Accuracies by task and their mean; {} where none is asked for and in all processes but the first."""
        if not self.tasks:
            return {}
        found = {}
        with distributed.first_process_works() as works:
            for index, (name, task) in enumerate(self.tasks.items() if works else ()):
                figure = self.journal.load_figures(f"zero-shot-{index}", _is_accuracy)
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

    def _job(self, layout: Layout, first: int, stop: int) -> Job:
        def embed() -> Stream:
            batch, gone = self.fit.calib_batch, self.history.present()
            return Stream.embed(layout, self.calibration.ids, batch=batch, gone=gone, **self.placement)

        return Job(layout, embed, first, stop, self.log.report, self.journal)

    def _prune(self, layout: Layout, first: int, stop: int) -> RemovedParts:
        if self.chosen.method is None:
            return RemovedParts()
        return prune(self._job(layout, first, stop), self.plan, self.calibration.ids)

    def _recover(self, layout: Layout, first: int, stop: int) -> None:
        dense = Layout(checkpoint.load(self.source, self.chosen.dtype))
        masks = {**self.history.present(), **self.result.masks}
        recover(self._job(layout, first, stop), self._job(dense, first, stop), masks, self.plan.recovery)

    def _reports(self, layout: Layout, first: int, stop: int) -> int:
        """How many layers will be reported; of whole layers that are removed a few less."""
        times = self.chosen.eval_dense + 1 if self.chosen.method else 1
        pruned = reports(self._job(layout, first, stop), self.plan) if self.chosen.method else 0
        return pruned + times * len(self.windows) * len(layout.layers)

    def _metrics(self) -> dict[str, Any]:
        """The metrics of a run after pruning; `counts` is for sparsity.json."""
        metrics: dict[str, Any] = {
            "perplexity": {}, "dense_perplexity": {}, "zero_shot": {},
            "sparsity": self.result.sparsity, "seconds": {}, "peak_memory_bytes": {}, "versions": versions(),
            "data_sha256": self.hashes, "text_sha256": self.texts, "model_sha256": self.model_hashes,
            "counts": self.result.counts,
        }  # fmt: skip
        if self.result.removed_layers:
            metrics["removed_layers"] = self.result.removed_layers
        return metrics

    def _save(self, model: PreTrainedModel, metrics: Mapping[str, Any]) -> Path | None:
        """Writes the checkpoint to its place."""
        chosen = self.chosen
        if self.place is None:
            return None
        saving.write_model(
            model, self.result.masks, self._record(metrics), self.place, layout=chosen.save_format,
            raw_zeros=chosen.raw_zeros, facts=self._facts(metrics),
            original_config=self.source.raw_config if self.source.layout == "state-spaces" else None,
        )  # fmt: skip
        self.journal.store_figures("saved", self.place.stamp)
        saved = self.place.publish()
        logger.info("saved: %s", chosen.save)
        return saved

    def _record(self, metrics: Mapping[str, Any]) -> dict[str, Any]:
        """What sparsessm.json holds."""
        kept = ("versions", "sparsity", "perplexity", "perplexity_notes", "data_sha256", "text_sha256", "removed_layers")
        record = {key: metrics[key] for key in kept if key in metrics}
        return record | {"options": self.chosen.settings, **self.result.past}

    def _facts(self, metrics: Mapping[str, Any]) -> Facts:
        """What the model card says besides."""
        chosen = self.chosen
        datasets = [HUB_IDS[chosen.dataset]] if chosen.method and chosen.dataset in HUB_IDS else []
        return Facts(
            origin_of(chosen.model, self.source.folder), datasets, reproducing(chosen), metrics["dense_perplexity"],
            metrics["zero_shot"],
        )  # fmt: skip


def _is_perplexity(figure: Any) -> bool:
    value, note = figure["value"], figure["note"]
    return (value is None or (is_number(value) and value > 0)) and (note is None or isinstance(note, str))


def _is_accuracy(figure: Any) -> bool:
    known = isinstance(figure["metric"], str) and is_number(figure["value"]) and isinstance(figure["documents"], int)
    return known and (figure["stderr"] is None or is_number(figure["stderr"]))
