"""How much an entry of A_log matters at each time step: S (T,D,N), low means prunable.

A new criterion is one function and one line in SALIENCIES; the command line picks it up from there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Saliency:
    """A criterion: `score(A_log (D,N), h2, abar)` -> (T,D,N), and the names of the sums that it needs.

    h2 is sum_b h_{t-1}^2, abar is sum_b Abar_t, both (T,D,N), or None where not needed. One that `interacts` scores sets
    of entries instead, by the sums that it needs (pruning.search).
    """

    score: Callable[[Tensor, Tensor | None, Tensor | None], Tensor] | None
    needs: tuple[str, ...]
    source: str
    interacts: bool = False


def _magnitude(A_log: Tensor, h2: Tensor | None, abar: Tensor | None) -> Tensor:
    return A_log.abs().unsqueeze(0)


def _a_log(A_log: Tensor, h2: Tensor | None, abar: Tensor | None) -> Tensor:
    return A_log.square() * h2


def _transition(A_log: Tensor, h2: Tensor | None, abar: Tensor | None) -> Tensor:
    return abar.square() * h2


SALIENCIES = {
    "magnitude": Saliency(_magnitude, (), "abs(A_log), no data (Han et al. 2015)"),
    "a_log": Saliency(_a_log, ("h2",), "A_log^2 sum_b h_{t-1}^2 (SparseSSM, theorem 1; release of June 2025)"),
    "transition": Saliency(
        _transition, ("h2", "abar"), "(sum_b Abar_t)^2 sum_b h_{t-1}^2 (SparseSSM, release of October 2025)"
    ),
    "output": Saliency(
        None, ("gram",), "what the block's output loses: |W_out_d|^2 sum (C_t Abar_t h_{t-1} silu(z))^2", interacts=True
    ),
}
