"""The selective scan of Mamba (Gu and Dao 2023, algorithm 2), which also sums the statistics of its states for pruning.

`selective_scan_ref` is written to be read; every faster kernel is tested against it. `selective_scan` is the one that
the rest of the project calls: it takes the kernel that the device of its inputs and the installed packages allow.

    dt_t = softplus(delta_t + delta_bias)        Abar_t = exp(dt_t A)
    h_t  = Abar_t h_{t-1} + dt_t B_t u_t         y_t = (sum_n C_t[n] h_t[:,n] + Dskip u_t) silu(z_t)
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any, ClassVar, Self

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsessm.errors import InputError, require_known
from sparsessm.kernels.backends import wants_gradient

# Sums over samples are kept in float64: each term is a float32 product, or a float32 sum of the products of a few samples
# of a batch, so the order in which batches (or processes) arrive moves the sum by about 1e-16 and the float32 value read
# from it practically never.
SUM_DTYPE = torch.float64

EFFECTS = ("zero", "unit", "removed")


@dataclass
class ScanSums:
    """Sums that a scan adds to as it goes; a field that is None is not computed. All tensors are SUM_DTYPE.

    `effect` says what pruned means (EFFECTS); counterfactual is not a sum: `tensors` leaves it out. What each field holds
    is the subclass's to say.
    """

    h2: Tensor | None = None
    abar: Tensor | None = None
    hh: Tensor | None = None
    ch2: Tensor | None = None
    gram: Tensor | None = None
    effect: str = "zero"
    counterfactual: Tensor | None = None

    FIELDS: ClassVar[tuple[str, ...]] = ("h2", "abar", "hh", "ch2", "gram")

    def __post_init__(self) -> None:
        require_known("effect", self.effect, EFFECTS)

    @classmethod
    def filled(
        cls, needs: tuple[str, ...], shapes: Mapping[str, tuple[int, ...]], device: torch.device | str, **others: Any
    ) -> Self:
        """Empty sums of the fields that `needs` names, in their shapes; others: fields that are no sums.

        Raises:
            ValueError: a need that is not known.
        """
        unknown = [name for name in needs if name not in shapes]
        if unknown:
            raise ValueError(f"unknown sums {', '.join(unknown)}, known are {', '.join(shapes)}")
        sums = cls(**others)
        for name in needs:
            setattr(sums, name, torch.zeros(shapes[name], dtype=SUM_DTYPE, device=device))
        return sums

    def tensors(self) -> list[Tensor]:
        """The sums that are kept, in the order of FIELDS: what processes add up among themselves."""
        return [value for name in self.FIELDS if (value := getattr(self, name)) is not None]

    def needs_counterfactual(self) -> bool:
        """Whether a scan has to run the recurrence with A = -1 beside its own."""
        return self.gram is not None and self.effect == "unit"


@dataclass
class ScanStatistics(ScanSums):
    """Sums over the states of channels.

    Attributes:
        h2: (T,D,N), sum over the batch of h_{t-1}^2, the state that enters step t (SparseSSM, theorem 1).
        abar: (T,D,N), sum over the batch of Abar_t.
        hh: (N,N), sum over batch, steps and channels of h_{t-1} h_{t-1}^T (the Hessian of SparseGPT on A_log).
        ch2: (T,D,N), sum over the batch of C_t^2 h_t^2: what each state adds to the output (GHOST).
        gram: (D,N,N), sum over batch and steps of e e^T per channel, where e (N,) is what the gated output of the channel
            loses with each of its states pruned alone. `effect` says what pruned means:
            zero     e[n] = C_t[n] Abar_t[n] h_{t-1}[n] silu(z_t)    (no transition)
            unit     e[n] = C_t[n] (h_t - h'_t)[n] silu(z_t)         (h' the same recurrence with A = -1)
            removed  e[n] = C_t[n] h_t[n] silu(z_t)                  (the state is gone)
            Without a gate, silu(z_t) counts as 1.
        counterfactual: (B,D,N), h' after the last step of the scan that ran last, left there by every scan that fills
            `gram` for the effect unit. Who cuts a sequence into pieces gives it to the next piece together with h0; a scan
            without h0 starts h' at zero, whatever this field holds.
    """

    @classmethod
    def zeros(
        cls, needs: tuple[str, ...], steps: int, D: int, N: int, device: torch.device | str, effect: str = "zero"
    ) -> ScanStatistics:
        """Empty sums for a scan of `steps` time steps; `needs` names the fields to be filled."""
        each = (steps, D, N)
        shapes = {"h2": each, "abar": each, "hh": (N, N), "ch2": each, "gram": (D, N, N)}
        return cls.filled(needs, shapes, device, effect=effect)

    def wanted(self) -> frozenset[str]:
        """The names of the sums that are kept."""
        return frozenset(name for name in self.FIELDS if getattr(self, name) is not None)

    def first_counterfactual(self, h0: Tensor | None) -> Tensor | None:
        """h' before the first step of a scan that starts from h0; None is zero."""
        if h0 is None:
            return None
        if self.counterfactual is None or self.counterfactual.shape != h0.shape:
            raise ValueError("a scan from h0 needs the counterfactual of the piece before for the effect unit")
        return self.counterfactual


