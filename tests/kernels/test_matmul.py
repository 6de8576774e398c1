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
def test_other_dtypes_and_gradients_are_left_to_torch(dtype):
    x, W = torch.randn(3, 4).to(dtype), torch.randn(5, 4).to(dtype)
    assert torch.equal(linear(x, W), F.linear(x, W))
    W = torch.randn(5, 4, requires_grad=True)
    assert linear(torch.randn(3, 4), W).requires_grad


def test_without_the_operator_torch_serves(monkeypatch):
    monkeypatch.setattr(matmul, "_by_onednn", lambda: False)
    x, W = torch.randn(3, 4), torch.randn(5, 4)
    assert torch.equal(linear(x, W), F.linear(x, W))


def test_this_torch_has_the_operator():
    assert matmul._by_onednn() == torch.backends.mkldnn.is_available()
