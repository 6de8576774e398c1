"""The loss of a language model at each token, without its probabilities."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsessm.kernels.selective_scan import kernel_for
from sparsessm.threads import for_each

# Entries of a vocabulary from which on one pass of ours pays; below, torch's keeps the last digits of small models.
LARGE = 1 << 14
_ROWS = 16  # of a piece of work


def negative_log_likelihood(logits: Tensor, targets: Tensor) -> Tensor:
    """-log softmax(logits)[targets] of logits (rows,V) and targets (rows,) int64: (rows,) float64."""
    rows, vocabulary = logits.shape
    if logits.device.type != "cpu" or vocabulary < LARGE or kernel_for("cpu") != "cpu":
        return F.cross_entropy(logits.float(), targets, reduction="none").double()
    out = torch.empty(rows, dtype=torch.float64)
    flat = (logits.float().contiguous().view(-1).numpy(), targets.contiguous().numpy(), out.numpy())
    tasks = [(first, min(first + _ROWS, rows), vocabulary, *flat) for first in range(0, rows, _ROWS)]
    for_each(_compiled(), tasks, min(torch.get_num_threads(), len(tasks)))
    return out


@functools.cache
def _compiled() -> Callable[[Any], None]:
    from sparsessm import lanes
    from sparsessm.compiled import kept, source_of
    from sparsessm.kernels import functions, likelihood_piece

    source = source_of(lanes, functions, likelihood_piece)

    def likelihood(task: Any) -> None:
        if len(source) > 0:
            likelihood_piece.likelihood_piece(*task)

    return kept(likelihood)
