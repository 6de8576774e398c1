"""The depthwise causal convolution of a mixer, with its activation; by causal-conv1d on CUDA if the two agree."""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsessm.kernels.backends import agrees


def causal_conv(padded: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Depthwise causal convolution: (B,K-1+L,D) with weight (D,1,K) -> (B,L,D).

    A sum over the K weights of a channel instead of `conv1d`, which wants channels before time: two transposes saved.
    """
    K = weight.shape[-1]
    steps = padded.shape[1] - (K - 1)
    out = padded[:, :steps] * weight[:, 0, 0]
    for k in range(1, K):
        out.addcmul_(padded[:, k : k + steps], weight[:, 0, k])
    return out if bias is None else out.add_(bias)


def causal_conv_silu(padded: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """silu(causal_conv(...)), by causal-conv1d where it is installed, supports these inputs, and agrees with ours."""
    theirs = None
    if padded.is_cuda and not torch.is_grad_enabled():
        K, D = weight.shape[-1], padded.shape[2]
        one_dtype = all(x is None or x.dtype == padded.dtype for x in (weight, bias))
        if 2 <= K <= 4 and D % 8 == 0 and one_dtype:
            theirs = causal_conv1d(padded.device.type, padded.dtype)
    return F.silu(causal_conv(padded, weight, bias)) if theirs is None else conv_by(theirs, padded, weight, bias)


def conv_by(theirs: Callable[..., Any], padded: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Our convolution by causal_conv1d_fn: it has time last, and begins before what is padded."""
    out = theirs(padded.contiguous().transpose(1, 2), weight[:, 0], bias)  # (B,D,K-1+L), channels side by side
    return out.transpose(1, 2)[:, weight.shape[-1] - 1 :]


@functools.cache
def causal_conv1d(device: str, dtype: torch.dtype) -> Callable[..., Any] | None:
    """causal_conv1d_fn with its SiLU, if it is installed and agrees with ours on inputs of the dtype."""
    if importlib.util.find_spec("causal_conv1d") is None:
        return None

    def theirs(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        from causal_conv1d import causal_conv1d_fn

        return causal_conv1d_fn(x, weight, bias, activation="silu")

    return theirs if agrees_with_ours(theirs, device, dtype) else None


def agrees_with_ours(theirs: Callable[..., Any], device: str, dtype: torch.dtype) -> bool:
    """Whether a function of x (B,D,T), weight (D,K) and bias (D,) computes our convolution and SiLU; warns if not."""
    generator = torch.Generator().manual_seed(0)
    padded, weight, bias = (
        torch.randn(shape, generator=generator).to(device, dtype) for shape in ((2, 3 + 37, 24), (24, 1, 4), (24,))
    )
    ours = F.silu(causal_conv(padded.float(), weight.float(), bias.float()))
    return agrees(
        "causal-conv1d", "the convolution", lambda: [conv_by(theirs, padded, weight, bias)], [ours], [torch.finfo(dtype).eps]
    )
