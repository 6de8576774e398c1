"""Products of float32 matrices on the CPU by oneDNN, which torch ships but uses only for other dtypes.

torch gives float32 products to MKL, which does not use the widest vectors of processors that Intel did not make;
oneDNN does (docs/BENCHMARKS.md). Both round to float32; they add in another order.
"""

from __future__ import annotations

import functools

import torch
import torch.nn.functional as F
from torch import Tensor


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (...,cols) times weight (rows,cols) transposed, plus bias (rows,): `torch.nn.functional.linear`, to rounding."""
    if x.device.type == "cpu" and x.dtype == weight.dtype == torch.float32 and _by_onednn() and not _wants_grad(x, weight):
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


def _wants_grad(*tensors: Tensor) -> bool:
    return torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)


@functools.cache
def _by_onednn() -> bool:
    """Whether this torch has the operator, which is not part of its documented interface, and it does what it did."""
    x, weight, bias = torch.arange(6.0).view(2, 3), torch.arange(12.0).view(4, 3), torch.arange(4.0)
    try:
        found = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    except (AttributeError, RuntimeError, TypeError):
        return False
    return torch.equal(found, F.linear(x, weight, bias))
