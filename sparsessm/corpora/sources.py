"""Where the text of a data set is: found and checked before anything is read as a whole.

A name is looked up in this order: the four of DATASETS (from the hub, or from copies under `data_dir`), a file or folder
that exists, the hub. The layouts of folders are described in data/README.md.
"""

import functools
import importlib.util
import json
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from sparsessm.corpora.names import DATASETS, Name, parts_of
from sparsessm.errors import InputError, first_line

DEMO_TEXT = Path(__file__).resolve().parent.parent.parent / "data" / "demo-text"

# The names under which a split's files may go.
ALIASES = {"train": ("train",), "validation": ("validation", "valid"), "test": ("test",)}
# The column of a named data set, and what else copies call it.
COLUMNS = {"wikitext2": ("text",), "ptb": ("sentence", "text"), "c4": ("text",)}
# How a file is read, by its ending: as lines, or by a loader of `datasets`. The first kind that has a split is taken.
KINDS = {
    "txt": (".txt",),
    "parquet": (".parquet",),
    "json": (".json", ".jsonl", ".json.gz", ".jsonl.gz"),
    "csv": (".csv",),
}
# What `datasets` writes beside the rows.
_RECORDS = ("state.json", "dataset_info.json", "dataset_dict.json")


@dataclass(frozen=True)
class Source:
    """Where a split will be read from, known before it is read."""

    dataset: str
    """One of DATASETS, or "file", "folder" or "hub", which are all read by the rule of wikitext2."""
    route: str
    """demo, one of KINDS, disk (datasets.save_to_disk) or hub."""
    split: str
    """train, validation, test, or as the data set calls it; "" for a file or folder without splits."""
    name: Name
    """As the user gave it."""
    paths: tuple[Path, ...] = ()
    """The local files, or the save_to_disk folder."""


def locate(name: str, data_dir: str | Path | None, calibration: bool) -> Source:
    """Find where the split for calibration, or else for evaluation, comes from.

    Raises:
        InputError: there is no such file, folder, configuration or split, or no package to read it with. What is said of
            the hub comes from the hub, except for DATASETS, of which nothing is asked.
    """
    data_dir = None if data_dir is None else Path(data_dir).expanduser()
    if data_dir is not None and not data_dir.is_dir():
        raise InputError(f"--data_dir {data_dir}: there is no such folder")
    asked = parts_of(name)
    path = Path(asked.base).expanduser()
    if asked.base in DATASETS:
        if asked != Name(asked.base):
            raise InputError(f"{asked.base} has a rule of its own: give it without {name.removeprefix(asked.base)}")
        source = _locate_named(asked, data_dir, calibration)
    elif not asked.base or not path.exists():
        _need_datasets(asked)
        return Source("hub", "hub", _split_of_hub(asked, calibration), asked)
    elif asked.config:
        raise InputError(f"{path} is a file or folder, without configurations: write {asked.base}::SPLIT:COLUMN")
    else:
        source = _locate_file(path, asked) if path.is_file() else _locate_folder(path, asked, calibration)
        if source.route == "txt" and asked.column:
            raise InputError(f"{source.paths[0]} is plain text, without the column {asked.column}: leave it out")
    if source.route not in ("demo", "txt"):
        _need_datasets(asked)
    return source


def _need_datasets(asked: Name) -> None:
    if importlib.util.find_spec("datasets") is None:
        raise InputError(f"reading {asked.base} needs the package datasets: pip install datasets")


def _locate_named(asked: Name, data_dir: Path | None, calibration: bool) -> Source:
    name = asked.base
    if name == "demo":
        split = "train" if calibration else "test"
        path = DEMO_TEXT / f"{split}.txt"
        if not path.is_file():
            raise InputError("the text demo comes with a clone of the repository: run there, or give another data set")
        return Source("demo", "demo", split, asked, (path,))
    # In local copies without train, validation replaces it.
    splits: tuple[str, ...] = ("train", "validation") if calibration else ("test",)
    if name == "c4":
        splits = ("train",) if calibration else ("validation",)
    if data_dir is None:
        return Source(name, "hub", splits[0], asked)
    folder = data_dir / name if (data_dir / name).is_dir() else data_dir
    files = _files_of(folder)
    if folder == data_dir:  # several sets may lie side by side there: leave out the files named after another one
        others = re.compile(rf"(?<![a-z0-9])({'|'.join(key.removesuffix('2') for key in COLUMNS if key != name)})")
        files = [path for path in files if not others.search(path.name.lower())]
    plain = [folder / f"{alias}.txt" for split in splits for alias in ALIASES[split] if name != "c4"]
    files = [path for path in files if path.suffix != ".txt" or path in plain]
    for split in splits:
        if found := _find_split(folder, files, split):
            return Source(name, found[0], split, asked, found[1])
    texts = "" if name == "c4" else f"{splits[0]}.txt, "
    raise InputError(
        f"no {' or '.join(splits)} split of {name} in {folder}: looked for {texts}parquet, json, jsonl, json.gz or csv "
        f"files with {splits[0]} in their names, and a folder of datasets.save_to_disk"
    )


def _locate_file(path: Path, asked: Name) -> Source:
    if asked.split:
        raise InputError(f"{path} is one file, without splits: write {asked.base}:::COLUMN, or leave the column out")
    kind = _kind_of(path)
    if kind is None:
        raise InputError(f"{path} is no text that can be read here: give a {_endings()} file")
    return Source("file", kind, "", asked, (path,))


