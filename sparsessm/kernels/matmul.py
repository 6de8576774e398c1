"""Products of float32 matrices on the CPU by oneDNN, which torch ships but uses only for other dtypes.

torch gives float32 products to MKL, which does not use the widest vectors of processors that Intel did not make;
oneDNN does (docs/BENCHMARKS.md). Both round to float32; they add in another order.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from sparsessm.kernels.backends import wants_gradient


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (...,cols) times weight (rows,cols) transposed, plus bias (rows,): `torch.nn.functional.linear`, to rounding.

    Its gradients are products of the same kind; gradients of gradients are refused.
    """
    if x.device.type != "cpu" or not x.dtype == weight.dtype == torch.float32 or not _by_onednn():
        return F.linear(x, weight, bias)
    if wants_gradient(x, weight, bias):
        return _Linear.apply(x, weight, bias)
    return _product(x, weight, bias)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        for_x, for_weight, for_bias = ctx.needs_input_grad
        # copies of what has gaps: oneDNN takes hundreds of times as long where there are some in what it is to transpose
        flat, weight = gradient.reshape(-1, weight.shape[0]).contiguous(), weight.contiguous()  # (tokens,rows)
        return (
            _product(flat, weight.T).view(x.shape) if for_x else None,
            _product(flat.T, x.reshape(-1, weight.shape[1]).contiguous().T) if for_weight else None,
            flat.sum(0) if for_bias else None,
        )


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


@functools.cache
def _by_onednn() -> bool:
    """Whether this torch has the operator, which is not part of its documented interface, and it does what it did."""
    x, weight, bias = torch.arange(6.0).view(2, 3), torch.arange(12.0).view(4, 3), torch.arange(4.0)
    try:
        found = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    except (AttributeError, RuntimeError, TypeError):
        return False
    return torch.equal(found, F.linear(x, weight, bias))
