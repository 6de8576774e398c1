"""Every option of a run, once: its default, its help, its check. `commandline.parse` makes a frozen Options of argv."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sparsessm.checks import OFFLOADS, check
from sparsessm.metrics.tasks import TASKS
from sparsessm.pruning.methods import (
    AGGREGATES,
    ALLOCATIONS,
    COMPENSATIONS,
    CONV_HESSIANS,
    IMPORTANCES,
    MEASURED,
    METHODS,
    MODULE_ORDERS,
    PRUNED_A_LOG,
    RECOVERIES,
    REMOVAL_TARGETS,
    SEARCHES,
    STRUCTURES,
    WEIGHT_RULES,
    Method,
)
from sparsessm.pruning.saliency import SALIENCIES

# What --target_modules takes; models.architecture says what they are.
MODULE_KINDS = ("nn.Linear", "nn.Conv1d")
# What --parts takes; models.architecture says what they are.
MODULE_PARTS = ("mixer", "attention", "mlp")

# Options that the saved files do not depend on: most set paths.
PLACES = (
    "save", "overwrite", "experiment_name", "base_dir", "log_wandb", "wandb_checkpoint", "push_to_hub", "private", "offload",
    "memory_budget", "generate", "dry_run",
)  # fmt: skip

# The methods whose own damping, or choice of modules for N:M, is not that of the others, for --help.
_DAMPING = "; ".join(f"{name}: {method.percdamp}" for name, method in METHODS.items() if method.percdamp != Method.percdamp)
_SPARING = ", ".join(name for name, method in METHODS.items() if method.spares_conv)

# The options in the order of --help: the first of each group, and the group's title.
GROUPS = {
    "model": "most used",
    "prunen": "what is pruned",
    "saliency": "in place of a part of the method",
    "recover": "recovery",
    "pruned_transition": "details of pruning",
    "data_dir": "what is measured, and on what",
    "dtype": "where it is computed",
    "overwrite": "what is written, and where",
}


def _boolean(text: str) -> bool:
    lowered = text.lower()
    if lowered in ("true", "1", "yes"):
        return True
    if lowered in ("false", "0", "no"):
        return False
    raise argparse.ArgumentTypeError(f"expected True or False, not {text!r}")


def _count_or_auto(text: str) -> int | None:
    if text == "auto":
        return None
    if not text.lstrip("-").isdecimal():
        raise argparse.ArgumentTypeError(f"expected a number or auto, not {text!r}")
    return int(text)


def _option(default: Any, about: str, *, names: Sequence[str] = (), **argument: Any) -> Any:
    """A field with its arguments for argparse; `names` are further spellings of the flag."""
    return field(default=default, metadata={"help": about, "names": names, **argument})


def _flag(about: str, *, names: Sequence[str] = ()) -> Any:
    """A boolean: --flag, --flag True and --flag False."""
    return _option(False, about, names=names, type=_boolean, nargs="?", const=True, metavar="BOOL")


# Flags that replace the part of a method that has the same name.
OVERRIDES = (
    "saliency", "structure", "search", "aggregate", "weights", "importance", "percdamp", "polish", "module_order",
    "compensate", "allocation",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Options:
    """What one run does. Made by `commandline.parse`; `check` has passed on every instance."""

    model: str = _option(None, "hub id, local folder (Hugging Face or state-spaces layout), or demo")
    dataset: str = _option(
        None,
        "calibration and evaluation text: wikitext2, ptb, c4, demo; NAME:CONFIG:SPLIT:COLUMN of the hub; a file or folder",
    )
    method: str | None = _option(
        None, "how to prune, see below; without a method the model is evaluated as it is", choices=METHODS, metavar="METHOD"
    )
    prune_A: bool = _flag("prune the transitions A_log (the paper's SSM module)")
    prune_layers: bool = _flag("prune the weights of linear and conv1d modules", names=("--prune_layer",))
    sparsity: float | None = _option(None, "share of entries to prune, between 0 and 1", type=float)
    nsamples: int = _option(128, "calibration windows", type=int)
    seqlen: int = _option(2048, "tokens per window", type=int)
    seed: int = _option(0, "seed of the calibration windows", type=int)
    save: str | None = _option(None, "folder for the pruned checkpoint, new or empty", metavar="DIR")
    eval_dense: bool = _flag("evaluate the model before pruning as well")
    generate: str | None = _option(
        None, "show how the model continues a text, before and after pruning; nothing is drawn at random", metavar="TEXT"
    )
    dry_run: bool = _flag("say what would be pruned, and the time and memory to expect; write nothing")

    prunen: int = _option(0, "N of N:M: how many of each M consecutive entries are pruned", type=int)
    prunem: int = _option(0, "M of N:M", type=int)
    minlayer: int = _option(-1, "first layer to prune", type=int)
    maxlayer: int = _option(1000, "layer before which pruning stops", type=int)
    target_modules: tuple[str, ...] = _option(
        MODULE_KINDS,
        f"types of modules to prune (default: both, but nn.Linear for N:M by {_SPARING})",
        nargs="+", choices=MODULE_KINDS,
    )  # fmt: skip
    parts: tuple[str, ...] = _option(
        MODULE_PARTS, "parts of layers whose modules are pruned", nargs="+", choices=MODULE_PARTS
    )
    module: str | None = _option(None, "prune the weights of this one module of each layer, by name, as in_proj")
    shed_target: str | None = _option(
        None,
        "what mamba-shedder removes: ssm, a layer's scan, y = D u stays (the default with --prune_A); mamba_block, whole "
        "blocks (with --prune_layers)",
        choices=REMOVAL_TARGETS,
    )

    saliency: str | None = _option(None, "score of an entry of A_log, instead of the method's", choices=SALIENCIES)
    aggregate: str | None = _option(None, "scores over time to one, instead of the method's", choices=AGGREGATES)
    time_power: float = _option(1.0, "p of aggregate power: weights (t+1)^-p", type=float)
    time_discount: float = _option(0.9, "g of aggregate discount: weights g^t", type=float)
    time_window: float = _option(0.25, "k of aggregate window: the first ceil(k L) steps", type=float)
    search: str | None = _option(
        None, "how entries are chosen by saliency output, which knows how they interact", choices=SEARCHES
    )
    structure: str | None = _option(
        None,
        "entries; columns: whole states are removed; heads: whole heads of Mamba-2; instead of the method's",
        choices=STRUCTURES,
    )
    weights: str | None = _option(
        None,
        "rule for the weights: magnitude; wanda; obs, in blocks of columns, as SparseGPT; obc, each row's cheapest weights "
        "one by one",
        choices=WEIGHT_RULES,
    )
    importance: str | None = _option(
        None,
        "what errors of outputs count for: none, all the same; rows, each by what it costs the model's loss; tokens, that "
        "and each token by its own",
        choices=IMPORTANCES,
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
        "sparsity of layers and modules: uniform; sensitivity, spread by alpha; output, by measured errors of the blocks; "
        "loss, one budget of the cheapest steps of obc",
        choices=ALLOCATIONS,
    )
    alpha: float = _option(0.0, "spread of sparsities by sensitivity: from p-alpha to p+alpha", type=float)

    recover: tuple[str, ...] | None = _option(
        None,
        "tune what is not pruned by what the dense model computes on the calibration windows: blocks, one layer after the "
        "other; model, all together; both in this order",
        nargs="+", choices=RECOVERIES,
    )  # fmt: skip
    recover_steps: int = _option(200, "steps of --recover model, of --calib_batch windows each (auto: 8)", type=int)
    recover_rate: float = _option(1e-3, "learning rate of --recover model", type=float)
    recover_passes: int = _option(10, "passes of --recover blocks over the windows, for each layer", type=int)
    recover_block_rate: float = _option(2e-3, "learning rate of --recover blocks", type=float)

    pruned_transition: str = _option(
        "zero", "a pruned entry of A_log: zero, no transition; unit, A = -1", choices=tuple(PRUNED_A_LOG)
    )
    raw_zeros: bool = _flag("save 0 for pruned entries of A_log whatever was evaluated, as the released code does")
    blocksize: int = _option(128, "columns per block of OBS", type=int)
    percdamp: float | None = _option(
        None, f"damping of the Hessian, as a share of its mean diagonal (default: {Method.percdamp}; {_DAMPING})", type=float
    )
    conv_hessian: str = _option(
        "tap", "Hessian of conv1d: tap, one per channel; channel, the released one", choices=CONV_HESSIANS
    )

    data_dir: str | None = _option(None, "folder with local copies of wikitext2, ptb, c4", metavar="DIR")
    ppl_datasets: tuple[str, ...] | None = _option(
        None, "texts to evaluate the perplexity on, named as DATASET is (default: DATASET; none: nothing)", nargs="+"
    )
    eval_windows: int | None = _option(None, "evaluate the first windows only", type=int)
    eval_zero_shot: bool = _flag("measure the zero-shot accuracy by lm-evaluation-harness (requirements-zero-shot.txt)")
    zero_shot_tasks: tuple[str, ...] = _option(TASKS, "tasks of the harness", nargs="+", metavar="TASK")
    zero_shot_include: str | None = _option(None, "folder of further task YAMLs for the harness", metavar="DIR")

    dtype: str = _option(
        "auto", "weights; A_log and statistics stay float32", choices=("auto", "float32", "bfloat16", "float16")
    )
    device: str = _option("auto", "where blocks compute: auto, cpu, cuda, cuda:1 ...")
    offload: str = _option(
        "auto",
        "where the inputs of a block are kept: device, the compute device; cpu, main memory; disk, a file in the run "
        "folder; auto, the first of these that has room",
        choices=OFFLOADS,
    )
    memory_budget: float | None = _option(
        None, "GiB that may be spent to save work, 0 for none (default: a share of what is free)", type=float
    )
    calib_batch: int | None = _option(
        None, "calibration windows that a block processes together (default: auto: 8; on a GPU up to 64, if it has room)",
        type=_count_or_auto, metavar="N",
    )  # fmt: skip
    eval_batch: int | None = _option(
        None, "the same of evaluation windows (default: auto)", type=_count_or_auto, metavar="N"
    )
    zero_shot_batch: int = _option(16, "choices that the harness feeds to the model together", type=int)

    overwrite: bool = _flag("let --save replace the checkpoint in a folder that is not empty; its other files stay")
    save_format: str = _option("hf", "layout of the checkpoint", choices=("hf", "state-spaces"))
    push_to_hub: str | None = _option(
        None, "push the saved checkpoint to this repository of the Hugging Face hub", metavar="REPO"
    )
    private: bool = _flag("let --push_to_hub make a private repository")
    experiment_name: str = _option("default", "folder of the run under base_dir")
    base_dir: str = _option("experiments", "folder of all experiments", metavar="DIR")
    log_wandb: bool = _flag("log to Weights & Biases (WANDB_* variables hold; WANDB_MODE=offline works)")
    wandb_checkpoint: bool = _flag("let --log_wandb upload the saved checkpoint as well, not only figures and pictures")

    def __post_init__(self) -> None:
        unsaid = self.target_modules is MODULE_KINDS  # itself: both that are named are another tuple
        if unsaid and self.prunem and self.method in METHODS and METHODS[self.method].spares_conv:
            object.__setattr__(self, "target_modules", ("nn.Linear",))
        check(self)

    @property
    def recipe(self) -> Method | None:
        """The method's row, with the parts that flags replace.

        A method's own allocation becomes uniform if the pattern does not allow different sparsities. What errors cost the
        model's loss is not measured for A_log alone unless it is asked for: it is a pass back through the model, and changes
        next to nothing there (docs/BEYOND.md).
        """
        if self.method is None:
            return None
        replaced = {name: getattr(self, name) for name in OVERRIDES if getattr(self, name) is not None}
        recipe = dataclasses.replace(METHODS[self.method], **replaced)
        if recipe.allocation == "loss" and not self.prune_layers and self.allocation is None:
            recipe = dataclasses.replace(recipe, allocation="output")
        if not self.prune_layers and self.importance is None:
            recipe = dataclasses.replace(recipe, importance="none")
        if recipe.allocation in MEASURED and self.allocation is None and not self.spreads(recipe):
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


# Of the options, as JSON gives them back.
DEFAULTS = {s.name: list(s.default) if isinstance(s.default, tuple) else s.default for s in dataclasses.fields(Options)}


def without_own(record: Mapping[str, Any]) -> dict[str, Any]:
    """A record of options in which a part that the method has by itself is null, as where its flag was not given.

    Older versions recorded the damping that all methods had.
    """
    own = METHODS.get(str(record["method"]), Method)
    return {name: None if name in OVERRIDES and value == getattr(own, name) else value for name, value in record.items()}
