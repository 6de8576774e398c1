"""What decides who computes: whether another package computes what we do, checked once, and whether a gradient is wanted."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

import torch
from torch import Tensor


def agrees(
    package: str, purpose: str, theirs: Callable[[], Sequence[Tensor]], ours: Sequence[Tensor], roundings: Sequence[float]
) -> bool:
    """Whether a package computes what we do, to 1e-4 and a rounding of the largest value; warns with the reason if not."""
    fault = "its values are not ours"
    try:
        for x, y, rounding in zip(theirs(), ours, roundings, strict=True):
            if x.shape != y.shape or not (x - y).abs().max() <= (1e-4 + rounding) * y.abs().max():
                break
        else:
            return True
    except Exception as error:  # of any kind: our own kernel works
        fault = first_line(error)
    warnings.warn(f"{package} is installed but is not used for {purpose}: {fault}", stacklevel=3)
    return False


def first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def wants_gradient(*tensors: Tensor | None) -> bool:
    """Whether a result of these tensors has to remember how it was made."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)
