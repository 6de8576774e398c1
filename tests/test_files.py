"""Files appear whole or not at all, links and pipes stay what they are, and a lock belongs to one process."""

import errno
import fcntl
import json
import os
import stat
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from sparsessm import files
from sparsessm.errors import StorageError, storing

ROOT = Path(__file__).resolve().parent.parent


def test_a_failed_write_leaves_what_was_there(tmp_path):
    target = tmp_path / "page"
    target.write_text("old")

    def fail(partial):
        partial.write_text("half")
        raise OSError(28, os.strerror(28))

    with pytest.raises(StorageError, match=r"the page could not be written .the disk is full"), storing("the page"):
        files.write_whole(target, fail)
    assert target.read_text() == "old" and os.listdir(tmp_path) == ["page"]


def test_a_new_file_has_the_modes_of_new_files_and_an_old_one_keeps_its_own(tmp_path):
    (tmp_path / "plain").write_text("")
    files.write_text(tmp_path / "new", "a")
    assert (tmp_path / "new").stat().st_mode == (tmp_path / "plain").stat().st_mode
    (tmp_path / "new").chmod(0o640)
    files.write_text(tmp_path / "new", "b")
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o640


def test_a_link_stays_and_what_it_points_to_is_replaced(tmp_path):
    (tmp_path / "there").mkdir()
    for name in ("old", "new"):
        (tmp_path / name).symlink_to(tmp_path / "there" / name)
    (tmp_path / "there" / "old").write_text("old")
    for name in ("old", "new"):
        files.write_text(tmp_path / name, "page")
        assert (tmp_path / name).is_symlink() and (tmp_path / "there" / name).read_text() == "page"
    files.write_text(tmp_path / "old", "own", follow=False)
    assert not (tmp_path / "old").is_symlink() and (tmp_path / "there" / "old").read_text() == "page"


def test_a_pipe_stays_and_what_is_written_arrives(tmp_path):
    pipe, seen = tmp_path / "pipe", []
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: seen.append(pipe.read_text()))
    reader.start()
    files.write_text(pipe, "page")
    reader.join(10)
    assert seen == ["page"] and pipe.is_fifo() and os.listdir(tmp_path) == ["pipe"]


def test_a_device_takes_what_is_written():
    files.write_text(Path("/dev/null"), "page")
    assert stat.S_ISCHR(os.stat("/dev/null").st_mode)


def test_what_lies_where_a_temporary_file_goes_is_left_alone(tmp_path):
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (tmp_path / ".figures.json.partial").symlink_to(victim)
    files.write_text(tmp_path / "figures.json", "1", follow=False)
    assert victim.read_text() == "mine"
    (tmp_path / "events").symlink_to(victim)
    with pytest.raises(OSError):
        files.append_line(tmp_path / "events", "line")
    assert victim.read_text() == "mine"


def test_numbers_that_are_not_finite_are_null():
    content = {"a": float("inf"), "b": [1.5, (float("nan"), 2)], "c": {"d": -float("inf")}, "e": True}
    assert json.loads(files.strict_json(content)) == {"a": None, "b": [1.5, [None, 2]], "c": {"d": None}, "e": True}


def test_names_change_places_in_one_step(tmp_path):
    one, other = tmp_path / "one", tmp_path / "other"
    one.mkdir()
    other.write_text("file")
    if not files.exchange(one, other):
        pytest.skip("this system or file system cannot exchange two names")
    assert other.is_dir() and one.read_text() == "file"
    assert files.exchange(one, tmp_path / "missing") is False and one.read_text() == "file"


HOLD = """
import sys
from pathlib import Path
from sparsessm.files import lock
held = lock(Path(sys.argv[1]))
print("held", flush=True)
input()
"""


def test_a_lock_is_refused_to_another_process_and_goes_with_its_own(tmp_path):
    path = tmp_path / "lock"
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(path)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert holder.stdout.readline() == "held\n"
    assert files.lock(path) is None
    holder.kill()
    holder.communicate()
    lock = files.lock(path)
    assert files.lock(path) is None
    files.unlock(lock)
    assert not path.exists()
    files.unlock(files.lock(path))


def test_a_lock_that_cannot_be_written_is_an_error(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(OSError):
        files.lock(tmp_path / "link")
    assert not (tmp_path / "elsewhere").exists()


def test_a_file_system_without_locks_does_without(tmp_path, monkeypatch):
    def flock(handle, _):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", flock)
    lock = files.lock(tmp_path / "lock")
    assert not lock.is_locked
    files.unlock(lock)
