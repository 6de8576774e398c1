"""Reading checkpoints: a hub id, a local folder in the Hugging Face or the original state-spaces layout, or `demo`.

What stock `transformers` would load is what is loaded, by its own loader: its order of files, its rules for tied heads,
its changes of weights on the way. Of the state-spaces layout, which it does not know, the config's keys and one tensor's
name are translated first. What cannot be right is refused before any tensor is read. `sparsessm.models.saving` writes.
"""

from __future__ import annotations

import copy
import hashlib
import json
import zipfile
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.utils import logging as transformers_logging

from sparsessm.errors import InputError, first_line
from sparsessm.models import original
from sparsessm.models.card import CARD
from sparsessm.models.family import ARCHITECTURES
from sparsessm.models.place import put_back

DEMO = Path(__file__).resolve().parent.parent.parent / "data" / "mamba-demo"

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# In the order in which stock transformers takes them.
_WEIGHT_FILES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")


@dataclass(frozen=True)
class Source:
    """A checkpoint that was found and looks complete, before any tensor is read.

    Attributes:
        name: what the user called it. folder: where its files lie. layout: "hf" or "state-spaces".
        config: what to build the model from. raw_config: config.json unchanged. files: its weight files.
    """

    name: str
    folder: Path
    layout: str
    config: PreTrainedConfig
    raw_config: dict[str, Any]
    files: tuple[Path, ...]


def find(name: str) -> Source:
    """Finds a checkpoint and checks what can be checked without reading tensors.

    Raises:
        InputError: no such folder or hub id, no config or weights, no model that is known here, adapters or quantised
            weights, files cut short.
    """
    folder = DEMO if name == "demo" else Path(name).expanduser()
    if not folder.is_dir():
        if folder.exists():
            raise InputError(f"{name} is a file: give the folder that holds config.json and the weights")
        put_back(folder)
    if folder.is_dir():
        put_back(folder)
    elif name == "demo":
        raise InputError("the model demo comes with a clone of the repository: run there, or give a folder or a hub id")
    else:
        folder = _download(name)
    if (folder / "adapter_config.json").exists():
        raise InputError(f"{name} holds an adapter (adapter_config.json): merge it into its base model first")
    if not (folder / "config.json").is_file():
        raise InputError(f"{name} has no config.json: give the folder of a checkpoint")
    raw = read_json(folder / "config.json")
    try:
        layout, config = _read_config(name, folder, raw)
    except InputError:
        raise
    except (TypeError, ValueError, KeyError, AttributeError, ArithmeticError, OSError, StrictDataclassError) as error:
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

    small = ["*.json", "*.txt", "*.jinja", "tokenizer*", CARD]
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


def _read_config(name: str, folder: Path, raw: dict[str, Any]) -> tuple[str, PreTrainedConfig]:
    if raw.get("quantization_config") is not None:
        raise InputError(f"{name} has quantised weights (quantization_config): give a model with plain ones")
    if raw.get("transformers_weights") is not None:
        raise InputError(f"{name} names other weight files (transformers_weights in config.json): use the usual names")
    if original.is_original(raw):
        return "state-spaces", original.config_of(name, raw)
    kind = raw.get("model_type")
    if kind not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise InputError(f"{name} is not a model that can be pruned here (model_type {kind!r}): known are {known}")
    return "hf", AutoConfig.from_pretrained(folder, trust_remote_code=False)


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
                    reason = first_line(error)
                    raise InputError(f"{file} is not a whole safetensors file ({reason}): fetch it again") from None
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


def skeleton(source: Source) -> PreTrainedModel:
    """The model without weights: modules, names and shapes."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(copy.deepcopy(source.config))


def load(source: Source, dtype: str = "auto") -> PreTrainedModel:
    """The model on the CPU, in eval mode, without gradients.

    A_log is float32 whatever the dtype; below float32 its values are rounded to the dtype once, here, because every runtime
    that loads the saved model in that dtype rounds them so.

    Raises:
        InputError: tensors missing, left over, of another shape than the config says, or with values that are not
            finite numbers of the dtype.
    """
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    options: dict[str, Any] = {"dtype": DTYPES.get(dtype, "auto"), "output_loading_info": True}
    options["ignore_mismatched_sizes"] = True  # it lists them, and we say so
    try:
        if source.layout == "hf":
            loaded: Any = AutoModelForCausalLM.from_pretrained(source.folder, trust_remote_code=False, **options)
        else:
            kind: Any = AutoModelForCausalLM._model_mapping[type(source.config)]
            config, state = copy.deepcopy(source.config), _read_original(source)
            loaded = kind.from_pretrained(None, config=config, state_dict=state, **options)
        model, found = loaded
    except InputError:
        raise
    except Exception as error:  # a broken pickle, zip or header may raise anything
        where = ", ".join(file.name for file in source.files[:3])
        raise InputError(f"{source.folder} cannot be loaded ({where}: {first_line(error)}): fetch it again") from error
    _check_found(source, found)
    for name, parameter in model.named_parameters():
        if not torch.isfinite(parameter).all():
            remedy = "the weights are broken" if parameter.dtype == torch.float32 else "try --dtype float32"
            raise InputError(f"{source.name}: {name} has values that are not finite: {remedy}")
    widen_A_log(model)
    model.config.tie_word_embeddings = model.get_output_embeddings().weight is model.get_input_embeddings().weight
    return model.eval().requires_grad_(False)


def widen_A_log(model: torch.nn.Module) -> None:
    """Makes A_log float32, whatever the dtype of the other parameters."""
    for name, parameter in model.named_parameters():
        if name.endswith(".A_log"):
            parameter.data = parameter.data.float()


def _check_found(source: Source, found: dict[str, Any]) -> None:
    if found["mismatched_keys"]:
        name, stored, wanted = sorted(found["mismatched_keys"])[0]
        raise InputError(f"{source.name}: {name} has shape {tuple(stored)}, the config says {tuple(wanted)}")
    if found["unexpected_keys"]:
        name = sorted(found["unexpected_keys"])[0]
        raise InputError(f"{source.name} holds {name}, which this model does not have: is this the right checkpoint?")
    if found["missing_keys"]:
        missing = sorted(found["missing_keys"])
        raise InputError(f"{source.name} lacks {len(missing)} tensors, the first {missing[0]}: fetch it again")


def _read_original(source: Source) -> dict[str, Tensor]:
    """All tensors of the state-spaces layout under the names of transformers."""
    state: dict[str, Tensor] = {}
    for file in source.files:
        if file.suffix == ".safetensors":
            state |= load_file(file)
            continue
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
        if not isinstance(content, dict) or not all(isinstance(tensor, Tensor) for tensor in content.values()):
            raise InputError(f"{file} does not hold named tensors: is this the right checkpoint?")
        state |= content
    return original.tensors_here(source.name, state, source.config.tie_word_embeddings)


def fingerprint(model: torch.nn.Module) -> str:
    """sha256 of all parameters, by name, dtype, shape and content."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
