"""Which entries are pruned: the lowest scores, as each pattern asks. All take any number of leading dimensions.

A pattern defines the share, whether entries compete in groups, whether whole columns are removed, and whether
parts of a model may have different shares. Ties break toward the lower flat index, on every device.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor

from sparsessm.errors import NumericalError
from sparsessm.threads import for_each


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
    if extra.any():  # more ties at the threshold than are needed: the first of them in index order
        rows, limit = scores[extra], threshold[extra]
        below, tied = rows < limit, rows == limit
        needed = k - below.sum(-1, keepdim=True)
        chosen[extra] = below | (tied & (tied.cumsum(-1) <= needed))
    return chosen


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


class Pattern(ABC):
    """How much of a matrix is pruned, and by which rule.

    Attributes:
        sparsity: share of entries. group: entries compete within groups of this number of consecutive columns, None for all.
        removes: the structure that is removed whole ("columns", "heads"), None where entries are pruned in place.
        spreads: whether parts may have different shares.
    """

    sparsity: float
    group: int | None = None
    removes: str | None = None
    spreads: ClassVar[bool] = False

    @abstractmethod
    def __call__(self, scores: Tensor) -> Tensor:
        """scores (...,rows,cols) -> bool mask of the same shape, True = pruned."""

    def choose(self, scores: Tensor, gone: Tensor | None = None) -> Tensor:
        """The mask in which all entries pruned before stay: they count, and are chosen first.

        gone: bool, in the shape of the scores.
        """
        return self(scores) if gone is None else self(scores.masked_fill(gone, -math.inf)) | gone

    def per_row(self) -> Pattern:
        """The pattern with each row as a separate comparison group (Wanda)."""
        return self

    def share(self, sparsity: float | None) -> Pattern:
        """The pattern with another share, where parts may have one."""
        return self

    def within(self, groups: int, cols: int) -> Pattern:
        """The pattern where columns fall into groups that must lose the same number."""
        return self

    def spread_rest(self, gone: Tensor | None, part: Tensor | None) -> Pattern:
        """The pattern for a part of a matrix, so that the whole ends with its share although some was pruned before.

        The rest to prune is spread evenly over the entries that are left.

        Args:
            gone: of the whole matrix. part: of the part, a view into it.
        """
        if gone is None or part is None or not self.spreads or not part.numel():
            return self
        left = int((~gone).sum())
        missing = max(0, round(self.sparsity * gone.numel()) - int(gone.sum()))
        before = int(part.sum())
        more = missing * (part.numel() - before) / left if left else 0
        return self.share(min(1.0, (before + more) / part.numel()))


@dataclass(frozen=True)
class Unstructured(Pattern):
    """The round(sparsity * rows * cols) lowest of the whole matrix."""

    sparsity: float
    spreads: ClassVar[bool] = True

    def __call__(self, scores: Tensor) -> Tensor:
        rows, cols = scores.shape[-2:]
        return lowest(scores.flatten(-2), round(self.sparsity * rows * cols)).unflatten(-1, (rows, cols))

    def per_row(self) -> Pattern:
        return PerRow(self.sparsity)

    def share(self, sparsity: float | None) -> Pattern:
        return self if sparsity is None else Unstructured(sparsity)


@dataclass(frozen=True)
class PerRow(Pattern):
    """The round(sparsity * cols) lowest of each row (Wanda's comparison group)."""

    sparsity: float

    def __call__(self, scores: Tensor) -> Tensor:
        return lowest(scores, round(self.sparsity * scores.shape[-1]))


@dataclass(frozen=True)
class NofM(Pattern):
    """The n lowest in every group of m consecutive columns of a row (SparseGPT's prunen, prunem)."""

    n: int
    m: int

    @property
    def sparsity(self) -> float:  # type: ignore[override]  # nobody writes it
        return self.n / self.m

    @property
    def group(self) -> int:  # type: ignore[override]  # the same
        return self.m

    def __call__(self, scores: Tensor) -> Tensor:
        if scores.shape[-1] % self.m:
            raise ValueError(f"{self.m} does not divide {scores.shape[-1]} columns")
        return lowest(scores.unflatten(-1, (-1, self.m)), self.n).flatten(-2)


@dataclass(frozen=True)
class Columns(Pattern):
    """The round(sparsity * cols) columns with the lowest sum over the rows, whole: states, or heads."""

    sparsity: float
    removes: str = "columns"

    def __call__(self, scores: Tensor) -> Tensor:
        cols = scores.shape[-1]
        return lowest(scores.sum(-2), round(self.sparsity * cols)).unsqueeze(-2).expand(scores.shape)

    def within(self, groups: int, cols: int) -> Pattern:
        return self if groups == 1 else NofM(round(self.sparsity * cols) // groups, cols // groups)

    def choose(self, scores: Tensor, gone: Tensor | None = None) -> Tensor:
        """Entries pruned before add nothing to the score of a column."""
        return self(scores if gone is None else scores.masked_fill(gone, 0))
