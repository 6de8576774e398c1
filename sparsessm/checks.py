"""Checks of the options; each error is one line that says what to do."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Any

from sparsessm.errors import InputError
from sparsessm.metrics.tasks import TASKS
from sparsessm.pruning.methods import MEASURED, METHODS, Method
from sparsessm.pruning.saliency import SALIENCIES

# What --offload takes.
OFFLOADS = ("auto", "device", "cpu", "disk")


def check(options: Any) -> None:
    """Every check of Options that does not need the model.

    Raises:
        InputError: one line that says what to do.
    """
    if options.model is None or options.dataset is None:
        raise InputError("give a MODEL and a DATASET, for example: python main.py demo demo")
    for name in (
        "nsamples", "seqlen", "calib_batch", "eval_batch", "blocksize", "eval_windows", "zero_shot_batch", "recover_steps",
        "recover_passes",
    ):  # fmt: skip
        value = getattr(options, name)
        if value is not None and value < 1:
            raise InputError(f"--{name} must be at least 1, not {value}")
    for name, value in vars(options).items():
        if name != "sparsity" and isinstance(value, float) and not math.isfinite(value):
            raise InputError(f"--{name} must be a finite number, not {value}")
    if options.offload not in OFFLOADS:
        raise InputError(f"--offload must be one of {', '.join(OFFLOADS)}, not {options.offload}")
    if options.seqlen < 2:
        raise InputError("--seqlen must be at least 2: a window of one token predicts nothing")
    if options.memory_budget is not None and not options.memory_budget >= 0:
        raise InputError(f"--memory_budget must not be negative, not {options.memory_budget}")
    for name in ("percdamp", "ridge", "polish"):
        value = getattr(options, name)
        if value is not None and not value >= 0:
            raise InputError(f"--{name} must not be negative, not {value}")
    for name in ("recover_rate", "recover_block_rate"):
        if getattr(options, name) <= 0:
            raise InputError(f"--{name} must be above 0, not {getattr(options, name)}")
    if not 0 < options.time_window <= 1:
        raise InputError(f"--time_window must lie above 0 and at most at 1, not {options.time_window}")
    if options.time_discount <= 0:
        raise InputError(f"--time_discount must be above 0, not {options.time_discount}")
    name, base = options.experiment_name, os.path.abspath(options.base_dir)
    if "\0" in name or not Path(os.path.abspath(os.path.join(base, name))).is_relative_to(base) or name.strip(" ./") == "":
        raise InputError(f"--experiment_name {name} is not a folder below --base_dir: give a plain name")
    if options.generate is not None and not options.generate.strip():
        raise InputError("--generate needs a text to continue")
    if options.overwrite and not options.save:
        raise InputError("--overwrite does nothing alone: add --save")
    if options.push_to_hub is not None and not options.save:
        raise InputError("--push_to_hub pushes what --save wrote: add --save")
    if options.private and options.push_to_hub is None:
        raise InputError("--private does nothing alone: add --push_to_hub")
    if options.wandb_checkpoint and not (options.log_wandb and options.save):
        raise InputError("--wandb_checkpoint does nothing alone: add --log_wandb and --save")
    _check_zero_shot(options)
    if options.method is None:
        if options.prune_A or options.prune_layers or options.sparsity is not None or options.prunem:
            raise InputError(f"say how to prune with --method, one of: {', '.join(METHODS)}")
        if options.recover:
            raise InputError("--recover tunes what a method has left: add --method")
        return
    _check_method(options)
    _check_share(options)


def _check_zero_shot(options: Any) -> None:
    names = options.zero_shot_tasks
    if not options.eval_zero_shot and (names != TASKS or options.zero_shot_include is not None):
        raise InputError("--zero_shot_tasks and --zero_shot_include do nothing alone: add --eval_zero_shot")
    if len(set(names)) < len(names):
        raise InputError(f"--zero_shot_tasks names a task twice: {' '.join(names)}")
    if "mean" in names:
        raise InputError("--zero_shot_tasks: a task cannot be called mean, as the mean of all tasks is: rename it")


def _check_method(options: Any) -> None:
    method, name = options.recipe, options.method
    if not (options.prune_A or options.prune_layers):
        raise InputError(f"--method {name} needs something to prune: give --prune_A, --prune_layers or both")
    if method.removes_parts:
        _check_removal(options)
        return
    if options.shed_target:
        raise InputError(f"--method {name} does not remove whole parts: leave out --shed_target")
    if options.prune_A and not method.prunes_A_log:
        able = [key for key, value in METHODS.items() if value.prunes_A_log]
        raise InputError(f"--method {name} has no rule for A_log; for --prune_A use one of: {', '.join(able)}")
    if options.prune_layers and method.weights is None:
        able = [key for key, value in METHODS.items() if value.weights]
        raise InputError(f"--method {name} has no rule for weights; for --prune_layers use one of: {', '.join(able)}")
    if (options.saliency or options.aggregate) and (method.obs_on_A_log or not METHODS[options.method].prunes_A_log):
        raise InputError(f"--method {name} does not score A_log: leave out --saliency and --aggregate")
    if method.needs_n_of_m and not options.prunem:
        raise InputError(f"--method {name} needs N:M: give --prunen and --prunem")
    if method.structure != "entries" and options.prunem:
        raise InputError(f"--method {name} removes whole states: give --sparsity, not --prunen and --prunem")
    _check_compensation(options, method)


def _check_compensation(options: Any, method: Method) -> None:
    saliency = SALIENCIES.get(method.saliency or "")
    if method.search != "independent" and method.prunes_A_log and not (saliency and saliency.interacts):
        able = [key for key, value in SALIENCIES.items() if value.interacts]
        raise InputError(f"--search {method.search} needs a saliency that knows how entries interact: {', '.join(able)}")
    solved = method.weights in ("obs", "obc")
    if options.polish and not solved:
        raise InputError(f"--polish refines the weights of OBS, which --method {options.method} does not use")
    scored = options.prune_A and saliency and saliency.interacts
    if method.importance != "none" and not (solved if options.prune_layers else scored):
        raise InputError(
            f"--importance {method.importance} is for --weights obs and obc, and --saliency output: give --importance none"
        )
    if options.structure not in (None, "entries") and not options.prune_A:
        raise InputError(f"--structure {options.structure} removes parts of the SSM: give --prune_A")
    if options.alpha and method.allocation in MEASURED:
        raise InputError(f"--allocation {method.allocation} needs no --alpha: leave one of them out")
    plain = (method.compensate, method.module_order) == ("none", "parallel")
    if options.alpha and method.allocation == "sensitivity" and not plain:
        raise InputError("--alpha cannot be combined with --compensate and --module_order: use --allocation output")
    if method.allocation in MEASURED and not options.spreads(method):
        raise InputError(
            f"--allocation {method.allocation} spreads an unstructured sparsity: leave it out with N:M and columns"
        )
    if method.allocation == "loss" and (
        (options.prune_layers and method.weights != "obc") or (options.prune_A and not scored)
    ):
        raise InputError(
            "--allocation loss knows the costs of --weights obc and --saliency output: use these, or --allocation uniform"
        )


def _check_removal(options: Any) -> None:
    target, name = options.removal_target, options.method
    if options.saliency or options.aggregate or options.module:
        raise InputError(f"--method {name} uses perplexity alone: leave out --saliency, --aggregate and --module")
    if options.prunen or options.prunem:
        raise InputError(f"--method {name} removes whole parts: give --sparsity, not --prunen and --prunem")
    if target == "ssm" and (options.prune_layers or not options.prune_A):
        raise InputError(
            "--shed_target ssm needs --prune_A, without --prune_layers; "
            "to remove whole blocks give --prune_layers and --shed_target mamba_block"
        )
    if target == "mamba_block" and options.recover and "blocks" in options.recover:
        raise InputError("--recover blocks needs every block that the dense model has: use --recover model")
    if target == "mamba_block" and not options.prune_layers:
        raise InputError("--shed_target mamba_block removes weights as well: give --prune_layers")


def _check_share(options: Any) -> None:
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