def _locate_folder(folder: Path, asked: Name, calibration: bool) -> Source:
    files = _files_of(folder)
    wanted = [asked.split] if asked.split else ["train", "validation"] if calibration else ["test", "validation"]
    for split in wanted:
        if found := _find_split(folder, files, split):
            return Source("folder", found[0], split, asked, found[1])
    there = [split for split in ALIASES if _find_split(folder, files, split)]
    saved = (folder / "state.json").is_file()
    if asked.split:
        have = f"it has {', '.join(there)}" if there else "its files are not named after splits: leave the split out"
        raise InputError(f"{folder} has no split {asked.split}: {have}")
    if not there and saved:
        return Source("folder", "disk", "", asked, (folder,))
    kinds = {kind: tuple(path for path in files if _kind_of(path) == kind) for kind in KINDS}
    kinds = {kind: paths for kind, paths in kinds.items() if paths}
    if there or not kinds:
        purpose, texts = ("calibration", "train.txt or valid.txt") if calibration else ("evaluation", "test.txt")
        other = f", or name its split, as {asked.base}::{there[0]}" if there else f" (read are {_endings()} files)"
        raise InputError(f"{folder} has no text for {purpose}: put {texts} there{other}")
    if len(kinds) > 1:
        raise InputError(f"{folder} holds files of several kinds ({', '.join(kinds)}): keep one kind, or give one file")
    ((kind, paths),) = kinds.items()
    return Source("folder", kind, "", asked, paths)


def _files_of(folder: Path) -> list[Path]:
    """The files that may hold text, sorted by name."""
    try:
        return sorted(path for path in folder.iterdir() if _kind_of(path) and path.name not in _RECORDS and path.is_file())
    except OSError as error:
        raise InputError(f"{folder} cannot be listed ({error.strerror}): make it readable") from None


def _kind_of(path: Path) -> str | None:
    return next((kind for kind, endings in KINDS.items() if path.name.lower().endswith(endings)), None)


def _endings() -> str:
    endings = [ending for group in KINDS.values() for ending in group]
    return f"{', '.join(endings[:-1])} or {endings[-1]}"


def _find_split(folder: Path, files: Sequence[Path], split: str) -> tuple[str, tuple[Path, ...]] | None:
    """(route, paths) of a split in a folder, or None."""
    aliases = ALIASES.get(split, (split,))
    for alias in aliases:
        if folder / f"{alias}.txt" in files:
            return "txt", (folder / f"{alias}.txt",)
        # One folder per split, as DatasetDict.save_to_disk makes them.
        if (folder / alias / "state.json").is_file():
            return "disk", (folder / alias,)
    if _saved_split(folder) in aliases:
        return "disk", (folder,)
    # As a word of the name: c4-train.00000-of-01024.json.gz, ptb_test.parquet, but not latest.json.
    word = re.compile(rf"(?<![a-z])({'|'.join(map(re.escape, aliases))})(?![a-z])")
    for kind in KINDS:
        found = tuple(path for path in files if _kind_of(path) == kind and word.search(path.name.lower()))
        if found:
            return kind, found
    return None


def _saved_split(folder: Path) -> str | None:
    """The split that Dataset.save_to_disk noted in this folder; None if it noted none or was never called on it."""
    state = folder / "state.json"
    if not state.is_file():
        return None
    try:
        return json.loads(state.read_text(encoding="utf-8")).get("_split")
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise InputError(f"{state} cannot be read ({first_line(error)}): copy the data set again") from None


def _split_of_hub(asked: Name, calibration: bool) -> str:
    splits = _splits_on_hub(asked.base, asked.config)
    if asked.split:
        wanted: tuple[str, ...] = (asked.split,)
    else:
        wanted = ALIASES["train"] if calibration else (*ALIASES["test"], *ALIASES["validation"])
    for split in wanted:
        if split in splits:
            return split
    example = f"{asked.base}:{asked.config}:{splits[0]}"
    raise InputError(f"{asked.base} has the splits {_listed(splits)}, not {wanted[0]}: choose one, as {example}")


@functools.lru_cache(maxsize=16)
def _splits_on_hub(name: str, config: str) -> tuple[str, ...]:
    """The splits of a configuration, as the hub says; "" is the default configuration."""
    unknown = f"give one of {', '.join(DATASETS)}, a file, a folder, or the id of a data set of the hub"
    looks_local = name.endswith(tuple(ending for group in KINDS.values() for ending in group))
    if looks_local or not re.fullmatch(r"\w[\w.-]*(/\w[\w.-]*)?", name):
        raise InputError(f"unknown data set {name or '(empty)'}: there is no such file or folder; {unknown}")
    import datasets
    from huggingface_hub import HfApi
    from huggingface_hub.errors import OfflineModeIsEnabled

    try:
        with suppress(OfflineModeIsEnabled):
            HfApi().dataset_info(name)  # fails at once, where datasets would try for half a minute
        configs = datasets.get_dataset_config_names(name)
        default = config or datasets.get_dataset_default_config_name(name)
        if default in configs:
            return tuple(datasets.get_dataset_split_names(name, default))
    except Exception as error:  # datasets and the HTTP client share no base class
        raise InputError(f"no data set {name} was found, here or on the hub ({first_line(error)}): {unknown}") from error
    reason = f"not {config}" if config else "and no default"
    raise InputError(f"{name} has the configurations {_listed(configs)}, {reason}: choose one, as {name}:{configs[0]}")


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")