def selective_scan_ref(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    h0: Tensor | None = None,
    statistics: ScanStatistics | None = None,
) -> tuple[Tensor, Tensor]:
    """One step of the recurrence after the other, in float32 (float64 for float64 inputs).

    Args:
        u, delta, z: (B,L,D) input, time step before bias and softplus, gate.
        A: (D,N), negative. B, C: (B,L,N). D, delta_bias: (D,).
        h0: (B,D,N) state before the first step, zero if None.
        statistics: sums to add to, see ScanStatistics.

    Returns:
        y (B,L,D) in the dtype of u, and the last state (B,D,N) in the dtype of the computation.
    """
    dtype = torch.float64 if u.dtype == torch.float64 else torch.float32
    batch, steps, channels = u.shape
    x, dt, A, B, C = (tensor.to(dtype) for tensor in (u, delta, A, B, C))
    if delta_bias is not None:
        dt = dt + delta_bias.to(dtype)
    if delta_softplus:
        dt = F.softplus(dt)
    dtx = dt * x

    gate = None if z is None else F.silu(z.to(dtype))

    h = torch.zeros(batch, channels, A.shape[1], dtype=dtype, device=u.device) if h0 is None else h0.to(dtype)
    counterfactual = None  # (B,D,N)
    if statistics is not None and statistics.needs_counterfactual():
        counterfactual = statistics.first_counterfactual(h0)
    counterfactual = torch.zeros_like(h) if counterfactual is None else counterfactual.to(dtype)
    y = torch.empty(batch, steps, channels, dtype=dtype, device=u.device)
    for t in range(steps):
        abar = torch.exp(dt[:, t, :, None] * A)  # (B,D,N)
        inflow = dtx[:, t, :, None] * B[:, t, None, :]  # (B,D,N)
        entered, h = h, abar * h + inflow
        y[:, t] = (h @ C[:, t, :, None]).squeeze(-1)  # (B,D,N) @ (B,N,1) -> (B,D)
        if statistics is not None:
            _add_statistics(statistics, t, entered, abar, h * C[:, t, None, :])
            if statistics.needs_counterfactual():
                counterfactual = torch.exp(-dt[:, t, :, None]) * counterfactual + inflow
            if statistics.gram is not None:
                lost = {"zero": abar * entered, "unit": h - counterfactual, "removed": h}[statistics.effect]
                lost = lost * C[:, t, None, :]
                _add_gram(statistics.gram, lost if gate is None else lost * gate[:, t, :, None])
    if D is not None:
        y = y + x * D.to(dtype)
    if gate is not None:
        y = y * gate
    if statistics is not None and statistics.needs_counterfactual():
        statistics.counterfactual = counterfactual
    return y.to(u.dtype), h


def _add_statistics(statistics: ScanStatistics, t: int, h: Tensor, abar: Tensor, read: Tensor) -> None:
    """Adds the state that enters step t, the transition that it meets there, and what is read of it then, to the sums."""
    if statistics.h2 is not None:
        statistics.h2[t] += h.to(SUM_DTYPE).square().sum(0)
    if statistics.abar is not None:
        statistics.abar[t] += abar.to(SUM_DTYPE).sum(0)
    if statistics.ch2 is not None:
        statistics.ch2[t] += read.to(SUM_DTYPE).square().sum(0)
    if statistics.hh is not None:
        flat = h.to(SUM_DTYPE).reshape(-1, h.shape[-1])  # (B,D,N) -> (B*D,N)
        statistics.hh += flat.T @ flat


