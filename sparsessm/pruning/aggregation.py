"""From a score at every time step to one score per entry.

`vote` (SparseSSM, algorithm 1): at each step the pattern chooses; the entries chosen most often are pruned. The others are
weighted sums over time, sum_t w_t S[t] with sum_t w_t = 1. Scores arrive in pieces of a window, in order, so that
(L,D,N) never has to exist at once.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sparsessm.pruning.methods import TIME_PARAMETERS
from sparsessm.pruning.patterns import Pattern

# Rows of a batched selection that are held at once: bounds the temporary masks, not the result.
_VOTE_ELEMENTS = 1 << 24


def _window(L: int, share: float) -> Tensor:
    return (torch.arange(L) < math.ceil(share * L)).double()


# w_t before normalisation, for L steps and the parameter of the rule (p, g or k).
WEIGHTS: dict[str, Callable[[int, float], Tensor]] = {
    "sum": lambda L, _: torch.ones(L, dtype=torch.float64),
    "power": lambda L, p: torch.arange(1, L + 1, dtype=torch.float64).pow(-p),
    "discount": lambda L, g: torch.full((L,), g, dtype=torch.float64).pow(torch.arange(L)),
    "linear": lambda L, _: torch.arange(L, 0, -1, dtype=torch.float64),
    "window": _window,
}

def time_weights(rule: str, L: int, parameter: float | None = None) -> Tensor:
    """The weights of a rule over L time steps, (L,) float64, summing to 1.

    Raises:
        ValueError: there is no such rule.
    """
    if rule not in WEIGHTS:
        raise ValueError(f"unknown aggregate {rule!r}, known are vote, {', '.join(WEIGHTS)}")
    weights = WEIGHTS[rule](L, TIME_PARAMETERS.get(rule, 0.0) if parameter is None else parameter)
    return weights / weights.sum()


class Aggregator:
    """Takes S[t0:t0+T] (T,D,N) piece by piece with `update`; `scores()` is then (D,N), low means prunable."""

    def __init__(
        self, rule: str, L: int, pattern: Pattern, parameter: float | None = None, gone: Tensor | None = None
    ) -> None:
        """gone: (D,N), entries that were pruned before: the pattern chooses them first at every step."""
        self.pattern, self.gone = pattern, gone
        self.weights = None if rule == "vote" else time_weights(rule, L, parameter)
        self.total: Any = 0.0  # a tensor once something was added

    def update(self, scores: Tensor, start: int) -> None:
        """Adds the steps start, start+1, ... of a window."""
        if self.pattern.removes and self.gone is not None:
            scores = scores.masked_fill(self.gone, 0)
        if self.weights is not None:
            weights = self.weights[start : start + scores.shape[0]].to(scores.device)
            self.total = self.total + torch.tensordot(weights, scores.to(weights.dtype), dims=1)
            return
        if start == 0:
            scores = scores[1:]  # no state enters the first step: every score is zero there, and it has no vote
        rows = max(1, _VOTE_ELEMENTS // scores.shape[1:].numel())
        for piece in scores.split(rows):
            # float32 is what a score is accurate to; in it equal scores are equal, and the index breaks ties
            gone = None if self.gone is None else self.gone.expand(piece.shape)
            self.total = self.total - self.pattern.choose(piece.float(), gone).sum(0, dtype=torch.float32)

    def scores(self) -> Tensor:
        """(D,N): minus the number of votes to prune, or the weighted sum."""
        return self.total.float()

    def mask(self) -> Tensor:
        """(D,N): what the pattern makes of the scores; of whole columns, entries pruned before are already counted."""
        return self.pattern.choose(self.scores(), None if self.pattern.removes else self.gone)
