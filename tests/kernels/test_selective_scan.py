"""The selective scan: the reference against brute force in float64, the fast kernels against the reference.

Kernels see random input, another one in each test and the same in every run. Tolerances: float32 results to 2e-5 of the
largest value, bfloat16 and float16 outputs to one rounding of their own, sums to 2e-5 of each field's largest. The kernel
for CUDA runs on the GPU where there is one, else through Triton's interpreter (conftest.py), which is slow: it sees small
shapes.
"""

import importlib.util
import itertools
import os
import random
import warnings
import zlib

import pytest
import torch

from sparsessm.kernels import selective_scan as scan_module
from sparsessm.kernels.selective_scan import (
    EFFECTS,
    ScanStatistics,
    force_kernel,
    selective_scan,
    selective_scan_ref,
)

NEEDS = [(), ("h2",), ("h2", "abar"), ("hh",), ("gram",), ("h2", "abar", "hh", "gram")]
without_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
KERNELS = ["cpu", pytest.param("cuda", marks=without_triton)]


@pytest.fixture
def seed(request):
    """Another one for each test, the same in every run."""
    return zlib.crc32(request.node.name.encode())


def inputs(B, L, D, N, *, seed=0, dtype=torch.float32, gate=True, skip=True, bias=True, h0=False, scale=1.0):
    g = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=g)

    values = {
        "u": draw(B, L, D).to(dtype),
        "delta": (scale * draw(B, L, D) - (0 if bias else 2)).to(dtype),
        "A": -torch.exp(draw(D, N)),
        "B": draw(B, L, N).to(dtype),
        "C": draw(B, L, N).to(dtype),
        "D": draw(D) if skip else None,
        "z": draw(B, L, D).to(dtype) if gate else None,
        "delta_bias": draw(D) - 2 if bias else None,
        "h0": draw(B, D, N) if h0 else None,
    }
    return values | {"delta_softplus": True}


def call(function, values, statistics=None):
    return function(**values, statistics=statistics)


def run(kernel, values, statistics=None):
    """`selective_scan` by a kernel, in the memory that it is for; results and sums come back to the CPU."""
    device = "cuda" if kernel == "cuda" and torch.cuda.is_available() else "cpu"

    def move(x):  # with all of its storage: what is a view stays one
        if not isinstance(x, torch.Tensor):
            return x
        storage = torch.empty(0, dtype=x.dtype).set_(x.untyped_storage())
        return storage.to(device).as_strided(x.shape, x.stride(), x.storage_offset())

    moved = {name: move(value) for name, value in values.items()}
    there = statistics and ScanStatistics(**{name: move(value) for name, value in vars(statistics).items()})
    with force_kernel(kernel):
        y, h = call(selective_scan, moved, there)
    if statistics is not None:
        for mine, theirs in zip(statistics.tensors(), there.tensors(), strict=True):
            mine.copy_(theirs)
        statistics.counterfactual = None if there.counterfactual is None else there.counterfactual.cpu()
    return y.cpu(), h.cpu()


def brute_force(values, effect):
    """Everything by its formula in float64, one number after the other; h_t as a sum over all earlier inputs."""
    u, delta, A, Bm, C = (values[name].double() for name in ("u", "delta", "A", "B", "C"))
    dt = delta if values["delta_bias"] is None else delta + values["delta_bias"].double()
    dt = torch.log1p(torch.exp(dt)) if values["delta_softplus"] else dt
    (B, L, D), N = u.shape, A.shape[1]
    h = torch.zeros(B, L + 1, D, N, dtype=torch.float64)  # h[:, t]: the state that enters step t
    counterfactual = torch.zeros_like(h)
    if values["h0"] is not None:
        h[:, 0] = values["h0"].double()
    abar = torch.exp(dt[..., None] * A)
    for b, t, d, n in itertools.product(range(B), range(L), range(D), range(N)):
        inflow = dt[b, t, d] * Bm[b, t, n] * u[b, t, d]
        h[b, t + 1, d, n] = abar[b, t, d, n] * h[b, t, d, n] + inflow
        counterfactual[b, t + 1, d, n] = torch.exp(-dt[b, t, d]) * counterfactual[b, t, d, n] + inflow
    y = torch.einsum("btdn,btn->btd", h[:, 1:], C)
    if values["D"] is not None:
        y = y + values["D"].double() * u
    gate = torch.ones_like(u)
    if values["z"] is not None:
        z = values["z"].double()
        gate = z / (1 + torch.exp(-z))
    lost = {"zero": abar * h[:, :-1], "unit": h[:, 1:] - counterfactual[:, 1:], "removed": h[:, 1:]}[effect]
    e = lost * C[:, :, None, :] * gate[..., None]
    entered = h[:, :-1]
    sums = {
        "h2": entered.square().sum(0), "abar": abar.sum(0), "hh": torch.einsum("btdi,btdj->ij", entered, entered),
        "gram": torch.einsum("btdi,btdj->dij", e, e), "ch2": (h[:, 1:] * C[:, :, None, :]).square().sum(0),
    }  # fmt: skip
    return y * gate, h[:, -1], sums


