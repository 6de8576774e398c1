"""The compiled part of the optimal brain compressor: the weights of one row, removed one after the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numba import njit

from sparsessm import lanes
from sparsessm.compiled import kept, source_of
from sparsessm.lanes import LANES, fill_from, fma, least, load, smaller, store

# Removals after which the inverse is brought up to date: until then each is a row that its use subtracts.
_PENDING = 4
# What vectors need of arithmetic: sums in any order.
_LOOSE = {"contract", "reassoc", "nsz", "nnan"}


def work_space(n: int, dtype: np.dtype) -> np.ndarray:
    """(n+4+_PENDING,width), whose rows begin with a cache line.

    It holds the inverse, rows for the weights, the diagonal, what each costs, some numbers, and pending removals. Its width
    is an odd number of vectors: columns of a power of two would fall on few sets of the first-level cache.
    """
    rows, width = n + 4 + _PENDING, (-(-n // LANES) | 1) * LANES
    whole = np.zeros(rows * width + LANES, dtype)
    first = -whole.ctypes.data // whole.itemsize % LANES
    return whole[first : first + rows * width].reshape(rows, width)


@njit(nogil=True, fastmath=_LOOSE)
def _remove_in_turn(
    w: np.ndarray, inverse: np.ndarray, C: np.ndarray, first: int, limit: int, group: int, left: np.ndarray,
    order: np.ndarray, cost: np.ndarray,
) -> None:  # fmt: skip
    """`obc.remove_in_turn_ref` for one row: w (n,) becomes what compensates; order and cost (n,) are filled.

    The weights that are left stand first, those of order[:alive], and of C the lower triangle less the products of pending
    rows is the inverse for them; the end of `order` says in reverse which went before. Loops take whole vectors: behind the
    last weight that is left, pending rows are zero and weights infinite, so that none there is the cheapest.

    Args:
        inverse: (n,n), of the Hessian. C: work_space(n). first: the weights order[:first] go first, whatever they cost, the
            last of them before the others; the rest of order are the other weights. limit: how many go at most.
        group: at most left[i // group] of each `group` weights go, 0 for no groups; left is used up.
    """
    n, stride = w.shape[0], C.shape[1]
    v, d, loss, numbers, pending = C[n], C[n + 1], C[n + 2], C[n + 3], C[n + 4 :]
    flat = C.reshape(C.size)
    in_place = first == 0  # then order counts up
    for i in range(n):
        if in_place:
            C[i, :i] = inverse[i, :i]
        else:
            for j in range(i):
                C[i, j] = inverse[order[i], order[j]]
        v[i], d[i], cost[i] = w[order[i]], inverse[order[i], order[i]], np.inf
    v[n:], d[n:] = np.inf, 1
    alive, waiting = n, 0
    for step in range(limit):
        best = _price(flat, n * stride, stride, alive)
        where = -1
        if step < first:
            where = first - 1 - step
        elif group == 0:
            where = _first_place(loss, best, alive)
        else:
            for k in range(alive):
                if left[order[k] // group] > 0 and (where < 0 or loss[k] < loss[where]):
                    where = k
        if where < 0:
            break
        cost[step] = loss[where]
        if group:
            left[order[where] // group] -= 1
        alive -= 1
        _take_out(flat, stride, where, alive, (n + 4 + waiting) * stride)
        for x in (v, d):
            x[where], x[alive] = x[alive], x[where]
        order[where], order[alive] = order[alive], order[where]
        for m in range(waiting):
            before = pending[m]
            numbers[m] = before[where]
            before[where], before[alive] = before[alive], 0
        numbers[_PENDING] = np.sqrt(d[alive])
        numbers[_PENDING + 1] = v[alive] / numbers[_PENDING]
        _move(flat, n * stride, stride, alive, waiting)
        v[alive], d[alive] = np.inf, 1
        waiting += 1
        if waiting == _PENDING:
            _subtract(flat, (n + 4) * stride, stride, alive)
            waiting = 0
    for k in range(n):
        w[order[k]] = v[k] if k < alive else 0
    order[:] = order[::-1].copy()


@njit(nogil=True)
def _price(flat, at, stride, alive):
    """Fills the row of costs from those of weights and diagonal, rows from `at` on; the least."""
    best = load(flat, at) * load(flat, at) / load(flat, at + stride)
    for k in range(0, alive, LANES):
        v = load(flat, at + k)
        price = v * v / load(flat, at + stride + k)
        store(flat, at + 2 * stride + k, price)
        best = smaller(best, price)
    return least(best)


@njit(nogil=True)
def _first_place(values, value, n):
    """Where a value stands first in whole vectors; -1 if nowhere."""
    for start in range(0, n, LANES):
        found = False
        for k in range(start, start + LANES):
            found |= values[k] == value
        if found:
            for k in range(start, start + LANES):
                if values[k] == value:
                    return k
    return -1


@njit(nogil=True)
def _take_out(flat, stride, where, last, row):
    """Copies row `where` of a symmetric matrix, of which the lower triangle is kept, to `row`, and puts row `last` there.

    row: where in `flat`. It is in the order from afterwards, without the diagonal, and zero from `last` to the end of its
        vector. What lies right of the diagonal has no meaning.
    """
    here, there = where * stride, last * stride
    for j in range(0, where, LANES):
        store(flat, row + j, load(flat, here + j))
        store(flat, here + j, load(flat, there + j))
    if where < last:
        flat[row + where] = flat[there + where]
    for k in range(where + 1, last):
        flat[row + k], flat[k * stride + where] = flat[k * stride + where], flat[there + k]
    for k in range(last, last // LANES * LANES + LANES):
        flat[row + k] = 0


@njit(nogil=True)
def _move(flat, at, stride, alive, waiting):
    """Makes the last of the pending rows what it is to be, and moves weights and diagonal by it.

    at: of the rows for weights, diagonal, costs and numbers, which are the factors of the rows that wait, the root of the
        diagonal of the weight that goes, and the weight over it. waiting: how many rows wait before this one.
    """
    numbers, pending = at + 3 * stride, at + 4 * stride
    row = pending + waiting * stride
    root, share = fill_from(flat, numbers + _PENDING), fill_from(flat, numbers + _PENDING + 1)
    for k in range(0, alive + 1, LANES):
        value = load(flat, row + k)
        for m in range(waiting):
            value = value - fill_from(flat, numbers + m) * load(flat, pending + m * stride + k)
        value = value / root
        store(flat, row + k, value)
        store(flat, at + k, load(flat, at + k) - share * value)
        store(flat, at + stride + k, load(flat, at + stride + k) - value * value)


@njit(nogil=True)
def _subtract(flat, at, stride, n):
    """Subtracts the product of each of _PENDING rows, from `at` on, with itself from the lower triangle of (n,n).

    Two rows of it at once; the one after the last has no meaning.
    """
    b, c, d = at + stride, at + 2 * stride, at + 3 * stride
    for k in range(1, n, 2):
        p, q, r, s = fill_from(flat, at + k), fill_from(flat, b + k), fill_from(flat, c + k), fill_from(flat, d + k)
        k1, to = k + 1, k * stride
        p1, q1, r1, s1 = fill_from(flat, at + k1), fill_from(flat, b + k1), fill_from(flat, c + k1), fill_from(flat, d + k1)
        for j in range(0, k1, LANES):
            w, x, y, z = load(flat, at + j), load(flat, b + j), load(flat, c + j), load(flat, d + j)
            store(flat, to + j, load(flat, to + j) - fma(z, s, fma(y, r, fma(x, q, w * p))))
            next_row = to + stride + j
            store(flat, next_row, load(flat, next_row) - fma(z, s1, fma(y, r1, fma(x, q1, w * p1))))


def _compiled(source: str) -> Callable[..., None]:
    def remove(*row: Any) -> None:
        if len(source) > 0:  # part of the name of what is kept
            _remove_in_turn(*row)

    return kept(remove)


remove_in_turn = _compiled(source_of(lanes))
