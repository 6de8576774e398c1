"""Calibration windows and evaluation streams: which text, how it is joined, where the windows start.

The rules are those of the SparseGPT data loader (Frantar and Alistarh 2023, datautils.py), which the SparseSSM paper
uses too; perplexities compare only where they are kept to the letter:

    data set    calibration, from train                          evaluation, one stream of T tokens
    wikitext2   lines joined by a space,                         test lines joined by two newlines
                start = randint(0, T - L - 1)
    ptb         sentences joined by a space, start as above      test sentences joined by a space
    c4          draw documents until one is longer than L,       the first 1100 validation documents joined by a space,
                start = randint(0, length - L - 1)               cut to 256 * L tokens
    demo        docstrings, two newlines between, as above       docstrings of other modules, two newlines between
    a folder    train.txt (or valid.txt), as wikitext2           test.txt, as wikitext2

L is seqlen. A stream is tokenised once, with the special tokens the tokenizer adds by default and no others. All draws
of a call come from one random.Random(seed), so nothing depends on what ran before.

WikiText-2, PTB and C4 come from the Hugging Face hub, or from local copies under `data_dir` (layouts: data/README.md).
Only these need the package `datasets`, and local .txt files do not.
"""

import hashlib
import importlib.util
import json
import logging
import platform
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sparsessm.corpora import demo_text
from sparsessm.corpora.names import DATASETS
from sparsessm.errors import InputError, first_line

logger = logging.getLogger("sparsessm")



C4_EVALUATION_DOCUMENTS = 1100
C4_EVALUATION_WINDOWS = 256

# One shard of each split, as the released loaders take. The plain json loader: naming the files on ("allenai/c4", "en")
# fails on datasets 4.0 to 5.0.1.
C4_FILES = {
    "train": "hf://datasets/allenai/c4/en/c4-train.00000-of-01024.json.gz",
    "validation": "hf://datasets/allenai/c4/en/c4-validation.00000-of-00008.json.gz",
}
PTB_FILES = "hf://datasets/ptb-text-only/ptb_text_only@refs%2Fconvert%2Fparquet/penn_treebank/{split}/0000.parquet"

# The names under which a split's files may go.
ALIASES = {"train": ("train",), "validation": ("validation", "valid"), "test": ("test",)}
COLUMNS = {"wikitext2": ("text",), "ptb": ("sentence", "text"), "c4": ("text",)}
# datasets' loader, and the endings it reads. A folder holding several kinds is read by the first.
LOADERS = {"parquet": (".parquet",), "json": (".json", ".jsonl", ".json.gz", ".jsonl.gz")}


@dataclass(frozen=True)
class Tokens:
    """Token ids, and what it takes to tell later whether two runs saw the same ones."""

    ids: Tensor
    """(nsamples, seqlen) calibration windows, or the (T,) evaluation stream."""
    sha256: str
    """Of the ids as little-endian int64: of the whole stream, before windows are drawn; for c4 calibration, which has
    no stream, of the windows."""
    source: str
    """One line: where the text came from, and how many lines or documents it has."""


@dataclass(frozen=True)
class _Place:
    """Where a split will be read from, known before anything is read."""

    dataset: str
    """One of DATASETS, or "folder"."""
    route: str
    """demo, txt, disk (datasets.save_to_disk), parquet, json or hub."""
    split: str
    """train, validation or test."""
    paths: tuple[Path, ...] = ()
    """The local files, or the save_to_disk folder."""


def check_dataset(name: str, data_dir: str | Path | None = None, *, calibration: bool) -> None:
    """Raise InputError if the data set is not available. Reads nothing, so it can be called before a model is loaded.

    What only the hub can answer (is it reachable?) stays open. `calibration`: the split for calibration is meant, else
    the one for evaluation.
    """
    _locate(name, data_dir, calibration)


