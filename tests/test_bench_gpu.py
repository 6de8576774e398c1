"""scripts/bench_gpu: every part runs, here on the CPU, and says what it compares; without a GPU one line says so."""

import re
import subprocess
import sys

import pytest

from scripts import bench_gpu, benchmarking
from tests.processes import ROOT


def test_every_part_runs_and_places_have_the_same_masks(monkeypatch, capsys):
    monkeypatch.setitem(benchmarking.SHAPES, "tiny", (16, 3))
    parts = [part for part in bench_gpu.PARTS if part != "masks"]
    bench_gpu.bench(shapes=["tiny"], nsamples=5, seqlen=32, only=parts, device="cpu", layers=2)
    said = capsys.readouterr().out
    assert re.search(r"tiny +float32 +3 ", said) and re.search(r"tiny +bfloat16 +3 ", said)
    assert re.findall(r"tiny +(device|cpu|disk) +[0-9.]+ +same", said) == ["device", "cpu", "disk"]
    assert "a copy has" in said and "published / ours" in said and "seconds a layer" in said
    assert said.count("Self CPU time total") == 2


@pytest.mark.slow
def test_the_masks_of_the_device_are_those_of_the_cpu(capsys):
    bench_gpu.bench(shapes=[], nsamples=1, seqlen=8, only=["masks"], device="cpu")
    assert "0 of 36864 entries of the demo's masks differ from the CPU's" in capsys.readouterr().out


def test_without_a_gpu_it_says_so_in_one_line():
    done = subprocess.run([sys.executable, "scripts/bench_gpu.py"], cwd=ROOT, capture_output=True, text=True,
                          env={"CUDA_VISIBLE_DEVICES": "", "PATH": ""})  # fmt: skip
    assert done.returncode == 2 and done.stdout == "" and done.stderr.startswith("error: no CUDA GPU is available to torch")
    assert done.stderr.count("\n") == 1
