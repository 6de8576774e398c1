"""The place of a checkpoint: checked before anything slow starts, locked during the run, filled in one step.

A folder is written beside its place under another name. What the place holds already (with --overwrite) is
exchanged for it atomically where the system can, its other files and folders included; where it cannot, the old
checkpoint is moved aside file by file and comes back at the next start if that was cut short.
"""

from __future__ import annotations

import hashlib
import logging
import os
import re
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

from sparsessm import files
from sparsessm.errors import InputError, StorageError, storing
from sparsessm.models.card import CARD, is_own_card

logger = logging.getLogger("sparsessm")

MASKS, RECORD = "masks.safetensors", "sparsessm.json"

# The files that make up a checkpoint, in either layout, and that another one replaces.
_CHECKPOINT_FILE = re.compile(
    r"(config|generation_config|tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab|sparsessm)\.json"
    r"|(model|pytorch_model)(-\d+-of-\d+)?\.(safetensors|bin)|(model\.safetensors|pytorch_model\.bin)\.index\.json"
    r"|merges\.txt|tokenizer\.model|chat_template\.jinja|masks\.safetensors"
)
_MOVING, _PREVIOUS = ".sparsessm-moving", ".sparsessm-previous"


def is_checkpoint_file(path: Path) -> bool:
    named = _CHECKPOINT_FILE.fullmatch(path.name) is not None and not path.is_dir()
    return named or (path.name == CARD and is_own_card(path))


def located(target: str) -> Path:
    """The real path of a target: links are followed, also one whose end does not exist yet."""
    return Path(os.path.realpath(Path(target).expanduser()))


def check_target(
    target: str, model_folder: Path, *, overwrite: bool = False, runs: Path | None = None, own: str | None = None
) -> None:
    """Whether a checkpoint can be written to `target`; looks and changes nothing.

    Args:
        model_folder: of the model that is to be pruned. runs: where run folders are made.
        own: hash of the record that this very run wrote there before it was interrupted (`Place.stamp`).

    Raises:
        InputError: the target is the model itself, holds something, is not a folder, or cannot be written.
    """
    path = located(target)
    try:
        there = path.exists() or path.lstat() is not None
    except FileNotFoundError:
        there = False
    except NotADirectoryError:
        raise InputError(f"--save {target} leads through a file: name a folder") from None
    except OSError as error:
        raise InputError(f"--save {target} cannot be a folder ({error.strerror}): name another one") from None
    if there and not path.is_dir():
        raise InputError(f"--save {target} is a file: name a folder")
    if path == Path(os.path.realpath(model_folder)):
        raise InputError(f"--save {target} is the model itself: name another folder")
    if runs is not None and Path(os.path.realpath(runs)).is_relative_to(path):
        raise InputError(f"--save {target} is where the run folders go (--base_dir): name a separate folder")
    if there and not overwrite and _held(path) and not (own and own == record_stamp(path)):
        raise InputError(
            f"--save {target} is not empty: name a new folder, or add --overwrite, which replaces the files of a "
            "checkpoint and leaves all others"
        )
    parent = path if there else path.parent
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise InputError(f"--save {target} cannot be written: {parent} is not a folder that you may write to")


def record_stamp(folder: Path) -> str | None:
    """Hash of the record of a saved checkpoint, None where there is none."""
    try:
        return hashlib.sha256((folder / RECORD).read_bytes()).hexdigest()
    except OSError:
        return None


def _held(path: Path) -> list[Path]:
    """The content of a folder, without what a killed run of ours may have left in it."""
    return [entry for entry in path.iterdir() if not entry.name.startswith(".sparsessm-")]


def put_back(path: Path) -> None:
    """Brings back a checkpoint that had been moved aside for another when the run was killed."""
    path = path.absolute()
    older = path.with_name(f".{path.name}.previous")  # as versions before 0.2 left it
    with suppress(OSError):
        if older.is_dir() and not path.exists():
            older.rename(path)
    previous, moving = path / _PREVIOUS, path / _MOVING
    if previous.is_dir():
        for entry in path.iterdir():
            if is_checkpoint_file(entry):
                entry.unlink()
        previous.rename(moving)
    if moving.is_dir():
        for entry in moving.iterdir():
            entry.rename(path / entry.name)
        moving.rmdir()


