"""Random stock models of every architecture, small, with no parameter constant, ordered or symmetric."""

import math
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, FalconMambaConfig, Mamba2Config, MambaConfig

TOKENS = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0)
COMMON = {"vocab_size": 64, "hidden_size": 16, "num_hidden_layers": 2, **TOKENS}
CONFIGS: dict[str, Any] = {
    "mamba": lambda **sizes: MambaConfig(**{"state_size": 6, "time_step_rank": 3, **sizes}),
    "falcon_mamba": lambda **sizes: FalconMambaConfig(**{"state_size": 6, "time_step_rank": 3, **sizes}),
    "mamba2": lambda **sizes: Mamba2Config(
        **{"state_size": 6, "num_heads": 8, "head_dim": 4, "n_groups": 1, "chunk_size": 8}
        | {"tie_word_embeddings": True, **sizes}
    ),
}


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


def family_checkpoint(folder: Path, demo: Path, kind: str, **sizes: Any) -> Path:
    """A random model of an architecture in the Hugging Face layout, with the demo's tokenizer and vocabulary."""
    random_model_of(kind, **{"vocab_size": 4096, **sizes}).save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(demo / file, folder)
    return folder


def stock_perplexity(folder: Path, text: Path, seqlen: int) -> float:
    """Perplexity of a saved folder by stock transformers alone on the test text of another, by WikiText-2's rule."""
    with text.open(encoding="utf-8") as lines:
        ids = AutoTokenizer.from_pretrained(folder)("\n\n".join(lines))["input_ids"]
    model = AutoModelForCausalLM.from_pretrained(folder)
    windows = torch.tensor(ids[: len(ids) // seqlen * seqlen]).view(-1, seqlen)
    with torch.no_grad():
        losses = [float(model(window[None], labels=window[None]).loss) for window in windows]
    return math.exp(sum(losses) / len(losses))
