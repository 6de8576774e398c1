"""The gradient of the scan: its reference against differences of the scan and autograd, the kernel against both.

The kernel computes in float32, all else in float64; each gradient is off by less than TOLERANCE of its norm.
"""

import pytest
import torch

from sparsessm.kernels import scan_gradient
from sparsessm.kernels.selective_scan import force_kernel, selective_scan, selective_scan_ref
from tests.differences import quotients

TOLERANCE = 1e-5
NAMES = ("u", "delta", "A", "B", "C", "D", "z", "delta_bias", "h0")


def inputs(b, L, D, N, seed=0):
    generator = torch.Generator().manual_seed(seed)
    shapes = ((b, L, D), (b, L, D), (D, N), (b, L, N), (b, L, N), (D,), (b, L, D), (D,), (b, D, N))
    found = dict(zip(NAMES, (torch.randn(shape, generator=generator) for shape in shapes), strict=True))
    found["A"] = -torch.exp(found["A"])
    return found


def gradients(scan, given, dtype, softplus=True):
    """Outputs and gradients of a fixed combination of them."""
    leaves = {name: value.detach().to(dtype).requires_grad_() for name, value in given.items()}
    y, last = scan(**leaves, delta_softplus=softplus)
    generator = torch.Generator().manual_seed(9)
    weights = [torch.randn(out.shape, generator=generator).to(dtype) for out in (y, last)]
    ((y * weights[0]).sum() + (last * weights[1]).sum()).backward()
    return {"y": y.detach(), "last": last.detach()} | {name: leaf.grad for name, leaf in leaves.items()}


def by_reference(given, softplus=True):
    """Gradients of the same combination by the reference, in float64."""
    wide = {name: given[name].double() if name in given else None for name in NAMES}
    h0 = torch.zeros(given["u"].shape[0], *given["A"].shape).double() if wide["h0"] is None else wide.pop("h0")
    generator = torch.Generator().manual_seed(9)
    gy, glast = (torch.randn(x.shape, generator=generator).double() for x in (given["u"], h0))
    wide.pop("h0", None)
    found = scan_gradient.selective_scan_gradient_ref(gy, glast, h0, **wide, delta_softplus=softplus)
    return {name: value for name, value in zip(NAMES, found, strict=True) if name in given}


def assert_close_to_autograd(given, softplus=True):
    found = gradients(selective_scan, given, torch.float32, softplus)
    assert off(found, gradients(selective_scan_ref, given, torch.float64, softplus)) < TOLERANCE
    return found


def off(found, exact):
    return max(float((found[name] - exact[name]).norm() / exact[name].norm().clamp_min(1e-30)) for name in exact)


def test_the_reference_is_the_quotient_of_differences():
    """Every derivative of a tiny scan, one number after the other, by two scans that are close together."""
    given = {name: value.double() for name, value in inputs(2, 3, 2, 2).items()}
    generator = torch.Generator().manual_seed(9)
    weights = [torch.randn(given[name].shape, generator=generator).double() for name in ("u", "h0")]

    def loss():
        y, last = selective_scan_ref(**given, delta_softplus=True)
        return float((y * weights[0]).sum() + (last * weights[1]).sum())

    for name, found in by_reference(given).items():
        for i, expected in enumerate(quotients(loss, given[name])):
            assert float(found.view(-1)[i]) == pytest.approx(expected, rel=1e-6, abs=1e-7), (name, i)


