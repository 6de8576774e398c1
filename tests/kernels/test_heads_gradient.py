"""The gradient of the scan of heads against autograd through its reference in float64, and what it keeps.

It computes in float32: each gradient is off by less than TOLERANCE of its norm.
"""

import math

import pytest
import torch

from sparsessm.kernels import heads_gradient
from sparsessm.kernels.chunked_scan import HeadStatistics, chunked_scan, chunked_scan_ref
from tests.differences import quotients
from tests.scans_of_heads import wide

TOLERANCE = 1e-5
pytestmark = pytest.mark.usefixtures("kernel")


def inputs(batch, steps, groups=1, heads=2, p=5, n=3, without=(), seed=0):
    generator, H = torch.Generator().manual_seed(seed), groups * heads

    def draw(*shape):
        return torch.randn(shape, generator=generator)

    values = {
        "u": draw(batch, steps, H, p), "dt": draw(batch, steps, H).exp() / 8, "A": -draw(H).exp(),
        "B": draw(batch, steps, groups, n), "C": draw(batch, steps, groups, n), "D": draw(H), "h0": draw(batch, H, p, n),
    }  # fmt: skip
    return {name: value for name, value in values.items() if name not in without}


def gradients(function, given):
    """Gradients of a fixed combination of the outputs."""
    leaves = {name: value.detach().clone().requires_grad_() for name, value in given.items()}
    y, last = function(**leaves)
    generator = torch.Generator().manual_seed(9)
    weights = [torch.randn(out.shape, generator=generator) for out in (y, last)]
    ((y * weights[0]).sum() + (last * weights[1]).sum()).backward()
    return {name: leaf.grad for name, leaf in leaves.items()}


def assert_exact(given):
    found, exact = gradients(chunked_scan, given), gradients(chunked_scan_ref, wide(given))
    for name, value in exact.items():
        assert torch.isfinite(found[name]).all(), name
        assert float((found[name] - value).norm()) < TOLERANCE * float(value.norm()), name
    return found


@pytest.mark.parametrize(
    "sizes",
    [
        {"batch": 1, "steps": 1, "heads": 1, "p": 1, "n": 1},
        {"batch": 3, "steps": 37, "groups": 2, "heads": 3},
        {"batch": 1, "steps": 2 * heads_gradient.PIECE + 3, "p": 16, "n": 8},
        {"batch": 2, "steps": heads_gradient.CHUNK, "groups": 3, "heads": 1},
        {"batch": 2, "steps": heads_gradient.PIECE + 1, "groups": 2, "heads": 1},
        {"batch": 2, "steps": 70, "without": ("D",)},
        {"batch": 3, "steps": 70, "without": ("h0",)},
        {"batch": 1, "steps": 70, "without": ("D", "h0")},
    ],
)
def test_gradients_are_those_of_the_reference(sizes):
    assert_exact(inputs(**sizes))


def test_derivatives_of_a_tiny_scan_are_quotients_of_differences():
    """Every number of every gradient, by two scans of the reference that are close together."""
    given = inputs(2, 3, groups=2, heads=1, p=2, n=2)
    found, near = gradients(chunked_scan, given), wide(given)
    generator = torch.Generator().manual_seed(9)
    weights = [torch.randn(given[name].shape, generator=generator).double() for name in ("u", "h0")]

    def loss():
        y, last = chunked_scan_ref(**near)
        return float((y * weights[0]).sum() + (last * weights[1]).sum())

    for name, gradient in found.items():
        for i, expected in enumerate(quotients(loss, near[name])):
            assert float(gradient.view(-1)[i]) == pytest.approx(expected, rel=1e-4, abs=1e-5), (name, i)


def test_heads_without_a_transition_have_no_derivative_by_it():
    given = inputs(2, 70, heads=4)
    given["A"][:2] = -math.exp(30)
    found = assert_exact(given)
    assert not found["A"][:2].any() and found["A"][2:].all()


