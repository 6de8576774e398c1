"""Calibration windows and evaluation streams: which text, how it is joined, where the windows start.

The rules are those of the SparseGPT data loader (Frantar and Alistarh 2023, datautils.py), which the SparseSSM paper
uses too; perplexities compare only where they are kept to the letter:

    data set    calibration, from train                          evaluation, one stream of T tokens
    wikitext2   lines joined by a space,                         test lines joined by two newlines
                start = randint(0, T - L - 1)
    ptb         sentences joined by a space, start as above      test sentences joined by a space
    c4          draw documents until one is longer than L,       the first 1100 validation documents joined by a space,
                start = randint(0, length - L - 1)               cut to 256 * L tokens
    demo        train.txt as it is, start as above               test.txt as it is
    any other   as wikitext2, the first 12 million characters    as wikitext2, the first 12 million characters
                of a table                                       of a table

L is seqlen. A stream is tokenised once, with the special tokens the tokenizer adds by default and no others. All draws
of a call come from one random.Random(seed), so nothing depends on what ran before.

Data sets come from the Hugging Face hub or from local files (layouts: data/README.md). The package `datasets` is needed
for the hub and for tables; .txt files are read without it.
"""

import hashlib
import logging
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsessm.corpora import c4, reading
from sparsessm.corpora.sources import locate
from sparsessm.errors import InputError

logger = logging.getLogger("sparsessm")


@dataclass(frozen=True)
class Tokens:
    """Token ids, and what it takes to tell later whether two runs saw the same ones."""

    ids: Tensor
    """(nsamples, seqlen) calibration windows, or the (T,) evaluation stream."""
    sha256: str
    """Of the ids as little-endian int64: of the whole stream, before windows are drawn; for c4 calibration, which has
    no stream, of the windows."""
    text_sha256: str
    """Of the rows joined by newlines, as UTF-8: whatever the tokenizer, and the same for calibration and evaluation. For
    c4 calibration, of the documents in the order in which windows were drawn from them."""
    source: str
    """One line: where the text came from, and how many lines or documents it has."""


def check_dataset(name: str, data_dir: str | Path | None = None, *, calibration: bool) -> None:
    """Raise InputError if the data set is not available, so that it is known before a model is loaded.

    A file is read up to its first line or rows. Of data sets of the hub, the configurations and splits are asked for;
    whether those of DATASETS can be reached stays open. `calibration`: the split for calibration is meant, else the one
    for evaluation.
    """
    reading.check(locate(name, data_dir, calibration))


def calibration_windows(
    name: str, tokenizer: Any, nsamples: int, seqlen: int, seed: int, data_dir: str | Path | None = None
) -> Tokens:
    """Draw `nsamples` windows of `seqlen` tokens; windows may overlap.

    Raises InputError if the data set cannot be read or holds no text longer than `seqlen` tokens.
    """
    place = locate(name, data_dir, calibration=True)
    if place.dataset == "c4":
        rows = reading.read(place, seed)
        try:
            drawn = _windows_of_documents(rows, tokenizer, nsamples, seqlen, random.Random(seed))
        except KeyError:  # more documents are needed than were kept
            rows = reading.read(place)
            drawn = _windows_of_documents(rows, tokenizer, nsamples, seqlen, random.Random(seed))
        windows, documents = drawn
        return Tokens(windows, _sha256(windows), _sha256_of_text(documents), rows.source)
    rows = reading.read(place)
    texts = _with_text(rows.texts)
    stream = _tokenise(tokenizer, " ".join(texts))  # (T,)
    if len(stream) <= seqlen:
        raise _too_short(f"{rows.source}: {len(stream)} tokens", seqlen)
    rng = random.Random(seed)
    starts = [rng.randint(0, len(stream) - seqlen - 1) for _ in range(nsamples)]
    windows = torch.stack([stream[start : start + seqlen] for start in starts])  # (nsamples, seqlen)
    return Tokens(windows, _sha256(stream), _sha256_of_text(texts), rows.source)


