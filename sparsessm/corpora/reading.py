"""Reading a source: the rows of a text, and the line that says where they came from.

Of tables without a rule of their own and of the hub, rows are streamed: no more than the first 12 million characters are
read, which is all of WikiText-2 and takes little of a data set of any size.
"""

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from sparsessm.corpora import c4
from sparsessm.corpora.names import HUB_IDS
from sparsessm.corpora.sources import COLUMNS, Source
from sparsessm.errors import InputError, first_line

MOST_CHARACTERS = 12_000_000
# Rows that are looked at to tell which columns hold text.
_PEEKED = 100
# Of CSV, an empty cell alone is null: the words NA, null and None are text.
_LOADER_OPTIONS: dict[str, dict[str, Any]] = {
    "parquet": {}, "json": {}, "csv": {"keep_default_na": False, "na_values": [""]},
}  # fmt: skip

PTB_FILES = "hf://datasets/ptb-text-only/ptb_text_only@refs%2Fconvert%2Fparquet/penn_treebank/{split}/0000.parquet"


@dataclass(frozen=True)
class Rows:
    """The rows of a split; None where a row holds null."""

    texts: Sequence[str | None]
    source: str
    """One line: where they came from, and how many there are."""


def check(source: Source) -> None:
    """Reads a file's first line, or a table's first rows, of sources that are not of DATASETS.

    Raises:
        InputError: it cannot be read, is empty, or has no column of text, or several and none was chosen.
    """
    if all(path.is_file() and not path.stat().st_size for path in source.paths) and source.paths:
        raise InputError(f"{_origin(source)} is empty: give a file with text")
    if source.route == "txt":
        _read_lines(source.paths[0], strip=False, most=1)
    elif source.dataset in ("file", "folder"):
        next(_rows_of_table(source, peek=True))


def read(source: Source, seed: int | None = None) -> Rows:
    """The rows of a source. `seed`: of c4 from the hub, only what a draw of this seed may ask for first.

    Raises:
        InputError: it cannot be read, or holds no text.
    """
    what = f"{source.dataset} {source.split}".rstrip()
    if source.route == "demo":
        text = source.paths[0].read_bytes().decode()
        return Rows([text], f"{what}: {len(text)} characters of docstrings of Python's standard library")
    if source.route == "txt":
        lines = [line for path in source.paths for line in _read_lines(path, strip=source.dataset == "ptb")]
        return Rows(lines, f"{what}: {len(lines)} lines of {_origin(source)}")
    if source.dataset in ("file", "folder", "hub"):
        return _read_stream(source, what)
    if source.route == "hub" and source.dataset == "c4" and (seed is not None or source.split == "validation"):
        return _read_c4(source, what, seed)
    table, origin = _load_hub(source) if source.route == "hub" else (_load_table(source), _origin(source))
    texts = _named_column(table, source.dataset, origin)
    return Rows(texts, f"{what}: {len(texts)} {'documents' if source.dataset == 'c4' else 'lines'} of {origin}")


def _origin(source: Source) -> str:
    if source.dataset == "hub":
        return f"the hub's {source.name}"
    more = f" and {len(source.paths) - 1} more" if len(source.paths) > 1 else ""
    return f"{source.paths[0]}{more}"


@contextmanager
def _named(what: str, remedy: str) -> Iterator[None]:
    """Makes one line of whatever `datasets`, pyarrow, the decompressors and the HTTP client raise; none of them logs."""
    log = logging.getLogger("datasets")
    level = log.level
    log.setLevel(logging.CRITICAL)
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        raise InputError(f"{what} ({first_line(error.__cause__ or error)}): {remedy}") from error
    finally:
        log.setLevel(level)


def _read_lines(path: Path, strip: bool, most: int | None = None) -> list[str]:
    """Lines of a file, stripped (PTB) or by WikiText-2's rule: a blank line is empty, others keep their newline."""
    try:
        with path.open(encoding="utf-8-sig") as file:  # a byte order mark is not text
            return [line.strip() if strip or not line.strip() else line for line in islice(file, most)]
    except UnicodeDecodeError:
        raise InputError(f"{path} is not UTF-8 text: convert it") from None
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error.strerror}): make it readable") from None


def _read_stream(source: Source, what: str) -> Rows:
    rows = _rows_of_table(source)
    column = next(rows)
    texts: list[str | None] = []
    characters = 0
    for text in rows:
        texts.append(text)
        characters += len(text or "")
        if characters >= MOST_CHARACTERS:
            break
    if not characters:
        raise InputError(f"{_origin(source)}: the column {column} holds no text: give another")
    first = "the first " if characters >= MOST_CHARACTERS else ""
    return Rows(texts, f"{what}: {first}{len(texts)} rows of {_origin(source)}, column {column}")


