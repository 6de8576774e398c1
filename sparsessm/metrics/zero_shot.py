"""Zero-shot accuracy of the model in memory, on the tasks of lm-evaluation-harness (package lm-eval).

The harness takes the log likelihood of each choice of a question as a continuation of the question. `acc` counts a
document where the right choice has the highest one, `acc_norm` where it has the highest one per character of the choice.
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import functools
import hashlib
import importlib.util
import io
import json
import logging
import math
import statistics
import sys
import traceback
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import nn

from sparsessm.errors import InputError
from sparsessm.models.stock import stock_torch_path

logger = logging.getLogger("sparsessm")

MAX_LENGTH = 2048  # tokens of question and choice; a longer question loses its beginning

_INSTALL = "pip install -r requirements-zero-shot.txt"
_harness_logger = logging.getLogger("lm_eval")


def load_tasks(names: Sequence[str], include: str | None) -> dict[str, Any]:
    """The harness's tasks with their documents, by name, set to no examples in the prompt.

    Args:
        include: a folder of further task YAMLs, which come before the harness's own of the same name.

    Raises:
        InputError: what is needed is not installed, or a task, its folder or its documents are not available or unusable.
    """
    missing = [package for package in ("lm_eval", "accelerate") if importlib.util.find_spec(package) is None]
    if missing:
        raise InputError(f"--eval_zero_shot needs {' and '.join(missing)}: {_INSTALL}, or leave the flag out")
    declared = _declared(Path(include).expanduser()) if include else {}
    with _bars_for_watchers():
        # indexing the harness's own 14 thousand tasks takes seconds: only where one of them is asked for
        own = not declared.keys() >= set(names)
        manager = _index(str(Path(include).expanduser()), own) if include else _own_index()
        return {name: _load_task(manager, name, declared) for name in names}


def _index(include: str | None, own: bool) -> Any:
    from lm_eval.tasks import TaskManager

    return TaskManager(include_path=include, include_defaults=own)


@functools.cache
def _own_index() -> Any:
    """The harness's own tasks alone, which do not change while the process lives."""
    return _index(None, True)


