"""How much an entry of A_log matters at each time step: S (T,rows,cols), low means prunable.

A new criterion is one function and one row in SALIENCIES, or a call of `register_saliency`; the command line, every pattern
and every aggregate use it from there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # --help needs the names and does not wait for torch
    from torch import Tensor

# Sums over the calibration windows that a score may need, by name; (T,rows,cols) each.
NEEDS = {
    "h2": "sum over windows of h_{t-1}^2, the state that enters step t (for a head: summed over its entries)",
    "abar": "sum over windows of the transition Abar_t",
    "ch2": "sum over windows of (C_t h_t)^2, what the output reads of the state",
}


@dataclass(frozen=True)
class Saliency:
    """A criterion.

    Attributes:
        score: of A_log (rows,cols) and, by their names, the sums in `needs`, (T,rows,cols) each -> (T,rows,cols).
        source: where it is from, in one line.
        interacts: it scores sets of entries instead, by the sums in `needs` (pruning.search); score is None.
    """

    score: Callable[..., Tensor] | None
    needs: tuple[str, ...]
    source: str
    interacts: bool = False

    def __call__(self, A_log: Tensor, statistics: Any) -> Tensor:
        """The scores for an object that has the sums as attributes."""
        assert self.score is not None  # those that interact are searched
        return self.score(A_log, **{name: getattr(statistics, name) for name in self.needs})


def magnitude(A_log: Tensor) -> Tensor:
    return A_log.abs().unsqueeze(0)


def a_log(A_log: Tensor, h2: Tensor) -> Tensor:
    return A_log.square() * h2


def transition(A_log: Tensor, h2: Tensor, abar: Tensor) -> Tensor:
    return abar.square() * h2


def ghost(A_log: Tensor, ch2: Tensor) -> Tensor:
    return ch2  # its root of the mean keeps the order


SALIENCIES = {
    "magnitude": Saliency(magnitude, (), "abs(A_log), no data (Han et al. 2015)"),
    "a_log": Saliency(a_log, ("h2",), "A_log^2 sum_b h_{t-1}^2 (SparseSSM, theorem 1; release of June 2025)"),
    "transition": Saliency(
        transition, ("h2", "abar"), "(sum_b Abar_t)^2 sum_b h_{t-1}^2 (SparseSSM, release of October 2025)"
    ),
    "ghost": Saliency(ghost, ("ch2",), "sum (C_t h_t)^2, controllability and observability (GHOST, arXiv 2602.11408)"),
    "output": Saliency(None, ("gram",), "what the block's output loses, sets of entries together", interacts=True),
}


def register_saliency(
    name: str, score: Callable[..., Tensor], needs: tuple[str, ...] = (), *, source: str = "registered"
) -> None:
    """Adds a criterion, which can then be used by its name with every pattern, aggregate and method.

    Args:
        score: of A_log (rows,cols) and the sums in `needs` by their names, (T,rows,cols) each; returns (T,rows,cols), or
            (1,rows,cols) where nothing is needed. Low means prunable. For Mamba-1 rows are channels and columns states,
            for Mamba-2 there is one row and a column for each head.
        needs: of NEEDS.

    Raises:
        ValueError: the name is taken, or a need is not known.
    """
    unknown = sorted(set(needs) - NEEDS.keys())
    if name in SALIENCIES or not name.isidentifier():
        raise ValueError(f"{name!r} cannot name a saliency: it is taken, or is not an identifier")
    if unknown:
        raise ValueError(f"unknown sums {', '.join(unknown)}, known are {', '.join(NEEDS)}")
    SALIENCIES[name] = Saliency(score, tuple(needs), source)
