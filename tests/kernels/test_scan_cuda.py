"""What the scan for CUDA does besides its numbers (test_scan.py): compiling for GPUs, and who serves when."""

import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch

from sparsessm.kernels.selective_scan import ScanStatistics, selective_scan_ref

scan_cuda = pytest.importorskip("sparsessm.kernels.scan_cuda", reason="triton is not installed")
scan_gradient_cuda = pytest.importorskip("sparsessm.kernels.scan_gradient_cuda", reason="triton is not installed")

REPOSITORY = Path(__file__).resolve().parents[2]
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def scan_values(dtype=torch.float32, gate=True, B=2, L=9, D=7, N=3):
    g = torch.Generator().manual_seed(5)
    u, delta, z, Bt, Ct = (torch.randn(B, L, n, generator=g).to(DEVICE, dtype) for n in (D, D, D, N, N))
    A, skip, bias = (torch.randn(shape, generator=g).to(DEVICE) for shape in ((D, N), (D,), (D,)))
    return [u, delta, -A.exp(), Bt, Ct, skip, z if gate else None, bias, True]


def like_mamba_ssm(u, delta, A, B, C, D, z, delta_bias, delta_softplus, return_last_state):
    """selective_scan_fn of mamba-ssm by our reference."""
    assert return_last_state and A.dtype == torch.float32
    u, delta, B, C = (x.transpose(1, 2) for x in (u, delta, B, C))
    z = None if z is None else z.transpose(1, 2)
    y, state = selective_scan_ref(u, delta, A, B, C, D, z, delta_bias, delta_softplus)
    return y.transpose(1, 2), state


def spoiled(change):
    """like_mamba_ssm with its results changed."""
    return lambda *arguments: change(*like_mamba_ssm(*arguments))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_another_scan_that_agrees_proves_right(dtype):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert scan_cuda.agrees_with_ours(like_mamba_ssm, DEVICE, dtype)


@pytest.mark.parametrize(
    "theirs, fault",
    [
        (spoiled(lambda y, state: (1.01 * y, state)), "not ours"),
        (spoiled(lambda y, state: (y, state.roll(1, 0))), "not ours"),
        (spoiled(lambda y, state: (y, state * float("nan"))), "not ours"),
        (spoiled(lambda y, state: (y[..., :-1], state)), "not ours"),
        (lambda *_: torch.ones(3).reshape(2, 2), "RuntimeError: shape '\\[2, 2\\]' is invalid"),
        (lambda u: u, "TypeError"),
    ],
)
def test_another_scan_that_fails_or_disagrees_is_not_used(theirs, fault):
    with pytest.warns(UserWarning, match=f"mamba-ssm is installed but is not used for the scan: .*{fault}") as caught:
        assert not scan_cuda.agrees_with_ours(theirs, DEVICE, torch.float32)
    assert len(caught) == 1


def test_a_broken_mamba_ssm_is_named_once(broken_package):
    broken_package("mamba_ssm", scan_cuda.mamba_ssm_scan)
    with pytest.warns(UserWarning, match="undefined symbol") as caught:
        for _ in range(2):
            scan_cuda.selective_scan_cuda(*scan_values())
    assert len(caught) == 1


def test_mamba_ssm_serves_what_it_can_and_nothing_else(monkeypatch):
    served = []

    def theirs(*arguments):
        served.append(arguments)
        return like_mamba_ssm(*arguments)

    monkeypatch.setattr(scan_cuda, "mamba_ssm_scan", lambda device, dtype: theirs)
    for gate in (True, False):
        values = scan_values(gate=gate)
        values[5] = values[5].half()
        y, state = scan_cuda.selective_scan_cuda(*values, statistics=ScanStatistics())
        expected_y, expected_state = selective_scan_ref(*values)
        assert torch.equal(y, expected_y) and torch.equal(state, expected_state) and y.is_contiguous()
    assert len(served) == 2

    values = scan_values()
    scan_cuda.selective_scan_cuda(*values, h0=torch.zeros(2, 7, 3, device=DEVICE))
    scan_cuda.selective_scan_cuda(*values, statistics=ScanStatistics.zeros(("h2",), 9, 7, 3, DEVICE))
    scan_cuda.selective_scan_cuda(values[0].half(), *values[1:])
    scan_cuda.selective_scan_cuda(*scan_values(B=1, L=1, D=2, N=257))
    assert len(served) == 2


