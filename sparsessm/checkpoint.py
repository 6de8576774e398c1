"""Reading checkpoints: a hub id, a local folder in the Hugging Face or the original state-spaces layout, or `demo`.

The two layouts hold the same tensors; only the embedding's name and the config's keys differ. So both are read the same
way: a config, an empty model, and every tensor checked as it is put in. Writing is in `sparsessm.saving`.
"""

from __future__ import annotations

import copy
import json
import math
import struct
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoTokenizer, GenerationConfig, MambaConfig, MambaForCausalLM, PreTrainedTokenizerBase

from sparsessm.errors import InputError

DEMO = Path(__file__).resolve().parent.parent / "data" / "mamba-demo"
FALLBACK_TOKENIZER = "EleutherAI/gpt-neox-20b"

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_INDEX_ENDING = ".index.json"
_WEIGHT_FILES = ("model.safetensors", "pytorch_model.bin")


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
        InputError: no such folder or hub id, no config or weights, not a Mamba-1 model, files cut short.
    """
    folder = DEMO if name == "demo" else Path(name).expanduser()
    if not folder.is_dir():
        if folder.exists():
            raise InputError(f"{name} is a file: give the folder that holds config.json and the weights")
        folder = _download(name)
    config_file = folder / "config.json"
    if not config_file.is_file():
        raise InputError(f"{name} has no config.json: give the folder of a Mamba checkpoint")
    try:
        raw = json.loads(config_file.read_text())
    except ValueError as error:
        raise InputError(f"{config_file} is not valid JSON ({error}): fetch it again") from None
    if not isinstance(raw, dict):
        raise InputError(f"{config_file} holds no config: fetch it again")
    try:
        layout, config = _read_config(name, raw)
    except (TypeError, ValueError, KeyError, StrictDataclassError) as error:
        if isinstance(error, InputError):
            raise
        reason = str(error).strip().splitlines()[-1].strip()
        raise InputError(f"{config_file} describes no model ({reason}): mend it, or fetch it again") from None
    return Source(name, folder, layout, config, raw, _weight_files(name, folder))


def _download(name: str) -> Path:
    """The local copy of a hub repository, fetched if need be; weights as safetensors where there are any."""
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise InputError(f"there is no folder {name}: give a folder, a hub id such as state-spaces/mamba-130m-hf, or demo")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        small = Path(snapshot_download(name, allow_patterns=["*.json", "*.safetensors", "tokenizer*", "*.txt"]))
        if not any(small.glob("*.safetensors")):
            small = Path(snapshot_download(name, allow_patterns=["*.json", "*.bin", "tokenizer*", "*.txt"]))
        return small
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        first_line = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise InputError(
            f"{name} is neither a folder here nor could it be fetched from the hub ({first_line}): "
            "check the name and the network, or give a local folder"
        ) from None


def _read_config(name: str, raw: dict[str, Any]) -> tuple[str, MambaConfig]:
    kind = raw.get("model_type")
    if kind == "mamba":
        return "hf", MambaConfig.from_dict(raw)
    ssm = raw.get("ssm_cfg") or {}
    if kind is None and {"d_model", "n_layer", "vocab_size"} <= raw.keys():
        if ssm.get("layer", "Mamba1") != "Mamba1" or raw.get("attn_layer_idx") or raw.get("d_intermediate"):
            raise InputError(f"{name} is a Mamba-2 or hybrid checkpoint: only Mamba-1 models can be pruned")
        if not raw.get("rms_norm", True):
            raise InputError(f"{name} uses LayerNorm (rms_norm false), which transformers' Mamba has not")
        return "state-spaces", _config_from_state_spaces(raw, ssm)
    raise InputError(f"{name} is no Mamba model (model_type {kind!r}): give a Mamba-1 checkpoint")


def _config_from_state_spaces(raw: dict[str, Any], ssm: dict[str, Any]) -> MambaConfig:
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
    """The files that hold the weights, none missing and none cut short; safetensors come first."""
    for plain in _WEIGHT_FILES:
        index = folder / (plain + _INDEX_ENDING)
        if index.is_file():
            try:
                shards = sorted(set(json.loads(index.read_text())["weight_map"].values()))
                files = tuple(folder / shard for shard in shards)
            except (ValueError, KeyError, AttributeError, TypeError):
                raise InputError(f"{index} is not an index of shards: fetch the checkpoint again") from None
        elif (folder / plain).is_file():
            files = (folder / plain,)
        else:
            continue
        for file in files:
            if not file.is_file():
                raise InputError(f"{file} is missing: fetch the checkpoint again")
            if file.suffix == ".safetensors":
                _check_safetensors(file)
        return files
    raise InputError(f"{name} has a config but no weights ({' or '.join(_WEIGHT_FILES)}, whole or in shards)")


def _check_safetensors(file: Path) -> None:
    """Compares the size of a file with what its header promises.

    The format (safetensors, "Format"): 8 bytes with the header's length, the header as JSON, the tensors' bytes.
    """
    size = file.stat().st_size
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > size:
                raise ValueError("the header is longer than the file")
            header = json.loads(stream.read(length))
        promised = 8 + length + max((v["data_offsets"][1] for k, v in header.items() if k != "__metadata__"), default=0)
    except (struct.error, ValueError, KeyError, TypeError, AttributeError):
        raise InputError(f"{file} is not a whole safetensors file: fetch it again") from None
    if size != promised:
        raise InputError(f"{file} holds {size} bytes where its header promises {promised}: fetch it again")


def load(source: Source, dtype: str = "auto") -> MambaForCausalLM:
    """The model on the CPU, in eval mode, without gradients.

    A_log is float32 whatever the dtype; below float32 its values are rounded to the dtype once, here, for every runtime
    that loads the saved model in that dtype will round them so.

    Raises:
        InputError: tensors missing, left over, or of another shape than the config says.
    """
    wanted = _DTYPES.get(dtype)
    with torch.device("meta"):
        model = MambaForCausalLM(copy.deepcopy(source.config))
    expected = {name: parameter.shape for name, parameter in model.named_parameters()}
    seen = {}
    for file in source.files:
        for name, tensor in _read_tensors(file):
            name = name.replace("backbone.embedding.", "backbone.embeddings.")
            if name == "lm_head.weight" and source.config.tie_word_embeddings:
                continue
            if name not in expected:
                raise InputError(f"{file} holds {name}, which a Mamba model has not: is this the right checkpoint?")
            if tensor.shape != expected[name]:
                raise InputError(
                    f"{file}: {name} has shape {tuple(tensor.shape)}, the config says {tuple(expected[name])}"
                )
            wanted = wanted or _stored_dtype(source, tensor)
            seen[name] = _cast(name, tensor, wanted)
    missing = sorted(expected.keys() - seen.keys())
    if missing:
        raise InputError(f"{source.name} lacks {len(missing)} tensors, the first {missing[0]}: fetch it again")
    model.load_state_dict(seen, strict=False, assign=True)
    model.tie_weights()
    model.config.dtype = wanted
    if (source.folder / "generation_config.json").is_file():
        model.generation_config = GenerationConfig.from_pretrained(source.folder)
    return model.eval().requires_grad_(False)


def _stored_dtype(source: Source, first: Tensor) -> torch.dtype:
    """What `auto` means: the config's dtype, else that of the first tensor."""
    named = source.raw_config.get("dtype") or source.raw_config.get("torch_dtype")
    return _DTYPES.get(str(named).removeprefix("torch."), first.dtype if first.is_floating_point() else torch.float32)


