"""A checkpoint takes its place in one step, nothing else there is touched, and a kill at any moment leaves a whole one."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from sparsessm import files
from sparsessm.errors import InputError, StorageError
from sparsessm.models import place
from sparsessm.models.place import Place, check_target

ROOT = Path(__file__).resolve().parents[2]
OLD = dict.fromkeys(
    ("config.json", "model-00001-of-00002.safetensors", "model.safetensors.index.json", "merges.txt"), "old"
)
NEW = {"config.json": "new", "model.safetensors": "new", "sparsessm.json": "new"}


def fill(folder: Path, content: dict[str, str]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in content.items():
        (folder / name).write_text(text)
    return folder


def neighbours(folder: Path) -> Path:
    """Things of somebody's beside a checkpoint: files, a repository, another checkpoint, links, a pipe."""
    fill(folder, {"trainer_state.json": "s", "my-model.safetensors": "t", "README.md": "r"})
    fill(folder / ".git", {"HEAD": "h"})
    fill(folder / "checkpoint-500", OLD)
    (folder / "latest").symlink_to("checkpoint-500")
    (folder / "gone").symlink_to("/nowhere/at/all")
    os.mkfifo(folder / "pipe")
    (folder / "config.json.d").mkdir()
    return folder


def seen(folder: Path) -> dict[str, str]:
    """Every name below a folder, with what it is or holds."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            kind = os.readlink(path)
        else:
            kind = "" if path.is_dir() else "pipe" if path.is_fifo() else path.read_text()
        found[str(path.relative_to(folder))] = kind
    return found


def published(target: Path) -> Path:
    with Place(str(target)) as taken:
        fill(taken.staging, NEW)
        return taken.publish()


@pytest.mark.parametrize("way", ["exchange", "move in", "mounted", "links refused"])
def test_the_files_of_a_checkpoint_are_replaced_and_all_others_stay(tmp_path, monkeypatch, way):
    target = neighbours(fill(tmp_path / "out", OLD))
    others = {name: text for name, text in seen(target).items() if "/" in name or name not in OLD}
    inode = (target / "trainer_state.json").stat().st_ino
    if way == "move in":
        monkeypatch.setattr(files, "exchange", lambda one, other: False)
    if way == "mounted":
        monkeypatch.setattr(os.path, "ismount", lambda path: str(path) == str(target))
    if way == "links refused":
        monkeypatch.setattr(os, "link", lambda *_, **__: (_ for _ in ()).throw(OSError(1, "no hard links here")))
    published(target)
    assert seen(target) == others | NEW
    assert (target / "trainer_state.json").stat().st_ino == inode
    assert os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("there", [False, True])
def test_a_new_or_empty_place_is_filled(tmp_path, there):
    target = tmp_path / "deep" / "er" / "out"
    if there:
        target.mkdir(parents=True)
    published(target)
    assert seen(target) == NEW and os.listdir(target.parent) == ["out"]


def test_what_is_not_published_leaves_no_trace(tmp_path):
    with Place(str(tmp_path / "deep" / "out")) as taken:
        fill(taken.staging, NEW)
    assert os.listdir(tmp_path) == []


def test_links_to_a_place_stay(tmp_path):
    (tmp_path / "disk").mkdir()
    for name, there in (("full", True), ("new", False)):
        if there:
            fill(tmp_path / "disk" / name, OLD)
        (tmp_path / name).symlink_to(tmp_path / "disk" / name)
        published(tmp_path / name)
        assert (tmp_path / name).is_symlink() and seen(tmp_path / "disk" / name) == NEW
    assert sorted(os.listdir(tmp_path / "disk")) == ["full", "new"]


def test_a_name_as_long_as_the_file_system_takes(tmp_path):
    published(tmp_path / ("p" * 250))
    assert seen(tmp_path / ("p" * 250)) == NEW


def test_a_full_disk_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(InputError, match=r"needs about .* MiB and its disk has"):
        Place(str(tmp_path / "out"), 1 << 60)
    assert os.listdir(tmp_path) == []


def test_one_run_at_a_time(tmp_path):
    with Place(str(tmp_path / "out")) as first:
        with pytest.raises(StorageError, match="another run is writing there"):
            Place(str(tmp_path / "out"))
        with Place(str(tmp_path / "other")):
            pass
        fill(first.staging, NEW)
        first.publish()
    assert seen(tmp_path) == {"out": "", **{f"out/{name}": text for name, text in NEW.items()}}


def test_targets_that_can_be_written(tmp_path):
    (tmp_path / "empty").mkdir()
    fill(tmp_path / "left" / ".sparsessm-previous", {})  # of a killed run
    for name in ("new", "empty", "deep/er/new", "left"):
        check_target(str(tmp_path / name), tmp_path / "model")
    check_target(str(neighbours(fill(tmp_path / "old", OLD))), tmp_path / "model", overwrite=True)
    assert not (tmp_path / "new").exists() and not (tmp_path / "deep").exists()


@pytest.mark.parametrize(
    "name", ["notes", "file", "file/below", "model", "model/../model", "link", "pipe", "loop", "p" * 300, "runs"]
)
def test_targets_that_are_refused(tmp_path, name):
    fill(tmp_path / "notes", {"thesis.tex": "years of work"})
    fill(tmp_path / "model", OLD)
    (tmp_path / "file").write_text("x")
    (tmp_path / "link").symlink_to(tmp_path / "model")
    (tmp_path / "loop").symlink_to(tmp_path / "loop")
    os.mkfifo(tmp_path / "pipe")
    for overwrite in (False, True):
        if name == "notes" and overwrite:
            continue
        with pytest.raises(InputError) as caught:
            check_target(str(tmp_path / name), tmp_path / "model", overwrite=overwrite, runs=tmp_path / "runs" / "default")
        assert "--save" in str(caught.value) and "\n" not in str(caught.value)


def test_what_this_run_wrote_before_it_was_interrupted_may_be_written_again(tmp_path):
    target = published(tmp_path / "out")
    stamp = place.record_stamp(target)
    check_target(str(target), tmp_path / "model", own=stamp)
    (target / "sparsessm.json").write_text("another run's")
    with pytest.raises(InputError, match="not empty"):
        check_target(str(target), tmp_path / "model", own=stamp)


# A process that publishes and stops dead at the Nth of the calls by which files change their names.
STOP = """
import json, os, sys
from pathlib import Path
from sparsessm import files
from sparsessm.models import place
sys.path.insert(0, "tests")
target, number, way = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
calls = 0
def counted(function):
    def call(*arguments, **keywords):
        global calls
        calls += 1
        if calls == number:
            os._exit(9)
        return function(*arguments, **keywords)
    return call
