"""Reading checkpoints: a hub id, a local folder in the Hugging Face or the original state-spaces layout, or `demo`.

What stock `transformers` would load is what is loaded, by its own loader: its order of files, its rules for tied heads,
its changes of weights on the way. Of the state-spaces layout, which it does not know, the config's keys and one tensor's
name are translated first. What cannot be right is refused before any tensor is read. Writing is in `sparsessm.models.saving`.
"""

from __future__ import annotations

import copy
import hashlib
import json
import math
import zipfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM, MambaConfig, MambaForCausalLM
from transformers.utils import logging as transformers_logging

from sparsessm.errors import InputError, first_line
from sparsessm.models.place import put_back

DEMO = Path(__file__).resolve().parent.parent.parent / "data" / "mamba-demo"

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# In the order in which stock transformers takes them.
_WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")

# All keys of the state-spaces layout; those of the second line shape initial weights and computation, not the model.
_ORIGINAL_KEYS = {
    "d_model", "n_layer", "vocab_size", "ssm_cfg", "rms_norm", "residual_in_fp32", "fused_add_norm",
    "pad_vocab_size_multiple", "tie_embeddings", "d_intermediate", "attn_layer_idx", "attn_cfg",
}  # fmt: skip
_ORIGINAL_SSM_KEYS = {"layer", "d_state", "d_conv", "expand", "dt_rank", "bias", "conv_bias"} | {
    "dt_min", "dt_max", "dt_init", "dt_scale", "dt_init_floor", "use_fast_path",
}  # fmt: skip
# Keys that libraries add to any config and that say nothing of the model.
_REMARKS = {"architectures", "dtype", "torch_dtype", "transformers_version", "_name_or_path", "model_type"}


@dataclass(frozen=True)
class Source:
    """A checkpoint that was found and looks whole, before any tensor is read.

    Attributes:
        name: what the user called it. folder: where its files lie. layout: "hf" or "state-spaces".
        config: what to build the model from. raw_config: config.json as it stands. files: its weight files.
    """

    name: str
    folder: Path
    layout: str
    config: MambaConfig
    raw_config: dict[str, Any]
    files: tuple[Path, ...]


