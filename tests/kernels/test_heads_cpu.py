"""Mamba-2's convolution and gated norm for CPUs against their formulas in float64, and who computes which."""

import pytest
import torch
import torch.nn.functional as F

from sparsessm.kernels import heads_cpu
from sparsessm.kernels.chunked_scan import chunked_scan, compiled_kernels
from sparsessm.kernels.selective_scan import force_kernel
from tests.scans_of_heads import inputs


def draw(*shape, seed):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("before", [True, False], ids=["before", "from the start"])
@pytest.mark.parametrize(
    ("batch", "steps", "channels", "K"), [(1, 1, 1, 4), (2, 2, 17, 4), (3, 9, 48, 2), (20, 5, 300, 3), (1, 3, 16, 1)]
)
def test_the_convolution_is_its_formula(batch, steps, channels, K, before, bias, threads, at_most_threads):
    x = draw(batch, steps, channels + 5, seed=1)[..., 2:-3]  # a part of wider rows
    past = draw(batch, K - 1, channels, seed=2) if before else None
    weight, b = draw(channels, 1, K, seed=3), draw(channels, seed=4) if bias else None
    at_most_threads(threads)
    found = heads_cpu.conv_silu(x, past, weight, b)
    padded = torch.cat([torch.zeros(batch, K - 1, channels) if past is None else past, x], 1).double()
    wide = F.conv1d(padded.mT, weight.double(), None if b is None else b.double(), groups=channels).mT
    torch.testing.assert_close(found.double(), F.silu(wide), rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    ("batch", "steps", "channels", "size"), [(1, 1, 1, 1), (2, 3, 34, 17), (3, 20, 96, 32), (20, 2, 40, 40)]
)
def test_the_gated_norm_is_its_formula(batch, steps, channels, size, threads, at_most_threads):
    y, z = draw(batch, steps, channels, seed=1), 3 * draw(batch, steps, 2 * channels + 1, seed=2)[..., :channels]
    weight = draw(channels, seed=3)
    at_most_threads(threads)
    found = heads_cpu.gated_norm(y, z, weight, size, 1e-5)
    q = (y.double() * F.silu(z.double())).unflatten(-1, (-1, size))
    expected = (q * (q.square().mean(-1, keepdim=True) + 1e-5).rsqrt()).flatten(2) * weight.double()
    torch.testing.assert_close(found.double(), expected, rtol=2e-6, atol=1e-6)


def test_gates_far_from_zero():
    z = torch.tensor([[[-1e4, -100.0, -88.0, 0.0, 100.0, 1e4]]])
    found = heads_cpu.gated_norm(torch.ones(1, 1, 6), z, torch.ones(6), 1, 1e-12)
    assert found.flatten().tolist() == pytest.approx([0, 0, 0, 0, 1, 1], abs=1e-6)


def gradients(function, values, dtype):
    """The result, and gradients of a fixed combination of its entries."""
    leaves = [None if value is None else value.to(dtype).detach().clone().requires_grad_() for value in values]
    out = function(*leaves)
    (out * draw(*out.shape, seed=9).to(dtype)).sum().backward()
    return [out.detach()] + [leaf.grad for leaf in leaves if leaf is not None]


def assert_same(found, exact):
    for one, other in zip(found, exact, strict=True):
        assert float((one.double() - other).norm()) < 1e-6 * float(other.norm())


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("before", [True, False], ids=["before", "from the start"])
@pytest.mark.parametrize(
    ("batch", "steps", "channels", "K"), [(1, 1, 1, 4), (2, 2, 17, 4), (3, 9, 48, 2), (20, 5, 300, 3), (1, 3, 16, 1)]
)
def test_gradients_of_the_convolution(batch, steps, channels, K, before, bias, threads, at_most_threads):
    at_most_threads(threads)
    values = [
        3 * draw(batch, steps, channels, seed=0), draw(batch, K - 1, channels, seed=1) if before and K > 1 else None,
        draw(channels, 1, K, seed=2), draw(channels, seed=3) if bias else None,
    ]  # fmt: skip

    def formula(x, before, weight, bias):
        padded = F.pad(x, (0, 0, K - 1, 0)) if before is None else torch.cat([before, x], 1)
        return F.silu(F.conv1d(padded.transpose(1, 2), weight, bias, groups=channels).transpose(1, 2))

    found = gradients(heads_cpu.conv_silu, values, torch.float32)
    assert torch.equal(found[0], heads_cpu.conv_silu(*values))
    assert_same(found, gradients(formula, values, torch.float64))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(
    ("batch", "steps", "channels", "size"), [(1, 1, 5, 5), (2, 3, 48, 24), (3, 20, 32, 16), (2, 7, 17, 17), (1, 50, 6, 2)]
)
def test_gradients_of_the_gated_norm(batch, steps, channels, size, threads, at_most_threads):
    at_most_threads(threads)
    wide = draw(batch, steps, channels + 3, seed=1) * 3
    values = [draw(batch, steps, channels, seed=0), wide[..., 3:], draw(channels, seed=2)]

    def formula(y, z, weight):
        q = (y * F.silu(z)).unflatten(-1, (-1, size))
        return (q * (q.square().mean(-1, keepdim=True) + 1e-3).rsqrt()).flatten(2) * weight

    found = gradients(lambda *x: heads_cpu.gated_norm(*x, size, 1e-3), values, torch.float32)
    assert torch.equal(found[0], heads_cpu.gated_norm(*values, size, 1e-3))
    assert_same(found, gradients(formula, values, torch.float64))


def test_gates_and_inputs_far_from_zero_have_gradients():
    """silu has a slope of 1 far above zero, and of 0 far below."""
    x, weight = torch.tensor([[[-1e30], [-200.0], [200.0], [1e30]]], requires_grad=True), torch.ones(1, 1, 1)
    heads_cpu.conv_silu(x, None, weight, None).sum().backward()
    assert x.grad.flatten().tolist() == pytest.approx([0, 0, 1, 1], abs=1e-30)


@pytest.mark.parametrize("threads", [1, 2])
def test_the_scan_does_not_depend_on_threads(threads, at_most_threads):
    values = inputs(50, batch=3, groups=2, heads=5, p=20, n=9, h0=True)
    expected = chunked_scan(**values)
    at_most_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(chunked_scan(**values), expected, strict=True))


def test_torch_computes_what_the_kernels_cannot():
    x = torch.zeros(2)
    assert compiled_kernels(x, x) is heads_cpu
    assert compiled_kernels(x, x.bfloat16()) is None and compiled_kernels(x.double()) is None
    with force_kernel("ref"):
        assert compiled_kernels(x) is None


@pytest.mark.parametrize("change", [{"A": 0.5}, {"dt": -0.5}, {"A": float("nan")}])
def test_states_that_could_grow_are_left_to_torch(change):
    values = inputs(40)
    for name, value in change.items():
        values[name].flatten()[0] = value
    with force_kernel("ref"):
        expected, _ = chunked_scan(**values)
    found, _ = chunked_scan(**values)
    torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)
