"""The interface of an SSM mixer: its forward in three steps, its A_log, and the structures that can be removed.

A mixer of ours computes on the parameters of a stock one and replaces it inside the stock layer's own forward. It
passes the inputs of its modules to hooks, adds to scan statistics, and can continue a window where a piece of it ended.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Self

import torch
from torch import Tensor, nn

from sparsessm.kernels.backends import wants_gradient
from sparsessm.kernels.chunked_scan import compiled_kernels
from sparsessm.kernels.convolution import causal_conv, causal_conv_silu
from sparsessm.kernels.matmul import linear

Hooks = Mapping[str, Callable[[Tensor], None]]  # by module: NAME gets its inputs, NAME.out its outputs
OUT = ".out"
NO_HOOKS: Hooks = {}
Removed = dict[str, Tensor]  # parameter name within the mixer -> bool in its shape from before, True = removed


@dataclass(frozen=True)
class Cache:
    """The cache of a mixer between two pieces of a window: conv (B,K-1,channels) inputs, state (B,...)."""

    conv: Tensor
    state: Tensor


@dataclass(frozen=True)
class ScanInputs:
    """The inputs of a scan that do not depend on A_log; a subclass has tensors (B,L,any) as its fields."""

    def compact(self) -> Self:
        """The same without memory that is shared with larger tensors."""
        return type(self)(*(tensor.contiguous() for tensor in vars(self).values()))

    def nbytes(self) -> int:
        """Memory of `compact()`."""
        return sum(tensor.numel() * tensor.element_size() for tensor in vars(self).values())


class Mixer(ABC):
    """Our forward of one SSM mixer.

    Attributes:
        module: the stock mixer. MODULES: names of its linear and convolution modules, in the order in which data meets
            them; the last is what leads back to the residual stream. STRUCTURES: what can be removed whole.
        importance: (M,), what squared errors of the output count for; None for all the same.
    """

    MODULES: ClassVar[tuple[str, ...]]
    STRUCTURES: ClassVar[tuple[str, ...]] = ()

    def __init__(self, module: nn.Module) -> None:
        self.module: Any = module  # transformers' own class: what it holds has no types here
        self.importance: Tensor | None = None

    def weighed_out(self) -> Tensor:
        """The last module's weight in float32, its rows times the root of what the squared error of each counts for."""
        W = self.module.get_submodule(self.MODULES[-1]).weight.data.float()
        return W if self.importance is None else W * self.importance.to(W.device).sqrt()[:, None]

    @abstractmethod
    def prepare(self, x: Tensor, conv: Tensor | None, hooks: Hooks) -> tuple[ScanInputs, Tensor]:
        """All before the scan, which does not depend on A_log: x (B,L,M), conv the last inputs of the convolution before."""

    @abstractmethod
    def scan(
        self, inputs: Any, state: Tensor | None, statistics: Any = None, hooks: Hooks = NO_HOOKS
    ) -> tuple[Tensor, Tensor]:
        """The scan, gate and norm: the input of the last module, (B,L,d_inner), and the state after the last step."""

    def project(self, y: Tensor, hooks: Hooks) -> Tensor:
        """The last module: (B,L,d_inner) -> (B,L,M)."""
        return self._linear(self.MODULES[-1], y, hooks)

    def _linear(self, name: str, x: Tensor, hooks: Hooks) -> Tensor:
        """A linear module, whose output is shown."""
        out = apply_linear(self.module.get_submodule(name), x)
        show(hooks, name + OUT, out)
        return out

    @abstractmethod
    def scan_statistics(
        self, needs: tuple[str, ...], steps: int, device: torch.device | str, *, effect: str, structure: str
    ) -> Any:
        """Empty sums for `steps` time steps; needs names them, structure says of what (STRUCTURES, or "entries")."""

    @property
    @abstractmethod
    def A_log(self) -> Tensor:
        """A_log as a matrix (rows,cols), a view of the parameter: groups of N of M lie along cols."""

    def scored(self, structure: str) -> Tensor:
        """A_log in the shape (rows,cols) of the scores for a structure; whole columns of it are removed."""
        return self.A_log

    def magnitudes(self, structure: str) -> Tensor:
        """What saliency magnitude scores, (rows,cols) of the scores for a structure."""
        return self.scored(structure)

    def competing(self, structure: str) -> int:
        """Into how many groups of consecutive columns a structure falls that must lose the same number."""
        return 1

    def output_gram(self, gram: Tensor) -> Tensor:
        """G (groups,cols,cols): what the layer's output loses with sets of entries, from the sums "gram"."""
        return gram

    @abstractmethod
    def remove(self, structure: str, columns: Tensor) -> Removed:
        """Removes what columns (cols,) chooses from the stock mixer."""

    @abstractmethod
    def silenced(self) -> dict[str, slice]:
        """Rows of parameters that, set to zero, leave D u as the scan's output, in every runtime."""


def apply_linear(module: Any, x: Tensor) -> Tensor:
    return linear(x, module.weight, module.bias)


def show(hooks: Hooks, name: str, value: Tensor) -> None:
    if name in hooks:
        hooks[name](value)


def convolved(mixer: Any, x: Tensor, before: Tensor | None, hooks: Hooks, *, kernels: Any = None) -> tuple[Tensor, Tensor]:
    """The causal convolution of a stock mixer with its activation: (B,L,channels) -> (B,L,channels).

    before: (B,K-1,channels), the inputs before x, zero if None; those before the next piece are returned as well. The hook
    of conv1d gets them all, (B,K-1+L,channels). kernels: see `compiled_kernels`.
    """
    weight, bias = mixer.conv1d.weight, mixer.conv1d.bias
    channels, _, K = weight.shape
    if before is None:
        before = x.new_zeros(len(x), K - 1, channels)
    apart = "conv1d" + OUT in hooks  # what it makes is wanted before its activation
    if wants_gradient(x, before, weight, bias):  # forward and back by torch take several times as long
        kernels = compiled_kernels(x, weight)
    if mixer.activation == "silu" and kernels is not None and not apart:
        if "conv1d" in hooks:
            show(hooks, "conv1d", torch.cat([before, x], dim=1))
        last = torch.cat([before, x[:, max(0, x.shape[1] - (K - 1)) :]], dim=1)
        return kernels.conv_silu(x, before, weight, bias), last[:, last.shape[1] - (K - 1) :].clone()
    padded = torch.cat([before, x], dim=1)
    show(hooks, "conv1d", padded)
    if mixer.activation == "silu" and not apart:
        out = causal_conv_silu(padded, weight, bias)
    else:
        made = causal_conv(padded, weight, bias)
        show(hooks, "conv1d" + OUT, made)
        out = mixer.act(made)
    # a copy: a view would keep the whole piece alive
    return out, padded[:, padded.shape[1] - (K - 1) :].clone()


def keep_rows(module: nn.Module, name: str, keep: Tensor, dim: int = 0) -> Tensor:
    """Replaces a parameter by what keep chooses along a dimension; returns the mask of the rest in the old shape."""
    parameter = module.get_parameter(name)
    owner, _, last = name.rpartition(".")
    keep = keep.to(parameter.device)
    kept = parameter.data.index_select(dim, keep.nonzero().flatten()).contiguous()
    setattr(module.get_submodule(owner), last, nn.Parameter(kept, requires_grad=False))
    shape = [1] * parameter.dim()
    shape[dim] = -1
    return (~keep).view(shape).expand(parameter.shape).contiguous()
