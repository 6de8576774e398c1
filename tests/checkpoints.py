"""What the tests of checkpoints share: writing and damaging them, and what is said of a broken one."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparsessm.errors import InputError
from sparsessm.models import checkpoint

VOCAB = 61  # of the state-spaces config, padded to 64 in the weights


def same_logits(folder: Path, stock, windows, **load) -> None:
    source = checkpoint.find(str(folder))
    model = checkpoint.load(source, **load)
    assert torch.equal(model(windows).logits, stock(windows).logits)


def renamed(stock) -> dict[str, torch.Tensor]:
    """The tensors under their names in the state-spaces layout, the tied head included."""
    state = {key.replace("backbone.embeddings.", "backbone.embedding."): t for key, t in stock.state_dict().items()}
    return {key: tensor.clone() for key, tensor in state.items()}


def write_state_spaces(folder: Path, stock, *, safetensors: bool = False, **config) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    sizes = {
        "d_model": 16, "n_layer": 2, "vocab_size": VOCAB, "rms_norm": True, "residual_in_fp32": True,
        "fused_add_norm": True, "pad_vocab_size_multiple": 8, "ssm_cfg": {"d_state": 6, "dt_rank": 3}, **config,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(sizes))
    if safetensors:
        save_file(renamed(stock), folder / "model.safetensors")
    else:
        torch.save(renamed(stock), folder / "pytorch_model.bin")
    return folder


def complaint(name: Path | str) -> str:
    """The one line that a checkpoint is refused with, found out before or while its tensors are read."""
    with pytest.raises(InputError) as caught:
        checkpoint.load(checkpoint.find(str(name)))
    message = str(caught.value)
    assert message and "\n" not in message
    return message


def rewrite_config(folder: Path, **changes) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))


def rewrite_tensors(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors")
