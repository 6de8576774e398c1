"""Statistics of a module's inputs: accumulators with `update` and `merge`, and nothing else.

They keep plain sums in SUM_DTYPE over all windows seen; the caller normalises them. (The sums over
states are kept by the scan itself, `sparsessm.kernels.selective_scan.ScanStatistics`.)
"""

from __future__ import annotations

import weakref
from collections.abc import Mapping
from typing import Protocol, Self

import torch
from torch import Tensor

from sparsessm.kernels.matmul import linear
from sparsessm.kernels.selective_scan import SUM_DTYPE


class Accumulator(Protocol):
    """A running sum over calibration windows, kept in the tensor `total`."""

    total: Tensor

    def tensors(self) -> list[Tensor]:
        """All that is summed: what processes add up among themselves."""

    def update(self, inputs: Tensor, tokens: Tensor | None = None) -> None:
        """Adds a batch of inputs, (B,L,columns); for conv1d (B,K-1+L,D), with the inputs before the piece.

        tokens: (B,L), what the products of each token count for; None for 1.
        """

    def merge(self, other: Self) -> None:
        """Adds what another process or another share of the windows has seen."""


class _Sum:
    def __init__(self, *shape: int, device: torch.device | str = "cpu") -> None:
        self.total = torch.zeros(shape, dtype=SUM_DTYPE, device=device)

    def tensors(self) -> list[Tensor]:
        return [self.total]

    def merge(self, other: Self) -> None:
        self.total += other.total.to(self.total.device)


class Gram(_Sum):
    """X X^T (cols,cols), summed over windows and steps; `skip` leading steps are the history of a convolution."""

    def __init__(self, cols: int, skip: int = 0, device: torch.device | str = "cpu") -> None:
        super().__init__(cols, cols, device=device)
        self.skip = skip

    def update(self, inputs: Tensor, tokens: Tensor | None = None) -> None:
        x = _weighted(inputs[:, self.skip :], tokens).T.contiguous()  # (cols,B*L)
        self.total += linear(x, x)


class SquaredNorms(_Sum):
    """The diagonal of X X^T, (cols,)."""

    def __init__(self, cols: int, device: torch.device | str = "cpu") -> None:
        super().__init__(cols, device=device)

    def update(self, inputs: Tensor, tokens: Tensor | None = None) -> None:
        self.total += _weighted(inputs, tokens).square().sum(0, dtype=SUM_DTYPE)


class ShiftedGram(_Sum):
    """X X^T of each channel's K shifted inputs, (D,K,K): a depthwise channel sees only its own."""

    def __init__(self, channels: int, K: int, device: torch.device | str = "cpu") -> None:
        super().__init__(channels, K, K, device=device)

    def update(self, inputs: Tensor, tokens: Tensor | None = None) -> None:
        K = self.total.shape[-1]
        padded = inputs.float()
        steps = padded.shape[1] - (K - 1)
        shifted = [padded[:, k : k + steps] for k in range(K)]  # weight k meets the input K-1-k steps back
        if tokens is not None:
            shifted = [x * tokens.sqrt()[..., None] for x in shifted]
        for i in range(K):
            for j in range(i, K):
                products = (shifted[i] * shifted[j]).sum((0, 1), dtype=SUM_DTYPE)
                self.total[:, i, j] += products
                if j > i:
                    self.total[:, j, i] += products


class Readers:
    """The accumulators of some modules, of which those share their sums that read the very same tensor.

    So do the queries, keys and values of attention, and the two branches of a gated MLP. Which modules do is seen when each
    reads for the first time: a layer takes the same way every time, and a module reads once on the way.

    Attributes:
        leaders: by module that has read, the one that sums for it.
    """

    def __init__(self, accumulators: Mapping[str, Accumulator]) -> None:
        self.accumulators = accumulators
        self.leaders: dict[str, str] = {}
        self._read: list[tuple[str, weakref.ref[Tensor], int]] = []  # by whom, what, and in which version

    def update(self, module: str, tokens: Tensor | None, inputs: Tensor) -> None:
        """Shows a module's inputs to the accumulator that sums for it, if that has not seen them; see Accumulator.update."""
        if module not in self.leaders:
            self.leaders[module] = module
            if tokens is None:
                version = inputs._version  # a tensor that was written to in between holds other values
                alike = (other for other, read, then in self._read if read() is inputs and then == version)
                leader = next((other for other in alike if self._kind(other) == self._kind(module)), module)
                self.leaders[module] = self.leaders[leader]
                self._read.append((module, weakref.ref(inputs), version))
        if self.leaders[module] == module:
            self.accumulators[module].update(inputs, tokens)

    def _kind(self, module: str) -> tuple[type, torch.Size, int]:
        mine = self.accumulators[module]
        return type(mine), mine.total.shape, getattr(mine, "skip", 0)

    def finish(self, leaders: Mapping[str, str]) -> list[Accumulator]:
        """Gives all modules their sums, and returns the accumulators that hold them, each once.

        leaders: of all processes, of which one may have had no windows.
        """
        for module, leader in leaders.items():
            self.accumulators[module].total = self.accumulators[leader].total
        return [mine for module, mine in self.accumulators.items() if leaders.get(module, module) == module]


class CrossGram(_Sum):
    """X X^T of a module's inputs X and T X^T, (rows,cols) in `cross`, with the outputs T that it should have."""

    def __init__(self, rows: int, cols: int, device: torch.device | str = "cpu") -> None:
        super().__init__(cols, cols, device=device)
        self.cross = torch.zeros(rows, cols, dtype=SUM_DTYPE, device=device)

    def update(self, inputs: Tensor, targets: Tensor) -> None:
        """inputs (B,L,cols), targets (B,L,rows)."""
        x = inputs.flatten(0, 1).float().T.contiguous()  # (cols,B*L)
        self.total += linear(x, x)
        self.cross += linear(targets.flatten(0, 1).float().T, x)

    def tensors(self) -> list[Tensor]:
        return [self.total, self.cross]

    def merge(self, other: Self) -> None:
        super().merge(other)
        self.cross += other.cross.to(self.cross.device)


def _weighted(inputs: Tensor, tokens: Tensor | None) -> Tensor:
    """Inputs (B,L,columns) as (B*L,columns) float32, each token times the root of its weight (B,L)."""
    flat = inputs.flatten(0, 1).float()
    return flat if tokens is None else flat * tokens.flatten().sqrt()[:, None]


def hessian(gram: Tensor, nsamples: int) -> Tensor:
    """H = (2/n) X X^T in float32, n calibration windows (SparseGPT, equation 2)."""
    return (gram * (2.0 / nsamples)).float()
