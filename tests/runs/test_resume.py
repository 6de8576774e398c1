"""A killed run resumes and ends with the bytes of an uninterrupted one; processes share a job."""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from tests.processes import ROOT, Command, job

WORDS = ["--model_path", "demo", "--seqlen", "128", "--nsamples", "12", "--eval_windows", "6", "--calib_batch", "2",
         "--eval_dense", "--method", "sparsessm", "--prune_A", "--prune_layers", "--sparsity", "0.5",
         "--alpha", "0.04"]  # fmt: skip


def digest(folder):
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.iterdir())}


@pytest.fixture(scope="module")
def words(text_folder):
    """The options of all runs here. Each process reads the text: the data set demo would take it seconds."""
    return ["--dataset", str(text_folder), *WORDS]


@pytest.fixture(scope="module")
def undisturbed(words, tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    process = Command(*words, "--base_dir", folder / "runs", "--save", folder / "out")
    _, err = process.communicate()
    assert process.returncode == 0, err
    return folder / "out"


@pytest.mark.slow
def test_a_killed_run_resumes_to_the_same_bytes(words, undisturbed, run_main, tmp_path):
    """Killed at several random moments of its work, and at last let finish."""
    rng, out, runs = random.Random(0), tmp_path / "out", tmp_path / "runs"
    process = Command(*words, "--base_dir", runs, "--save", out)
    kills = 0
    while kills < 2 and (before := progress(runs)) < 10:  # of 22 records; a kill after the last would be none
        while progress(runs) == before and process.poll() is None:
            time.sleep(0.01)  # until it has got further than last time
        time.sleep(rng.uniform(0, 0.2))
        process.send_signal(signal.SIGKILL)
        kills += 1
        process.communicate()
        (run,) = runs.glob("default/*")
        process = Command("--resume", run)
    _, err = process.communicate()
    assert kills == 2
    assert process.returncode == 0, err
    assert digest(out) == digest(undisturbed)
    assert not [file for file in tmp_path.iterdir() if file.name.startswith(".")]
    assert not (run / "layers").exists()
    again = run_main(["--resume", run], base_dir=False)
    assert "has finished" in again.stderr and again.code == 2


def progress(runs):
    return len(list(runs.glob("default/*/layers/*.safetensors")) + list(runs.glob("default/*/layers/*.json")))


def test_a_resumed_run_notices_that_its_text_has_changed(run_main, tmp_path, text_folder):
    outcome = run_main(["demo", str(text_folder), "--seqlen", "64", "--eval_windows", "2"])
    (outcome.folder / "metrics.json").unlink()
    (outcome.folder / "layers").mkdir()
    (outcome.folder / "layers" / "data_sha256.json").write_text(json.dumps({"evaluation": "of another text"}))
    resumed = run_main(["--resume", str(outcome.folder)], base_dir=False)
    assert resumed.code == 2 and "the text changed" in resumed.stderr


@pytest.mark.slow
@pytest.mark.parametrize("count", [2, 3])
def test_processes_share_a_job_and_agree_with_one(words, undisturbed, tmp_path, count):
    out, _ = job(count, *words, "--base_dir", tmp_path / "runs", "--save", tmp_path / "out")
    masks, expected = (load_file(folder / "masks.safetensors") for folder in (tmp_path / "out", undisturbed))
    assert masks.keys() == expected.keys() and all((masks[name] == expected[name]).all() for name in masks)
    weights, one = (load_file(folder / "model.safetensors") for folder in (tmp_path / "out", undisturbed))
    assert all(torch.allclose(weights[name], one[name], rtol=1e-4, atol=1e-6) for name in one)
    assert len(out.strip().splitlines()) == 3  # one table, from one process
    (run,) = tmp_path.glob("runs/default/*")
    # the comparison with stock, layers, perplexities, phases (load, eval, prune, eval), the end
    assert len((run / "events.jsonl").read_text().splitlines()) == 1 + 3 * 6 + 2 + 4 + 1


@pytest.mark.slow
def test_a_process_that_dies_ends_the_job_with_its_error(words, tmp_path):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", "main.py"]
    process = subprocess.Popen([*launcher, *words, "--nsamples", "24", "--base_dir", tmp_path], cwd=ROOT, text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip
    while not progress(tmp_path) or not list(tmp_path.glob("default/*/layers/ssm-*")):
        assert process.poll() is None
        time.sleep(0.05)
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True).stdout.split()
    os.kill(int(children[-1]), signal.SIGKILL)
    died = time.monotonic()
    _, err = process.communicate(timeout=60)
    assert process.returncode != 0 and time.monotonic() - died < 60
    assert "Signal 9" in err or "SIGKILL" in err
