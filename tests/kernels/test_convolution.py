"""Whether and when causal-conv1d serves the convolution; its own numbers need a GPU and the package."""

import warnings

import pytest
import torch
import torch.nn.functional as F

from sparsessm.kernels import convolution

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


class OnCuda(torch.Tensor):
    """A tensor that says that it lies on a GPU, wherever it does."""

    is_cuda = True


def on_cuda(values):
    return values.to(DEVICE).as_subclass(OnCuda)


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
        assert convolution.agrees_with_ours(like_causal_conv1d, DEVICE, dtype)


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
    with pytest.warns(UserWarning, match=f"causal-conv1d is installed but is not used for the convolution: .*{fault}"):
        assert not convolution.agrees_with_ours(theirs, DEVICE, torch.float32)


def test_a_broken_package_is_named_once(broken_package):
    broken_package("causal_conv1d", convolution.causal_conv1d)
    padded, weight = on_cuda(torch.ones(1, 5, 8)), torch.ones(8, 1, 4, device=DEVICE)
    ours = F.silu(convolution.causal_conv(padded, weight, None))
    with torch.no_grad(), pytest.warns(UserWarning, match="undefined symbol") as caught:
        for _ in range(2):
            assert torch.equal(convolution.causal_conv_silu(padded, weight, None), ours)
            assert convolution.causal_conv1d(DEVICE, torch.float32) is None
    assert len(caught) == 1


def test_it_serves_what_it_can_and_nothing_else(monkeypatch):
    asked, generator = [], torch.Generator().manual_seed(3)

    def lookup(device, dtype):
        asked.append(dtype)
        return like_causal_conv1d

    monkeypatch.setattr(convolution, "causal_conv1d", lookup)
    padded, weight, bias = (torch.randn(s, generator=generator) for s in ((2, 12, 16), (16, 1, 4), (16,)))
    there, weight, bias = on_cuda(padded), weight.to(DEVICE), bias.to(DEVICE)

    def served(padded, weight, bias):
        """Whether causal-conv1d was asked; what comes out is right either way."""
        asked.clear()
        found = convolution.causal_conv_silu(padded, weight, bias)
        torch.testing.assert_close(found, F.silu(convolution.causal_conv(padded, weight, bias)), atol=1e-6, rtol=1e-5)
        return bool(asked)

    with torch.no_grad():
        assert served(there, weight, bias) and served(there, weight, None)
        assert not served(there, weight[..., :1], bias)
        assert not served(there[..., :15], weight[:15], None)
        assert not served(there.bfloat16(), weight, bias)
        assert not served(padded, weight.cpu(), bias.cpu())
    assert not served(there, weight, bias)  # gradients are wanted