def test_where_triton_does_not_work_the_reference_serves(monkeypatch):
    def no_compiler(*_, **__):
        raise RuntimeError("Failed to find C compiler.\nPlease specify one")

    monkeypatch.setattr(scan_cuda, "launch", no_compiler)
    scan_cuda.triton_works.cache_clear()
    try:
        with pytest.warns(UserWarning, match="slow scan .* RuntimeError: Failed to find C compiler.$") as caught:
            for _ in range(2):
                y, _ = scan_cuda.selective_scan_cuda(*scan_values())
            u, *rest = scan_values()
            with_gradient, _ = scan_gradient_cuda.scan_with_gradient(u.requires_grad_(), *rest, None)
        assert len(caught) == 1
        assert torch.equal(y, selective_scan_ref(*scan_values())[0])
        assert torch.equal(with_gradient, y) and with_gradient.requires_grad
    finally:
        scan_cuda.triton_works.cache_clear()


def test_views_are_read_where_they_are():
    whole = torch.randn(2, 5, 12)
    for view in (whole[..., 7:], whole[:, 1:], whole.expand(2, 5, 12), whole[:1].expand(3, 5, 12)):
        rows = scan_cuda._rows(view)
        assert rows.data_ptr() == view.data_ptr() and rows.stride() == view.stride()
    assert scan_cuda._rows(whole.transpose(1, 2)).stride(-1) == 1


@pytest.mark.parametrize("samples", [1, 8, 11])
def test_sums_have_the_same_bits_every_time(samples):
    values, needs = scan_values(B=samples, L=3, D=18), ("h2", "abar", "hh", "gram")
    found = []
    for _ in range(2):
        statistics = ScanStatistics.zeros(needs, 3, 18, 3, DEVICE, "unit")
        results = scan_cuda.scan_by_triton(*values, statistics=statistics)
        found.append((*results, *statistics.tensors(), statistics.counterfactual))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_sums_of_another_length_are_refused():
    with pytest.raises(AssertionError, match="another shape"):
        scan_cuda.scan_by_triton(*scan_values(), statistics=ScanStatistics.zeros(("h2",), 8, 7, 3, DEVICE))


COMPILE = """
import re, sys, torch
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver

class Absent:  # the driver of a GPU that is not there: enough to compile for it
    get_current_target = lambda self: GPUTarget("cuda", int(sys.argv[1]), 32)
    get_current_device = lambda self: 0
    get_current_stream = lambda self, device: 0

driver.set_active(Absent())
from sparsessm.kernels import scan_cuda
from sparsessm.kernels.selective_scan import ScanStatistics

compiled = []
scan_cuda.launch = lambda kernel, grid, *arguments, **constants: compiled.append(
    kernel.warmup(*arguments, grid=grid, **constants))

def compile_scan(B, L, D, N, dtype, needs=(), effect="zero", h0=False, plain=False):
    u, z, projected = (torch.empty(B, L, n, dtype=dtype) for n in (D, 2 * D, 2 * N))
    statistics = ScanStatistics.zeros(needs, L, D, N, "cpu", effect)
    state = statistics.counterfactual = torch.empty(B, D, N) if h0 else None
    D_ = None if plain else torch.empty(D)
    scan_cuda.scan_by_triton(u, u, torch.empty(D, N), projected[..., :N], projected[..., N:], D_,
                             None if plain else z[..., D:], D_, not plain, state, statistics)

every = ("h2", "abar", "hh", "gram")
compile_scan(8, 2048, 1536, 16, torch.bfloat16)
compile_scan(9, 128, 768, 16, torch.float16, every, "unit", h0=True)
compile_scan(1, 1, 1, 1, torch.float32, every, "removed", plain=True)
compile_scan(2, 3, 5, 33, torch.float32, every, "zero")
from sparsessm.kernels.scan_gradient_cuda import piece_gradient
wide, narrow, states = torch.empty(2, 64, 1536), torch.empty(2, 64, 16), torch.empty(2, 1536, 16)
piece_gradient(wide, wide, wide, narrow, narrow, states[0], states, states, states)
for kernel in compiled:
    assert not re.search(r"\\b(atom|red)\\.", kernel.asm["ptx"]), "sums by atomics have no fixed order"
    assert kernel.asm["cubin"]
print(len(compiled))
"""


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
def test_kernels_compile_for_gpus(capability, tmp_path):
    """As on a machine with such a GPU, up to machine code; and none of them sums by atomics."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", COMPILE, str(capability)]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == 9
