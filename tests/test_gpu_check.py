"""scripts/gpu_check: its line where there is no GPU, and that its check tells a right scan from wrong ones."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from scripts import gpu_check, gpu_check_heads
from sparsessm.kernels.chunked_scan import chunked_scan, chunked_scan_ref
from sparsessm.kernels.selective_scan import selective_scan_ref

SMALL = [(1, 1, 1, 1), (2, 5, 3, 4)]


def test_without_a_gpu_it_says_so_in_one_line():
    script = Path(gpu_check.__file__).with_suffix(".sh")
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "VENV": sys.prefix}
    done = subprocess.run(["bash", script], env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == f"error: no CUDA GPU is available to torch {torch.__version__}: nothing to check\n"


def test_the_check_passes_the_reference():
    lines = []
    assert gpu_check.check(selective_scan_ref, "cpu", SMALL, lines.append) == 0
    assert len(lines) == 6 and all("right, off by" in line for line in lines)


def test_the_check_passes_the_kernel():
    scan_cuda = pytest.importorskip("sparsessm.kernels.scan_cuda", reason="triton is not installed")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    lines = []
    gpu_check.check(scan_cuda.scan_by_triton, device, SMALL, lines.append)
    # Triton's interpreter cuts bfloat16 off where a GPU rounds
    assert all("right" in line or (device == "cpu" and "bfloat16" in line) for line in lines), lines


def spoil(y=0.0, state=0.0, **sums):
    def scan(*arguments, statistics=None, **values):
        out, last = selective_scan_ref(*arguments, **values, statistics=statistics)
        for name, error in sums.items():
            if statistics is not None and getattr(statistics, name) is not None:
                getattr(statistics, name).mul_(1 + error)
        return out * (1 + y), last + state

    return scan


@pytest.mark.parametrize(
    "scan, fault",
    [
        (spoil(y=1e-4), "y off by"),
        (spoil(state=1e-3), "state off by"),
        (spoil(y=float("nan")), "y off by inf"),
        *((spoil(**{name: 1e-4}), f"{name} off by") for name in gpu_check.NEEDS),
    ],
)
def test_the_check_finds_what_is_wrong(scan, fault):
    lines = []
    assert gpu_check.check(scan, "cpu", SMALL[1:], lines.append) > 0
    assert any(fault in line and "float32" in line for line in lines), lines


def test_the_check_finds_other_bits_and_lost_zeros():
    calls = iter(range(1000))

    def restless(**values):
        y, state = selective_scan_ref(**values)
        return y, state * (1 + 1e-7 * next(calls))

    def forgetful(**values):
        return selective_scan_ref(**values | {"A": values["A"].clamp(min=-1e3)})

    lines = []
    assert gpu_check.check(restless, "cpu", SMALL[1:], lines.append) == 3 and "other bits" in lines[0]
    tiny = lambda **values: forgetful(**values | {"delta_bias": values["delta_bias"] - 30})  # noqa: E731
    assert gpu_check.check(tiny, "cpu", SMALL[1:], lines.append) == 3 and "transitions where" in lines[-1]


def test_least_bytes_are_those_of_the_tensors():
    # u, delta, z, y: 4 x 2*3*5; B, C: 2 x 2*3*7 of 2 bytes; A 35, D and bias 10, state 70 of 4 bytes
    assert gpu_check.least_bytes(2, 3, 5, 7, 2, ()) == 2 * (120 + 84) + 4 * 115
    assert gpu_check.least_bytes(2, 3, 5, 7, 2, ("h2", "gram")) == 2 * (120 + 84) + 4 * 115 + 16 * (105 + 245)


SMALL_HEADS = [(1, 1, 1, 1, 1, 1), (2, 37, 4, 3, 5, 2)]


@pytest.mark.parametrize("scan", [chunked_scan_ref, chunked_scan])
def test_the_check_of_heads_passes_the_reference_and_what_the_cpu_computes(scan):
    lines = []
    assert gpu_check_heads.check(scan, "cpu", SMALL_HEADS, lines.append) == 0, lines
    assert len(lines) == 4 and all("right, off by" in line for line in lines)


@pytest.mark.parametrize("what", ["y", "state", "hh", "ch2", "abar"])
def test_the_check_of_heads_finds_what_is_wrong(what, error=1e-4):
    def spoiled(*arguments, statistics=None, **values):
        y, state = chunked_scan_ref(*arguments, **values, statistics=statistics)
        total = None if statistics is None else getattr(statistics, what, None)
        if total is not None:
            total *= 1 + error
        return y * (1 + error * (what == "y")), state * (1 + error * (what == "state"))

    lines = []
    assert gpu_check_heads.check(spoiled, "cpu", SMALL_HEADS[1:], lines.append) >= 1
    assert f"wrong: {what}" in lines[0].replace(" of states", "").replace(" without sums", "")
