"""Names of data sets: the four with rules of their own, files and folders, and any other of the Hugging Face hub."""

import os
from collections.abc import Sequence
from dataclasses import dataclass

from sparsessm.errors import InputError

DATASETS = ("wikitext2", "ptb", "c4", "demo")

# Their ids on the Hugging Face hub.
HUB_IDS = {"wikitext2": "Salesforce/wikitext", "ptb": "ptb-text-only/ptb_text_only", "c4": "allenai/c4"}


@dataclass(frozen=True)
class Name:
    """The parts of NAME[:CONFIG[:SPLIT[:COLUMN]]]; "" where a part takes its default."""

    base: str
    """One of DATASETS, a file or folder, or an id of the hub."""
    config: str = ""
    split: str = ""
    column: str = ""

    def __str__(self) -> str:
        return ":".join([self.base, self.config, self.split, self.column]).rstrip(":")


def parts_of(name: str) -> Name:
    """The parts of a name; a path that exists is one part, colons or not.

    Raises:
        InputError: more than four parts.
    """
    if _exists(name):
        return Name(name)
    parts = name.split(":")
    if len(parts) > 4:
        raise InputError(f"data set {name}: expected NAME:CONFIG:SPLIT:COLUMN, got {len(parts)} parts")
    return Name(*parts)


def with_full_path(name: str, reserved: Sequence[str] = DATASETS) -> str:
    """The name with the full path of a file or folder that is here; any other name as it is."""
    base, colon, others = (name, "", "") if _exists(name) else name.partition(":")
    if base in reserved or not _exists(base):
        return name
    return os.path.abspath(os.path.expanduser(base)) + colon + others


def _exists(path: str) -> bool:
    return os.path.exists(os.path.expanduser(path))