def _declared(folder: Path) -> dict[str, Path]:
    """The YAMLs of a folder by the task that they name; the harness itself passes over a file that it cannot read."""
    import yaml

    if not folder.is_dir():
        raise InputError(f"--zero_shot_include {folder} is not a folder: give one that holds task YAMLs")
    found = {}
    for path in sorted(folder.glob("**/*.yaml")):
        try:
            node = yaml.compose(path.read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise InputError(f"--zero_shot_include: {path} is not YAML ({_line(error)}): correct or remove it") from None
        for key, value in node.value if isinstance(node, yaml.MappingNode) else ():
            if key.value in ("task", "group") and isinstance(value, yaml.ScalarNode):
                found[value.value] = path
    if not found:
        raise InputError(f"--zero_shot_include {folder} holds no task: give a folder of .yaml files with a key task")
    return found


def _load_task(manager: Any, name: str, declared: Mapping[str, Path]) -> Any:
    if name in {*manager.all_groups, *manager.all_tags}:
        raise InputError(f"--zero_shot_tasks: {name} stands for several tasks: name them one by one")
    known = name in manager.all_tasks
    if not known and name not in declared:
        near = difflib.get_close_matches(name, manager.all_subtasks, 3)
        hint = f"did you mean {' or '.join(near)}?" if near else "see `lm_eval ls tasks`, or give --zero_shot_include"
        raise InputError(f"--zero_shot_tasks: there is no task {name}: {hint}")
    try:
        # a file of the folder that the harness passed over says by its path what is wrong with it
        (task,) = manager.load([name if known else str(declared[name])])["tasks"].values()
        documents = task.eval_docs
    except Exception as error:  # data sets, templates and functions of YAMLs raise anything
        if any(frame.name == "download" for frame in traceback.extract_tb(error.__traceback__)):
            raise InputError(
                f"the documents of the zero-shot task {name} are not available ({_line(error)}): fetch them once with a "
                "network (they stay in the cache of datasets), leave the task out of --zero_shot_tasks, or read a local "
                "copy by a YAML in --zero_shot_include"
            ) from None
        raise InputError(
            f"the zero-shot task {name} cannot be used ({_line(error)}): correct its YAML, or leave the task out"
        ) from None
    if task.OUTPUT_TYPE not in ("multiple_choice", "loglikelihood") or getattr(task, "MULTIMODAL", False):
        raise InputError(f"the zero-shot task {name} is not scored by log likelihoods of text: leave it out")
    metric_of(name, task.aggregation())
    if not len(documents):
        raise InputError(f"the zero-shot task {name} has no documents: correct its YAML, or leave it out")
    task.set_config(key="num_fewshot", value=0)
    return task


def _line(error: Exception) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def metric_of(name: str, available: Collection[str]) -> str:
    """Which of a task's metrics the papers of this field report: acc for arc_easy, else acc_norm where there is one."""
    wanted = "acc" if name == "arc_easy" or "acc_norm" not in available else "acc_norm"
    if wanted not in available:
        raise InputError(f"the zero-shot task {name} measures neither acc nor acc_norm: leave it out")
    return wanted


def documents_sha256(task: Any) -> str:
    """Hash of the documents that a task asks about, in their order."""
    digest = hashlib.sha256()
    for document in task.eval_docs:
        digest.update(json.dumps(document, sort_keys=True, default=str).encode() + b"\n")
    return digest.hexdigest()


def accuracy(
    model: nn.Module, tokenizer: Any, name: str, task: Any, *, batch: int, device: torch.device
) -> dict[str, Any]:
    """One task's metric by name, its value from 0 to 1, its standard error (None of one document), and over how many.

    The model computes on the device, by the stock forward of transformers, and goes back to where it was.

    Args:
        batch: choices that the model processes together, the shorter ones padded at their end; no choice sees another.
    """
    from lm_eval.evaluator import evaluate

    metric = metric_of(name, task.aggregation())
    home = next(model.parameters()).device
    model.to(device)
    try:
        with _harness_log(), _bars_for_watchers(), stock_torch_path(model) if device.type == "cpu" else nullcontext():
            adapter = _adapter(model, tokenizer, batch)
            outcome = evaluate(lm=adapter, task_dict={"tasks": {name: task}}, bootstrap_iters=0, log_samples=True)
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, MemoryError) or "memory" in str(error):
            raise  # named like the errors of other steps
        raise _failure(name, error) from error
    except Exception as error:  # of the harness, of a task's own functions, of odd documents: they share no base class
        raise _failure(name, error) from error
    finally:
        model.to(home)
    figures = outcome["results"][name]
    key = next(key for key in figures if key.startswith(f"{metric},"))  # "acc,none": the metric and a filter's name
    scores = [float(sample[metric]) for sample in outcome["samples"][name] if f"{metric},{sample['filter']}" == key]
    spread = statistics.stdev(scores) / math.sqrt(len(scores)) if len(scores) > 1 else None
    return {"metric": metric, "value": float(figures[key]), "stderr": spread, "documents": len(scores)}


def _failure(name: str, error: Exception) -> InputError:
    return InputError(f"the zero-shot task {name} failed ({_line(error)}): correct its documents, or leave the task out")


def _adapter(model: nn.Module, tokenizer: Any, batch: int) -> Any:
    """The model as the harness wants it."""
    from lm_eval.models.huggingface import HFLM

    _harness_logger.setLevel(logging.ERROR)  # it warns of every model that is handed over in memory
    try:
        # a copy: the harness may give the tokenizer a padding token, and ours is saved with the model
        tokenizer = copy.deepcopy(tokenizer)
        return HFLM(pretrained=model, tokenizer=tokenizer, backend="causal", batch_size=batch, max_length=MAX_LENGTH)
    finally:
        _harness_logger.setLevel(logging.WARNING)


@contextmanager
def _harness_log() -> Iterator[None]:
    """What the harness warns of, such as a label out of range, goes to the run's log."""
    handlers = list(logger.handlers)
    for handler in handlers:
        _harness_logger.addHandler(handler)
    try:
        yield
    finally:
        for handler in handlers:
            _harness_logger.removeHandler(handler)


def with_mean(figures: Mapping[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The figures of `accuracy` by task, and under `mean` their plain mean; its error takes the tasks as independent."""
    errors = [figure["stderr"] for figure in figures.values()]
    mean = statistics.fmean(figure["value"] for figure in figures.values())
    error = None if None in errors else math.hypot(*errors) / len(errors)
    return {**figures, "mean": {"value": mean, "stderr": error}}


@contextmanager
def _bars_for_watchers() -> Iterator[None]:
    """The harness's and datasets' progress bars, which cannot all be switched off, go to a terminal and nowhere else."""
    with contextlib.nullcontext() if sys.stderr.isatty() else contextlib.redirect_stderr(io.StringIO()):
        yield
