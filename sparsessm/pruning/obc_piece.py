"""The compiled part of the optimal brain compressor: the weights of one row, removed one after the other."""

from __future__ import annotations

import numpy as np
from numba import njit

from sparsessm.compiled import kept

# Rows of the work space are of whole vectors, so that no loop has a rest; what lies right of the diagonal has no meaning.
_VECTOR = 16
# Removals after which the inverse is brought up to date: until then each is a row that its use subtracts.
_PENDING = 4
# What vectors need of arithmetic: sums in any order.
_LOOSE = {"contract", "reassoc", "nsz", "nnan"}


def work_space(n: int, dtype: np.dtype) -> np.ndarray:
    """(n+3+_PENDING,width) zeros: the inverse, rows for the weights, the diagonal, what each costs, and pending removals."""
    return np.zeros((n + 3 + _PENDING, -(-n // _VECTOR) * _VECTOR), dtype)


def _remove_in_turn(
    w: np.ndarray, inverse: np.ndarray, C: np.ndarray, first: int, limit: int, group: int, left: np.ndarray,
    order: np.ndarray, cost: np.ndarray,
) -> None:  # fmt: skip
    """`obc.remove_in_turn_ref` for one row: w (n,) becomes what compensates; order and cost (n,) are filled.

    The weights that are left stand first, those of order[:alive], and of C the lower triangle less the products of pending
    rows is the inverse for them; the end of `order` says in reverse which went before.

    Args:
        inverse: (n,n), of the Hessian. C: work_space(n). first: the weights order[:first] go first, whatever they cost, the
            last of them before the others; the rest of order are the other weights. limit: how many go at most.
        group: at most left[i // group] of each `group` weights go, 0 for no groups; left is used up.
    """
    n = w.shape[0]
    v, d, loss, pending = C[n], C[n + 1], C[n + 2], C[n + 3 :]
    for i in range(n):
        for j in range(i):
            C[i, j] = inverse[order[i], order[j]]
        v[i], d[i], cost[i] = w[order[i]], inverse[order[i], order[i]], np.inf
    alive, waiting = n, 0
    for step in range(limit):
        for k in range(alive):
            loss[k] = v[k] * v[k] / d[k]
        where = -1
        if step < first:
            where = first - 1 - step
        elif group == 0:
            best = loss[0]
            for k in range(alive):
                best = min(best, loss[k])
            for k in range(alive):
                if loss[k] == best:
                    where = k
                    break
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
        _swap(C, where, alive)
        for x in (v, d):
            x[where], x[alive] = x[alive], x[where]
        order[where], order[alive] = order[alive], order[where]
        row = pending[waiting]
        row[:] = C[alive]
        for m in range(waiting):
            before = pending[m]
            before[where], before[alive] = before[alive], before[where]
            factor = before[alive]
            for k in range(alive):
                row[k] -= factor * before[k]
        root = np.sqrt(d[alive])
        share = v[alive] / root
        for k in range(alive):
            row[k] /= root
            v[k] -= share * row[k]
            d[k] -= row[k] * row[k]
        waiting += 1
        if waiting == _PENDING:
            _subtract(C, pending, alive)
            waiting = 0
    for k in range(n):
        w[order[k]] = v[k] if k < alive else 0
    order[:] = order[::-1].copy()


@njit(nogil=True, fastmath=_LOOSE)
def _subtract(C: np.ndarray, rows: np.ndarray, n: int) -> None:
    """Subtracts the product of each of _PENDING rows with itself from the lower triangle of C (n,n)."""
    a, b, c, d = rows[0], rows[1], rows[2], rows[3]
    for k in range(n):
        p, q, r, s, out = a[k], b[k], c[k], d[k], C[k]
        for j in range((k + _VECTOR) // _VECTOR * _VECTOR):
            out[j] -= p * a[j] + q * b[j] + r * c[j] + s * d[j]


@njit(nogil=True)
def _swap(C: np.ndarray, a: int, b: int) -> None:
    """Exchanges rows and columns a <= b of a symmetric matrix of which the lower triangle is kept, without the diagonal."""
    if a == b:
        return
    for j in range(a):
        C[a, j], C[b, j] = C[b, j], C[a, j]
    for k in range(a + 1, b):
        C[k, a], C[b, k] = C[b, k], C[k, a]


remove_in_turn = kept(_remove_in_turn, fastmath=_LOOSE)