class Place:
    """A target that is held by this run: `staging` is the folder to write to, `publish` puts it in place."""

    def __init__(self, target: str, needed: int = 0) -> None:
        """Takes the place, before anything slow starts.

        Args:
            needed: bytes that the checkpoint will take.

        Raises:
            InputError: another run holds the place, or it cannot be written or its disk is too full.
        """
        self.target, self.path = target, located(target)
        self._made = []
        with storing(f"--save {target}", "name another folder"):
            self._made = files.made_parents(self.path.parent)
            # a mounted folder, or one in a folder that is not ours, cannot change places with another
            self._inside = self.path.is_dir() and (
                os.path.ismount(self.path) or not os.access(self.path.parent, os.W_OK | os.X_OK)
            )
            around = self.path if self._inside else self.path.parent
            mark = f".sparsessm-{hashlib.sha256(os.fsencode(self.path.name)).hexdigest()[:12]}"
            lock = files.lock(around / f"{mark}.lock")
            if lock is None:
                busy = "another run is writing there: wait until it ends, or name another folder"
                raise StorageError(f"--save {target}: {busy}")
            self._lock = lock
            for left in around.glob(f"{mark}-*.partial"):
                shutil.rmtree(left, ignore_errors=True)
            put_back(self.path)
            self.staging = Path(tempfile.mkdtemp(prefix=f"{mark}-", suffix=".partial", dir=around))
        free = shutil.disk_usage(self.staging).free
        if free < needed:
            self.close()
            raise InputError(f"--save {target} needs about {needed >> 20} MiB and its disk has {free >> 20} MiB free")

    def __enter__(self) -> Place:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def stamp(self) -> str | None:
        """What tells this checkpoint's record from any other's, once it is written."""
        return record_stamp(self.staging)

    def publish(self) -> Path:
        """Puts the folder in its place.

        Raises:
            StorageError: the system refuses; the old checkpoint is unchanged.
        """
        with storing(str(self.path), "nothing was saved: free some space, or name another place"):
            card = self.path / CARD
            if os.path.lexists(card) and not is_own_card(card):
                (self.staging / CARD).unlink(missing_ok=True)
                logger.warning("warning: %s was written or edited by hand: it stays, and no new card is written", card)
            files.publish_modes(self.staging)
            if self._inside:
                self._move_in()
            elif not self.path.exists() or not any(self.path.iterdir()):
                self.staging.rename(self.path)
            elif not self._exchange():
                self._move_in()
        return self.path

    def _exchange(self) -> bool:
        """Lets the staging folder and the one in place change places, other things of the latter in both."""
        before = set(self.staging.iterdir())
        try:
            for entry in self.path.iterdir():
                if not is_checkpoint_file(entry):
                    _link(entry, self.staging / entry.name)
            shutil.copymode(self.path, self.staging)
            if files.exchange(self.staging, self.path):
                return True
        except OSError:
            pass  # a file system without hard links, or another one below the folder
        for entry in set(self.staging.iterdir()) - before:
            shutil.rmtree(entry) if entry.is_dir() and not entry.is_symlink() else entry.unlink()
        return False

    def _move_in(self) -> None:
        """Replaces the checkpoint file by file; `put_back` repairs what a kill leaves half done."""
        moving, previous = self.path / _MOVING, self.path / _PREVIOUS
        moving.mkdir()
        try:
            for entry in self.path.iterdir():
                if is_checkpoint_file(entry):
                    entry.rename(moving / entry.name)
            moving.rename(previous)
            for entry in sorted(self.staging.iterdir(), key=lambda entry: entry.name == "config.json"):
                entry.rename(self.path / entry.name)
        except BaseException:
            put_back(self.path)
            raise
        done = Path(tempfile.mkdtemp(dir=self.staging)) / "previous"
        previous.rename(done)

    def close(self) -> None:
        """Releases the place; what was not published is deleted."""
        shutil.rmtree(self.staging, ignore_errors=True)
        files.unlock(self._lock)
        files.remove_empty(self._made)


def _link(source: Path, target: Path) -> None:
    """The same file, or folder of the same files, under a second name."""
    if source.is_symlink():
        target.symlink_to(os.readlink(source))
    elif source.is_dir():
        target.mkdir()
        for entry in source.iterdir():
            _link(entry, target / entry.name)
        shutil.copystat(source, target)
    else:
        os.link(source, target, follow_symlinks=False)
