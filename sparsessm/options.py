"""Every option of the command line, once: its default, its help, its check. `parse` makes a frozen Options of argv."""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from sparsessm.checks import check
from sparsessm.corpora.names import DATASETS
from sparsessm.errors import InputError
from sparsessm.metrics.tasks import TASKS
from sparsessm.pruning.methods import (
    AGGREGATES,
    ALLOCATIONS,
    COMPENSATIONS,
    CONV_HESSIANS,
    METHODS,
    MODULE_ORDERS,
    PRUNED_A_LOG,
    REMOVAL_TARGETS,
    SEARCHES,
    STRUCTURES,
    Method,
)
from sparsessm.pruning.saliency import SALIENCIES

# What --target_modules takes; models.architecture says what they are.
MODULE_KINDS = ("nn.Linear", "nn.Conv1d")
# What --parts takes; models.architecture says what they are.
MODULE_PARTS = ("mixer", "attention", "mlp")

# Options that only set paths: the saved files do not depend on them.
PLACES = ("save", "overwrite", "experiment_name", "base_dir", "log_wandb", "offload", "memory_budget")


def _boolean(text: str) -> bool:
    lowered = text.lower()
    if lowered in ("true", "1", "yes"):
        return True
    if lowered in ("false", "0", "no"):
        return False
    raise argparse.ArgumentTypeError(f"expected True or False, not {text!r}")


def _option(default: Any, about: str, *, names: Sequence[str] = (), **argument: Any) -> Any:
    """A field with its arguments for argparse; `names` are further spellings of the flag."""
    return field(default=default, metadata={"help": about, "names": names, **argument})


def _flag(about: str, *, names: Sequence[str] = ()) -> Any:
    """A boolean: --flag, --flag True and --flag False."""
    return _option(False, about, names=names, type=_boolean, nargs="?", const=True, metavar="BOOL")


# Flags that replace the part of a method that has the same name.
OVERRIDES = ("saliency", "structure", "search", "aggregate", "polish", "module_order", "compensate", "allocation")


