"""Random stock models of every architecture, small, with no parameter constant, ordered or symmetric."""

import math
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BambaConfig,
    FalconH1Config,
    FalconMambaConfig,
    GraniteMoeHybridConfig,
    JambaConfig,
    Mamba2Config,
    MambaConfig,
    NemotronHConfig,
    Zamba2Config,
)

from sparsessm.layerwise.layer import each_layer
from sparsessm.layerwise.stream import Stream
from sparsessm.models.architecture import Layout

TOKENS = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0)
ATTENTION = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 24}
HEADS = {"mamba_n_heads": 8, "mamba_d_head": 4, "mamba_d_state": 6, "mamba_chunk_size": 8}
MAMBA, FULL = "linear_attention", "full_attention"
COMMON = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, **TOKENS}
CONFIGS: dict[str, Any] = {
    "mamba": lambda **sizes: MambaConfig(**{"state_size": 6, "time_step_rank": 3, **sizes}),
    "falcon_mamba": lambda **sizes: FalconMambaConfig(**{"state_size": 6, "time_step_rank": 3, **sizes}),
    "mamba2": lambda **sizes: Mamba2Config(
        **{"state_size": 6, "num_heads": 8, "head_dim": 4, "n_groups": 1, "chunk_size": 8}
        | {"tie_word_embeddings": True, **sizes}
    ),
    "nemotron_h": lambda **sizes: NemotronHConfig(
        **{"layers_block_type": [MAMBA, "mlp", FULL, MAMBA], "ssm_state_size": 6, "mamba_num_heads": 8}
        | {"mamba_head_dim": 4, "n_groups": 1, "chunk_size": 8, "head_dim": 4, **ATTENTION, **sizes}
        | {"num_hidden_layers": len(sizes.get("layers_block_type", "four"))}
    ),
    "bamba": lambda **sizes: BambaConfig(**{"attn_layer_indices": [1], **HEADS, **ATTENTION, **sizes}),
    "granitemoehybrid": lambda **sizes: GraniteMoeHybridConfig(
        **{"layer_types": [MAMBA, FULL, MAMBA], "num_local_experts": 0, "shared_intermediate_size": 24}
        | {"embedding_multiplier": 3.0, "residual_multiplier": 0.4, "logits_scaling": 2.0, "attention_multiplier": 0.3}
        | {**HEADS, **ATTENTION, **sizes, "num_hidden_layers": len(sizes.get("layer_types", "two"))}
    ),
    "falcon_h1": lambda **sizes: FalconH1Config(
        **{"mamba_d_ssm": 32, "ssm_multipliers": [0.7, 1.2, 0.9, 1.1, 0.8], "mlp_multipliers": [0.8, 1.3]}
        | {"ssm_in_multiplier": 1.4, "ssm_out_multiplier": 0.6, "attention_in_multiplier": 1.1, "key_multiplier": 0.7}
        | {"attention_out_multiplier": 0.8, "embedding_multiplier": 2.0, "lm_head_multiplier": 0.5}
        | {**HEADS, **ATTENTION, **sizes}
    ),
    "zamba2": lambda **sizes: Zamba2Config(
        **{"layers_block_type": [MAMBA, "hybrid", MAMBA, "hybrid"], "num_mem_blocks": 1, "mamba_ngroups": 1}
        | {"n_mamba_heads": 8, "mamba_d_state": 6, "chunk_size": 8, **ATTENTION, "num_key_value_heads": 4}
        | {"use_shared_attention_adapter": True, "adapter_rank": 3, "use_mem_rope": True, **sizes}
        | {"num_hidden_layers": len(sizes.get("layers_block_type", "four"))}
    ),
    "jamba": lambda **sizes: JambaConfig(
        **{"mamba_d_state": 6, "mamba_dt_rank": 3, "attn_layer_period": 2, "attn_layer_offset": 1}
        | {"num_experts": 4, "expert_layer_period": 2, "expert_layer_offset": 1, **ATTENTION, **sizes}
    ),
}
HYBRIDS = ("nemotron_h", "bamba", "granitemoehybrid", "falcon_h1", "zamba2", "jamba")
# A second configuration of each hybrid: other groups, norms, biases, experts, and orders of layers.
OTHERS: dict[str, dict[str, Any]] = {
    "nemotron_h": {
        "layers_block_type": [FULL, MAMBA, "moe", MAMBA, "mlp"], "n_groups": 4, "use_bias": True, "mlp_bias": True,
        "time_step_min": 0.2, "moe_intermediate_size": 12, "moe_shared_expert_intermediate_size": 12,
        "n_routed_experts": 4, "use_conv_bias": False, "tie_word_embeddings": True,
    },
    "bamba": {"attn_layer_indices": [0], "mamba_n_groups": 2, "mamba_proj_bias": True, "mlp_bias": True,
              "time_step_limit": (0.05, 0.4), "num_hidden_layers": 3, "tie_word_embeddings": True},
    "granitemoehybrid": {"layer_types": [FULL, MAMBA, MAMBA, FULL], "mamba_n_groups": 4, "num_local_experts": 4,
                         "position_embedding_type": "rope", "mamba_conv_bias": False, "tie_word_embeddings": True},
    "falcon_h1": {"mamba_n_groups": 2, "mamba_rms_norm": True, "mamba_norm_before_gate": True, "projectors_bias": True,
                  "attention_bias": True, "mamba_proj_bias": True},
    "zamba2": {"layers_block_type": ["hybrid", MAMBA, MAMBA, "hybrid", "hybrid"], "num_mem_blocks": 2, "mamba_ngroups": 2,
               "add_bias_linear": True, "use_shared_attention_adapter": False, "use_mem_rope": False},
    "jamba": {"num_hidden_layers": 3, "attn_layer_offset": 0, "num_experts": 1, "mamba_proj_bias": True,
              "mamba_conv_bias": False, "tie_word_embeddings": True},
}  # fmt: skip
GATE_FIRST = {"mamba_rms_norm": True, "mamba_norm_before_gate": False, "mamba_n_groups": 4}
VARIANTS = [(kind, {}) for kind in HYBRIDS] + [*OTHERS.items(), ("falcon_h1", GATE_FIRST)]


