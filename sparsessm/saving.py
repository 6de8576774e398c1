"""Writing checkpoints: whole or not at all.

A folder is written beside its target under a temporary name and takes the target's place by a rename; an existing
checkpoint is kept until then.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor
from transformers import MambaForCausalLM, PreTrainedTokenizerBase

from sparsessm.checkpoint import Source
from sparsessm.errors import InputError

MASKS, RECORD = "masks.safetensors", "sparsessm.json"


def check_target(target: str, source: Source) -> None:
    """Whether a checkpoint can be written to `target`, before anything heavy starts.

    Raises:
        InputError: the target is the model itself, a file, a folder of something else, or cannot be written.
    """
    path = Path(target).expanduser().absolute()
    if path.exists():
        if not path.is_dir():
            raise InputError(f"--save {target} is a file: name a folder")
        if path.resolve() == source.folder.resolve():
            raise InputError(f"--save {target} is the model itself: name another folder")
        if any(path.iterdir()) and not (path / "config.json").is_file():
            raise InputError(f"--save {target} holds something that is no checkpoint: name a new folder")
    parent = path.parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise InputError(f"--save {target} cannot be written: {parent} is not a folder that you may write to")
    needed = sum(file.stat().st_size for file in source.files)
    free = shutil.disk_usage(parent).free
    if free < needed:
        raise InputError(f"--save {target} needs about {needed >> 20} MiB and {parent} has {free >> 20} MiB free")


def save(
    model: MambaForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    masks: Mapping[str, Tensor],
    record: Mapping[str, Any],
    target: str,
    *,
    layout: str = "hf",
    raw_zeros: bool = False,
    original_config: Mapping[str, Any] | None = None,
) -> Path:
    """Writes config, weights, tokenizer, masks.safetensors and sparsessm.json to the folder `target`.

    Args:
        masks: by parameter name, True = pruned. A mask of removed states keeps the shape before the removal.
        record: what sparsessm.json holds.
        layout: "hf", or "state-spaces" for what mamba_ssm loads (config.json, pytorch_model.bin).
        raw_zeros: write 0 for pruned entries of A_log.
        original_config: config.json of a state-spaces source, whose keys that pruning does not change are kept.

    Raises:
        InputError: the disk is full or the target cannot be written; nothing is left under the target's name.
    """
    path = Path(target).expanduser().absolute()
    staging = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        _mend(path)
        staging = path.with_name(f".{path.name}.partial")
        staging.mkdir()
        _write(model, masks, staging, layout, raw_zeros, original_config)
        tokenizer.save_pretrained(staging)
        if masks:
            save_file({name: mask.contiguous() for name, mask in sorted(masks.items())}, staging / MASKS)
        (staging / RECORD).write_text(json.dumps(record, indent=2, sort_keys=True) + "\n")
        _publish(staging)
        _replace(path, staging)
    except Exception as error:  # the tokenizers package raises nothing more special
        if not _is_storage_fault(error):
            raise
        raise InputError(f"{path} could not be written ({error}): nothing was saved, make room or name another place") from None
    finally:
        if staging is not None:
            shutil.rmtree(staging, ignore_errors=True)
    return path


def _is_storage_fault(error: Exception) -> bool:
    """Whether the disk refused; torch, safetensors and tokenizers wrap the system's error in their own."""
    if isinstance(error, (OSError, SafetensorError)):
        return True
    refusals = [os.strerror(code) for code in (errno.ENOSPC, errno.EFBIG, errno.EDQUOT)]
    return any(words in str(error) for words in (*refusals, "PytorchStreamWriter", "unexpected pos"))


def _write(
    model: MambaForCausalLM,
    masks: Mapping[str, Tensor],
    folder: Path,
    layout: str,
    raw_zeros: bool,
    original_config: Mapping[str, Any] | None,
) -> None:
    state = model.state_dict()
    if raw_zeros:
        for name, mask in masks.items():
            if name.endswith(".A_log") and mask.shape == state[name].shape:
                state[name] = state[name].masked_fill(mask, 0)
    if layout == "hf":
        model.save_pretrained(folder, state_dict=state)
        return
    config = _state_spaces_config(model, original_config or {})
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    renamed = {name.replace("backbone.embeddings.", "backbone.embedding."): tensor for name, tensor in state.items()}
    torch.save(renamed, folder / "pytorch_model.bin")


def _state_spaces_config(model: MambaForCausalLM, original: Mapping[str, Any]) -> dict[str, Any]:
    config = model.config
    if config.intermediate_size != int(config.expand * config.hidden_size):
        raise InputError("the state-spaces layout has no word for an intermediate size other than expand * d_model")
    rows = config.vocab_size
    return {
        "d_model": config.hidden_size,
        "n_layer": config.num_hidden_layers,
        "vocab_size": original.get("vocab_size", rows),
        "ssm_cfg": {
            "d_state": config.state_size, "d_conv": config.conv_kernel, "expand": config.expand,
            "dt_rank": config.time_step_rank, "bias": config.use_bias, "conv_bias": config.use_conv_bias,
        },
        "rms_norm": True,
        "residual_in_fp32": config.residual_in_fp32,
        "fused_add_norm": original.get("fused_add_norm", True),
        "pad_vocab_size_multiple": original.get("pad_vocab_size_multiple", 8 if rows % 8 == 0 else 1),
        "tie_embeddings": config.tie_word_embeddings,
    }  # fmt: skip


def _publish(folder: Path) -> None:
    """Gives a temporary folder, made for its owner alone, the permissions that new files would have; syncs it."""
    mask = os.umask(0)
    os.umask(mask)
    folder.chmod(0o777 & ~mask)
    for file in folder.iterdir():
        file.chmod(0o666 & ~mask)
        with file.open("rb") as stream:
            os.fsync(stream.fileno())


def _mend(path: Path) -> None:
    """Clears what a killed run may have left beside the target; a target caught between two renames comes back."""
    shutil.rmtree(path.with_name(f".{path.name}.partial"), ignore_errors=True)
    previous = path.with_name(f".{path.name}.previous")
    if previous.exists() and not path.exists():
        previous.rename(path)
    shutil.rmtree(previous, ignore_errors=True)


def _replace(path: Path, staging: Path) -> None:
    """Puts staging in the place of path; what was there comes back if that fails."""
    if not path.exists():
        staging.rename(path)
        return
    previous = path.with_name(f".{path.name}.previous")
    path.rename(previous)
    try:
        staging.rename(path)
    except OSError:
        with suppress(OSError):
            previous.rename(path)
        raise
    shutil.rmtree(previous, ignore_errors=True)