def evaluation_stream(name: str, tokenizer: Any, seqlen: int, data_dir: str | Path | None = None) -> Tokens:
    """The evaluation text as one stream (T,), T >= seqlen; `seqlen` also decides where c4 is cut.

    Raises InputError if the data set cannot be read or is shorter than one window.
    """
    place = locate(name, data_dir, calibration=False)
    rows = reading.read(place)
    texts, source = rows.texts, rows.source
    if place.dataset == "c4" and place.route != "hub":
        texts = texts[: c4.EVALUATION_DOCUMENTS]
        source = f"{source}, of these the first {len(texts)}"
    texts = _with_text(texts)
    stream = _tokenise(tokenizer, (" " if place.dataset in ("ptb", "c4") else "\n\n").join(texts))  # (T,)
    if place.dataset == "c4":
        stream = stream[: c4.EVALUATION_WINDOWS * seqlen]
    if len(stream) < seqlen:
        raise _too_short(f"{source}: {len(stream)} tokens", seqlen)
    return Tokens(stream, _sha256(stream), _sha256_of_text(texts), source)


def evaluation_windows(
    name: str, tokenizer: Any, seqlen: int, limit: int | None = None, data_dir: str | Path | None = None
) -> Tensor:
    """The evaluation text in windows (n, seqlen), the first `limit` of them; raises as `evaluation_stream`."""
    return cut_windows(evaluation_stream(name, tokenizer, seqlen, data_dir).ids, seqlen, limit)


def cut_windows(ids: Tensor, seqlen: int, limit: int | None = None) -> Tensor:
    """Cut a stream (T,) into its floor(T / seqlen) whole windows (n, seqlen), and keep the first `limit` of them.

    Raises InputError if the stream is shorter than one window.
    """
    count = len(ids) // seqlen
    if count == 0:
        raise _too_short(f"the text has {len(ids)} tokens", seqlen)
    return ids[: count * seqlen].view(count, seqlen)[:limit]


def _with_text(rows: Sequence[str | None]) -> list[str]:
    """The rows without those that hold null; a warning gives their number."""
    found = [row for row in rows if row is not None]
    if len(found) < len(rows):
        logger.warning("warning: %d of %d rows hold no text (null) and are left out", len(rows) - len(found), len(rows))
    return found


def _windows_of_documents(
    rows: reading.Rows, tokenizer: Any, nsamples: int, seqlen: int, rng: random.Random
) -> tuple[Tensor, list[str]]:
    """C4's rule: draw documents until one is longer than seqlen, then a window in it. (nsamples, seqlen)

    Documents found too short are remembered: drawing one again costs no tokenising, and the search ends when all are.
    Also the documents of the windows. KeyError if a document was drawn that `rows` does not hold.
    """
    short: dict[int, int] = {}  # document -> tokens
    windows: list[Tensor] = []
    documents: list[str] = []
    while len(windows) < nsamples:
        if len(short) == len(rows.texts):
            raise _too_short(f"{rows.source}: the longest has {max(short.values(), default=0)} tokens", seqlen)
        number = rng.randint(0, len(rows.texts) - 1)
        if number in short:
            continue
        document = rows.texts[number] or ""
        ids = _tokenise(tokenizer, document)
        if len(ids) <= seqlen:
            short[number] = len(ids)
            continue
        start = rng.randint(0, len(ids) - seqlen - 1)
        windows.append(ids[start : start + seqlen])
        documents.append(document)
    return torch.stack(windows), documents


def _tokenise(tokenizer: Any, text: str) -> Tensor:
    """(T,) int64. `verbose=False` silences the warning that the text is longer than the model takes: it gets cut."""
    return torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.int64)


def _sha256(ids: Tensor) -> str:
    return hashlib.sha256(ids.numpy().astype("<i8").tobytes()).hexdigest()


def _sha256_of_text(texts: Iterable[str]) -> str:
    return hashlib.sha256("\n".join(texts).encode("utf-8", "surrogatepass")).hexdigest()


def _too_short(what: str, seqlen: int) -> InputError:
    return InputError(f"{what}, too few for a window of {seqlen}: --seqlen must be smaller")
