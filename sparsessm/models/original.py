"""The layout of the original state-spaces repositories: the same tensors, except one name and the keys of the config.

A config.json without `model_type`, with `ssm_cfg`; weights in pytorch_model.bin; no tokenizer. mamba_ssm reads it, and
transformers does not. A key that is not known here is refused: it may mean another model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import Mamba2Config, MambaConfig

from sparsessm.errors import InputError

_KEYS = {
    "d_model", "n_layer", "vocab_size", "ssm_cfg", "rms_norm", "residual_in_fp32", "fused_add_norm",
    "pad_vocab_size_multiple", "tie_embeddings", "d_intermediate", "attn_layer_idx", "attn_cfg",
}  # fmt: skip
# Keys that libraries add to any config and that say nothing of the model.
_REMARKS = {"architectures", "dtype", "torch_dtype", "transformers_version", "_name_or_path", "model_type"}
# Keys of ssm_cfg that shape initial weights and the way of computing, not the model.
_INITIAL = {
    "Mamba1": {"dt_min", "dt_max", "dt_init", "dt_scale", "dt_init_floor", "use_fast_path"},
    "Mamba2": {"dt_min", "dt_max", "dt_init_floor", "A_init_range", "conv_init", "chunk_size", "use_mem_eff_path"},
}
_SHARED = {"layer", "d_state", "d_conv", "expand", "bias", "conv_bias"}
_SSM_KEYS = {"Mamba1": _SHARED | {"dt_rank"}, "Mamba2": _SHARED | {"headdim", "ngroups", "dt_limit"}}
# What transformers' Mamba-2 computes; a config may say so, and nothing else.
_FIXED = {"Mamba1": {}, "Mamba2": {"D_has_hdim": False, "rmsnorm": True, "norm_before_gate": False, "d_ssm": None}}

_EMBEDDING, _ITS_NAME_HERE = "backbone.embedding.", "backbone.embeddings."
_NORM_EPSILON = 1e-5


def is_original(raw: Mapping[str, Any]) -> bool:
    """Whether a config.json is of this layout."""
    return raw.get("model_type") is None and {"d_model", "n_layer", "vocab_size"} <= raw.keys()


def config_of(name: str, raw: Mapping[str, Any]) -> MambaConfig | Mamba2Config:
    """The config of transformers that says the same.

    Raises:
        InputError: a hybrid, LayerNorm, or a key that is not known.
    """
    ssm = dict(raw.get("ssm_cfg") or {})
    kind = ssm.get("layer", "Mamba1")
    if raw.get("attn_layer_idx") or raw.get("d_intermediate"):
        raise InputError(f"{name} is a hybrid of the state-spaces layout (attn_layer_idx), which cannot be pruned here")
    if kind not in _SSM_KEYS:
        raise InputError(f"{name} has layers of the kind {kind}: known are {', '.join(_SSM_KEYS)}")
    if not raw.get("rms_norm", True):
        raise InputError(f"{name} uses LayerNorm (rms_norm false), which transformers' Mamba does not have")
    fixed = _FIXED[kind]
    unknown = sorted((raw.keys() - _KEYS - _REMARKS) | (ssm.keys() - _SSM_KEYS[kind] - _INITIAL[kind] - fixed.keys()))
    if unknown:
        raise InputError(f"{name}: config.json has keys that no {kind} model of this layout has: {', '.join(unknown)}")
    for key, value in fixed.items():
        if ssm.get(key, value) != value:
            raise InputError(f"{name}: {key} is {ssm[key]}, which transformers' {kind} cannot compute")
    d_model, multiple, expand = raw["d_model"], raw.get("pad_vocab_size_multiple", 8), ssm.get("expand", 2)
    both = {
        "hidden_size": d_model,
        "num_hidden_layers": raw["n_layer"],
        "vocab_size": math.ceil(raw["vocab_size"] / multiple) * multiple,
        "conv_kernel": ssm.get("d_conv", 4),
        "expand": expand,
        "use_bias": ssm.get("bias", False),
        "use_conv_bias": ssm.get("conv_bias", True),
        "layer_norm_epsilon": _NORM_EPSILON,
        "residual_in_fp32": raw.get("residual_in_fp32", True),
        "tie_word_embeddings": raw.get("tie_embeddings", True),
    }
    if kind == "Mamba1":
        rank = ssm.get("dt_rank", "auto")
        rank = math.ceil(d_model / 16) if rank == "auto" else rank
        return MambaConfig(state_size=ssm.get("d_state", 16), time_step_rank=rank, **both)
    headdim = ssm.get("headdim", 64)
    return Mamba2Config(
        state_size=ssm.get("d_state", 128), head_dim=headdim, num_heads=expand * d_model // headdim,
        n_groups=ssm.get("ngroups", 1), time_step_limit=tuple(map(float, ssm.get("dt_limit", (0.0, math.inf)))),
        bos_token_id=0, eos_token_id=0, pad_token_id=0, **both,
    )  # fmt: skip


def raw_config(config: Any, original: Mapping[str, Any]) -> dict[str, Any]:
    """config.json of this layout for a config of transformers; keys of the source that pruning does not change are kept.

    Raises:
        InputError: the layout cannot express something.
    """
    ssm = {
        "d_state": config.state_size, "d_conv": config.conv_kernel, "expand": config.expand, "bias": config.use_bias,
        "conv_bias": config.use_conv_bias,
    }  # fmt: skip
    if isinstance(config, MambaConfig):
        if config.intermediate_size != int(config.expand * config.hidden_size):
            raise InputError("the state-spaces layout cannot express an intermediate size other than expand * d_model")
        ssm |= {"dt_rank": config.time_step_rank}
    else:
        ssm |= {"layer": "Mamba2", "headdim": config.head_dim, "ngroups": config.n_groups}
        low, high = config.time_step_limit
        if (low, high) != (0.0, math.inf):
            ssm["dt_limit"] = [low, high]
    rows = config.vocab_size
    return {
        "d_model": config.hidden_size,
        "n_layer": config.num_hidden_layers,
        "vocab_size": original.get("vocab_size", rows),
        "ssm_cfg": ssm,
        "rms_norm": True,
        "residual_in_fp32": config.residual_in_fp32,
        "fused_add_norm": original.get("fused_add_norm", True),
        "pad_vocab_size_multiple": original.get("pad_vocab_size_multiple", 8 if rows % 8 == 0 else 1),
        "tie_embeddings": config.tie_word_embeddings,
    }


def tensors_here(name: str, state: Mapping[str, Tensor], tied: bool) -> dict[str, Tensor]:
    """Tensors of this layout under the names of transformers.

    Raises:
        InputError: the config ties the head to the embedding, and the file holds another one.
    """
    embedding, head = state.get(_EMBEDDING + "weight"), state.get("lm_head.weight")
    if tied and embedding is not None and head is not None and not torch.equal(embedding, head):
        raise InputError(f"{name} ties its head by its config but has a different head: set tie_embeddings to false")
    return {key.replace(_EMBEDDING, _ITS_NAME_HERE): tensor for key, tensor in state.items()}


def tensors_there(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The reverse of `tensors_here`."""
    return {key.replace(_ITS_NAME_HERE, _EMBEDDING): tensor for key, tensor in state.items()}
