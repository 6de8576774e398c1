"""Every option of the command line, once: its default, its help, its check. `parse` makes a frozen Options of argv."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from sparsessm.errors import InputError
from sparsessm.model.block import MODULES, PRUNED_A_LOG
from sparsessm.pipeline import TransitionPlan, WeightPlan
from sparsessm.pruning.aggregation import AGGREGATES
from sparsessm.pruning.methods import METHODS, Method
from sparsessm.pruning.patterns import Columns, NofM, Pattern, Unstructured
from sparsessm.pruning.saliency import SALIENCIES

MODULE_TYPES = {
    "nn.Linear": ("in_proj", "x_proj", "dt_proj", "out_proj"),
    "nn.Conv1d": ("conv1d",),
}

# Options that say where things go and not what is done: what is saved does not depend on them.
PLACES = ("save", "experiment_name", "base_dir", "log_wandb", "offload", "memory_budget")


def _boolean(text: str) -> bool:
    lowered = text.lower()
    if lowered in ("true", "1", "yes"):
        return True
    if lowered in ("false", "0", "no"):
        return False
    raise argparse.ArgumentTypeError(f"expected True or False, not {text!r}")


def _option(default: Any, about: str, *, names: Sequence[str] = (), **argument: Any) -> Any:
    """A field with what argparse has to know of it; `names` are further spellings of the flag."""
    return field(default=default, metadata={"help": about, "names": names, **argument})


def _flag(about: str, *, names: Sequence[str] = ()) -> Any:
    """A boolean: --flag, --flag True and --flag False."""
    return _option(False, about, names=names, type=_boolean, nargs="?", const=True, metavar="BOOL")


@dataclass(frozen=True, kw_only=True)
class Options:
    """What one run does. Made by `parse`; `check` has passed on every instance that leaves this module."""

    model: str | None = _option(None, "hub id, local folder (Hugging Face or state-spaces layout), or demo")
    dataset: str | None = _option(None, "calibration and evaluation text: wikitext2, ptb, c4, demo, or a folder")

    method: str | None = _option(
        None,
        "pruning method; without one the model is evaluated as it is. "
        + "; ".join(f"{name}: {method.about}" for name, method in METHODS.items()),
        choices=tuple(METHODS),
    )
    prune_A: bool = _flag("prune the transitions A_log (the paper's SSM module)")
    prune_layers: bool = _flag("prune the weights of linear and conv1d modules", names=("--prune_layer",))
    sparsity: float | None = _option(None, "share of entries to prune, between 0 and 1", type=float)
    prunen: int = _option(0, "N of N:M: how many of each M consecutive entries are pruned", type=int)
    prunem: int = _option(0, "M of N:M", type=int)
    minlayer: int = _option(-1, "first layer to prune", type=int)
    maxlayer: int = _option(1000, "layer before which pruning stops", type=int)

    saliency: str | None = _option(None, "score of an entry of A_log, instead of the method's", choices=tuple(SALIENCIES))
    aggregate: str | None = _option(None, "scores over time to one, instead of the method's", choices=AGGREGATES)
    time_power: float = _option(1.0, "p of aggregate power: weights (t+1)^-p", type=float)
    time_discount: float = _option(0.9, "g of aggregate discount: weights g^t", type=float)
    time_window: float = _option(0.25, "k of aggregate window: the first ceil(k L) steps", type=float)
    pruned_transition: str = _option(
        "zero", "a pruned entry of A_log: zero, no transition; unit, A = -1", choices=tuple(PRUNED_A_LOG)
    )
    raw_zeros: bool = _flag("save 0 for pruned entries of A_log whatever was evaluated, as the released code does")

    target_modules: tuple[str, ...] = _option(
        tuple(MODULE_TYPES), "types of modules to prune", nargs="+", choices=tuple(MODULE_TYPES)
    )
    module: str | None = _option(None, "prune the weights of this one module of each layer", choices=MODULES)
    alpha: float = _option(0.0, "spread of sparsities by sensitivity: from p-alpha to p+alpha", type=float)
    blocksize: int = _option(128, "columns per block of OBS", type=int)
    percdamp: float = _option(0.01, "damping of the Hessian, as a share of its mean diagonal", type=float)
    conv_hessian: str = _option(
        "tap", "Hessian of conv1d: tap, one per channel; channel, the released one", choices=("tap", "channel")
    )

    nsamples: int = _option(128, "calibration windows", type=int)
    seqlen: int = _option(2048, "tokens per window", type=int)
    seed: int = _option(0, "seed of the calibration windows", type=int)
    data_dir: str | None = _option(None, "folder with local copies of wikitext2, ptb, c4")
    calib_batch: int = _option(8, "calibration windows that go through a block together", type=int)

    ppl_datasets: tuple[str, ...] | None = _option(
        None, "what to take the perplexity on (default: DATASET; none: nothing)", nargs="+"
    )
    eval_windows: int | None = _option(None, "evaluate the first windows only", type=int)
    eval_batch: int = _option(8, "evaluation windows that go through a block together", type=int)
    eval_dense: bool = _flag("evaluate the model before pruning as well")

    dtype: str = _option(
        "auto", "weights; A_log and statistics stay float32", choices=("auto", "float32", "bfloat16", "float16")
    )
    device: str = _option("auto", "where blocks compute: auto, cpu, cuda, cuda:1 ...")
    offload: str = _option(
        "cpu",
        "where the inputs of a block wait: device, the compute device; cpu, main memory; disk, a file in the run folder",
        choices=("device", "cpu", "disk"),
    )
    memory_budget: float | None = _option(
        None, "GiB that may be spent to save work, 0 for none (default: a share of what is free)", type=float
    )

    save: str | None = _option(None, "folder for the pruned checkpoint")
    save_format: str = _option("hf", "layout of the checkpoint", choices=("hf", "state-spaces"))
    experiment_name: str = _option("default", "folder of the run under base_dir")
    base_dir: str = _option("experiments", "folder of all experiments")
    log_wandb: bool = _flag("log to Weights & Biases (WANDB_* variables hold; WANDB_MODE=offline works)")

    def __post_init__(self) -> None:
        check(self)

    @property
    def recipe(self) -> Method | None:
        """The method's row, with the overrides of --saliency and --aggregate."""
        if self.method is None:
            return None
        method = METHODS[self.method]
        return dataclasses.replace(
            method, saliency=self.saliency or method.saliency, aggregate=self.aggregate or method.aggregate
        )

    @property
    def pattern(self) -> Pattern:
        """What the scores of a matrix are chosen by."""
        if self.prunem:
            return NofM(self.prunen, self.prunem)
        return (Columns if self.recipe.structure == "columns" else Unstructured)(self.sparsity)

    @property
    def modules(self) -> tuple[str, ...]:
        """Names of the modules whose weights are pruned, in the order in which data meets them."""
        if self.module:
            return (self.module,)
        named = {name for kind in self.target_modules for name in MODULE_TYPES[kind]}
        return tuple(name for name in MODULES if name in named)

    @property
    def evaluation_sets(self) -> tuple[str, ...]:
        if self.ppl_datasets is None:
            return (self.dataset,)
        return () if self.ppl_datasets == ("none",) else self.ppl_datasets

    def transition_plan(self) -> TransitionPlan:
        recipe = self.recipe
        parameter = {"power": self.time_power, "discount": self.time_discount, "window": self.time_window}
        return TransitionPlan(
            pattern=self.pattern, saliency=recipe.saliency, aggregate=recipe.aggregate,
            parameter=parameter.get(recipe.aggregate), obs=recipe.obs_on_A_log, transition=self.pruned_transition,
            percdamp=self.percdamp, blocksize=self.blocksize,
        )  # fmt: skip

    def weight_plan(self) -> WeightPlan:
        return WeightPlan(
            pattern=self.pattern, rule=self.recipe.weights, modules=self.modules,
            alpha=self.alpha if self.recipe.sensitive else 0.0, conv_hessian=self.conv_hessian,
            percdamp=self.percdamp, blocksize=self.blocksize,
        )  # fmt: skip


