"""Greedy removal, the search of Mamba-Shedder (arXiv 2501.17088): the part with the lowest cost goes, then the next."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence

# cost(removed, left): the cost of removing each of `left` alone, in addition to those already removed.
Cost = Callable[[tuple[int, ...], tuple[int, ...]], Mapping[int, float]]


def greedy(candidates: Sequence[int], cost: Cost, steps: int, done: Sequence[int] = ()) -> Iterator[tuple[int, float]]:
    """Removes the candidate with the lowest cost, of equals the lowest one, until `steps` are removed.

    Yields (candidate, cost) of each removal before the costs of the next are asked for.

    Args:
        done: what was removed before; counts towards `steps`.

    Raises:
        ValueError: more steps than candidates, or a cost that is NaN and leaves no order to choose by.
    """
    if steps > len(candidates):
        raise ValueError(f"{steps} of {len(candidates)} candidates cannot be removed")
    removed = tuple(done)
    while len(removed) < steps:
        left = tuple(candidate for candidate in candidates if candidate not in removed)
        costs = cost(removed, left)
        if any(math.isnan(costs[candidate]) for candidate in left):
            raise ValueError("costs hold NaN: there is no lowest to choose")
        best = min(left, key=lambda candidate: (costs[candidate], candidate))
        removed += (best,)
        yield best, costs[best]
