"""The gradient of the scan against autograd through the reference in float64, and what it keeps."""

import pytest
import torch

from sparsessm.kernels import scan_gradient, scan_gradient_cpu
from sparsessm.kernels.selective_scan import force_kernel, selective_scan, selective_scan_ref

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


def off(found, exact):
    return max(float((found[name] - exact[name]).norm() / exact[name].norm().clamp_min(1e-30)) for name in exact)


@pytest.mark.parametrize("b, L, D, N", [(1, 1, 1, 1), (3, 37, 5, 3), (1, 130, 40, 16), (2, 64, 16, 4), (2, 65, 17, 7)])
def test_gradients_are_those_of_the_reference(b, L, D, N):
    given = inputs(b, L, D, N)
    assert off(gradients(selective_scan, given, torch.float32), gradients(selective_scan_ref, given, torch.float64)) < 1e-5


@pytest.mark.parametrize("without", [("D",), ("z",), ("delta_bias",), ("h0",), ("D", "z", "delta_bias", "h0")])
def test_what_is_not_given_is_left_out(without):
    given = {name: value for name, value in inputs(2, 70, 9, 4).items() if name not in without}
    assert off(gradients(selective_scan, given, torch.float32), gradients(selective_scan_ref, given, torch.float64)) < 1e-5


def test_extreme_time_steps_and_pruned_transitions():
    given = inputs(2, 70, 6, 5)
    given["delta"][0] = 30.0
    given["delta"][1] = -30.0
    given["A"][:3] = -torch.exp(torch.tensor(30.0))
    found, exact = (gradients(scan, given, dtype) for scan, dtype in
                    ((selective_scan, torch.float32), (selective_scan_ref, torch.float64)))  # fmt: skip
    assert all(torch.isfinite(value).all() for value in found.values())
    assert off(found, exact) < 1e-5
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


def test_the_forward_is_the_one_without_gradients():
    given = inputs(2, 100, 24, 6)
    plain = selective_scan(**given, delta_softplus=True)
    given["u"].requires_grad_()
    for found, expected in zip(selective_scan(**given, delta_softplus=True), plain, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


def test_a_growing_state_and_a_forced_reference_are_left_to_it():
    given = inputs(1, 5, 3, 2)
    given["A"] = given["A"].abs() * 0.1
    assert off(gradients(selective_scan, given, torch.float32), gradients(selective_scan_ref, given, torch.float64)) < 1e-5
    with force_kernel("ref"):
        given = inputs(1, 5, 3, 2)
        y, _ = selective_scan(**{**given, "u": given["u"].requires_grad_()}, delta_softplus=True)
    assert y.grad_fn is not None and "Scan" not in type(y.grad_fn).__name__


@pytest.mark.parametrize("b, T, D, N", [(1, 1, 1, 1), (2, 7, 33, 5), (1, 12, 40, 16)])
def test_a_piece_on_cuda_is_the_one_on_the_cpu(b, T, D, N):
    """By Triton's interpreter where there is no GPU; carried derivatives and those by A are changed in place by both."""
    cuda = pytest.importorskip("sparsessm.kernels.scan_gradient_cuda", reason="triton is not installed")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    given = inputs(b, T, D, N)
    dt, A = given["delta"].abs(), given["A"]
    A[0, 0] = -1e13
    results = []
    for piece, where in ((scan_gradient_cpu.piece_gradient, "cpu"), (cuda.piece_gradient, device)):
        carried, gA = given["h0"].clone().to(where), given["h0"].square().to(where)
        rest = (x.to(where) for x in (dt, given["u"], given["z"], given["B"], given["C"], A, given["h0"].flip(0)))
        results.append([*(x.cpu() for x in piece(*rest, carried, gA)), carried.cpu(), gA.cpu()])
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(theirs, ours, rtol=1e-4, atol=1e-5)


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
