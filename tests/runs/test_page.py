"""The page of a run on wandb, as its own files hold it: what is logged and uploaded, the environment, --resume."""

import importlib.util
import json
import os
import signal
import struct
import time

import pytest
import wandb
from wandb.proto.wandb_internal_pb2 import Record

from tests.processes import Command

SMALL = ["--seqlen", "64", "--nsamples", "4", "--eval_windows", "2", "--log_wandb"]
A_LOG = ["--method", "sparsessm", "--prune_A", "--sparsity", "0.5"]

pytestmark = pytest.mark.usefixtures("tokenised_once")


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """wandb remembers the environment of its first use, so each test starts and ends its service."""
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_SILENT", "true")
    wandb.teardown()
    yield
    wandb.teardown()


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")


@pytest.fixture
def nobody(monkeypatch, tmp_path):
    """A user without a key."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))


def leveldb_log(content):
    """The records of a LevelDB log, the format that `wandb sync` reads: blocks of 32 KiB that start 7 bytes before
    `content`, in them fragments with a checksum (4 bytes), a length (2) and a kind: whole, first, middle, last."""
    at, record, found = 0, b"", []
    while at + 7 <= len(content):
        left = 32768 - (at + 7) % 32768
        if left < 7:
            at += left
            continue
        length, kind = struct.unpack("<HB", content[at + 4 : at + 7])
        record += content[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):
            found.append(record)
            record = b""
    return found


def records_of(folder):
    """The records of each offline run below a folder, the first run first."""
    wandb.teardown()  # its service writes the last block of a file after the run's `finish`; this waits for its end
    return [records_in(file) for file in sorted(folder.glob("wandb/offline-run-*/*.wandb"))]


def records_in(file):
    return [Record.FromString(data) for data in leveldb_log(file.read_bytes()[7:])]  # after ":W&B", magic, version


def rows_of(records):
    """(step, layer) of each logged row of layers."""
    found = []
    for record in records:
        row = {item.key or item.nested_key[0]: json.loads(item.value_json) for item in record.history.item}
        if "layer" in row:
            assert "ssm/sparsity" in row
            found.append((row["_step"], row["layer"]))
    return found


def uploads_of(records):
    """Names of the files in the artifacts of a run, and of those beside them."""
    artifacts = [record.request.log_artifact.artifact for record in records] + [record.artifact for record in records]
    names = {entry.path for artifact in artifacts for entry in artifact.manifest.contents}
    return names, {file.path for record in records for file in record.files.files}


def test_options_layers_figures_and_small_files_are_logged_but_no_checkpoint(run_main, text_folder, tmp_path, offline):
    done = run_main(["demo", text_folder, *SMALL, *A_LOG, "--save", tmp_path / "out"])
    assert done.code == 0
    (records,) = records_of(done.folder)
    (run,) = [record.run for record in records if record.run.run_id]
    config = {item.key: item.value_json for item in run.config.update}
    assert (run.project, run.job_type, run.display_name) == ("sparsessm", "prune", f"default-{done.folder.name}")
    assert config["nsamples"] == "4" and config["method"] == '"sparsessm"'
    assert rows_of(records) == [(layer, layer) for layer in range(6)]
    assert any(f"perplexity/{text_folder}" in str(record.summary) for record in records)
    artifacts, files = uploads_of(records)
    assert not artifacts and {"options.json", "sparsity.json", "metrics.json"} <= files
    assert not any(name.endswith(".safetensors") for name in files)
    kept = next(done.folder.glob("wandb/offline-run-*/files/metrics.json"))
    assert json.loads(kept.read_text()) == done.metrics


def test_the_checkpoint_is_uploaded_where_asked(run_main, text_folder, tmp_path, offline):
    argv = ["demo", text_folder, *SMALL, *A_LOG, "--wandb_checkpoint"]
    refused = run_main(argv)
    assert refused.code == 2 and "--wandb_checkpoint does nothing alone: add --log_wandb and --save" in refused.stderr
    done = run_main([*argv, "--save", tmp_path / "out"])
    artifacts, _ = uploads_of(records_of(done.folder)[0])
    assert artifacts == {file.name for file in (tmp_path / "out").iterdir()}


def test_the_environment_wins_over_our_own_values(run_main, text_folder, tmp_path, offline, monkeypatch):
    said = {"PROJECT": "theirs", "ENTITY": "group", "NAME": "a name", "RUN_GROUP": "table", "JOB_TYPE": "job",
            "RUN_ID": "abc1", "TAGS": "one,two", "NOTES": "a note", "DIR": str(tmp_path / "elsewhere")}  # fmt: skip
    for name, value in said.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    (tmp_path / "elsewhere").mkdir()
    done = run_main(["demo", text_folder, *SMALL])
    assert done.code == 0 and not (done.folder / "wandb").exists()
    (records,) = records_of(tmp_path / "elsewhere")
    (run,) = [record.run for record in records if record.run.run_id]
    assert (run.project, run.entity, run.display_name, run.run_group) == ("theirs", "group", "a name", "table")
    assert (run.job_type, run.run_id, list(run.tags), run.notes) == ("job", "abc1", ["one", "two"], "a note")
    assert json.loads((done.folder / "wandb.json").read_text()) == {"id": "abc1", "project": "theirs", "entity": "group"}


def test_in_a_sweep_project_and_id_are_the_agents(run_main, text_folder, offline, monkeypatch):
    monkeypatch.setenv("WANDB_SILENT", "false")
    for name, value in {"SWEEP_ID": "s1", "RUN_ID": "r1", "PROJECT": "swept"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    done = run_main(["demo", text_folder, *SMALL])
    assert done.code == 0 and "Ignoring" not in done.stderr
    (records,) = records_of(done.folder)
    (run,) = [record.run for record in records if record.run.run_id]
    assert (run.sweep_id, run.run_id, run.project) == ("s1", "r1", "swept")


def test_disabled_leaves_nothing(run_main, text_folder, monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "disabled")
    done = run_main(["demo", text_folder, *SMALL, *A_LOG])
    assert done.code == 0 and "warning" not in done.stderr
    assert not list(done.folder.glob("wandb*"))


def test_without_a_key_a_run_is_logged_offline(run_main, text_folder, nobody, monkeypatch):
    monkeypatch.setattr("wandb.errors.term.can_use_terminput", lambda: True)  # at a terminal wandb itself would ask
    done = run_main(["demo", text_folder, *SMALL])
    (line,) = [line for line in done.stderr.splitlines() if "offline" in line]
    assert done.code == 0 and line.startswith("warning: wandb logs this run offline (no key: wandb login")
    assert line.endswith(f"wandb sync {done.folder / 'wandb'}")
    assert len(records_of(done.folder)) == 1


def test_without_a_network_a_run_is_logged_offline(run_main, text_folder, nobody, monkeypatch):
    for name, value in {"API_KEY": 40 * "a", "BASE_URL": "http://127.0.0.1:9", "INIT_TIMEOUT": "1"}.items():
        monkeypatch.setenv(f"WANDB_{name}", value)
    done = run_main(["demo", text_folder, *SMALL])
    (line,) = [line for line in done.stderr.splitlines() if "offline" in line]
    assert done.code == 0 and line.endswith(f"wandb sync {done.folder / 'wandb'}")
    assert len(records_of(done.folder)) == 1


def test_settings_that_wandb_refuses_are_one_line_before_anything_heavy(run_main, text_folder, offline, monkeypatch):
    monkeypatch.setenv("WANDB_PROJECT", "a/b")
    done = run_main(["demo", text_folder, *SMALL])
    assert done.code == 2 and done.folder is None
    assert done.stderr.strip().splitlines()[-1].startswith("error: wandb cannot start (")


def test_wandb_missing_is_said_before_anything_heavy(run_main, monkeypatch):
    present = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "wandb" else present(name, *rest))
    done = run_main(["demo", "demo", *SMALL])
    assert done.code == 2 and "pip install wandb" in done.stderr and done.folder is None


@pytest.mark.slow
def test_a_killed_run_continues_its_page(run_main, text_folder, tmp_path, offline):
    """Offline, the second part has a file of its own, which `wandb sync` uploads to the same page after the first."""
    argv = ["demo", str(text_folder), *SMALL, *A_LOG, "--base_dir", str(tmp_path), "--nsamples", "12", "--calib_batch", "1"]
    process = Command(*argv, **{name: value for name, value in os.environ.items() if name.startswith("WANDB_")})
    while not any('"event": "layer"' in file.read_text() for file in tmp_path.glob("default/*/events.jsonl")):
        assert process.poll() is None
        time.sleep(0.005)
    while not any(rows_of(records_in(file)) for file in tmp_path.glob("default/*/wandb/offline-run-*/*.wandb")):
        assert process.poll() is None
        process.send_signal(signal.SIGSTOP)  # or it would be through before wandb's own process has written a row
        time.sleep(0.05)
        process.send_signal(signal.SIGCONT)
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    (folder,) = tmp_path.glob("default/*")
    page = (folder / "wandb.json").read_text()
    reported = (folder / "events.jsonl").read_text().count('"event": "layer"')
    done = run_main(["--resume", folder], base_dir=False)
    assert done.code == 0, done.stderr
    before, after = records_of(folder)
    assert {record.run.run_id for record in before + after if record.run.run_id} == {json.loads(page)["id"]}
    first = rows_of(before)
    assert 0 < len(first) <= reported < 6 and first == [(layer, layer) for layer in range(len(first))]
    assert rows_of(after) == [(layer, layer) for layer in range(reported, 6)]
    assert (folder / "wandb.json").read_text() == page


def test_a_damaged_record_of_the_page_is_named(run_main, text_folder, offline):
    done = run_main(["demo", text_folder, *SMALL])
    (done.folder / "metrics.json").unlink()
    (done.folder / "wandb.json").write_text('{"id": ')
    again = run_main(["--resume", done.folder], base_dir=False)
    assert again.code == 2 and f"{done.folder / 'wandb.json'} is damaged" in again.stderr