def check(options: Options) -> None:
    """Everything that can be known to be wrong without looking at the model.

    Raises:
        InputError: one line that says what to do.
    """
    if options.model is None or options.dataset is None:
        raise InputError("give a MODEL and a DATASET, for example: python main.py demo demo")
    for name in ("nsamples", "seqlen", "calib_batch", "eval_batch", "blocksize", "eval_windows"):
        value = getattr(options, name)
        if value is not None and value < 1:
            raise InputError(f"--{name} must be at least 1, not {value}")
    if options.seqlen < 2:
        raise InputError("--seqlen must be at least 2: a window of one token predicts nothing")
    if options.memory_budget is not None and not options.memory_budget >= 0:
        raise InputError(f"--memory_budget must not be negative, not {options.memory_budget}")
    if options.percdamp < 0:
        raise InputError(f"--percdamp must not be negative, not {options.percdamp}")
    if not 0 < options.time_window <= 1:
        raise InputError(f"--time_window must lie above 0 and at most at 1, not {options.time_window}")
    if options.time_discount <= 0:
        raise InputError(f"--time_discount must be above 0, not {options.time_discount}")
    if options.method is None:
        if options.prune_A or options.prune_layers or options.sparsity is not None or options.prunem:
            raise InputError(f"say how to prune with --method, one of: {', '.join(METHODS)}")
        return
    _check_method(options)
    _check_share(options)