taken = place.Place(str(target))
for name, text in json.loads(sys.argv[4]).items():
    (taken.staging / name).write_text(text)
if way == "move in":
    files.exchange = lambda one, other: False
else:
    files.exchange = counted(files.exchange)
os.rename, os.link, Path.rename, Path.unlink = map(counted, (os.rename, os.link, Path.rename, Path.unlink))
taken.publish()
taken.close()
"""


@pytest.mark.parametrize("way", ["exchange", "move in"])
def test_killed_at_any_moment_the_place_holds_a_whole_checkpoint_at_the_next_start(tmp_path, way):
    if way == "exchange" and not _can_exchange(tmp_path):
        pytest.skip("this system or file system cannot exchange two names")
    ends = set()
    for number in range(1, 40):
        target = neighbours(fill(tmp_path / str(number) / "out", OLD))
        before = seen(target)
        others = {name: text for name, text in before.items() if "/" in name or name not in OLD}
        done = subprocess.run([sys.executable, "-c", STOP, target, str(number), way, json.dumps(NEW)], cwd=ROOT, check=False)
        if way == "exchange":  # whole at every moment, without any repair
            assert seen(target) in (before, others | NEW)
        with Place(str(target)):  # the next start
            assert seen(target) in (before, others | NEW)
        assert os.listdir(target.parent) == ["out"]
        ends.add(seen(target) == before)
        if done.returncode == 0:
            break
    assert done.returncode == 0 and ends == {True, False}


def _can_exchange(folder: Path) -> bool:
    one, other = folder / "a", folder / "b"
    one.write_text("")
    other.write_text("")
    able = files.exchange(one, other)
    one.unlink()
    other.unlink()
    return able


def test_what_an_older_version_left_between_its_two_renames_comes_back(tmp_path):
    fill(tmp_path / ".out.previous", OLD)
    place.put_back(tmp_path / "out")
    assert seen(tmp_path / "out") == OLD and os.listdir(tmp_path) == ["out"]
