"""The selective scan for CUDA: `sparsessm.kernels.selective_scan.selective_scan_ref` by the kernels of `triton_kernels`.

Nothing of size (B,L,D,N) is ever made. If mamba-ssm is installed and agrees, it computes the scans that it supports.

With TRITON_INTERPRET=1 in the environment before triton is imported the kernels run on the CPU, slowly, for tests.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.util
import warnings
from collections.abc import Callable
from typing import Any

import torch
import triton
from torch import Tensor

from sparsessm.kernels import triton_kernels as kernels
from sparsessm.kernels.backends import agrees, first_line
from sparsessm.kernels.selective_scan import (
    EFFECTS,
    SUM_DTYPE,
    ScanStatistics,
    selective_scan_ref,
)

PROVIDES = frozenset({"h2", "abar", "hh", "gram"})

# Samples whose states a program keeps side by side to sum over them; more take one launch after the other.
SAMPLES = 8
# Elements of a tile for each warp that works on it: 16 states, or 32 products, in a thread.
WARP_TILE, PRODUCT_TILE = 512, 1024
MOST_WARPS, MOST_CHANNELS = 8, 32
# States on one side of a tile of products.
SIDE = 16


def selective_scan_cuda(
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
    """`selective_scan_ref` for tensors in the memory of a GPU, see there: inputs of 32 or 16 bits, no gradients."""
    values = (u, delta, A, B, C, D, z, delta_bias, delta_softplus)
    if not triton_works(u.device):
        return selective_scan_ref(*values, h0, statistics)
    plain = h0 is None and (statistics is None or not statistics.tensors())
    if plain and A.shape[1] <= 256 and all(x is None or x.dtype == u.dtype for x in (delta, B, C, z)):
        theirs = mamba_ssm_scan(u.device.type, u.dtype)
        if theirs is not None:
            return scan_by_mamba_ssm(theirs, *values)
    return scan_by_triton(*values, h0, statistics)


def scan_by_triton(
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
    """`selective_scan_cuda` by our own kernels, whatever is installed."""
    statistics = ScanStatistics() if statistics is None else statistics
    (batch, steps, channels), N = u.shape, A.shape[1]
    first_counterfactual = statistics.first_counterfactual(h0) if statistics.needs_counterfactual() else None
    y = torch.empty(u.shape, dtype=u.dtype, device=u.device)
    state = torch.empty(batch, channels, N, dtype=torch.float32, device=u.device)

    inputs = [_rows(x) for x in (u, delta, u if z is None else z, B, C)]
    sizes = (steps, channels, *(stride for x in inputs for stride in x.stride()[:2]))
    # an argument that is not given is a pointer that the kernel, compiled for `form`, does not read
    given = (A, D, delta_bias, h0, first_counterfactual)
    A, skip, bias, start, start_counterfactual = (state if x is None else _flat(x) for x in given)
    form = {
        "N": N,
        "WITH_BIAS": delta_bias is not None,
        "WITH_SOFTPLUS": bool(delta_softplus),
        "WITH_GATE": z is not None,
        "WITH_H0": h0 is not None,
    }

    with torch.cuda.device(u.device) if u.is_cuda else contextlib.nullcontext():
        h2, abar = (_sums(x, (steps, channels, N), state) for x in (statistics.h2, statistics.abar))
        summing = statistics.h2 is not None or statistics.abar is not None
        tile = _tile(N, min(batch, SAMPLES) if summing else 1)
        at_once = SAMPLES if summing else batch
        for first in range(0, batch, at_once):
            part = slice(first, first + at_once)
            count = min(at_once, batch - first)
            launch(
                kernels.scan, (triton.cdiv(channels, tile["BD"]), triton.cdiv(count, tile["BB"])),
                *(x[part] for x in inputs), y[part], A, skip, bias, start[part], state[part], h2, abar, count, *sizes,
                WITH_SKIP=D is not None, WITH_H2=statistics.h2 is not None, WITH_ABAR=statistics.abar is not None,
                **tile, **form,
            )  # fmt: skip
        if statistics.hh is not None or statistics.gram is not None:
            counterfactual = torch.empty_like(state) if statistics.needs_counterfactual() else state
            gram = _sums(statistics.gram, (channels, N, N), state)
            tile = _product_tile(N)
            effect = "zero" if statistics.gram is None else statistics.effect
            grid = tuple(triton.cdiv(*pair) for pair in ((channels, tile["BD"]), (N, tile["BI"]), (N, tile["BJ"])))
            parts = torch.empty(grid[0] if statistics.hh is not None else 0, N, N, dtype=SUM_DTYPE, device=u.device)
            launch(
                kernels.products, grid, *inputs, A, bias, start, start_counterfactual, counterfactual, parts, gram, batch,
                *sizes,
                WITH_HH=statistics.hh is not None, WITH_GRAM=statistics.gram is not None, EFFECT=EFFECTS.index(effect),
                **tile, **form,
            )  # fmt: skip
            if statistics.hh is not None:
                statistics.hh += parts.sum(0)
            if statistics.needs_counterfactual():
                statistics.counterfactual = counterfactual
    return y, state


def launch(kernel: Any, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
    kernel[grid](*arguments, **constants)


def _tile(N: int, samples: int) -> dict[str, int]:
    """States, samples and channels of a program of `kernels.scan`, and its warps."""
    BN, BB = triton.next_power_of_2(N), triton.next_power_of_2(samples)
    BD = min(MOST_CHANNELS, max(16 // BB, WARP_TILE // (BN * BB)))
    return {"BN": BN, "BB": BB, "BD": BD, "num_warps": min(MOST_WARPS, max(1, BN * BB * BD // WARP_TILE))}


def _product_tile(N: int) -> dict[str, int]:
    """States on either side and channels of a program of `kernels.products`: the work of one warp."""
    side = min(SIDE, triton.next_power_of_2(N))
    return {"BI": side, "BJ": side, "BD": min(MOST_CHANNELS, PRODUCT_TILE // side**2), "num_warps": 1}


def _rows(x: Tensor) -> Tensor:
    """(B,L,any) whose last axis lies side by side in memory; a copy only if it does not."""
    return x.detach() if x.stride(-1) == 1 else x.detach().contiguous()


def _flat(x: Tensor) -> Tensor:
    return x.detach().float().contiguous()


def _sums(x: Tensor | None, shape: tuple[int, ...], nothing: Tensor) -> Tensor:
    if x is None:
        return nothing
    assert x.shape == shape and x.dtype == SUM_DTYPE and x.is_contiguous(), "sums of another shape than the scan's"
    return x


@functools.cache
def triton_works(device: torch.device) -> bool:
    """Whether a kernel can be compiled and run: Triton wants a C compiler, and a GPU that it knows."""
    ones = torch.ones(1, 2, 1, device=device)
    try:
        scan_by_triton(ones, ones, -ones[0, :1], ones, ones)
    except Exception as error:  # of any kind: the slow scan works
        warnings.warn(f"triton does not work here, the slow scan is used instead: {first_line(error)}", stacklevel=3)
        return False
    return True


@functools.cache
def mamba_ssm_scan(device: str, dtype: torch.dtype) -> Callable[..., Any] | None:
    """The scan of mamba-ssm, if it is installed and agrees with ours on inputs of the dtype."""
    if importlib.util.find_spec("mamba_ssm") is None:
        return None

    def theirs(*arguments: Any) -> tuple[Tensor, Tensor]:
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

        return selective_scan_fn(*arguments)

    return theirs if agrees_with_ours(theirs, device, dtype) else None


def agrees_with_ours(theirs: Callable[..., Any], device: str, dtype: torch.dtype) -> bool:
    """Whether a function with the signature of mamba-ssm's selective_scan_fn computes our scan; warns if not."""
    generator = torch.Generator().manual_seed(0)
    u, delta, z, B, C = (torch.randn(2, 37, n, generator=generator).to(device, dtype) for n in (24, 24, 24, 6, 6))
    A, D, bias = (torch.randn(shape, generator=generator).to(device) for shape in ((24, 6), (24,), (24,)))
    values = (u, delta, -A.exp(), B, C, D, z, bias, True)
    ours = scan_by_triton(*values)
    return agrees(
        "mamba-ssm", "the scan", lambda: scan_by_mamba_ssm(theirs, *values), ours, (torch.finfo(dtype).eps, 0.0)
    )


def scan_by_mamba_ssm(
    theirs: Callable[..., Any], u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None,
    z: Tensor | None, delta_bias: Tensor | None, delta_softplus: bool,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Our scan by mamba-ssm's selective_scan_fn: it has time last, and wants A, D and delta_bias in float32."""
    u, delta, B, C = (x.transpose(1, 2) for x in (u, delta, B, C))  # (B,L,any) -> (B,any,L)
    z = None if z is None else z.transpose(1, 2)
    D, bias = (None if x is None else _flat(x) for x in (D, delta_bias))
    y, state = theirs(u, delta, _flat(A), B, C, D, z, bias, delta_softplus, True)
    return y.transpose(1, 2).contiguous(), state.contiguous()
