"""A budget for the whole model: the sparsity of each part, so that the sum of the errors of all parts is smallest.

Either from a few measured errors of each part (`budget`), or from what every step of pruning it costs (`cheapest`).
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Hashable, Mapping, Sequence
from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

# Sparsities at which the error of a part is measured.
MEASURED_AT = (0.4, 0.6, 0.8)
_STEP = 0.005

Part = TypeVar("Part", bound=Hashable)


def error_curve(errors: Sequence[float]) -> np.ndarray:
    """Errors at the sparsities 0, 0.005 ... 1, from those at MEASURED_AT.

    Between and beyond, logarithms are interpolated; below, the error grows with the cube of the sparsity, as the sum of
    the squares of the smallest of evenly spread weights does.
    """
    at = np.arange(round(1 / _STEP) + 1) * _STEP
    logs = np.log(np.maximum(np.asarray(errors, dtype=float), np.finfo(float).tiny))
    slope = (logs[-1] - logs[-2]) / (MEASURED_AT[-1] - MEASURED_AT[-2])
    curve = np.exp(np.interp(at, MEASURED_AT, logs) + slope * np.maximum(at - MEASURED_AT[-1], 0))
    below = at < MEASURED_AT[0]
    curve[below] = np.exp(logs[0]) * (at[below] / MEASURED_AT[0]) ** 3
    return curve


def budget(parts: Mapping[Part, tuple[int, Sequence[float]]], sparsity: float) -> dict[Part, float]:
    """Sparsities of parts of (size, errors at MEASURED_AT) whose mean by size is `sparsity`.

    Each part gives between p/2 and (1+p)/2: errors measured one part at a time say little about a model without one
    part. Each curve is replaced by its lower convex hull there; then every part is at the same slope, error per
    entry (Lagrange), except the last that moved.
    """
    lowest, highest = math.ceil(sparsity / 2 / _STEP - 1e-9), math.floor((1 + sparsity) / 2 / _STEP + 1e-9)
    left = sparsity * sum(size for size, _ in parts.values())
    found, steps = [], []
    for index, (size, errors) in enumerate(parts.values()):
        curve = error_curve(errors)
        hull = [lowest]
        for k in range(lowest + 1, highest + 1):
            while len(hull) > 1 and _slope(curve, hull[-2], hull[-1]) >= _slope(curve, hull[-1], k):
                hull.pop()
            hull.append(k)
        steps += [(_slope(curve, a, b) / size, index, b * _STEP, size) for a, b in itertools.pairwise(hull)]
        found.append(lowest * _STEP)
        left -= found[-1] * size
    for _, index, share, size in sorted(steps):
        step = min((share - found[index]) * size, left)
        found[index] += step / size
        left -= step
    return dict(zip(parts, found, strict=True))


# Costs are counted by their sign, exponent and first five bits: bins an octave's thirty-second wide.
_BITS_LEFT_OUT = 18
# The largest share of a weight that one budget takes.
MOST = 0.98

Counts = Sequence[tuple[int, int]]


def counts_of(costs: Tensor) -> list[tuple[int, int]]:
    """How many of the costs, not negative, are in each bin; (bin, count) by bin."""
    bins = costs.float().contiguous().view(torch.int32) >> _BITS_LEFT_OUT
    found, counts = bins.flatten().unique(return_counts=True)
    return list(zip(found.tolist(), counts.tolist(), strict=True))


def cheapest(parts: Mapping[Part, Counts], sparsity: float, most: float = 1.0) -> dict[Part, float]:
    """Sparsities of parts, given the costs of their steps, so that the cheapest steps of all are taken.

    Exact in the number of entries over all parts. No part gives a larger share than `most`, unless what costs nothing or
    `sparsity` is more.
    """
    edges = sorted({edge for counts in parts.values() for edge, _ in counts})
    taken = np.zeros((len(parts), len(edges) + 1), dtype=np.int64)  # of each part, with all bins before one
    for row, counts in zip(taken, parts.values(), strict=True):
        row[1 + np.searchsorted(edges, [edge for edge, _ in counts])] = [count for _, count in counts]
        free = dict(counts).get(0, 0)
        np.minimum(row.cumsum(), max(math.ceil(max(most, sparsity) * row.sum()), free), out=row)
    sizes = [sum(count for _, count in counts) for counts in parts.values()]
    total = min(round(sparsity * sum(sizes)), int(taken[:, -1].sum()))
    last = int(np.searchsorted(taken.sum(0), total))  # the bin that not all is taken of
    before = taken[:, max(0, last - 1)]
    more, missing = taken[:, last] - before, total - int(before.sum())
    share = more * missing / max(1, more.sum())
    given = np.floor(share).astype(np.int64)
    given[np.argsort(given - share, kind="stable")[: missing - int(given.sum())]] += 1
    return {part: int(count) / size for part, count, size in zip(parts, before + given, sizes, strict=True)}


def in_whole_entries(sizes: Mapping[Part, int], shares: Mapping[Part, float]) -> dict[Part, float]:
    """Shares whose rounded counts add up to the number of entries to prune, to a thousandth of all.

    Parts that have a handful of entries each miss it by far. Those whose rounding went farthest the wrong way then give one
    entry more or less.
    """
    exact = {part: share * sizes[part] for part, share in shares.items()}
    counts = {part: round(value) for part, value in exact.items()}
    missing = round(sum(exact.values())) - sum(counts.values())
    if abs(missing) <= sum(sizes.values()) / 1000:
        return dict(shares)
    sign = 1 if missing > 0 else -1
    for part in sorted(exact, key=lambda part: sign * (counts[part] - exact[part]))[: abs(missing)]:
        counts[part] += sign
    return {part: shares[part] if counts[part] == round(exact[part]) else counts[part] / sizes[part] for part in shares}


def _slope(curve: np.ndarray, a: int, b: int) -> float:
    return (curve[b] - curve[a]) / ((b - a) * _STEP)