def calibration_windows(
    name: str, tokenizer: Any, nsamples: int, seqlen: int, seed: int, data_dir: str | Path | None = None
) -> Tokens:
    """Draw `nsamples` windows of `seqlen` tokens; windows may overlap.

    Raises InputError if the data set cannot be read or holds no text longer than `seqlen` tokens.
    """
    place = _locate(name, data_dir, calibration=True)
    rows, source = _read(place)
    rng = random.Random(seed)
    if place.dataset == "c4":
        windows = _windows_of_documents(rows, tokenizer, nsamples, seqlen, rng, source)  # (nsamples, seqlen)
        return Tokens(windows, _sha256(windows), source)
    stream = _tokenise(tokenizer, ("\n\n" if place.dataset == "demo" else " ").join(_with_text(rows)))  # (T,)
    if len(stream) <= seqlen:
        raise _too_short(f"{source}: {len(stream)} tokens", seqlen)
    starts = [rng.randint(0, len(stream) - seqlen - 1) for _ in range(nsamples)]
    windows = torch.stack([stream[start : start + seqlen] for start in starts])  # (nsamples, seqlen)
    return Tokens(windows, _sha256(stream), source)


def evaluation_stream(name: str, tokenizer: Any, seqlen: int, data_dir: str | Path | None = None) -> Tokens:
    """The evaluation text as one stream (T,), T >= seqlen; `seqlen` also decides where c4 is cut.

    Raises InputError if the data set cannot be read or is shorter than one window.
    """
    place = _locate(name, data_dir, calibration=False)
    rows, source = _read(place)
    if place.dataset == "c4":
        rows = rows[:C4_EVALUATION_DOCUMENTS]
        source = f"{source}, of these the first {len(rows)}"
    stream = _tokenise(tokenizer, (" " if place.dataset in ("ptb", "c4") else "\n\n").join(_with_text(rows)))  # (T,)
    if place.dataset == "c4":
        stream = stream[: C4_EVALUATION_WINDOWS * seqlen]
    if len(stream) < seqlen:
        raise _too_short(f"{source}: {len(stream)} tokens", seqlen)
    return Tokens(stream, _sha256(stream), source)


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
    rows: Sequence[str], tokenizer: Any, nsamples: int, seqlen: int, rng: random.Random, source: str
) -> Tensor:
    """C4's rule: draw documents until one is longer than seqlen, then a window in it. (nsamples, seqlen)

    Documents found too short are remembered: drawing one again costs no tokenising, and the search ends when all are.
    """
    short: dict[int, int] = {}  # document -> tokens
    windows: list[Tensor] = []
    while len(windows) < nsamples:
        if len(short) == len(rows):
            raise _too_short(f"{source}: the longest has {max(short.values(), default=0)} tokens", seqlen)
        document = rng.randint(0, len(rows) - 1)
        if document in short:
            continue
        ids = _tokenise(tokenizer, rows[document] or "")
        if len(ids) <= seqlen:
            short[document] = len(ids)
            continue
        start = rng.randint(0, len(ids) - seqlen - 1)
        windows.append(ids[start : start + seqlen])
    return torch.stack(windows)


def _tokenise(tokenizer: Any, text: str) -> Tensor:
    """(T,) int64. `verbose=False` silences the warning that the text is longer than the model takes: it gets cut."""
    return torch.tensor(tokenizer(text, verbose=False)["input_ids"], dtype=torch.int64)


def _sha256(ids: Tensor) -> str:
    return hashlib.sha256(ids.numpy().astype("<i8").tobytes()).hexdigest()


def _too_short(what: str, seqlen: int) -> InputError:
    return InputError(f"{what}, too few for a window of {seqlen}: --seqlen must be smaller")


