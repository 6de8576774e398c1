"""The public functions, for notebooks and other people's scripts. `import sparsessm` gives them; see docs/EXTENDING.md."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparsessm.corpora import text
from sparsessm.errors import InputError
from sparsessm.layerwise.memory import device_named, placement
from sparsessm.layerwise.parity import check_parity
from sparsessm.layerwise.stream import Stream
from sparsessm.metrics.perplexity import perplexity as perplexity_of
from sparsessm.models import checkpoint, saving
from sparsessm.models.architecture import Layout
from sparsessm.models.card import Facts, Origin, origin_of
from sparsessm.models.history import History, Ledger, read_history
from sparsessm.models.place import check_target
from sparsessm.models.tokenizing import load_tokenizer
from sparsessm.options import Options
from sparsessm.procedure.driver import Job, no_report
from sparsessm.procedure.fitness import check_model, check_rest
from sparsessm.procedure.fitting import fitted
from sparsessm.procedure.plan import Plan, plan_of
from sparsessm.procedure.prune import prune as prune_by_plan
from sparsessm.procedure.recovery import recover
from sparsessm.procedure.removal import RemovedParts
from sparsessm.result import Result, result_of, versions

# What `prune` calls the two phases of the paper, and the option that asks for each.
PARTS = {"A_log": "prune_A", "weights": "prune_layers"}

# What was pruned before, by model: what `load` found and `prune` did.
_histories: WeakKeyDictionary[PreTrainedModel, History] = WeakKeyDictionary()
# Where a model came from, for the card of `save`.
_origins: WeakKeyDictionary[PreTrainedModel, Origin] = WeakKeyDictionary()
# Options and result of the last run, for the record of `save`.
_runs: WeakKeyDictionary[PreTrainedModel, dict[str, Any]] = WeakKeyDictionary()
_results: WeakKeyDictionary[PreTrainedModel, Result] = WeakKeyDictionary()


def load(name: str, dtype: str = "auto") -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A model on the CPU as stock `transformers` loads it, and its tokenizer.

    Args:
        name: a hub id, a folder in the Hugging Face or the state-spaces layout, or "demo".
        dtype: of the weights: auto, float32, bfloat16, float16; A_log is float32 in any case.

    Raises:
        sparsessm.errors.InputError: one line that says what is wrong and what to do.
    """
    source = checkpoint.find(name)
    tokenizer = load_tokenizer(source)
    model = checkpoint.load(source, dtype)
    _histories[model] = read_history(source.folder, Layout(model))
    _origins[model] = origin_of(name, source.folder)
    return model, tokenizer


def calibration(
    dataset: str, tokenizer: PreTrainedTokenizerBase, *, nsamples: int = 128, seqlen: int = 2048, seed: int = 0,
    data_dir: str | Path | None = None,
) -> Tensor:  # fmt: skip
    """Calibration windows (nsamples,seqlen) int64, drawn as the command line draws them (SparseSSM, section 4.1).

    Args:
        dataset: wikitext2, ptb, c4, demo, NAME[:CONFIG[:SPLIT[:COLUMN]]] of the hub, or a file or folder (data/README.md).
        data_dir: with local copies of the first three.

    Raises:
        sparsessm.errors.InputError: the text is not available, or is too short.
    """
    return text.calibration_windows(dataset, tokenizer, nsamples, seqlen, seed, data_dir).ids


def evaluation(
    dataset: str, tokenizer: PreTrainedTokenizerBase, *, seqlen: int = 2048, windows: int | None = None,
    data_dir: str | Path | None = None,
) -> Tensor:  # fmt: skip
    """The test text in windows (n,seqlen) int64; `windows` keeps the first ones.

    Raises:
        sparsessm.errors.InputError: the text is not available, or is shorter than a window.
    """
    return text.evaluation_windows(dataset, tokenizer, seqlen, windows, data_dir)


def perplexity(
    model: PreTrainedModel, windows: Tensor, *, batch: int | None = None, device: str = "auto", offload: str = "auto"
) -> float:
    """exp of the mean negative log likelihood of L-1 tokens in each of the windows (n,L); no number beyond exp(700).

    Args:
        batch, device, offload: --eval_batch, --device and --offload of the command line.

    Raises:
        sparsessm.errors.InputError: there is no such device.
        sparsessm.errors.DivergenceError: a layer or the head outputs values that are not finite.
    """
    layout, where = Layout(model), device_named(device)
    asked = Options(model="-", dataset="-", seqlen=windows.shape[1], eval_batch=batch, offload=offload)
    fit = fitted(asked, Plan(), layout, where, evaluation=len(windows))
    return perplexity_of(layout, windows, batch=fit.eval_batch, **placement(where, fit.offload, None)).value