def random_model_of(kind: str, *, seed: int = 0, dtype: torch.dtype = torch.float32, **sizes: Any) -> torch.nn.Module:
    """A model of an architecture on the CPU; sizes: fields of its config."""
    config = CONFIGS[kind](**{**COMMON, **sizes})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config)
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape)
            if name.endswith("A_log"):
                new = 0.3 + 0.8 * noise
            elif name.endswith(("dt_bias", "dt_proj.bias")):
                new = -2.0 + noise
            elif "norm" in name or name.endswith(".D"):
                new = 1.0 + 0.3 * noise
            elif name.endswith(".bias"):
                new = 0.3 * noise
            elif parameter.dim() == 2 and parameter.shape[0] != config.vocab_size:
                new = noise / parameter.shape[1] ** 0.5
            else:
                new = 0.5 * noise
            parameter.data.copy_(new)
    return model.to(dtype).eval().requires_grad_(False)


def logits_of(layout: Layout, ids: torch.Tensor, steps: int = 8, batch: int = 2, **placement: Any) -> torch.Tensor:
    """Logits (n,L,V) of token ids (n,L) by our way, layer by layer in pieces of so many steps."""
    stream = Stream.embed(layout, ids, **{"device": "cpu", "offload": "cpu", **placement}, batch=batch, steps=steps)
    for _ in each_layer(layout, stream):
        pass
    return layout.leave(stream.hidden[:, :].flatten(0, 1)).view(*ids.shape, -1)


def family_checkpoint(folder: Path, demo: Path, kind: str, **sizes: Any) -> Path:
    """A random model of an architecture in the Hugging Face layout, with the demo's tokenizer and vocabulary."""
    random_model_of(kind, **{"vocab_size": 4096, **sizes}).save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(demo / file, folder)
    return folder


def stock_perplexity(folder: Path, text: Path, seqlen: int, windows: int | None = None) -> float:
    """Perplexity of a saved folder by stock transformers alone on the test text of another, by WikiText-2's rule.

    windows: how many of the first, all if None.
    """
    with text.open(encoding="utf-8") as lines:
        ids = AutoTokenizer.from_pretrained(folder)("\n\n".join(lines))["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(folder)
    cut = torch.tensor(ids[: len(ids) // seqlen * seqlen]).view(-1, seqlen)[:windows]
    with torch.no_grad():
        losses = [float(model(window[None], labels=window[None]).loss) for window in cut]
    return math.exp(sum(losses) / len(losses))