def _rows_of_table(source: Source, peek: bool = False) -> Iterator[Any]:
    """First the name of the column, then its rows one by one."""
    import datasets

    origin = _origin(source)
    remedy = "is it reachable?" if source.dataset == "hub" else "is the file whole?"
    with _named(f"cannot read {origin}", remedy):
        files = list(map(str, source.paths))
        if source.route == "disk":
            table = datasets.load_from_disk(files[0]).to_iterable_dataset()
        elif source.route == "hub":
            name, config = source.name.base, source.name.config or None
            table = datasets.load_dataset(name, config, split=source.split, streaming=True)
        else:
            # Files given without the names of their splits are all "train" to the loader, whatever they hold.
            options = _LOADER_OPTIONS[source.route]
            table = datasets.load_dataset(source.route, data_files=files, split="train", streaming=True, **options)
        rows = iter(table)
        first = list(islice(rows, _PEEKED))
        column = _chosen_column(first, source, origin)
        yield column
        for row in (*first, *(() if peek else rows)):
            if not isinstance(text := row.get(column), str | None):
                raise InputError(f"{origin}: the column {column} holds {type(text).__name__}, not text: give another")
            yield text


def _chosen_column(rows: Sequence[Mapping[str, Any]], source: Source, origin: str) -> str:
    """The column that was asked for, or `text`, or the only one that holds text in these rows."""
    if not rows:
        raise InputError(f"{origin} has no rows: give a file with text")
    kinds = {key: {type(row[key]) for row in rows if row.get(key) is not None} for row in rows for key in row}
    able = [key for key, found in kinds.items() if found == {str}]
    asked = source.name.column
    if asked in kinds and kinds[asked] <= {str}:
        return asked
    if not asked and ("text" in able or len(able) == 1):
        return "text" if "text" in able else able[0]
    if not able:
        raise InputError(f"{origin} has the columns {', '.join(kinds)}, and none holds text: give another file")
    reason = f"not {asked}" if asked else "and none is called text"
    example = f"{source.name.base}:{source.name.config}:{source.name.split}:{able[0]}"
    raise InputError(f"{origin} has text in the columns {', '.join(able)}, {reason}: choose one, as {example}")


def _load_table(source: Source) -> Any:
    """datasets.Dataset of local files of a named data set."""
    import datasets

    files = list(map(str, source.paths))
    with _named(f"cannot read {_origin(source)}", "is the file whole?"):
        if source.route == "disk":
            return datasets.load_from_disk(files[0])
        return datasets.load_dataset(source.route, data_files=files, split="train", **_LOADER_OPTIONS[source.route])


def _read_c4(source: Source, what: str, seed: int | None) -> Rows:
    """Of the hub's shard: the documents for evaluation, or those that the draw of this seed may ask for first."""
    origin = f"the hub's {c4.FILES[source.split]}"
    with _named("cannot load c4 from the hub", "--data_dir reads a local copy instead"):
        if seed is None:
            documents = c4.evaluation_documents()
            return Rows(documents, f"{what}: the first {len(documents)} documents of {origin}")
        return Rows(c4.train_candidates(seed), f"{what}: {c4.TRAIN_DOCUMENTS} documents of {origin}")


def _load_hub(source: Source) -> tuple[Any, str]:
    """(datasets.Dataset, where it came from) of the hub."""
    import datasets

    attempts: list[tuple[tuple[str, ...], dict[str, Any]]]
    if source.dataset == "wikitext2":
        attempts = [((HUB_IDS["wikitext2"], "wikitext-2-raw-v1"), {"split": source.split})]
    elif source.dataset == "c4":
        attempts = [(("json",), {"data_files": {"train": c4.FILES[source.split]}, "split": "train"})]
    else:
        # The repository's main branch is a loading script, which datasets no longer runs; some versions stumble over it
        # even when asked for the converted branch, and get that branch's files by name.
        converted = {"revision": "refs/convert/parquet", "split": source.split}
        file = PTB_FILES.format(split=source.split)
        attempts = [
            ((HUB_IDS["ptb"],), converted),
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
        f"cannot load {source.dataset} from the hub ({first_line(failure)}): --data_dir reads a local copy instead"
    ) from failure


def _named_column(table: Any, dataset: str, origin: str) -> Sequence[str | None]:
    """The text column. C4's stays lazy: of its 356,317 documents a run reads a few hundred."""
    for name in COLUMNS[dataset]:
        if name in table.column_names:
            kind = getattr(table.features[name], "dtype", "lists")
            if kind not in ("string", "large_string", "null"):
                raise InputError(f"{origin}: the column {name} holds {kind}, not text: give another copy of {dataset}")
            return [row and row.strip() for row in table[name]] if dataset == "ptb" else table[name]
    raise InputError(f"{origin} has the columns {', '.join(table.column_names)}: {dataset} needs {COLUMNS[dataset][0]}")
