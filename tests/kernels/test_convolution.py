"""Whether and when causal-conv1d serves the convolution; its own numbers need a GPU and the package."""

import warnings

import pytest
import torch
import torch.nn.functional as F

from sparsessm.kernels import convolution as conv_cuda
from sparsessm.models.mamba1 import causal_conv

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def like_causal_conv1d(x, weight, bias):
    """causal_conv1d_fn with SiLU by torch: x (B,D,T) with channels side by side, weight (D,K)."""
    assert x.stride(1) == 1 and x.shape[1] % 8 == 0 and x.stride(0) % 8 == x.stride(2) % 8 == 0
    K, T = weight.shape[1], x.shape[2]
    bias = None if bias is None else bias.float()
    return F.silu(F.conv1d(x.float(), weight.float()[:, None], bias, padding=K - 1, groups=x.shape[1])[..., :T]).to(x.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_convolution_that_agrees_proves_right(dtype):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert conv_cuda.proves_right(like_causal_conv1d, DEVICE, dtype)


@pytest.mark.parametrize(
    "theirs, fault",
    [
        (lambda *values: 1.01 * like_causal_conv1d(*values), "not ours"),
        (lambda *values: like_causal_conv1d(*values).roll(1, 2), "not ours"),
        (lambda *values: like_causal_conv1d(*values) * float("nan"), "not ours"),
        (lambda x, weight, bias: like_causal_conv1d(x, weight, None), "not ours"),
        (lambda x: x, "TypeError"),
    ],
)
def test_one_that_fails_or_disagrees_is_not_used(theirs, fault):
    with pytest.warns(UserWarning, match=f"causal-conv1d is installed but does not serve the convolution: .*{fault}"):
        assert not conv_cuda.proves_right(theirs, DEVICE, torch.float32)


def test_a_broken_package_is_named_once(broken_package):
    broken_package("causal_conv1d", conv_cuda.causal_conv1d)
    with torch.no_grad(), pytest.warns(UserWarning, match="undefined symbol") as caught:
        for _ in range(2):
            assert conv_cuda.causal_conv_silu(torch.zeros(1, 5, 8), torch.zeros(8, 1, 4), None) is None
    assert len(caught) == 1


def test_it_serves_what_it_can_and_nothing_else(monkeypatch):
    monkeypatch.setattr(conv_cuda, "causal_conv1d", lambda device, dtype: like_causal_conv1d)
    generator = torch.Generator().manual_seed(3)
    padded, weight, bias = (torch.randn(s, generator=generator) for s in ((2, 12, 16), (16, 1, 4), (16,)))
    with torch.no_grad():
        for offset in (bias, None):
            found = conv_cuda.causal_conv_silu(padded, weight, offset)
            torch.testing.assert_close(found, F.silu(causal_conv(padded, weight, offset)), atol=1e-6, rtol=1e-5)
        assert conv_cuda.causal_conv_silu(padded, weight[..., :1], bias) is None
        assert conv_cuda.causal_conv_silu(padded[..., :15], weight[:15], None) is None
        assert conv_cuda.causal_conv_silu(padded.bfloat16(), weight, bias) is None
    assert conv_cuda.causal_conv_silu(padded, weight, bias) is None  # gradients are wanted