def _cast(name: str, tensor: Tensor, dtype: torch.dtype) -> Tensor:
    cast = tensor.to(dtype)
    return cast.float() if name.endswith(".A_log") else cast


def _read_tensors(file: Path):
    """(name, tensor) one after the other."""
    if file.suffix == ".safetensors":
        from safetensors import safe_open

        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():
                yield name, opened.get_tensor(name)
        return
    try:
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(file))
    except Exception as error:  # what a broken pickle or zip raises is anything
        raise InputError(f"{file} cannot be read ({type(error).__name__}): fetch it again") from None
    if not isinstance(state, dict) or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise InputError(f"{file} holds something else than named tensors: is this the right checkpoint?")
    yield from state.items()


def load_tokenizer(source: Source) -> PreTrainedTokenizerBase:
    """The checkpoint's own tokenizer, or GPT-NeoX's where it has none (as the state-spaces checkpoints)."""
    own = any((source.folder / file).is_file() for file in ("tokenizer.json", "tokenizer_config.json"))
    origin = source.folder if own else FALLBACK_TOKENIZER
    try:
        return AutoTokenizer.from_pretrained(origin)
    except (OSError, ValueError) as error:
        first_line = str(error).strip().splitlines()[0]
        raise InputError(
            f"no tokenizer from {origin} ({first_line}): put a tokenizer.json beside the weights of {source.name}"
        ) from None
