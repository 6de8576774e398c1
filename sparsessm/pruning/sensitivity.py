"""Sparsity from sensitivity (SparseSSM, section 3.4): sensitive modules keep more, insensitive ones less."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor

_MOST_MOVED = 24


def sensitivity(diagonal: Tensor) -> float:
    """s = sum_i H_ii^2 / cols, from the diagonal (cols,) of a module's Hessian H = (2/n) X X^T."""
    return float(diagonal.double().square().mean())


def spread(scores: Sequence[float], sparsity: float, alpha: float) -> list[float]:
    """Sparsities of one group of m modules, in the order of `scores`, with mean `sparsity`.

    With n = min(24, m // 2): the n least sensitive keep from 1-p-alpha rising evenly to 1-p, the n most sensitive from
    1-p rising evenly to 1-p+alpha, any between them 1-p. For n = 1 each end moves by alpha / 2.
    """
    order = np.argsort(np.asarray(scores), kind="stable")
    n = min(_MOST_MOVED, len(order) // 2)
    step = np.array([alpha / 2]) if n == 1 else np.linspace(alpha, 0.0, n)
    pruned = np.full(len(order), sparsity)
    pruned[order[:n]] += step
    pruned[order[len(order) - n :]] -= step[::-1]
    return [float(value) for value in pruned]


def sparsities(scores: Mapping[tuple[int, str], float], sparsity: float, alpha: float) -> dict[tuple[int, str], float]:
    """Sparsity of each (layer, module) that was scored; modules of one name are ranked among themselves, see `spread`."""
    result: dict[tuple[int, str], float] = {}
    for group in sorted({name for _, name in scores}):
        keys = sorted(key for key in scores if key[1] == group)
        result.update(zip(keys, spread([scores[key] for key in keys], sparsity, alpha), strict=True))
    return result