def _add_gram(gram: Tensor, lost: Tensor) -> None:
    """Adds the products of what a channel loses with each of its states, lost (B,D,N), to gram (D,N,N)."""
    lost = lost.to(SUM_DTYPE)
    gram += torch.einsum("bdi,bdj->dij", lost, lost)


# Below this exponent all is forgotten in float32; sums of larger ones would leave their differences no digits.
FORGOTTEN = -128


def decays(A: Tensor, delta: Tensor, bias: Tensor | None = None, softplus: bool = False) -> bool:
    """Whether no state can grow; False where a number is undefined."""
    if not bool((A <= 0).all()):
        return False
    return softplus or bool(((delta if bias is None else delta + bias) >= 0).all())


KERNELS = ("ref", "cpu", "cuda")
_forced = os.environ.get("SPARSESSM_SCAN") or None
if _forced is not None and _forced not in KERNELS:
    raise InputError(f"SPARSESSM_SCAN is {_forced!r}, can be one of {', '.join(KERNELS)}: correct it, or unset it")


@contextmanager
def force_kernel(name: str | None) -> Iterator[None]:
    """Makes `selective_scan` use one of KERNELS for a while, even for slower cases; None lets it choose.

    The environment variable SPARSESSM_SCAN does the same for a whole process.
    """
    global _forced
    if name is not None:
        require_known("kernel", name, KERNELS)
    before, _forced = _forced, name
    try:
        yield
    finally:
        _forced = before


def selective_scan(
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    z: Tensor | None = None,
    delta_bias: Tensor | None = None,
    delta_softplus: bool = False,
    h0: Tensor | None = None,
    statistics: ScanStatistics | None = None,
) -> tuple[Tensor, Tensor]:
    """`selective_scan_ref` by the fastest kernel that there is for the inputs: same arguments, same results to rounding.

    Float64 inputs go to the reference, and so do sums that the kernel does not provide, and inputs that want gradients where
    the kernel has none.
    """
    name = kernel_for(u.device.type)
    if u.dtype == torch.float64:
        name = "ref"
    if wants_gradient(u, delta, A, B, C, D, z, delta_bias, h0):
        if name != "ref" and statistics is None and decays(A, delta, delta_bias, delta_softplus):
            with_gradient = _kernel_module({"cpu": "gradient", "cuda": "gradient_cuda"}[name]).scan_with_gradient
            return with_gradient(u, delta, A, B, C, D, z, delta_bias, delta_softplus, h0)
        name = "ref"
    if statistics is not None and not statistics.wanted() <= provided(name):
        name = "ref"
    return _load_kernel(name)(u, delta, A, B, C, D, z, delta_bias, delta_softplus, h0, statistics)


def kernel_for(device: str) -> str:
    """The name of the kernel that serves a kind of device, or of the one that is forced."""
    return _forced or _choose_kernel(device)


def provided(kernel: str) -> frozenset[str]:
    """The sums that a kernel computes, by its module; the reference computes all."""
    return frozenset(ScanStatistics.FIELDS) if kernel == "ref" else _kernel_module(kernel).PROVIDES


@functools.cache
def _choose_kernel(device: str) -> str:
    """The name of the kernel for a kind of device; says so if a package that would make it fast does not work."""
    if device == "cpu" and os.environ.get("NUMBA_DISABLE_JIT", "0") not in ("", "0"):
        warnings.warn("NUMBA_DISABLE_JIT is set: the slow scan is used instead of the fast one", stacklevel=3)
        return "ref"
    if device not in ("cpu", "cuda") or importlib.util.find_spec({"cpu": "numba", "cuda": "triton"}[device]) is None:
        return "ref"
    try:
        _load_kernel(device)
    except ImportError as error:
        warnings.warn(f"the fast scan for {device} cannot be used, the slow one is used instead: {error}", stacklevel=3)
        return "ref"
    return device


@functools.cache
def _load_kernel(name: str) -> Callable[..., tuple[Tensor, Tensor]]:
    """The function of a kernel. Its module, and the compiler that this needs, are loaded when first used."""
    return selective_scan_ref if name == "ref" else getattr(_kernel_module(name), f"selective_scan_{name}")


def _kernel_module(name: str) -> ModuleType:
    return importlib.import_module(f"sparsessm.kernels.scan_{name}")
