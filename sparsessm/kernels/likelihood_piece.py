"""Negative log likelihoods for CPUs, compiled by numba: rows of logits are read twice and nothing as large is written."""

from __future__ import annotations

import math

from numba import njit

from sparsessm.kernels.functions import exp
from sparsessm.lanes import LANES, fill, floats, larger, load, store

TOGETHER = 64  # vectors whose sum is in float32


@njit(nogil=True)
def likelihood_piece(first, last, vocabulary, logits, targets, out):
    """out[row] = log(sum(exp(logits[row]))) - logits[row, targets[row]] of rows first to last, in float64."""
    vector = floats(LANES)
    whole = vocabulary // LANES * LANES
    for row in range(first, last):
        at = row * vocabulary
        top = fill(-math.inf)
        for v in range(0, whole, LANES):
            top = larger(top, load(logits, at + v))
        store(vector, 0, top)
        largest = vector.max()
        for v in range(whole, vocabulary):
            largest = max(largest, logits[at + v])
        total = 0.0
        for start in range(0, whole, TOGETHER * LANES):
            some = fill(0.0)
            for v in range(start, min(start + TOGETHER * LANES, whole), LANES):
                some = some + exp(load(logits, at + v) - fill(largest))
            store(vector, 0, some)
            for lane in range(LANES):
                total += vector[lane]
        for v in range(whole, vocabulary):
            total += math.exp(logits[at + v] - largest)
        out[row] = largest + math.log(total) - logits[at + targets[row]]