def _check_method(options: Options) -> None:
    method, name = METHODS[options.method], options.method
    if not (options.prune_A or options.prune_layers):
        raise InputError(f"--method {name} needs something to prune: give --prune_A, --prune_layers or both")
    if options.prune_A and not method.prunes_A_log and options.saliency is None:
        able = [key for key, value in METHODS.items() if value.prunes_A_log]
        raise InputError(f"--method {name} has no rule for A_log; for --prune_A use one of: {', '.join(able)}")
    if options.prune_layers and method.weights is None:
        able = [key for key, value in METHODS.items() if value.weights]
        raise InputError(f"--method {name} has no rule for weights; for --prune_layers use one of: {', '.join(able)}")
    if (options.saliency or options.aggregate) and (method.obs_on_A_log or not method.prunes_A_log):
        raise InputError(f"--method {name} does not score A_log: leave out --saliency and --aggregate")
    if method.structure == "n:m" and not options.prunem:
        raise InputError(f"--method {name} needs N:M: give --prunen and --prunem")
    if method.structure == "columns" and options.prunem:
        raise InputError(f"--method {name} removes whole states: give --sparsity, not --prunen and --prunem")
    if not options.modules:
        raise InputError(f"--target_modules names no module; use some of: {', '.join(MODULE_TYPES)}")


def _check_share(options: Options) -> None:
    n, m, p = options.prunen, options.prunem, options.sparsity
    if n or m:
        if not 0 < n < m:
            raise InputError(f"--prunen must be at least 1 and below --prunem, not {n} and {m}")
        if options.blocksize % m:
            raise InputError(f"--prunem {m} must divide --blocksize {options.blocksize}")
        if p is not None and abs(p - n / m) > 1e-9:
            raise InputError(f"--sparsity {p} contradicts {n}:{m}, which is {n / m:g}: leave one of them out")
        if options.alpha:
            raise InputError("--alpha spreads an unstructured sparsity: leave it out with --prunen and --prunem")
    elif p is None:
        raise InputError(f"--method {options.method} needs --sparsity, or --prunen and --prunem")
    elif not 0 < p < 1:
        raise InputError(f"--sparsity must lie between 0 and 1, not {p}")
    elif options.alpha < 0:
        raise InputError(f"--alpha must not be negative, not {options.alpha}")
    elif p + options.alpha >= 1 or p - options.alpha < 0:
        raise InputError(
            f"--sparsity {p} with --alpha {options.alpha} leaves the range 0 to 1: keep alpha below {min(p, 1 - p):g}"
        )


