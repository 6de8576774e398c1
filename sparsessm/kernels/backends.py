"""Whether the kernels of other packages compute what ours do: checked once before they are used."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence

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