def _locate(name: str, data_dir: str | Path | None, calibration: bool) -> _Place:
    """Find where the split comes from; InputError if there is no such place, or the package to read it is missing."""
    data_dir = None if data_dir is None else Path(data_dir).expanduser()
    if data_dir is not None and not data_dir.is_dir():
        raise InputError(f"--data_dir {data_dir}: there is no such folder")
    if name not in DATASETS:
        return _locate_folder(name, calibration)
    if name == "demo":
        return _Place("demo", "demo", "train" if calibration else "test")
    splits = _splits(name, calibration)
    place = _Place(name, "hub", splits[0]) if data_dir is None else _locate_local(name, data_dir, splits)
    if place.route != "txt" and importlib.util.find_spec("datasets") is None:
        raise InputError(f"reading {name} needs the package datasets: pip install datasets")
    return place


def _splits(name: str, calibration: bool) -> tuple[str, ...]:
    """The splits that can be used, the right one first. In local copies without train, validation replaces it."""
    if name == "c4":
        return ("train",) if calibration else ("validation",)
    return ("train", "validation") if calibration else ("test",)


def _locate_folder(name: str, calibration: bool) -> _Place:
    folder = Path(name).expanduser()
    if not folder.is_dir():
        raise InputError(
            f"unknown data set {name}: give one of {', '.join(DATASETS)}, or a folder with train.txt and test.txt"
        )
    wanted = {"train": "train.txt", "validation": "valid.txt"} if calibration else {"test": "test.txt"}
    for split, file in wanted.items():
        if (folder / file).is_file():
            return _Place("folder", "txt", split, (folder / file,))
    purpose = "calibration" if calibration else "evaluation"
    raise InputError(f"{folder} has no text for {purpose}: put {' or '.join(wanted.values())} there")


def _locate_local(name: str, data_dir: Path, splits: tuple[str, ...]) -> _Place:
    """Search data_dir/name, or data_dir itself where it has no such folder, for the first of `splits` there is."""
    folder = data_dir / name if (data_dir / name).is_dir() else data_dir
    try:
        files = sorted(folder.iterdir())
    except OSError as error:
        raise InputError(f"{folder} cannot be listed ({error.strerror}): make it readable") from None
    if folder == data_dir:  # several sets may lie side by side there: leave out the files named after another one
        others = re.compile(rf"(?<![a-z0-9])({'|'.join(key.removesuffix('2') for key in COLUMNS if key != name)})")
        files = [path for path in files if not others.search(path.name.lower())]
    for split in splits:
        for alias in ALIASES[split]:
            if name != "c4" and (folder / f"{alias}.txt").is_file():
                return _Place(name, "txt", split, (folder / f"{alias}.txt",))
            # One folder per split, as DatasetDict.save_to_disk makes them.
            if (folder / alias / "state.json").is_file():
                return _Place(name, "disk", split, (folder / alias,))
        if _saved_split(folder) in ALIASES[split]:
            return _Place(name, "disk", split, (folder,))
        # As a word of the name: c4-train.00000-of-01024.json.gz, ptb_test.parquet, but not latest.json.
        word = re.compile(rf"(?<![a-z])({'|'.join(ALIASES[split])})(?![a-z])")
        for loader, endings in LOADERS.items():
            found = tuple(path for path in files if path.name.endswith(endings) and word.search(path.name.lower()))
            if found:
                return _Place(name, loader, split, found)
    texts = "" if name == "c4" else f"{splits[0]}.txt, "
    raise InputError(
        f"no {' or '.join(splits)} split of {name} in {folder}: looked for {texts}parquet, json, jsonl or json.gz "
        f"files with {splits[0]} in their names, and a folder of datasets.save_to_disk"
    )


def _saved_split(folder: Path) -> str | None:
    """The split that Dataset.save_to_disk noted in this folder; None if it noted none or was never called on it."""
    state = folder / "state.json"
    if not state.is_file():
        return None
    try:
        return json.loads(state.read_text(encoding="utf-8")).get("_split")
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise InputError(f"{state} cannot be read ({first_line(error)}): copy the data set again") from None