def check_model(options: Options, config: Any) -> tuple[int, int]:
    """What can be wrong only for this model; returns the range of layers to prune, first <= i < stop.

    Args:
        config: a MambaConfig.
    """
    first, stop = max(0, options.minlayer), min(options.maxlayer, config.num_hidden_layers)
    if options.method is None:
        return first, stop
    if first >= stop:
        raise InputError(
            f"--minlayer {options.minlayer} and --maxlayer {options.maxlayer} leave none of the model's "
            f"{config.num_hidden_layers} layers"
        )
    if options.prune_A and METHODS[options.method].structure == "columns":
        if (first, stop) != (0, config.num_hidden_layers):
            raise InputError("removing states needs every layer, for a config has one state size: drop the layer range")
        if not 0 < round(options.sparsity * config.state_size) < config.state_size:
            raise InputError(f"--sparsity {options.sparsity} removes none or all of the {config.state_size} states")
    m = options.prunem
    if m and options.prune_A and config.state_size % m:
        raise InputError(f"--prunem {m} does not divide the state size {config.state_size}")
    if m and options.prune_layers:
        columns = {
            "in_proj": config.hidden_size, "conv1d": config.conv_kernel, "x_proj": config.intermediate_size,
            "dt_proj": config.time_step_rank, "out_proj": config.intermediate_size,
        }  # fmt: skip
        for name in options.modules:
            if columns[name] % m:
                raise InputError(
                    f"--prunem {m} does not divide the {columns[name]} columns of {name}: "
                    "choose others with --target_modules or --module"
                )
    return first, stop


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise InputError(message)


def parse(argv: Sequence[str]) -> tuple[Options, Path | None]:
    """Options from command-line words, and the folder of the run to go on with, if any.

    Raises:
        InputError: for unknown flags and for whatever `check` finds.
    """
    parser = _Parser(
        prog="main.py",
        description="Prune a Mamba language model in one shot, measure its perplexity, save it.",
        allow_abbrev=False,
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("positionals", nargs="*", metavar="MODEL DATASET", help="the model and the calibration text")
    for spec in dataclasses.fields(Options):
        arguments = dict(spec.metadata)
        names = ["--model_path" if spec.name == "model" else f"--{spec.name}", *arguments.pop("names")]
        parser.add_argument(*names, dest=spec.name, default=spec.default, **arguments)
    parser.add_argument("--resume", metavar="RUN_FOLDER", help="go on with an interrupted run; takes no other option")
    known = vars(parser.parse_intermixed_args(list(argv)))
    words, resume = known.pop("positionals"), known.pop("resume")
    if resume is not None:
        if len(argv) > 2 or words:
            raise InputError("--resume takes the options of the run that it goes on with: leave out all others")
        return _recorded(Path(resume))
    for name, word in zip(("model", "dataset"), words):
        if known[name] is not None:
            raise InputError(f"the {name} is given twice: {word} and {known[name]}")
        known[name] = word
    if len(words) > 2:
        raise InputError(f"expected MODEL and DATASET, got {len(words)} words: {' '.join(words)}")
    return _frozen(known), None


def _frozen(values: dict[str, Any]) -> Options:
    return Options(**{key: tuple(value) if isinstance(value, list) else value for key, value in values.items()})


def _recorded(folder: Path) -> tuple[Options, Path]:
    """The options of an interrupted run."""
    try:
        values = json.loads((folder / "options.json").read_text())
    except (OSError, ValueError):
        raise InputError(f"--resume {folder} holds no options.json: give the folder of a run") from None
    if (folder / "metrics.json").is_file():
        raise InputError(f"--resume {folder} has finished: its figures are in metrics.json")
    known = {spec.name for spec in dataclasses.fields(Options)}
    if values.keys() != known:
        raise InputError(f"--resume {folder} was written by another version (options.json differs): start the run anew")
    return _frozen(values), folder