def prune(
    model: PreTrainedModel,
    windows: Tensor,
    method: str = "sparsessm_obs",
    *,
    sparsity: float | None = None,
    parts: Sequence[str] = ("A_log",),
    device: str = "auto",
    offload: str = "auto",
    report: Callable[..., None] = no_report,
    **options: Any,
) -> Result:
    """Prunes a model in place, as the command line does; entries that were pruned before stay pruned, and count.

    Args:
        windows: (n,L) int64 calibration windows of token ids, from `calibration` or your own.
        method: a name of METHODS (README.md). sparsity: share of the entries to prune, between 0 and 1.
        parts: "A_log", "weights" or both. device, offload, options: flags of the command line by their names, as
            prunen=2, prunem=4.
        report: called for each finished layer, report(phase, layer, **figures).

    Returns:
        Masks by parameter name, pruned shares, and what `save` needs to know.

    Raises:
        sparsessm.errors.InputError: options that do not fit the model, before anything is changed; or a model
            that stock `transformers` of this version computes in another way.
        sparsessm.errors.NumericalError: a Hessian or a stream without finite values, with the parameter's name.
    """
    unknown = sorted(set(parts) - PARTS.keys()) + sorted(set(options) - {spec.name for spec in dataclasses.fields(Options)})
    if unknown:
        raise InputError(f"prune does not know {unknown[0]}: parts are {', '.join(PARTS)}, options are main.py's flags")
    asked: dict[str, Any] = {flag: part in parts for part, flag in PARTS.items()}
    count, seqlen = windows.shape
    chosen = Options(
        model="-", dataset="-", method=method, sparsity=sparsity, nsamples=count, seqlen=seqlen, offload=offload, **asked,
        **options,
    )  # fmt: skip
    layout, where = Layout(model), device_named(device)
    first, stop = check_model(chosen, layout)
    check_parity(layout, "the model", where)
    history = history_of(model, layout)
    ledger = Ledger(layout, history)
    plan = plan_of(chosen, layout.targets(chosen.target_modules, chosen.parts, chosen.module))
    check_rest(chosen, plan, layout, history, first, stop)

    fit = fitted(chosen, plan, layout, where, count)
    place = placement(where, fit.offload, chosen.memory_budget) | {"batch": fit.calib_batch, "gone": history.present()}

    def job(layout: Layout) -> Job:
        return Job(layout, lambda: Stream.embed(layout, windows, **place), first, stop, report)

    dense = Layout(copy.deepcopy(model)) if chosen.recover else None
    result = result_of(history, ledger, prune_by_plan(job(layout), plan, windows))
    if dense is not None:
        recover(job(layout), job(dense), {**history.present(), **result.masks}, plan.recovery)
    _runs[model], _results[model] = chosen.settings, result
    _histories[model] = history.followed_by(result.masks, result.past, {"options": _runs[model]})
    return result


def history_of(model: PreTrainedModel, layout: Layout) -> History:
    """What was pruned from a model, by what `load` and `prune` know, or else by its values."""
    return _histories[model] if model in _histories else read_history(None, layout)


def save(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: str | Path, result: Result | None = None, *,
    overwrite: bool = False, layout: str = "hf",
) -> Path:  # fmt: skip
    """Writes a checkpoint that stock `transformers` opens, with masks, record and model card; whole or not at all.

    Args:
        result: of `prune`; without one, what `load`, `prune` or the values say of the model.
        overwrite: replace the checkpoint in a folder that is not empty; its other files stay.
        layout: "hf", or "state-spaces" for mamba-ssm.

    Raises:
        sparsessm.errors.InputError: the folder holds something, or cannot be written.
    """
    target = str(Path(folder).expanduser().absolute())
    where = Path(model.name_or_path or "-")
    check_target(target, where, overwrite=overwrite)
    origin = _origins[model] if model in _origins else origin_of(model.name_or_path or "", where)
    result = result or _results.get(model)
    if result is None:
        layers = Layout(model)
        history = history_of(model, layers)
        result = result_of(history, Ledger(layers, history), RemovedParts())
    record = {"versions": versions(), "sparsity": result.sparsity, "options": _runs.get(model, {}), **result.past}
    return saving.save(model, tokenizer, result.masks, record, target, layout=layout, facts=Facts(origin))
