"""A budget for the whole model: the sparsity of each part, so that the sum of the errors of all parts is smallest."""

from __future__ import annotations

import itertools
import math
from collections.abc import Hashable, Mapping, Sequence
from typing import TypeVar

import numpy as np

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
