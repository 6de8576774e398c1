"""The tokenizer of a checkpoint: the one that AutoTokenizer takes, checked against the model before slow work starts."""

from __future__ import annotations

import hashlib
import logging
from typing import Any

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from sparsessm.errors import InputError, first_line
from sparsessm.models.checkpoint import Source, read_json

logger = logging.getLogger("sparsessm")

# The tokenizer that the published checkpoints of the state-spaces layout were trained with; they do not include it.
FALLBACK_TOKENIZER = "EleutherAI/gpt-neox-20b"

_JSON_FILES = ("tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json")
_FILES = (*_JSON_FILES, "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model")


def load_tokenizer(source: Source) -> PreTrainedTokenizerBase:
    """The checkpoint's own tokenizer; GPT-NeoX's for a state-spaces checkpoint without one, which is logged in one line.

    Raises:
        InputError: there is none, its files are broken, or it makes ids that the model has no embedding for.
    """
    own = [source.folder / name for name in _FILES if (source.folder / name).is_file()]
    if own:
        for file in own:
            if file.suffix == ".json":
                read_json(file)
        tokenizer = _load(str(source.folder), source, "correct or replace its tokenizer files")
    elif source.layout == "state-spaces":
        logger.info("tokenizer: that of %s, because %s has none", FALLBACK_TOKENIZER, source.name)
        tokenizer = _load(FALLBACK_TOKENIZER, source, "put a tokenizer.json beside the weights")
    else:
        raise InputError(f"{source.name} has no tokenizer: put its tokenizer.json beside the weights")
    _check(tokenizer, source)
    return tokenizer


def _load(origin: str, source: Source, remedy: str) -> PreTrainedTokenizerBase:
    try:
        return AutoTokenizer.from_pretrained(origin, trust_remote_code=False)
    except Exception as error:  # broken files may raise anything; tokenizers raises a bare Exception
        raise InputError(f"no tokenizer for {source.name} from {origin} ({first_line(error)}): {remedy}") from error


def _check(tokenizer: PreTrainedTokenizerBase, source: Source) -> None:
    """Whether the tokenizer works and its ids are rows of the embedding."""
    rows = source.config.vocab_size
    try:
        ids = sorted(tokenizer.get_vocab().values())
        tokenizer("state space", verbose=False)["input_ids"]
    except Exception as error:  # odd values in its files fail here at the latest
        raise InputError(f"the tokenizer of {source.name} does not work ({first_line(error)}): correct its files") from error
    # transformers itself may add special tokens to a tokenizer that has no tokenizer.json
    added = set() if (source.folder / "tokenizer.json").is_file() else set(tokenizer.all_special_ids)
    ids = [i for i in ids if i < rows or i not in added]
    if not ids or ids[0] < 0 or ids[-1] >= rows:
        spread = f"{ids[0]} to {ids[-1]}" if ids else "none"
        raise InputError(
            f"the tokenizer of {source.name} does not fit the model: it makes the ids {spread}, the embedding has {rows} "
            "rows: use the model's own tokenizer"
        )


def tokenizer_sha256(tokenizer: Any) -> str:
    """Hash of what a tokenizer does with text, as far as its backend says; of its vocabulary where it has none."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    text = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
    return hashlib.sha256(text.encode()).hexdigest()