def _read(place: _Place) -> tuple[Sequence[str], str]:
    """The rows of a split, and the line that says where they came from."""
    rows: Sequence[str]
    if place.route == "demo":
        rows = demo_text.docstrings(evaluation=place.split == "test")
        return rows, f"demo: {len(rows)} docstrings of the standard library of Python {platform.python_version()}"
    if place.route == "txt":
        rows, origin = _read_lines(place.paths[0], strip=place.dataset == "ptb"), str(place.paths[0])
    else:
        table, origin = _read_hub(place) if place.route == "hub" else _read_table(place)
        rows = _column(table, place.dataset, origin)
    unit = "documents" if place.dataset == "c4" else "lines"
    return rows, f"{place.dataset} {place.split}: {len(rows)} {unit} of {origin}"


def _read_lines(path: Path, strip: bool) -> list[str]:
    """Lines of a file, stripped (PTB) or by WikiText-2's rule: a blank line is empty, others keep their newline."""
    try:
        with path.open(encoding="utf-8-sig") as file:  # a byte order mark is not text
            return [line.strip() if strip or not line.strip() else line for line in file]
    except UnicodeDecodeError:
        raise InputError(f"{path} is not UTF-8 text: convert it") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): make it readable") from None


def _read_table(place: _Place) -> tuple[Any, str]:
    """(datasets.Dataset, where it came from) of local files."""
    import datasets

    files = [str(path) for path in place.paths]
    origin = files[0] if len(files) == 1 else f"{files[0]} and {len(files) - 1} more"
    try:
        if place.route == "disk":
            return datasets.load_from_disk(files[0]), origin
        # Files given without the names of their splits are all "train" to the loader, whatever they hold.
        return datasets.load_dataset(place.route, data_files=files, split="train"), origin
    except Exception as error:  # datasets, pyarrow and the decompressors share no base class
        raise InputError(f"cannot read {origin} ({first_line(error)}): is the file whole?") from error


def _read_hub(place: _Place) -> tuple[Any, str]:
    """(datasets.Dataset, where it came from) of the hub."""
    import datasets

    if place.dataset == "wikitext2":
        attempts: list[tuple[tuple[str, ...], dict[str, Any]]]
        attempts = [(("Salesforce/wikitext", "wikitext-2-raw-v1"), {"split": place.split})]
    elif place.dataset == "c4":
        attempts = [(("json",), {"data_files": {"train": C4_FILES[place.split]}, "split": "train"})]
    else:
        # The repository's main branch is a loading script, which datasets no longer runs; some versions stumble over it
        # even when asked for the converted branch, and get that branch's files by name.
        converted = {"revision": "refs/convert/parquet", "split": place.split}
        file = PTB_FILES.format(split=place.split)
        attempts = [
            (("ptb-text-only/ptb_text_only",), converted),
            (("parquet",), {"data_files": {"train": file}, "split": "train"}),
        ]
    for arguments, keywords in attempts:
        try:
            table = datasets.load_dataset(*arguments, **keywords)
        except Exception as error:  # datasets and the HTTP client share no base class
            failure = error  # the name after `as` does not outlive its block
        else:
            files = keywords.get("data_files", {}).values()
            return table, " ".join(["the hub's", *(files or arguments)])
    raise InputError(
        f"cannot load {place.dataset} from the hub ({first_line(failure)}): --data_dir reads a local copy instead"
    ) from failure


def _column(table: Any, dataset: str, origin: str) -> Sequence[str]:
    """The text column. C4's stays lazy: of its 356,317 documents a run reads a few hundred. Rows may be None."""
    for name in COLUMNS[dataset]:
        if name in table.column_names:
            kind = getattr(table.features[name], "dtype", "lists")
            if kind not in ("string", "large_string", "null"):
                raise InputError(f"{origin}: the column {name} holds {kind}, not text: give another copy of {dataset}")
            return [row and row.strip() for row in table[name]] if dataset == "ptb" else table[name]
    raise InputError(f"{origin} has the columns {', '.join(table.column_names)}: {dataset} needs {COLUMNS[dataset][0]}")
