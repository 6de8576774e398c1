"""Run folders that were damaged or edited in any way: the page is made without them, or with what they say."""

from __future__ import annotations

import json
import os
import pickle
import shutil
import threading

import pytest

from sparsessm.report.page import write_report
from sparsessm.report.plots import svg
from sparsessm.report.results import read_runs

INF, NAN = float("inf"), float("nan")
ODD = [INF, NAN, "x", "", [], {}, {"a": {"b": []}}, None, -1, True, 1e308, 1 << 70, [[1]], {"a": INF}]


@pytest.fixture
def one_run(experiments, tmp_path):
    """A copy of a run of two phases with masks, beside an intact one."""
    for name in ("all", "dense"):
        shutil.copytree(experiments / name, tmp_path / "e" / name)
    (folder,) = (tmp_path / "e" / "all").iterdir()
    return folder


drawn = {}  # most pictures are the same in all of these pages


def draw(picture):
    data = pickle.dumps(picture)
    if data not in drawn:
        drawn[data] = svg(picture)
    return drawn[data]


def page(folder, target) -> str:
    write_report(read_runs(folder), folder, target, draw)
    return target.read_text()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["options.json", "metrics.json", "sparsity.json"])
def test_any_value_of_any_key(one_run, tmp_path, name):
    file = one_run / name
    content = json.loads(file.read_text())
    for number, key in enumerate(content):
        for odd in ODD[number % 7 :: 7]:  # each key has some of them, and all have all
            file.write_text(json.dumps({**content, key: odd}))
            assert "dense" in page(tmp_path / "e", tmp_path / "r.html"), (key, odd)


@pytest.mark.slow
def test_any_value_in_an_event(one_run, tmp_path):
    file = one_run / "events.jsonl"
    lines = file.read_text().splitlines()
    for number, line in enumerate(lines):
        for key in json.loads(line) if number % 2 else ():
            odd = [json.dumps({**json.loads(line), key: value}) for value in ODD]
            file.write_text("\n".join([*lines[:number], *odd, *lines[number + 1 :]]))
            assert "dense" in page(tmp_path / "e", tmp_path / "r.html"), line


@pytest.mark.parametrize("name", ["options.json", "metrics.json", "sparsity.json", "events.jsonl", "masks.safetensors"])
@pytest.mark.parametrize(
    "text", ["", "{", "[]", "7", "null", '"x"', "[" * 100_000, '{"a":' * 100_000, "\x00\xff"], ids=lambda t: t[:4]
)
def test_any_text_in_any_file(one_run, tmp_path, name, text):
    (one_run / name).write_text(text)
    assert "dense" in page(tmp_path / "e", tmp_path / "r.html")


def test_a_sparsity_without_end_is_a_damaged_run(one_run, tmp_path):
    content = json.loads((one_run / "options.json").read_text())
    (one_run / "options.json").write_text(json.dumps({**content, "sparsity": float("inf")}))
    (name, reason), = read_runs(tmp_path / "e").damaged
    assert name.startswith("all/") and reason == "options.json: sparsity should be a number from 0 to 1, or null"


def test_a_link_and_a_pipe_stay_what_they_are(one_run, tmp_path, run_report):
    (tmp_path / "link.html").symlink_to(tmp_path / "page.html")
    os.mkfifo(tmp_path / "pipe")
    assert run_report([tmp_path / "e", "-o", tmp_path / "link.html"]) == 0
    assert (tmp_path / "link.html").is_symlink() and "dense" in (tmp_path / "page.html").read_text()
    seen = []
    reader = threading.Thread(target=lambda: seen.append((tmp_path / "pipe").read_text()))
    reader.start()
    assert run_report([tmp_path / "e", "-o", tmp_path / "pipe"]) == 0
    reader.join(20)
    assert "dense" in seen[0] and (tmp_path / "pipe").is_fifo()