def close(found, expected, tolerance=2e-5, what=""):
    assert found.shape == expected.shape, what
    found, expected = found.double(), expected.double()
    scale = float(expected.abs().max()) if expected.numel() else 0.0
    worst = float((found - expected).abs().max()) if expected.numel() else 0.0
    assert worst <= tolerance * max(scale, 1e-30), f"{what}: off by {worst:.3g}, largest value {scale:.3g}"


@pytest.mark.parametrize("effect", EFFECTS)
@pytest.mark.parametrize("form", [{}, {"gate": False}, {"skip": False, "bias": False}], ids=str)
def test_reference_is_the_formula(form, effect):
    values = inputs(2, 4, 3, 2, **form)
    statistics = ScanStatistics.zeros(ScanStatistics.FIELDS, 4, 3, 2, "cpu", effect)
    y, h = call(selective_scan_ref, values, statistics)
    expected_y, expected_h, sums = brute_force(values, effect)
    close(y, expected_y, what="y")
    close(h, expected_h, what="h")
    assert sums.keys() == set(ScanStatistics.FIELDS)
    for name, value in sums.items():
        close(getattr(statistics, name), value, what=name)


def test_reference_continues_from_a_state():
    values = inputs(2, 4, 3, 2, h0=True)
    y, h = call(selective_scan_ref, values)
    expected_y, expected_h, _ = brute_force(values, "zero")
    close(y, expected_y)
    close(h, expected_h)


def test_reference_computes_in_float64_where_its_input_is():
    values = {k: v.double() if isinstance(v, torch.Tensor) else v for k, v in inputs(2, 9, 3, 2).items()}
    y, h = call(selective_scan_ref, values)
    assert y.dtype == h.dtype == torch.float64
    expected_y, expected_h, _ = brute_force(values, "zero")
    close(y, expected_y, 1e-13)
    close(h, expected_h, 1e-13)


def test_time_steps_without_softplus():
    values = inputs(2, 5, 3, 2, bias=False) | {"delta_softplus": False}
    values["delta"] = values["delta"].abs()
    y, h = call(selective_scan_ref, values)
    expected_y, expected_h, _ = brute_force(values, "zero")
    close(y, expected_y)
    close(h, expected_h)


