"""Which entries a score condemns: the lowest, as each pattern asks. All take any number of leading dimensions.

Ties break toward the lower flat index, on every device.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from sparsessm.errors import NumericalError
from sparsessm.threads import for_each

Pattern = Callable[[Tensor], Tensor]  # scores (...,rows,cols) -> bool mask of the same shape, True = pruned


def lowest(scores: Tensor, k: int) -> Tensor:
    """Marks the k lowest of the last dimension, of equals the ones with the lower index.

    Raises:
        NumericalError: where NaN leaves no order to choose by.
    """
    size = scores.shape[-1]
    if k <= 0 or k >= size:
        return torch.full(scores.shape, k > 0, dtype=torch.bool, device=scores.device)
    if scores.numel() and torch.isnan(scores.amax()):  # which is NaN where any is
        raise NumericalError("the scores hold NaN: there is no lowest to choose")
    threshold = _kth_lowest(scores, k)
    chosen = scores <= threshold
    extra = chosen.sum(-1, dtype=torch.int64) > k
    if extra.any():  # more equals at the threshold than there is room for: the first of them in index order
        rows, limit = scores[extra], threshold[extra]
        below, tied = rows < limit, rows == limit
        room = k - below.sum(-1, keepdim=True)
        chosen[extra] = below | (tied & (tied.cumsum(-1) <= room))
    return chosen


def choose(pattern: Pattern, scores: Tensor, gone: Tensor | None = None) -> Tensor:
    """The mask that a pattern asks for, in which all that was gone before stays: it counts, and is chosen first.

    Of whole columns it is the price that what is gone adds nothing to.

    gone: bool, in the shape of the scores.
    """
    if gone is None:
        return pattern(scores)
    if isinstance(pattern, Columns):
        return pattern(scores.masked_fill(gone, 0))
    return pattern(scores.masked_fill(gone, -math.inf)) | gone


_P = TypeVar("_P")


def spread_rest(pattern: _P, gone: Tensor | None, part: Tensor | None) -> _P:
    """The pattern for a part of a matrix, so that the whole ends with the pattern's share although some is gone before.

    What is still to go is spread evenly over what is still there. Only Unstructured has a share to adapt.

    Args:
        gone: of the whole matrix. part: of the part, a view into it.
    """
    if gone is None or part is None or not isinstance(pattern, Unstructured) or not part.numel():
        return pattern
    left = int((~gone).sum())
    missing = max(0, round(pattern.sparsity * gone.numel()) - int(gone.sum()))
    before = int(part.sum())
    more = missing * (part.numel() - before) / left if left else 0
    return replace(pattern, sparsity=min(1.0, (before + more) / part.numel()))


def _kth_lowest(scores: Tensor, k: int) -> Tensor:
    """The k-th lowest of the last dimension, (...,1)."""
    if scores.device.type == "cpu" and scores.dtype in (torch.float32, torch.float64):
        # several times as fast as torch's, which does not use the vectors of the processor
        rows = scores.detach().reshape(-1, scores.shape[-1]).numpy()
        found = np.empty((len(rows), 1), rows.dtype)

        def select(part: slice) -> None:
            found[part] = np.partition(rows[part], k - 1, axis=-1)[:, k - 1 : k]

        threads = torch.get_num_threads()
        size = max(1, -(-len(rows) // threads))
        for_each(select, [slice(start, start + size) for start in range(0, len(rows), size)], threads)
        return torch.from_numpy(found).view(*scores.shape[:-1], 1)
    return scores.kthvalue(k, dim=-1, keepdim=True).values


@dataclass(frozen=True)
class Unstructured:
    """The round(sparsity * rows * cols) lowest of the whole matrix."""

    sparsity: float

    def __call__(self, scores: Tensor) -> Tensor:
        rows, cols = scores.shape[-2:]
        return lowest(scores.flatten(-2), round(self.sparsity * rows * cols)).unflatten(-1, (rows, cols))


@dataclass(frozen=True)
class PerRow:
    """The round(sparsity * cols) lowest of each row (Wanda's comparison group)."""

    sparsity: float

    def __call__(self, scores: Tensor) -> Tensor:
        return lowest(scores, round(self.sparsity * scores.shape[-1]))


@dataclass(frozen=True)
class NofM:
    """The n lowest in every group of m consecutive columns of a row (SparseGPT's prunen, prunem)."""

    n: int
    m: int

    def __call__(self, scores: Tensor) -> Tensor:
        if scores.shape[-1] % self.m:
            raise ValueError(f"{self.m} does not divide {scores.shape[-1]} columns")
        return lowest(scores.unflatten(-1, (-1, self.m)), self.n).flatten(-2)


@dataclass(frozen=True)
class Columns:
    """The round(sparsity * cols) columns with the lowest sum over the rows, whole."""

    sparsity: float

    def __call__(self, scores: Tensor) -> Tensor:
        rows, cols = scores.shape[-2:]
        return lowest(scores.sum(-2), round(self.sparsity * cols)).unsqueeze(-2).expand(scores.shape)
