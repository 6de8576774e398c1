"""The products by oneDNN against torch's own, and who is left to torch."""

import pytest
import torch
import torch.nn.functional as F

from sparsessm.kernels import matmul
from sparsessm.kernels.matmul import linear


@pytest.mark.parametrize("shape", [(1, 1, 1), (3, 5, 7), (128, 48, 1536), (1000, 768, 80)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("lead", [(), (2,)], ids=str)
def test_it_is_linear_to_rounding(shape, bias, lead):
    rows, cols, out = shape
    g = torch.Generator().manual_seed(rows)
    x, W = torch.randn(*lead, rows, cols, generator=g), torch.randn(out, cols, generator=g)
    b = torch.randn(out, generator=g) if bias else None
    expected = F.linear(x.double(), W.double(), None if b is None else b.double())
    torch.testing.assert_close(linear(x, W, b).double(), expected, rtol=1e-5, atol=1e-4)


def test_views_are_taken_as_they_are():
    g = torch.Generator().manual_seed(0)
    wide, W = torch.randn(4, 9, 20, generator=g), torch.randn(6, 7, generator=g)
    for x in (wide[..., 3:10], wide[:, 2:5, :7], wide.transpose(0, 1)[..., :7]):
        torch.testing.assert_close(linear(x, W), F.linear(x, W), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_are_left_to_torch(dtype):
    x, W = torch.randn(3, 4).to(dtype), torch.randn(5, 4).to(dtype)
    assert torch.equal(linear(x, W), F.linear(x, W))


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("shape, rows", [((2, 5, 40), 33), ((1, 1, 1), 7), ((3, 37, 3), 1), ((4, 9), 80)])
@pytest.mark.parametrize("way", ["plain", "transposed", "expanded"])  # how the gradient of the product lies in memory
def test_gradients_are_those_of_torch_in_float64(shape, rows, way, with_bias):
    g = torch.Generator().manual_seed(0)
    x, W, b = torch.randn(shape, generator=g), torch.randn(rows, shape[-1], generator=g), torch.randn(rows, generator=g)
    values = [x, W, b if with_bias else None]
    weigh = torch.randn(*shape[:-1], rows, generator=g)

    def gradients(function, dtype):
        leaves = [None if value is None else value.detach().clone().to(dtype).requires_grad_() for value in values]
        out = function(*leaves)
        by = weigh.transpose(0, 1).contiguous().transpose(0, 1) if way == "transposed" else weigh
        (out.sum() if way == "expanded" else (out * by.to(dtype)).sum()).backward()
        return out.detach(), *(leaf.grad for leaf in leaves if leaf is not None)

    found, exact = gradients(linear, torch.float32), gradients(F.linear, torch.float64)
    assert torch.equal(found[0], linear(*values))
    for one, other in zip(found, exact, strict=True):
        assert float((one.double() - other).norm()) < 1e-6 * float(other.norm())


def test_a_constant_weight_gets_no_gradient():
    x, W = torch.randn(3, 4, requires_grad=True), torch.randn(5, 4)
    linear(x, W).sum().backward()
    torch.testing.assert_close(x.grad, W.sum(0).expand(3, 4))
    assert W.grad is None


def test_without_the_operator_torch_serves(monkeypatch):
    monkeypatch.setattr(matmul, "_by_onednn", lambda: False)
    x, W = torch.randn(3, 4), torch.randn(5, 4)
    assert torch.equal(linear(x, W), F.linear(x, W))


def test_this_torch_has_the_operator():
    assert matmul._by_onednn() == torch.backends.mkldnn.is_available()