@pytest.mark.parametrize("softplus", [True, False])
@pytest.mark.parametrize("without", [(), ("D",), ("z",), ("delta_bias",), ("h0",), ("D", "z", "delta_bias", "h0")])
def test_the_reference_is_what_autograd_finds(without, softplus):
    given = {name: value.double() for name, value in inputs(2, 9, 5, 3).items() if name not in without}
    exact = gradients(selective_scan_ref, given, torch.float64, softplus)
    for name, found in by_reference(given, softplus).items():
        torch.testing.assert_close(found, exact[name], rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("b, L, D, N", [(1, 1, 1, 1), (3, 37, 5, 3), (1, 130, 40, 16), (2, 64, 16, 4), (2, 65, 17, 7)])
def test_gradients_are_those_of_the_reference(b, L, D, N):
    given = inputs(b, L, D, N)
    found = assert_close_to_autograd(given)
    assert off(found, by_reference(given)) < TOLERANCE


def test_time_steps_without_softplus():
    given = inputs(2, 70, 9, 4)
    given["delta"], given["delta_bias"] = given["delta"].abs(), given["delta_bias"].abs()
    assert_close_to_autograd(given, softplus=False)


@pytest.mark.parametrize("threads", [1, 2])
def test_no_number_depends_on_threads(threads, at_most_threads):
    given = inputs(3, 70, 40, 6)
    expected = gradients(selective_scan, given, torch.float32)
    at_most_threads(threads)
    found = gradients(selective_scan, given, torch.float32)
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize("without", [("D",), ("z",), ("delta_bias",), ("h0",), ("D", "z", "delta_bias", "h0")])
def test_what_is_not_given_is_left_out(without):
    given = {name: value for name, value in inputs(2, 70, 9, 4).items() if name not in without}
    assert_close_to_autograd(given)


def test_extreme_time_steps_and_pruned_transitions():
    given = inputs(2, 70, 6, 5)
    given["delta"][0] = 30.0
    given["delta"][1] = -30.0
    given["A"][:3] = -torch.exp(torch.tensor(30.0))
    found = assert_close_to_autograd(given)
    assert all(torch.isfinite(value).all() for value in found.values())
    assert found["A"][:3].abs().max() < 1e-10  # a state without a transition has next to no derivative by it


def test_only_some_want_a_gradient():
    given = inputs(2, 20, 6, 4)
    given["B"].requires_grad_()
    y, _ = selective_scan(**given, delta_softplus=True)
    y.sum().backward()
    exact = {name: value.detach().double() for name, value in given.items()}
    exact["B"].requires_grad_()
    selective_scan_ref(**exact, delta_softplus=True)[0].sum().backward()
    torch.testing.assert_close(given["B"].grad.double(), exact["B"].grad, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_forward_is_the_one_without_gradients_to_the_bit(dtype):
    given = inputs(2, 100, 24, 6)
    given |= {name: given[name].to(dtype) for name in ("u", "delta", "B", "C", "z")}
    plain = selective_scan(**given, delta_softplus=True)
    given["u"].requires_grad_()
    for found, expected in zip(selective_scan(**given, delta_softplus=True), plain, strict=True):
        assert torch.equal(found, expected)


def test_gradients_have_the_dtype_of_what_they_are_of_and_views_are_taken_as_they_are():
    given = inputs(2, 70, 24, 6)
    whole = torch.cat([given[name] for name in ("u", "z", "B", "C")], -1).bfloat16().requires_grad_()
    u, z, B, C = whole.split([24, 24, 6, 6], -1)
    rest = {name: given[name] for name in ("delta", "A", "D", "delta_bias")}
    y, _ = selective_scan(**rest, u=u, z=z, B=B, C=C, delta_softplus=True)
    y.float().sum().backward()
    wide = whole.detach().double().requires_grad_()
    u, z, B, C = wide.split([24, 24, 6, 6], -1)
    rest = {name: value.double() for name, value in rest.items()}
    selective_scan_ref(**rest, u=u, z=z, B=B, C=C, delta_softplus=True)[0].sum().backward()
    assert whole.grad.dtype == torch.bfloat16
    assert float((whole.grad.double() - wide.grad).norm() / wide.grad.norm()) < 3e-3


def test_a_growing_state_and_a_forced_reference_are_left_to_it():
    given = inputs(1, 5, 3, 2)
    given["A"] = given["A"].abs() * 0.1
    assert_close_to_autograd(given)
    with force_kernel("ref"):
        given = inputs(1, 5, 3, 2)
        y, _ = selective_scan(**{**given, "u": given["u"].requires_grad_()}, delta_softplus=True)
    assert y.grad_fn is not None and "Scan" not in type(y.grad_fn).__name__


@pytest.mark.parametrize("b, L, D, N", [(1, 1, 1, 1), (2, 7, 33, 5), (1, 9, 40, 16)])
def test_gradients_on_cuda_are_those_of_the_reference(monkeypatch, b, L, D, N):
    """By Triton's interpreter where there is no GPU; pieces of four steps, so that derivatives are carried over seams."""
    cuda = pytest.importorskip("sparsessm.kernels.scan_gradient_cuda", reason="triton is not installed")
    monkeypatch.setattr(cuda, "PIECE", 4)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    given = inputs(b, L, D, N)
    given["A"][0, 0] = -1e13

    def scan(*, delta_softplus, **some):
        places = {name: value.to(device) for name, value in some.items()}
        y, last = cuda.scan_with_gradient(**places, delta_softplus=delta_softplus)
        return y.cpu(), last.cpu()

    assert off(gradients(scan, given, torch.float32), gradients(selective_scan_ref, given, torch.float64)) < 1e-5


def test_memory_grows_with_pieces_not_with_states():
    """What autograd keeps for L steps of D channels with N states: inputs, and a state for every piece."""
    b, L, D, N = 1, 1024, 64, 16
    kept = []

    def note(tensor):
        kept.append((tensor.untyped_storage().data_ptr(), tensor.untyped_storage().nbytes()))
        return tensor

    given = {name: value.requires_grad_() for name, value in inputs(b, L, D, N).items()}
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        y, _ = selective_scan(**given, delta_softplus=True)
    total = sum(dict(kept).values())
    states = b * L * D * N * 4
    assert total < 16 * b * L * D * 4 + L // scan_gradient.PIECE * b * D * N * 4 < 2 * states
    y.sum().backward()
