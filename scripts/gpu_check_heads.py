"""The part of scripts/gpu_check.py about the scan of Mamba-2's heads: its checks on a GPU, and its times."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from sparsessm.kernels.chunked_scan import HeadStatistics, chunked_scan_ref

NEEDS = ("h2", "abar", "hh", "ch2")
# (B,L,H,P,N,G): one of everything, sizes that fit no chunk, several groups, the models' own.
SHAPES = [(1, 1, 1, 1, 1, 1), (3, 47, 6, 5, 7, 2), (2, 33, 4, 16, 64, 4), (2, 300, 24, 64, 128, 1), (1, 512, 80, 64, 128, 1)]
DTYPES = (torch.float32, torch.bfloat16)
TOLERANCE = 2e-5  # of the largest value of a tensor; inputs are rounded to their dtype before both compute
MODELS = {"mamba2-130m": 24, "mamba2-2.7b": 80}  # heads; 64 channels, 128 states
BATCH, LENGTHS, TIMED_NEEDS = 8, (128, 2048), [(), ("h2",), ("h2", "abar"), ("hh",)]

Scan = Callable[..., tuple[Tensor, Tensor]]


def draw(shape: tuple[int, ...], dtype: torch.dtype, device: str, seed: int = 0) -> dict[str, Tensor | None]:
    """Arguments of a scan of heads as a mixer gives them."""
    B, L, H, P, N, G = shape
    g = torch.Generator(device).manual_seed(seed)

    def normal(*sizes: int) -> Tensor:
        return torch.randn(sizes, generator=g, device=device)

    return {
        "u": normal(B, L, H, P).to(dtype), "dt": F.softplus(normal(B, L, H) - 2), "A": -torch.exp(normal(H)),
        "B": normal(B, L, G, N).to(dtype), "C": normal(B, L, G, N).to(dtype), "D": normal(H), "h0": normal(B, H, P, N),
    }  # fmt: skip


def off(found: Tensor, expected: Tensor) -> float:
    """The largest difference, as a share of the largest value; infinite where something is not a number."""
    share = (found.double() - expected.double()).abs().max() / expected.double().abs().max().clamp(min=1e-30)
    return float(share.nan_to_num(torch.inf))


def check(scan: Scan, device: str, shapes: list[tuple[int, ...]], report: Callable[[str], None] = print) -> int:
    """Compares `scan` with the reference in float64, sums of heads and of states; returns how many were wrong."""
    wrong = 0
    for number, (shape, dtype) in enumerate((shape, dtype) for shape in shapes for dtype in DTYPES):
        _, L, H, _, N, _ = shape
        values = draw(shape, dtype, device, seed=number)
        wide = {name: value.double() if isinstance(value, Tensor) else value for name, value in values.items()}
        errors: dict[str, float] = {}
        for by_state in (False, True):
            needs = NEEDS[:-2] + NEEDS[-1:] if by_state else NEEDS
            exact, found, again = (HeadStatistics.zeros(needs, L, H, N, device, by_state=by_state) for _ in range(3))
            expected = chunked_scan_ref(**wide, statistics=exact)
            y, state = scan(**values, statistics=found)
            errors |= {"y": off(y, expected[0]), "state": off(state, expected[1])}
            kind = " of states" if by_state else ""
            errors |= {f"{name}{kind}": off(getattr(found, name), getattr(exact, name)) for name in needs}
            scan(**values, statistics=again)
            if not all(torch.equal(a, b) for a, b in zip(found.tensors(), again.tensors(), strict=True)):
                errors["bits, the second time"] = float("inf")
        plain, last = scan(**values)
        errors |= {"y without sums": off(plain, expected[0]), "state without sums": off(last, expected[1])}
        cut, parts, carried = L // 2, [], values["h0"]
        for some in (slice(0, cut), slice(cut, L)):
            if some.stop > some.start:
                steps = {name: values[name][:, some] for name in ("u", "dt", "B", "C")}
                part, carried = scan(**values | steps | {"h0": carried})
                parts.append(part)
        errors |= {"y in pieces": off(torch.cat(parts, 1), expected[0]), "state in pieces": off(carried, expected[1])}
        # y leaves mamba-ssm's kernels in the dtype of u
        rounding = 0.0 if dtype == torch.float32 else torch.finfo(dtype).eps / 2
        faults = [
            f"{name} off by {error:.1e}" for name, error in errors.items()
            if not error <= TOLERANCE + (rounding if name.startswith("y") else 0.0)
        ]  # fmt: skip
        wrong += bool(faults)
        said = f"wrong: {', '.join(faults)}" if faults else f"right, off by {max(errors.values()):.1e}"
        report(f"heads {' x '.join(map(str, shape))}, {str(dtype)[6:]}: {said}")
    return wrong


def time_all(dtype: torch.dtype, median_ms: Callable[[Callable[[], object], int], float]) -> None:
    """Prints the table of times for inputs of a dtype; the products that a scan is made of bound it, not its bytes."""
    from sparsessm.kernels import chunked_scan as kernels

    theirs = kernels.mamba_ssm_scan("cuda", dtype)
    print(f"\nheads, {str(dtype)[6:]}, B {BATCH}, P 64, N 128; {'with' if theirs else 'no'} mamba-ssm")
    print("      model     L     sums        ms  mamba-ssm ms")
    for (model, H), L in ((pair, L) for pair in MODELS.items() for L in LENGTHS):
        values = draw((BATCH, L, H, 64, 128, 1), dtype, "cuda")
        for needs in TIMED_NEEDS:
            sums = HeadStatistics.zeros(needs, L, H, 128, "cuda") if needs else None
            ours = median_ms(lambda: kernels.chunked_scan(**values, statistics=sums), 20)  # noqa: B023
            other = ""
            if theirs and not needs:
                other = f"{median_ms(lambda: kernels.scan_by_mamba_ssm(theirs, *values.values()), 20):.3f}"  # noqa: B023
            print(f"{model:>11} {L:>5} {'+'.join(needs) or 'none':>8} {ours:>9.3f} {other:>13}")