def find(name: str) -> Source:
    """Finds a checkpoint and checks what can be checked without reading tensors.

    Raises:
        InputError: no such folder or hub id, no config or weights, not a Mamba-1 model, adapters or quantised weights,
            files cut short.
    """
    folder = DEMO if name == "demo" else Path(name).expanduser()
    if not folder.is_dir():
        if folder.exists():
            raise InputError(f"{name} is a file: give the folder that holds config.json and the weights")
        put_back(folder)
    if folder.is_dir():
        put_back(folder)
    else:
        folder = _download(name)
    if (folder / "adapter_config.json").exists():
        raise InputError(f"{name} holds an adapter (adapter_config.json): merge it into its base model first")
    if not (folder / "config.json").is_file():
        raise InputError(f"{name} has no config.json: give the folder of a Mamba checkpoint")
    raw = read_json(folder / "config.json")
    try:
        layout, config = _read_config(name, raw)
    except InputError:
        raise
    except (TypeError, ValueError, KeyError, AttributeError, ArithmeticError, StrictDataclassError) as error:
        reason = str(error).strip().splitlines()[-1].strip() if str(error).strip() else type(error).__name__
        raise InputError(f"{folder / 'config.json'} describes no model ({reason}): correct it, or fetch it again") from None
    if (folder / "generation_config.json").is_file():
        read_json(folder / "generation_config.json")
    return Source(name, folder, layout, config, raw, _weight_files(name, folder))


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object of a checkpoint.

    Raises:
        InputError: the file cannot be read or holds something else.
    """
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{file} is not valid JSON ({first_line(error)}): fetch it again") from None
    if not isinstance(content, dict):
        raise InputError(f"{file} holds no values by name: fetch it again")
    return content


def _download(name: str) -> Path:
    """The local copy of a hub repository, fetched if need be; weights as safetensors where there are any."""
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise InputError(f"there is no folder {name}: give a folder, a hub id such as state-spaces/mamba-130m-hf, or demo")
    from huggingface_hub import snapshot_download

    small = ["*.json", "*.txt", "*.jinja", "tokenizer*"]
    try:
        folder = Path(snapshot_download(name, allow_patterns=[*small, "*.safetensors"]))
        if not any(folder.glob("*.safetensors")):
            folder = Path(snapshot_download(name, allow_patterns=[*small, "*.bin"]))
        return folder
    except Exception as error:  # of the hub, the HTTP library, its proxies, the disk: they share no base class
        raise InputError(
            f"{name} is neither a folder here nor could it be fetched from the hub ({first_line(error)}): "
            "check the name, the network and its proxies, or give a local folder"
        ) from error


def _read_config(name: str, raw: dict[str, Any]) -> tuple[str, MambaConfig]:
    if raw.get("quantization_config") is not None:
        raise InputError(f"{name} has quantised weights (quantization_config): give a model with plain ones")
    if raw.get("transformers_weights") is not None:
        raise InputError(f"{name} names weight files of its own (transformers_weights in config.json): use the usual names")
    kind = raw.get("model_type")
    if kind == "mamba":
        return "hf", MambaConfig.from_dict(copy.deepcopy(raw))
    if kind is None and {"d_model", "n_layer", "vocab_size"} <= raw.keys():
        return "state-spaces", _config_from_state_spaces(name, raw)
    raise InputError(f"{name} is no Mamba model (model_type {kind!r}): give a Mamba-1 checkpoint")


def _config_from_state_spaces(name: str, raw: dict[str, Any]) -> MambaConfig:
    ssm = raw.get("ssm_cfg") or {}
    if ssm.get("layer", "Mamba1") != "Mamba1" or raw.get("attn_layer_idx") or raw.get("d_intermediate"):
        raise InputError(f"{name} is a Mamba-2 or hybrid checkpoint: only Mamba-1 models can be pruned")
    if not raw.get("rms_norm", True):
        raise InputError(f"{name} uses LayerNorm (rms_norm false), which transformers' Mamba has not")
    unknown = sorted((raw.keys() - _ORIGINAL_KEYS - _REMARKS) | (ssm.keys() - _ORIGINAL_SSM_KEYS))
    if unknown:
        raise InputError(f"{name}: config.json has keys that no Mamba-1 model of this layout has: {', '.join(unknown)}")
    d_model, multiple = raw["d_model"], raw.get("pad_vocab_size_multiple", 8)
    rank = ssm.get("dt_rank", "auto")
    return MambaConfig(
        hidden_size=d_model,
        num_hidden_layers=raw["n_layer"],
        vocab_size=math.ceil(raw["vocab_size"] / multiple) * multiple,
        state_size=ssm.get("d_state", 16),
        conv_kernel=ssm.get("d_conv", 4),
        expand=ssm.get("expand", 2),
        time_step_rank=math.ceil(d_model / 16) if rank == "auto" else rank,
        use_bias=ssm.get("bias", False),
        use_conv_bias=ssm.get("conv_bias", True),
        layer_norm_epsilon=1e-5,
        residual_in_fp32=raw.get("residual_in_fp32", True),
        tie_word_embeddings=raw.get("tie_embeddings", True),
    )


def _weight_files(name: str, folder: Path) -> tuple[Path, ...]:
    """The files that hold the weights, none missing and none cut short."""
    for plain in _WEIGHT_FILES:
        if not (folder / plain).is_file():
            continue
        files = _shards(folder / plain) if plain.endswith(".index.json") else (folder / plain,)
        for file in files:
            if not file.is_file():
                raise InputError(f"{file} is missing: fetch the checkpoint again")
            if file.suffix == ".safetensors":
                try:
                    with safe_open(file, framework="pt"):
                        pass
                except (SafetensorError, OSError, ValueError) as error:
                    raise InputError(f"{file} is not a whole safetensors file ({first_line(error)}): fetch it again") from None
        return files
    raise InputError(f"{name} has a config but no weights ({_WEIGHT_FILES[0]} or {_WEIGHT_FILES[2]}, whole or in shards)")


def _shards(index: Path) -> tuple[Path, ...]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        parts = [PurePosixPath(name) for name in names]
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError):
        raise InputError(f"{index} is not an index of shards: fetch the checkpoint again") from None
    if not parts:
        raise InputError(f"{index} names no shard: fetch the checkpoint again")
    for part in parts:
        if part.is_absolute() or ".." in part.parts:
            raise InputError(f"{index} names a file outside the model's folder ({part}): fetch the checkpoint again")
    return tuple(index.parent / name for name in names)


def load(source: Source, dtype: str = "auto") -> MambaForCausalLM:
    """The model on the CPU, in eval mode, without gradients.

    A_log is float32 whatever the dtype; below float32 its values are rounded to the dtype once, here, for every runtime
    that loads the saved model in that dtype will round them so.

    Raises:
        InputError: tensors missing, left over, of another shape than the config says, or with values that are not
            finite numbers of the dtype.
    """
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    options: dict[str, Any] = {"dtype": _DTYPES.get(dtype, "auto"), "output_loading_info": True}
    options["ignore_mismatched_sizes"] = True  # it lists them, and we say so
    try:
        if source.layout == "hf":
            model, found = AutoModelForCausalLM.from_pretrained(source.folder, trust_remote_code=False, **options)
        else:
            state = _read_state_spaces(source)
            model, found = MambaForCausalLM.from_pretrained(
                None, config=copy.deepcopy(source.config), state_dict=state, **options
            )
    except InputError:
        raise
    except Exception as error:  # what a broken pickle, zip or header raises is anything
        where = ", ".join(file.name for file in source.files[:3])
        raise InputError(f"{source.folder} cannot be loaded ({where}: {first_line(error)}): fetch it again") from error
    _check_found(source, found)
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            remedy = "the weights are broken" if parameter.dtype == torch.float32 else "try --dtype float32"
            raise InputError(f"{source.name}: {name} has values that are not finite: {remedy}")
        if name.endswith(".A_log"):
            parameter.data = parameter.data.float()
    model.config.tie_word_embeddings = model.lm_head.weight is model.backbone.embeddings.weight
    return model.eval().requires_grad_(False)


def _check_found(source: Source, found: dict[str, Any]) -> None:
    if found["mismatched_keys"]:
        name, stored, wanted = sorted(found["mismatched_keys"])[0]
        raise InputError(f"{source.name}: {name} has shape {tuple(stored)}, the config says {tuple(wanted)}")
    if found["unexpected_keys"]:
        name = sorted(found["unexpected_keys"])[0]
        raise InputError(f"{source.name} holds {name}, which a Mamba model has not: is this the right checkpoint?")
    if found["missing_keys"]:
        missing = sorted(found["missing_keys"])
        raise InputError(f"{source.name} lacks {len(missing)} tensors, the first {missing[0]}: fetch it again")


def _read_state_spaces(source: Source) -> dict[str, Tensor]:
    """All tensors under their Hugging Face names."""
    state: dict[str, Tensor] = {}
    for file in source.files:
        if file.suffix == ".safetensors":
            state |= load_file(file)
            continue
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
        if not isinstance(content, dict) or not all(isinstance(tensor, Tensor) for tensor in content.values()):
            raise InputError(f"{file} holds something else than named tensors: is this the right checkpoint?")
        state |= content
    embedding, head = state.get("backbone.embedding.weight"), state.get("lm_head.weight")
    if source.config.tie_word_embeddings and embedding is not None and head is not None and not torch.equal(embedding, head):
        raise InputError(f"{source.name} ties its head by its config and holds another one: set tie_embeddings to false")
    return {name.replace("backbone.embedding.", "backbone.embeddings."): tensor for name, tensor in state.items()}


def fingerprint(model: torch.nn.Module) -> str:
    """sha256 of all parameters, by name, dtype, shape and content."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