@dataclass(frozen=True, kw_only=True)
class Options:
    """What one run does. Made by `parse`; `check` has passed on every instance that leaves this module."""

    model: str = _option(None, "hub id, local folder (Hugging Face or state-spaces layout), or demo")
    dataset: str = _option(None, "calibration and evaluation text: wikitext2, ptb, c4, demo, or a folder")

    method: str | None = _option(
        None,
        "pruning method; without one the model is evaluated as it is. "
        + "; ".join(f"{name}: {method.about}" for name, method in METHODS.items()),
        choices=METHODS,
    )
    prune_A: bool = _flag("prune the transitions A_log (the paper's SSM module)")
    prune_layers: bool = _flag("prune the weights of linear and conv1d modules", names=("--prune_layer",))
    sparsity: float | None = _option(None, "share of entries to prune, between 0 and 1", type=float)
    prunen: int = _option(0, "N of N:M: how many of each M consecutive entries are pruned", type=int)
    prunem: int = _option(0, "M of N:M", type=int)
    minlayer: int = _option(-1, "first layer to prune", type=int)
    maxlayer: int = _option(1000, "layer before which pruning stops", type=int)
    shed_target: str | None = _option(
        None,
        "what mamba-shedder removes: ssm, a layer's scan, y = D u stays (the default with --prune_A); mamba_block, whole "
        "blocks (with --prune_layers)",
        choices=REMOVAL_TARGETS,
    )

    saliency: str | None = _option(None, "score of an entry of A_log, instead of the method's", choices=SALIENCIES)
    structure: str | None = _option(
        None,
        "entries; columns: whole states are removed; heads: whole heads of Mamba-2; instead of the method's",
        choices=STRUCTURES,
    )
    search: str | None = _option(
        None, "how entries are chosen by saliency output, which knows how they interact", choices=SEARCHES
    )
    aggregate: str | None = _option(None, "scores over time to one, instead of the method's", choices=AGGREGATES)
    time_power: float = _option(1.0, "p of aggregate power: weights (t+1)^-p", type=float)
    time_discount: float = _option(0.9, "g of aggregate discount: weights g^t", type=float)
    time_window: float = _option(0.25, "k of aggregate window: the first ceil(k L) steps", type=float)
    pruned_transition: str = _option(
        "zero", "a pruned entry of A_log: zero, no transition; unit, A = -1", choices=tuple(PRUNED_A_LOG)
    )
    raw_zeros: bool = _flag("save 0 for pruned entries of A_log whatever was evaluated, as the released code does")

    target_modules: tuple[str, ...] = _option(
        MODULE_KINDS, "types of modules to prune", nargs="+", choices=MODULE_KINDS
    )
    parts: tuple[str, ...] = _option(
        MODULE_PARTS, "parts of layers whose modules are pruned", nargs="+", choices=MODULE_PARTS
    )
    module: str | None = _option(None, "prune the weights of this one module of each layer, by name, as in_proj")
    alpha: float = _option(0.0, "spread of sparsities by sensitivity: from p-alpha to p+alpha", type=float)
    blocksize: int = _option(128, "columns per block of OBS", type=int)
    percdamp: float = _option(0.01, "damping of the Hessian, as a share of its mean diagonal", type=float)
    conv_hessian: str = _option(
        "tap", "Hessian of conv1d: tap, one per channel; channel, the released one", choices=CONV_HESSIANS
    )

    polish: int | None = _option(None, "iterations toward the best weights for the mask that OBS ends with", type=int)
    module_order: str | None = _option(
        None,
        "parallel: the modules of a block on the inputs of the block as it was; sequential: each on the outputs of the "
        "pruned ones before it",
        choices=MODULE_ORDERS,
    )
    compensate: str | None = _option(
        None, "out_proj: refit it toward the dense model's stream after the block", choices=COMPENSATIONS
    )
    ridge: float = _option(0.1, "ridge of the refit toward the old weights, as a share of the mean diagonal", type=float)
    allocation: str | None = _option(
        None,
        "sparsity of layers and modules: uniform; sensitivity, spread by alpha; output, by measured errors of the blocks",
        choices=ALLOCATIONS,
    )

    nsamples: int = _option(128, "calibration windows", type=int)
    seqlen: int = _option(2048, "tokens per window", type=int)
    seed: int = _option(0, "seed of the calibration windows", type=int)
    data_dir: str | None = _option(None, "folder with local copies of wikitext2, ptb, c4")
    calib_batch: int = _option(8, "calibration windows that a block processes together", type=int)

    ppl_datasets: tuple[str, ...] | None = _option(
        None, "texts to evaluate the perplexity on (default: DATASET; none: nothing)", nargs="+"
    )
    eval_windows: int | None = _option(None, "evaluate the first windows only", type=int)
    eval_batch: int = _option(8, "evaluation windows that a block processes together", type=int)
    eval_dense: bool = _flag("evaluate the model before pruning as well")
    eval_zero_shot: bool = _flag("measure the zero-shot accuracy by lm-evaluation-harness (requirements-zero-shot.txt)")
    zero_shot_tasks: tuple[str, ...] = _option(TASKS, "tasks of the harness", nargs="+")
    zero_shot_include: str | None = _option(None, "folder of further task YAMLs for the harness")
    zero_shot_batch: int = _option(16, "choices that the harness feeds to the model together", type=int)

    dtype: str = _option(
        "auto", "weights; A_log and statistics stay float32", choices=("auto", "float32", "bfloat16", "float16")
    )
    device: str = _option("auto", "where blocks compute: auto, cpu, cuda, cuda:1 ...")
    offload: str = _option(
        "cpu",
        "where the inputs of a block are kept: device, the compute device; cpu, main memory; disk, a file in the run folder",
        choices=("device", "cpu", "disk"),
    )
    memory_budget: float | None = _option(
        None, "GiB that may be spent to save work, 0 for none (default: a share of what is free)", type=float
    )

    save: str | None = _option(None, "folder for the pruned checkpoint, new or empty")
    overwrite: bool = _flag("let --save replace the checkpoint in a folder that is not empty; its other files stay")
    save_format: str = _option("hf", "layout of the checkpoint", choices=("hf", "state-spaces"))
    experiment_name: str = _option("default", "folder of the run under base_dir")
    base_dir: str = _option("experiments", "folder of all experiments")
    log_wandb: bool = _flag("log to Weights & Biases (WANDB_* variables hold; WANDB_MODE=offline works)")

    def __post_init__(self) -> None:
        check(self)

    @property
    def recipe(self) -> Method | None:
        """The method's row, with the parts that flags replace.

        A method's own allocation by output becomes uniform if the pattern does not allow different sparsities.
        """
        if self.method is None:
            return None
        replaced = {name: getattr(self, name) for name in OVERRIDES if getattr(self, name) is not None}
        recipe = dataclasses.replace(METHODS[self.method], **replaced)
        if recipe.allocation == "output" and self.allocation is None and not self.spreads(recipe):
            recipe = dataclasses.replace(recipe, allocation="uniform")
        return recipe

    def spreads(self, recipe: Method) -> bool:
        """Whether parts can have different sparsities: not with N:M, nor where whole states are removed."""
        return not self.prunem and not (recipe.structure != "entries" and self.prune_A)

    @property
    def settings(self) -> dict[str, Any]:
        """All options but the paths (PLACES)."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name not in PLACES}

    @property
    def share(self) -> float:
        """The sparsity, unless N:M sets it."""
        assert self.sparsity is not None
        return self.sparsity

    @property
    def evaluation_sets(self) -> tuple[str, ...]:
        if self.ppl_datasets is None:
            return (self.dataset,)
        return () if self.ppl_datasets == ("none",) else self.ppl_datasets

    @property
    def removal_target(self) -> str:
        """The parts that a removing method removes."""
        return self.shed_target or ("ssm" if self.prune_A else "mamba_block")


def program() -> str:
    """How this program was called, as far as argv tells: main.py, the module or the installed command."""
    called = Path(sys.argv[0] if sys.argv else "")
    if called.name == "__main__.py" and called.parent.name == "sparsessm":
        return "python -m sparsessm"
    if called.name == "sparsessm":
        return "sparsessm"
    return f"python {shlex.quote(str(called)) if called.name.endswith('main.py') else 'main.py'}"


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(message)


def parse(argv: Sequence[str]) -> tuple[Options, Path | None]:
    """Options from the command line, and the folder of the run to resume, if any.

    Raises:
        InputError: for unknown flags and for whatever `check` finds.
    """
    parser = _Parser(
        prog=program(),
        description="Prune a Mamba language model in one shot, measure its perplexity, save it.",
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("positionals", nargs="*", metavar="MODEL DATASET", help="the model and the calibration text")
    for spec in dataclasses.fields(Options):
        arguments = dict(spec.metadata)
        names = ["--model_path" if spec.name == "model" else f"--{spec.name}", *arguments.pop("names")]
        parser.add_argument(*names, dest=spec.name, default=spec.default, **arguments)
    parser.add_argument("--resume", metavar="RUN_FOLDER", help="resume an interrupted run; takes no other option")
    known = vars(parser.parse_intermixed_args(list(argv)))
    positionals, resume = known.pop("positionals"), known.pop("resume")
    if resume is not None:
        if len(argv) > 2 or positionals:
            raise InputError("--resume takes the options of the run that it resumes: leave out all others")
        return _recorded(Path(resume))
    for name, word in zip(("model", "dataset"), positionals, strict=False):
        if known[name] is not None:
            raise InputError(f"the {name} is given twice: {word} and {known[name]}")
        known[name] = word
    if len(positionals) > 2:
        raise InputError(f"expected MODEL and DATASET, got {len(positionals)} arguments: {' '.join(positionals)}")
    return _frozen(known), None


def _frozen(values: dict[str, Any]) -> Options:
    """Options with absolute paths, without ~."""
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
    for name in ("data_dir", "zero_shot_include", "save", "base_dir"):
        if values[name] is not None:
            values[name] = os.path.abspath(os.path.expanduser(values[name]))
    values["model"] = _whole_place(values["model"], ("demo",))
    values["dataset"] = _whole_place(values["dataset"], DATASETS)
    if values["ppl_datasets"] is not None:
        values["ppl_datasets"] = tuple(_whole_place(name, (*DATASETS, "none")) for name in values["ppl_datasets"])
    return Options(**values)


def _whole_place(name: str | None, reserved: Sequence[str]) -> str | None:
    """The full path of a model or data set that is a folder here; any other name as it is."""
    if name is None or name in reserved or not os.path.isdir(os.path.expanduser(name)):
        return name
    return os.path.abspath(os.path.expanduser(name))


def _recorded(folder: Path) -> tuple[Options, Path]:
    """The options of an interrupted run, checked as if they came from the command line."""
    folder = Path(os.path.abspath(folder.expanduser()))
    file = folder / "options.json"
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        raise InputError(f"--resume {folder} holds no options.json: give the folder of a run") from None
    known = {spec.name for spec in dataclasses.fields(Options)}
    if not isinstance(values, dict) or values.keys() != known:
        odd = sorted(values.keys() ^ known)[0] if isinstance(values, dict) else "it holds no values by name"
        raise InputError(f"--resume {folder} was written by another version (options.json: {odd}): start a new run")
    try:
        chosen = parse(argv_of(values))[0]
    except InputError as error:
        raise InputError(f"--resume {folder}: options.json was edited ({error}): start a new run") from None
    parsed = json.loads(json.dumps(dataclasses.asdict(chosen)))
    for name, value in values.items():
        if parsed[name] != value or isinstance(parsed[name], bool) != isinstance(value, bool):
            shown = json.dumps(value)[:60]
            raise InputError(f"--resume {folder}: options.json was edited ({name} is {shown}): start a new run")
    return chosen, folder


def argv_of(values: Mapping[str, Any]) -> list[str]:
    """The command-line arguments that say the same as the values of options.json."""
    argv = []
    for name, value in values.items():
        flag = "--model_path" if name == "model" else f"--{name}"
        if isinstance(value, list):
            argv += [flag, *map(str, value)]
        elif value is not None:
            argv.append(f"{flag}={value}")
    return argv
