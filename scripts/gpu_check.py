"""Checks the scans for CUDA, of Mamba-1 and of heads, on this machine's GPU against the references in float64; times them.

    bash scripts/gpu_check.sh

Needs torch with CUDA and triton, no other package; mamba-ssm is timed where it is installed, and the output says
whether causal-conv1d computes the convolution. Exit code 0 if every check
passed, 1 if one did not, 2 where there is no GPU or no triton.

Times are medians of events on the GPU, its cache emptied before each; those of mamba-ssm hold the copies that its
layout needs. GB/s: the bytes that a scan has to move at least (each tensor once, each sum both ways) by its time;
beside it the share of what a copy on this GPU reaches.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from scripts import gpu_check_heads
from scripts.gpu_check_heads import off
from sparsessm.kernels.chunked_scan import chunked_scan
from sparsessm.kernels.selective_scan import EFFECTS, ScanStatistics, selective_scan_ref

NEEDS = ("h2", "abar", "hh", "gram")
# (B,L,D,N): one of everything, sizes that fit no tile, more samples than are summed at once, the models' own.
SHAPES = [
    (1, 1, 1, 1), (3, 47, 33, 5), (2, 20, 31, 64), (4, 65, 257, 20), (17, 9, 48, 2), (1, 2048, 64, 16),
    (8, 128, 1536, 16), (8, 128, 5120, 16),
]  # fmt: skip
Shape = tuple[int, int, int, int]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
TOLERANCE = 2e-5  # of the largest value of a tensor, beside the rounding of y to its dtype
MODELS = {"mamba-130m": 1536, "mamba-2.8b": 5120}  # channels; 16 states
BATCH, LENGTHS, TIMED_NEEDS = 8, (128, 2048), [(), ("h2",), ("h2", "abar"), ("hh",), ("gram",)]

Scan = Callable[..., tuple[Tensor, Tensor]]


def draw(shape: Shape, dtype: torch.dtype, device: str, seed: int = 0, **changes: object) -> dict:
    """Arguments of a scan as a block gives them: z, B and C are slices of larger tensors."""
    B, L, D, N = shape
    g = torch.Generator(device).manual_seed(seed)

    def normal(*sizes: int, dtype: torch.dtype = torch.float32) -> Tensor:
        return torch.randn(sizes, generator=g, device=device).to(dtype)

    both, projected = normal(B, L, 2 * D, dtype=dtype), normal(B, L, 3 + 2 * N, dtype=dtype)
    return {
        "u": normal(B, L, D, dtype=dtype), "delta": normal(B, L, D, dtype=dtype), "A": -torch.exp(normal(D, N)),
        "B": projected[..., 3 : 3 + N], "C": projected[..., 3 + N :], "D": normal(D), "z": both[..., D:],
        "delta_bias": normal(D) - 2, "delta_softplus": True, "h0": None, **changes,
    }  # fmt: skip


def check(scan: Scan, device: str, shapes: list[Shape], report: Callable[[str], None] = print) -> int:
    """Compares `scan` with the reference in float64: a report per shape and dtype; returns how many were wrong."""
    wrong = 0
    for number, (shape, dtype) in enumerate((shape, dtype) for shape in shapes for dtype in DTYPES):
        _, L, D, N = shape
        effect = EFFECTS[number % len(EFFECTS)]
        values = draw(shape, dtype, device, seed=number)
        exact = ScanStatistics.zeros(NEEDS, L, D, N, device, effect)
        expected = selective_scan_ref(
            **{k: v.double() if isinstance(v, Tensor) else v for k, v in values.items()}, statistics=exact
        )
        sums = [ScanStatistics.zeros(NEEDS, L, D, N, device, effect) for _ in range(2)]
        (y, state), again = (scan(**values, statistics=each) for each in sums)
        plain, last = scan(**values)
        rounding = 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps / 2
        errors = {
            "y": off(y, expected[0]) - rounding, "y without sums": off(plain, expected[0]) - rounding,
            "state": off(state, expected[1]), "state without sums": off(last, expected[1]),
            **{name: off(getattr(sums[0], name), getattr(exact, name)) for name in NEEDS},
            **pieces(scan, values, exact, expected, rounding),
        }  # fmt: skip
        faults = [f"{name} off by {error:.1e}" for name, error in errors.items() if not error <= TOLERANCE]
        pairs = zip([y, state, *sums[0].tensors()], [*again, *sums[1].tensors()], strict=True)
        if not all(torch.equal(first, second) for first, second in pairs):
            faults.append("other bits the second time")
        no_transition = ScanStatistics.zeros(("abar",), L, D, N, device)
        scan(**values | {"A": torch.full_like(values["A"], -torch.tensor(30.0).exp().item())}, statistics=no_transition)
        if no_transition.abar.any():
            faults.append("transitions where there are none")
        worst = max(max(errors.values()), 0.0)
        report(f"{shape!s:>20} {str(dtype)[6:]:>8} {effect:>7}  {'; '.join(faults) or f'right, off by {worst:.1e}'}")
        wrong += bool(faults)
    return wrong


def pieces(scan: Scan, values: dict, exact: ScanStatistics, expected: tuple[Tensor, Tensor], rounding: float) -> dict:
    """Errors of a scan in two pieces, the second from where the first ended."""
    L, found, state, counterfactual = values["u"].shape[1], [], None, None
    empty = {name: torch.zeros_like(getattr(exact, name)) for name in NEEDS}
    total = dataclasses.replace(exact, **empty, counterfactual=None)
    for part in (slice(0, L // 3), slice(L // 3, L)):
        if part.start == part.stop:
            continue
        piece = {k: v[:, part] if k in ("u", "delta", "B", "C", "z") else v for k, v in values.items()}
        sums = dataclasses.replace(total, h2=total.h2[part], abar=total.abar[part], counterfactual=counterfactual)
        y, state = scan(**piece | {"h0": state}, statistics=sums)
        counterfactual = sums.counterfactual
        found.append(y)
    errors = {"y": off(torch.cat(found, 1), expected[0]) - rounding, "state": off(state, expected[1])}
    errors |= {name: off(getattr(total, name), getattr(exact, name)) for name in NEEDS}
    return {f"{name} in pieces": error for name, error in errors.items()}


def least_bytes(B: int, L: int, D: int, N: int, size: int, needs: tuple[str, ...]) -> int:
    """What a scan of values of `size` bytes has to move: u, delta, z, y, B, C, A, D, bias, state; sums both ways."""
    sums = {"h2": L * D * N, "abar": L * D * N, "hh": N * N, "gram": D * N * N}
    values, weights = 4 * B * L * D + 2 * B * L * N, D * N + 2 * D + B * D * N
    return size * values + 4 * weights + 16 * sum(sums[name] for name in needs)


def median_ms(run: Callable[[], object], repeats: int) -> float:
    """Milliseconds of `run` on the GPU, once to warm up and then the median, each time with an empty cache."""
    run()
    emptied = torch.empty(1 << 28, dtype=torch.uint8, device="cuda")
    times = []
    for _ in range(repeats):
        start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        emptied.zero_()
        start.record()
        run()
        stop.record()
        stop.synchronize()
        times.append(start.elapsed_time(stop))
    return statistics.median(times)


def copy_bandwidth() -> float:
    """GB/s of a copy within the GPU's memory, read and written bytes together."""
    source = torch.empty(1 << 29, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    return 2 * source.numel() / median_ms(lambda: target.copy_(source), 20) / 1e6


def time_all(dtype: torch.dtype) -> None:
    """Prints the table of times for inputs of a dtype."""
    from sparsessm.kernels import convolution, scan_cuda

    copy = copy_bandwidth()
    theirs = scan_cuda.mamba_ssm_scan("cuda", dtype)
    packages = {"mamba-ssm": theirs, "causal-conv1d": convolution.causal_conv1d("cuda", dtype)}
    served = ", ".join(f"{'with' if found else 'no'} {name}" for name, found in packages.items())
    print(f"\n{str(dtype)[6:]}, B {BATCH}, N 16; a copy has {copy:.0f} GB/s; {served}")
    print("     model     L     sums        ms   GB/s of copy  torch loop ms  mamba-ssm ms")
    for (model, D), L in ((pair, L) for pair in MODELS.items() for L in LENGTHS):
        values = draw((BATCH, L, D, 16), dtype, "cuda")
        for needs in TIMED_NEEDS:
            sums = ScanStatistics.zeros(needs, L, D, 16, "cuda")
            ours = median_ms(lambda: scan_cuda.scan_by_triton(**values, statistics=sums), 20)  # noqa: B023
            loop = median_ms(lambda: selective_scan_ref(**values, statistics=sums), 3)  # noqa: B023
            other = ""
            if theirs and not needs:
                arguments = [value for name, value in values.items() if name != "h0"]
                other = f"{median_ms(lambda: scan_cuda.scan_by_mamba_ssm(theirs, *arguments), 20):.3f}"  # noqa: B023
            speed = least_bytes(BATCH, L, D, 16, dtype.itemsize, needs) / ours / 1e6
            print(
                f"{model:>10} {L:>5} {'+'.join(needs) or 'none':>8} {ours:>9.3f} {speed:>6.0f} {speed / copy:>7.0%} "
                f"{loop:>14.1f} {other:>13}"
            )


@torch.no_grad()
def main() -> int:
    """The command; returns its exit code."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    if not torch.cuda.is_available():
        print(f"error: no CUDA GPU is available to torch {torch.__version__}: nothing to check", file=sys.stderr)
        return 2
    try:
        import triton

        from sparsessm.kernels.scan_cuda import scan_by_triton
    except ImportError as error:
        print(f"error: the scan for CUDA needs triton ({error}): pip install triton", file=sys.stderr)
        return 2
    print(f"{torch.cuda.get_device_name()}; torch {torch.__version__}, triton {triton.__version__}")
    wrong = check(scan_by_triton, "cuda", SHAPES) + gpu_check_heads.check(chunked_scan, "cuda", gpu_check_heads.SHAPES)
    count = len(SHAPES) * len(DTYPES) + len(gpu_check_heads.SHAPES) * len(gpu_check_heads.DTYPES)
    print(f"{wrong} of {count} checks failed" if wrong else "all checks passed")
    for dtype in (torch.bfloat16, torch.float32):
        time_all(dtype)
        gpu_check_heads.time_all(dtype, median_ms)
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