def test_extreme_time_steps():
    given = inputs(2, 140, heads=4)
    given["A"][:3] = torch.tensor([-100.0, -1e-6, 0.0])
    given["dt"][0, ::3], given["dt"][1], given["dt"][1, 5] = 50.0, 1e-6, 0.0
    assert_exact(given)


def test_each_number_is_right_where_a_neighbour_forgets_fast():
    """A long time step between short ones: its derivative is small, and not what is left of a difference of large ones."""
    given = inputs(1, 40, heads=1)
    given["A"][:], given["dt"][:] = -20.0, 0.002
    given["dt"][0, 20] = 0.6  # exp(-12)
    found, exact = (gradients(*pair)["dt"] for pair in ((chunked_scan, given), (chunked_scan_ref, wide(given))))
    torch.testing.assert_close(found[0, 20].double(), exact[0, 20], rtol=1e-4, atol=0)


def test_growing_states():
    given = inputs(2, 70, heads=2)
    given["A"][0] = 0.3
    assert_exact(given)


def test_only_some_want_a_gradient():
    given = inputs(2, 70)
    exact = gradients(chunked_scan_ref, wide(given))["A"]
    given["A"].requires_grad_()
    y, last = chunked_scan(**given)
    generator = torch.Generator().manual_seed(9)
    weights = [torch.randn(out.shape, generator=generator) for out in (y, last)]
    ((y * weights[0]).sum() + (last * weights[1]).sum()).backward()
    torch.testing.assert_close(given["A"].grad.double(), exact, rtol=1e-5, atol=1e-5)
    assert given["u"].grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_forward_is_the_one_without_gradients(dtype, request):
    given = inputs(2, heads_gradient.PIECE + 50, groups=2, p=16, n=6)
    given |= {name: given[name].to(dtype) for name in ("u", "B", "C")}
    plain = chunked_scan(**given)
    given["u"].requires_grad_()
    exactly = "compiled" in request.node.name  # the order of torch's sums may depend on how many chunks there are
    for found, expected in zip(chunked_scan(**given), plain, strict=True):
        assert found.dtype == expected.dtype
        torch.testing.assert_close(found, expected, rtol=0 if exactly else 1e-5, atol=0 if exactly else 1e-5)


def test_gradients_have_the_dtype_of_what_they_are_of():
    given = inputs(2, 70)
    given |= {name: given[name].bfloat16() for name in ("u", "B", "C")}
    found, exact = gradients(chunked_scan, given), gradients(chunked_scan_ref, wide(given))
    for name, value in exact.items():
        assert found[name].dtype == given[name].dtype
        assert float((found[name] - value).norm()) < 5e-3 * float(value.norm()), name


@pytest.mark.parametrize("wanted", ["u", "C"])
def test_sums_and_gradients_at_once_are_left_to_torch(wanted):
    given = inputs(2, 40, without=("h0",))
    expected, sums = (HeadStatistics.zeros(("abar",), 40, 2, 3, "cpu") for _ in range(2))
    chunked_scan(**given, statistics=expected)
    given[wanted].requires_grad_()
    y, _ = chunked_scan(**given, statistics=sums)
    y.sum().backward()
    exact = wide({name: value.detach() for name, value in given.items()})
    exact[wanted].requires_grad_()
    chunked_scan_ref(**exact)[0].sum().backward()
    assert torch.equal(sums.abar, expected.abar)
    torch.testing.assert_close(given[wanted].grad.double(), exact[wanted].grad, rtol=1e-4, atol=1e-5)


def test_memory_grows_with_pieces_not_with_states():
    """What is kept for L steps of H heads: inputs, and a state for every piece."""
    steps, H, P, N = 1024, 4, 16, 64
    kept = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    given = {name: value.requires_grad_() for name, value in inputs(1, steps, heads=H, p=P, n=N).items()}
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        chunked_scan(**given)
    own = sum(4 * value.numel() for value in given.values())
    assert sum(kept.values()) <= own + 4 * steps // heads_gradient.PIECE * H * P * N < 4 * steps * H * P * N / 4
