"""A dry run: what it says would be pruned, what it expects of time and memory, and that it writes nothing."""

import json
import os
import re
import subprocess
import sys

import pytest

from tests.family import family_checkpoint
from tests.processes import ROOT, Command

QUICK = ["--seqlen", 32, "--nsamples", 4, "--eval_windows", 4, "--dry_run"]


def rows(told):
    """What, layers, entries and share of each line of the table."""
    return [tuple(re.split(r"  +", line.strip())) for line in told.split("\n") if line.rstrip().endswith(" %")]


def test_it_says_what_would_be_pruned_and_writes_nothing(run_main, text_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    argv = ["--method", "magnitude", "--prune_A", "--prune_layers", "--sparsity", "0.25", "--minlayer", "2"]
    done = run_main(["demo", text_folder, *argv, *QUICK, "--save", tmp_path / "out", "--offload", "disk"])
    assert done.code == 0, done.stderr
    assert done.folder is None and os.listdir(tmp_path) == []
    D, N, M, R = 384, 16, 192, 12
    sizes = {"A_log": D * N, "in_proj": 2 * D * M, "conv1d": 4 * D, "x_proj": (R + 2 * N) * D, "dt_proj": D * R,
             "out_proj": D * M}  # fmt: skip
    assert rows(done.stdout) == [(name, "4", f"{4 * size:,}", "25 %") for name, size in sizes.items()]
    assert "model: demo, 6 layers, 9 MiB in float32" in done.stdout
    assert f"4 windows of 32 tokens to calibrate, 4 windows of {text_folder} to evaluate" in done.stdout
    assert f"saved: about 9 MiB in {tmp_path / 'out'}" in done.stdout
    assert "by a trial of 1 of 6 layers with random weights on 4 windows" in done.stdout
    assert "time: about " in done.stdout and "disk: 0 MiB in the run folder" in done.stdout


@pytest.mark.slow
def test_the_memory_that_it_expects_is_what_a_run_takes(text_folder, tmp_path):
    argv = ["demo", text_folder, "--method", "sparsessm", "--prune_A", "--prune_layers", "--sparsity", 0.5, "--seqlen", 128,
            "--nsamples", 24, "--eval_windows", 24]  # fmt: skip
    dry = Command(*argv, "--dry_run")
    told, _ = dry.communicate()
    number, unit = re.search(r"memory: about ([0-9.]+) (MiB|GiB)", told).groups()
    words = [sys.executable, "main.py", *map(str, argv), "--base_dir", tmp_path]  # imports count for what it takes
    subprocess.run(words, cwd=ROOT, capture_output=True, check=True)
    (metrics,) = tmp_path.glob("default/*/metrics.json")
    measured = json.loads(metrics.read_text())["peak_memory_bytes"]["process"] / 2**20
    assert float(number) * {"MiB": 1, "GiB": 1024}[unit] == pytest.approx(measured, rel=0.25)


def test_what_goes_whole_is_counted_whole(run_main, text_folder):
    states = run_main(["demo", text_folder, "--method", "structure_mag", "--prune_A", "--sparsity", "0.5", *QUICK])
    assert rows(states.stdout) == [("states", "6", "96", "50 %")]
    parts = run_main(["demo", text_folder, "--method", "mamba-shedder", "--prune_A", "--sparsity", "0.5", *QUICK])
    assert rows(parts.stdout) == [("SSM branches", "6", "6", "50 %")]
    assert "time and memory: not known before the run, because it tries every removal" in parts.stdout


def test_a_hybrid_is_tried_by_a_layer_of_each_kind(run_main, demo_dir, text_folder, tmp_path):
    model = family_checkpoint(tmp_path / "in", demo_dir, "nemotron_h")
    done = run_main([model, text_folder, "--method", "magnitude", "--prune_layers", "--prunen", 2, "--prunem", 4,
                     "--parts", "mlp", "attention", *QUICK])  # fmt: skip
    assert [row[0] for row in rows(done.stdout)] == ["up_proj", "down_proj", "q_proj", "k_proj", "v_proj", "o_proj"]
    assert "by a trial of 3 of 4 layers" in done.stdout and rows(done.stdout)[0][3] == "50 %"


def test_mistakes_are_found_as_in_a_run(run_main, text_folder, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    argv = ["demo", text_folder, "--method", "magnitude", "--prune_A", "--sparsity", "0.5", *QUICK]
    assert "is not empty" in run_main([*argv, "--save", tmp_path / "full"]).stderr
    short = run_main(["demo", text_folder, "--seqlen", 10**7, "--dry_run"])
    assert short.code == 2 and "too few for a window" in short.stderr