def compare(kernel, values, needs=(), effect="zero", tolerance=2e-5):
    (_, L, D), N = values["u"].shape, values["A"].shape[1]
    ours, theirs = (ScanStatistics.zeros(needs, L, D, N, "cpu", effect) for _ in range(2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        y, h = run(kernel, values, ours if needs else None)
    expected_y, expected_h = call(selective_scan_ref, values, theirs)
    assert y.dtype == expected_y.dtype and h.dtype == expected_h.dtype
    rounding = {torch.float32: 0.0, torch.bfloat16: 2**-8, torch.float16: 2**-11}[y.dtype]
    if kernel == "cuda" and y.dtype == torch.bfloat16 and not torch.cuda.is_available():
        rounding = 2**-7  # Triton's interpreter cuts off where a GPU rounds
    close(y, expected_y, tolerance + rounding, "y")
    close(h, expected_h, tolerance, "h")
    for name in needs:
        close(getattr(ours, name), getattr(theirs, name), tolerance, name)


SHAPES = [
    (1, 1, 1, 1), (1, 2, 3, 1), (2, 1, 16, 16), (3, 17, 5, 16), (2, 33, 17, 5), (2, 16, 16, 12), (1, 47, 100, 3),
    (5, 31, 33, 16), (1, 300, 8, 16), (2, 20, 31, 64), (9, 15, 48, 2), (17, 18, 40, 20), (1, 19, 1536, 16),
]  # fmt: skip
# For CUDA: more samples than are summed at once, more states than a tile of products has, channels of several programs.
CUDA_SHAPES = [(1, 1, 1, 1), (1, 2, 3, 1), (2, 7, 5, 16), (3, 9, 17, 5), (1, 23, 40, 3), (9, 3, 33, 2), (2, 4, 3, 20)]
CASES = [
    *(("cpu", *case) for case in itertools.product(SHAPES, NEEDS)),
    *(("cuda", *case) for case in itertools.product(CUDA_SHAPES, NEEDS)),
    *(("cuda", *case) for case in itertools.product([(5, 31, 33, 16), (2, 20, 31, 64)], [(), ("h2", "abar")])),
    ("cuda", (1, 130, 8, 16), ()),
]


@pytest.mark.parametrize(
    "kernel, shape, needs",
    [
        pytest.param(
            kernel, *case, marks=without_triton if kernel == "cuda" else (), id=f"{kernel}-{case[0]}-{case[1]}"
        )
        for kernel, *case in CASES
    ],
)
def test_kernels_on_odd_shapes(kernel, shape, needs, seed):
    compare(kernel, inputs(*shape, seed=seed), needs, random.Random(seed).choice(EFFECTS))


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("effect", EFFECTS)
@pytest.mark.parametrize("h0", [False, True])
def test_kernels_for_every_effect(kernel, effect, h0, seed):
    values = inputs(3, 21, 19, 6, seed=seed, h0=h0 and effect != "unit")
    compare(kernel, values, ("gram", "h2"), effect)


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("form", [{}, {"gate": False}, {"skip": False}, {"bias": False}, {"h0": True}], ids=str)
def test_kernels_for_every_form_and_dtype(kernel, dtype, form, seed):
    compare(kernel, inputs(3, 21, 19, 6, seed=seed, dtype=dtype, **form), ("h2", "abar"))


@pytest.mark.parametrize("kernel", KERNELS)
def test_kernels_on_views(kernel, seed):
    """As the block hands them over: gate and states are slices of larger tensors."""
    values = inputs(3, 21, 19, 6, seed=seed)
    g = torch.Generator().manual_seed(seed)
    both, projected = torch.randn(3, 21, 38, generator=g), torch.randn(3, 21, 4 + 12, generator=g)
    values |= {"z": both[..., 19:], "B": projected[..., 4:10], "C": projected[..., 10:]}
    values |= {"u": torch.randn(3, 19, 21, generator=g).transpose(1, 2)}
    compare(kernel, values, ("h2",))


EXTREMES = {
    "no transition": {"A": torch.full((19, 6), -torch.tensor(30.0).exp())},
    "A is -1": {"A": torch.full((19, 6), -1.0)},
    "A is zero": {"A": torch.zeros(19, 6)},
    "tiny time steps": {"delta_bias": torch.full((19,), -60.0)},
    "huge time steps": {"delta_bias": torch.full((19,), 80.0)},
    "saturated gates": {"z": torch.tensor([-300.0, 300.0, -88.0, 88.0, 0.0]).repeat(3, 21, 4)[..., :19]},
    "large inputs": {"u": torch.full((3, 21, 19), 1e15)},
    "all zero": {"u": torch.zeros(3, 21, 19)},
}


@pytest.mark.parametrize("kernel", KERNELS)
@pytest.mark.parametrize("case", EXTREMES)
def test_kernels_on_extreme_values(kernel, case, seed):
    compare(kernel, inputs(3, 21, 19, 6, seed=seed) | EXTREMES[case], ("h2", "abar"))


@pytest.mark.parametrize("kernel", KERNELS)
def test_kernels_give_zero_where_there_is_no_transition(kernel, seed):
    """Exactly, as every runtime does: what is saved is what was evaluated."""
    values = inputs(2, 9, 19, 6, seed=seed) | {"A": torch.full((19, 6), -torch.tensor(30.0).exp())}
    statistics = ScanStatistics.zeros(("abar",), 9, 19, 6, "cpu")
    run(kernel, values, statistics)
    assert not statistics.abar.any()


@pytest.mark.parametrize("kernel", KERNELS)
def test_kernels_pass_on_what_is_not_a_number(kernel, seed):
    values = inputs(2, 9, 19, 6, seed=seed)
    values["u"][1, 4, 7] = float("nan")
    y, h = run(kernel, values)
    bad = torch.isnan(y)
    assert bad[1, 4:, 7].all() and int(bad.sum()) == 5 and torch.isnan(h[1, 7]).all()


@pytest.mark.parametrize("kernel", [*KERNELS, "ref"])
@pytest.mark.parametrize("cut", [1, 7, 16, 20])
@pytest.mark.parametrize("effect", EFFECTS)
def test_pieces_make_the_whole(kernel, cut, effect, seed):
    values, needs = inputs(3, 21, 19, 6, seed=seed), ("h2", "abar", "hh", "gram")
    whole = ScanStatistics.zeros(needs, 21, 19, 6, "cpu", effect)
    y, h = call(selective_scan_ref, values, whole)
    parts, state, counterfactual, sums = [], None, None, []
    for start in range(0, 21, cut):
        piece = {n: v[:, start : start + cut] if n in ("u", "delta", "B", "C", "z") else v for n, v in values.items()}
        statistics = ScanStatistics.zeros(needs, piece["u"].shape[1], 19, 6, "cpu", effect)
        statistics.counterfactual = counterfactual
        out, state = run(kernel, piece | {"h0": state}, statistics)
        counterfactual = statistics.counterfactual
        parts.append(out)
        sums.append(statistics)
    close(torch.cat(parts, 1), y, what="y")
    close(state, h, what="h")
    for name in ("h2", "abar"):
        close(torch.cat([getattr(m, name) for m in sums]), getattr(whole, name), what=name)
    for name in ("hh", "gram"):
        close(sum(getattr(m, name) for m in sums), getattr(whole, name), what=name)


@pytest.mark.parametrize("kernel", [*KERNELS, "ref"])
def test_sums_are_added_to_what_is_there(kernel, seed):
    values, needs = inputs(2, 9, 19, 6, seed=seed), tuple(scan_module.provided(kernel))
    assert {"h2", "abar", "hh", "gram"} <= set(needs)
    once, twice = (ScanStatistics.zeros(needs, 9, 19, 6, "cpu") for _ in range(2))
    for statistics in (once, twice, twice):
        run(kernel, values, statistics)
    for name in needs:
        close(getattr(twice, name), 2 * getattr(once, name), 1e-12, name)


@pytest.mark.parametrize("kernel", [None, *KERNELS])
def test_a_sum_that_a_kernel_does_not_fill_is_filled_all_the_same(kernel, seed):
    compare(kernel, inputs(2, 9, 19, 6, seed=seed), ScanStatistics.FIELDS)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_the_cpu_kernel_gives_the_same_bits_with_any_number_of_threads(threads, seed):
    values, needs = inputs(3, 40, 200, 6, seed=seed), ("h2", "abar", "hh", "gram")
    found, before = [], torch.get_num_threads()
    try:
        for count in (1, threads):
            torch.set_num_threads(count)
            statistics = ScanStatistics.zeros(needs, 40, 200, 6, "cpu")
            with force_kernel("cpu"):
                found.append((*call(selective_scan, values, statistics), *statistics.tensors()))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_growing_states_are_left_to_the_reference(seed):
    values = inputs(2, 9, 19, 6, seed=seed)
    compare("cpu", values | {"A": -values["A"] * 0.1}, ("h2",))


def test_unknown_kernels_and_effects_are_refused():
    with pytest.raises(ValueError, match="known are ref, cpu, cuda"), force_kernel("tpu"):
        pass
    with pytest.raises(ValueError, match="known are zero, unit, removed"):
        ScanStatistics(effect="gone")


def test_without_numba_the_reference_serves(monkeypatch):
    monkeypatch.setattr(scan_module.importlib.util, "find_spec", lambda name: None)
    assert scan_module._choose_kernel.__wrapped__("cpu") == "ref"


def test_continuing_with_unit_needs_its_counterfactual():
    values = inputs(1, 3, 2, 2, h0=True)
    statistics = ScanStatistics.zeros(("gram",), 3, 2, 2, "cpu", "unit")
    with pytest.raises(ValueError, match="counterfactual"):
        call(selective_scan_ref, values, statistics)


def test_the_default_on_the_cpu_is_the_compiled_kernel():
    assert os.environ.get("SPARSESSM_SCAN") or scan_module._choose_kernel("cpu") == "cpu"
