"""Which entries a score condemns: the lowest, as each pattern asks. All take any number of leading dimensions.

Ties break toward the lower flat index, on every device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Pattern = Callable[[Tensor], Tensor]  # scores (...,rows,cols) -> bool mask of the same shape, True = pruned


def lowest(scores: Tensor, k: int) -> Tensor:
    """Marks the k lowest of the last dimension, of equals the ones with the lower index.

    Raises:
        ValueError: where NaN leaves no order to choose by.
    """
    size = scores.shape[-1]
    if k <= 0 or k >= size:
        return torch.full(scores.shape, k > 0, dtype=torch.bool, device=scores.device)
    if torch.isnan(scores).any():
        raise ValueError("scores hold NaN: there is no lowest to choose")
    threshold = scores.kthvalue(k, dim=-1, keepdim=True).values
    chosen = scores <= threshold
    extra = chosen.sum(-1, dtype=torch.int64) > k
    if extra.any():  # more equals at the threshold than there is room for: the first of them in index order
        rows, limit = scores[extra], threshold[extra]
        below, tied = rows < limit, rows == limit
        room = k - below.sum(-1, keepdim=True)
        chosen[extra] = below | (tied & (tied.cumsum(-1) <= room))
    return chosen


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
