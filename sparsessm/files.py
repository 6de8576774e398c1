"""Files and folders that appear whole or not at all, and locks that vanish with their process.

A regular file, or a new name, is replaced by a rename. Links, pipes and devices stay: what is written goes
through them. A folder that holds other things is exchanged for its successor in one step of the file system, with those
other things in it.
"""

from __future__ import annotations

import ctypes
import errno
import json
import math
import os
import shutil
import stat
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

_EXCHANGE, _HERE = 2, -100  # RENAME_EXCHANGE and AT_FDCWD of Linux
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP)  # as file systems say that they have none


def strict_json(content: Any, **form: Any) -> str:
    """JSON that strict readers take: numbers that are not finite become null."""
    return json.dumps(_finite(content), allow_nan=False, **form)


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


def write_whole(path: Path, write: Callable[[Path], Any], *, follow: bool = True) -> None:
    """Has `write` make a file beside `path`, and puts it in its place.

    Args:
        follow: a link at `path` stays, and what it points to is replaced; otherwise the link itself is replaced.
    """
    path = Path(os.path.realpath(path)) if follow else path
    special = follow and path.exists() and not path.is_file()
    if special and path.is_dir():
        raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    # a new unique name: an existing file or link is neither followed nor overwritten
    handle, name = tempfile.mkstemp(prefix=".", suffix=".partial", dir=None if special else path.parent)
    os.close(handle)
    partial = Path(name)
    try:
        write(partial)
        if special:
            with partial.open("rb") as source, path.open("wb") as target:
                shutil.copyfileobj(source, target)
            return
        partial.chmod(stat.S_IMODE(path.stat().st_mode) if path.is_file() and not path.is_symlink() else _mode(0o666))
        sync(partial)
        partial.replace(path)
    finally:
        with suppress(FileNotFoundError):
            partial.unlink()


def write_text(path: Path, text: str, *, follow: bool = True) -> None:
    """Writes a text file whole, see `write_whole`."""
    write_whole(path, lambda partial: partial.write_text(text, encoding="utf-8"), follow=follow)


def append_line(path: Path, line: str) -> None:
    """Appends a line to a file of our own; a link in its place is refused."""
    handle = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW, 0o666)
    with os.fdopen(handle, "a", encoding="utf-8") as stream:
        stream.write(line + "\n")


def sync(path: Path) -> None:
    with path.open("rb") as stream:
        os.fsync(stream.fileno())


def publish_modes(folder: Path) -> None:
    """Gives a temporary folder, made for its owner alone, the permissions of new files and folders; syncs its files."""
    folder.chmod(_mode(0o777))
    for file in folder.iterdir():
        file.chmod(_mode(0o666))
        sync(file)


def _mode(mode: int) -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mode & ~mask


def exchange(one: Path, other: Path) -> bool:
    """Lets two names change places in one step; False where the system or the file system cannot."""
    call = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    return call is not None and call(_HERE, os.fsencode(one), _HERE, os.fsencode(other), _EXCHANGE) == 0


def lock(path: Path, *, wait: float = 0, on_acquired: Callable[[int], None] | None = None) -> FileLock | None:
    """A lock of the system's on a file, held until `unlock` or the end of the process; None where another has it.

    Where the file system knows no locks there is none, and users must not start two runs at once.

    Args:
        wait: seconds to wait for another holder. on_acquired: takes the file's descriptor.
    """
    taken = FileLock(path, thread_local=False, on_acquired=on_acquired)
    try:
        taken.acquire(timeout=wait)
    except Timeout:
        return None
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
    return taken


def unlock(taken: FileLock) -> None:
    """Releases a lock and removes its file; a process that waits for it makes a new one."""
    with suppress(OSError):
        os.unlink(taken.lock_file)
    taken.release()


def made_parents(folder: Path) -> list[Path]:
    """Makes a folder and its parents; returns those that were not there, the innermost first."""
    missing = [place for place in (folder, *folder.parents) if not place.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    return missing


def remove_empty(folders: list[Path]) -> None:
    """Removes folders as long as they are empty, in order."""
    for folder in folders:
        try:
            folder.rmdir()
        except OSError:
            return
