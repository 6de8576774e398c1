"""Writing checkpoints: what is saved is what was evaluated, as stock `transformers` will load it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from sparsessm import files
from sparsessm.errors import InputError, first_line, storing
from sparsessm.models import original
from sparsessm.models.card import CARD, Facts, card_text, is_own_card
from sparsessm.models.family import architecture_of
from sparsessm.models.place import MASKS, RECORD, Place


def size_needed(model: PreTrainedModel) -> int:
    """Bytes that a checkpoint of the model takes, masks of all entries included."""
    return sum(parameter.numel() * (parameter.element_size() + 1) for parameter in model.parameters())


def write_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Writes the tokenizer, before anything slow starts.

    Raises:
        InputError: it cannot be written, or the disk is full.
    """
    try:
        with storing(f"the tokenizer in {folder.parent}"):
            tokenizer.save_pretrained(folder)
    except InputError:
        raise
    except Exception as error:  # odd values in its files may raise anything
        raise InputError(f"the model's tokenizer cannot be saved ({first_line(error)}): correct its files") from error
    config = folder / "tokenizer_config.json"
    if config.is_file():
        kept = json.loads(config.read_text(encoding="utf-8"))
        if kept.pop("auto_map", None) is not None:  # it names code that is not saved
            config.write_text(json.dumps(kept, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def save(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    masks: Mapping[str, Tensor],
    record: Mapping[str, Any],
    target: str,
    **layout: Any,
) -> Path:
    """Writes a whole checkpoint to the folder `target`; its old checkpoint is replaced, other files stay.

    Args:
        masks, record, layout: see `write_model`.

    Raises:
        StorageError: the disk is full or the target cannot be written; the old checkpoint is unchanged.
    """
    with Place(target, size_needed(model)) as place:
        write_tokenizer(tokenizer, place.staging)
        write_model(model, masks, record, place, **layout)
        return place.publish()


def write_model(
    model: PreTrainedModel,
    masks: Mapping[str, Tensor],
    record: Mapping[str, Any],
    place: Place,
    *,
    layout: str = "hf",
    raw_zeros: bool = False,
    original_config: Mapping[str, Any] | None = None,
    facts: Facts | None = None,
) -> None:
    """Writes config, weights, masks.safetensors, sparsessm.json and the model card to the staging folder of a place.

    Args:
        masks: by parameter name, True = pruned; written by the names in the checkpoint. A mask of removed states keeps
            the shape before the removal.
        record: what sparsessm.json holds.
        layout: "hf", or "state-spaces" for what mamba_ssm loads (config.json, pytorch_model.bin).
        raw_zeros: write 0 for pruned entries of A_log.
        original_config: config.json of a state-spaces source, whose keys that pruning does not change are kept.
        facts: what the card says besides the record.
    """
    with storing(str(place.path), "nothing was saved: free some space, or name another place"):
        state = model.state_dict()
        if raw_zeros:
            for name, mask in masks.items():
                if name.endswith(".A_log") and mask.shape == state[name].shape:
                    state[name] = state[name].masked_fill(mask, 0)
        _LAYOUTS[layout](model, state, place.staging, original_config or {})
        if masks:
            row, names = architecture_of(model.config), _saved_names(place.staging)
            named = {row.in_files(name, names): mask.contiguous() for name, mask in sorted(masks.items())}
            save_file(named, place.staging / MASKS)
        (place.staging / RECORD).write_text(files.strict_json(record, indent=2, sort_keys=True) + "\n")
        text = card_text(record, facts or Facts(), model.config.model_type, layout)
        (place.staging / CARD).write_text(text, encoding="utf-8")


def rewrite_card(folder: Path, record: Mapping[str, Any], facts: Facts, model_type: str, layout: str) -> None:
    """Replaces the card of a saved checkpoint, unless somebody else wrote or edited it."""
    if is_own_card(folder / CARD):
        with storing(str(folder / CARD)):
            files.write_text(folder / CARD, card_text(record, facts, model_type, layout), follow=False)


def _write_hf(model: PreTrainedModel, state: dict[str, Tensor], folder: Path, _: Mapping[str, Any]) -> None:
    for key, value in architecture_of(model.config).neutral.items():
        setattr(model.config, key, value)
    if hasattr(model.config, "auto_map"):
        del model.config.auto_map  # it names code that is not saved
    model.save_pretrained(folder, state_dict=state)


def _saved_names(folder: Path) -> set[str]:
    """Names of the tensors in the safetensors files of a folder."""
    names: set[str] = set()
    for file in folder.glob("model*.safetensors"):
        with safe_open(file, "pt") as content:
            names |= set(content.keys())
    return names


def _write_original(model: PreTrainedModel, state: dict[str, Tensor], folder: Path, source: Mapping[str, Any]) -> None:
    (folder / "config.json").write_text(json.dumps(original.raw_config(model.config, source), indent=2) + "\n")
    torch.save(original.tensors_there(state), folder / "pytorch_model.bin")


_LAYOUTS = {"hf": _write_hf, "state-spaces": _write_original}
