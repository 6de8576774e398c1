"""Pruning on a GPU: seconds, their limits, where they go, and the published procedure re-created beside it.

    python scripts/bench_gpu.py [--shapes 130m 2.8b mamba2-130m] [--nsamples 64] [--seqlen 2048] [--only PART ...]

Random weights, made on the GPU. The parts: `rates`, what a copy and products reach in the same run; `A_log`, half of it
by method sparsessm in all layers, in bfloat16 and small shapes in float32 too, against the published procedure on one layer
and four windows, each by layer and window; `places`, the same of four layers with the block inputs on the GPU, in pinned
main memory and on disk, whose masks have to be the same; `weights`, half of two layers by OBS; `profile`, the operations
that take longest in one layer of each; `masks`, those of the demo model in float32 against the CPU's.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
from torch import Tensor, nn

from scripts.benchmarking import (
    HEADS,
    SHAPES,
    config_of,
    machine,
    model_on,
    plain_mixer,
    projection_operations,
    published_procedure,
)
from sparsessm.corpora import text
from sparsessm.layerwise.memory import placement
from sparsessm.layerwise.stream import Stream
from sparsessm.models import checkpoint
from sparsessm.models.architecture import Layout
from sparsessm.models.tokenizing import load_tokenizer
from sparsessm.options import Options
from sparsessm.procedure.driver import Job
from sparsessm.procedure.fitting import fitted
from sparsessm.procedure.plan import plan_of
from sparsessm.procedure.prune import prune
from sparsessm.report.tables import text_table

Flags = dict[str, Any]

PARTS = ("rates", "A_log", "places", "weights", "profile", "masks")
A_LOG: Flags = {"method": "sparsessm", "prune_A": True, "sparsity": 0.5}
WEIGHTS: Flags = {"method": "sparsegpt", "prune_layers": True, "sparsity": 0.5}
FEW = {"layers": 1, "windows": 4}  # of the published procedure, which is slow


def wait(device: torch.device) -> None:
    """Until the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(run: Callable[[], Any], device: torch.device) -> float:
    """Of a call, until the device is done."""
    wait(device)
    start = time.perf_counter()
    run()
    wait(device)
    return time.perf_counter() - start


def best(run: Callable[[], Any], device: torch.device, rounds: int = 5) -> float:
    """The median of some calls after a first one."""
    run()
    return statistics.median(seconds(run, device) for _ in range(rounds))


def rates(device: torch.device, size: int = 8192) -> dict[str, float]:
    """Bytes/s of a copy, read and written together, and floating point operations/s of products by dtype."""
    source = torch.empty(size, size, device=device)
    target = torch.empty_like(source)
    found = {"copy": 2 * source.nbytes / best(lambda: target.copy_(source), device)}
    for dtype in (torch.float32, torch.bfloat16):
        a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
        found[str(dtype)[6:]] = 2 * size**3 / best(lambda: a @ b, device)  # noqa: B023
    return found


def prune_by(flags: Flags, model: nn.Module, windows: Tensor, device: torch.device, **how: Any) -> dict[str, Tensor]:
    """Prunes by the options of a command; the masks."""
    layout, seqlen = Layout(model), windows.shape[1]
    chosen = Options(model="-", dataset="-", nsamples=len(windows), seqlen=seqlen, **flags, **how)
    plan = plan_of(chosen, layout.targets(chosen.target_modules, chosen.parts, None))
    fit = fitted(chosen, plan, layout, device, len(windows))
    place = placement(device, fit.offload, None) | {"batch": fit.calib_batch}
    removed = prune(Job(layout, lambda: Stream.embed(layout, windows, **place), 0, len(layout.layers)), plan, windows)
    return removed.masks


def warm(flags: Flags, shape: str, dtype: torch.dtype, seqlen: int, device: torch.device) -> None:
    """Compiles and tunes the kernels of a shape."""
    windows = torch.randint(1024, (8, seqlen), device="cpu")
    prune_by(flags, model_on(device, config_of(shape, 1, vocab=1024), dtype), windows, device)


def of_A_log(
    shape: str, dtype: torch.dtype, windows: Tensor, device: torch.device, known: dict[str, float]
) -> dict[str, str]:
    """A row of the table of A_log."""
    warm(A_LOG, shape, dtype, windows.shape[1], device)
    model = model_on(device, config_of(shape, vocab=1024), dtype)
    layers, tokens = len(Layout(model).layers), windows.numel()
    took = seconds(lambda: prune_by(A_LOG, model, windows, device), device)
    row = {
        "shape": shape, "dtype": str(dtype)[6:], "layers": str(layers), "seconds": f"{took:.2f}",
        "ms a layer": f"{1e3 * took / layers:.1f}", "us a layer and window": f"{1e6 * took / layers / len(windows):.0f}",
    }  # fmt: skip
    if known and shape in SHAPES:
        limit = tokens * projection_operations(Layout(model).layers[0]) * layers / known[str(dtype)[6:]]
        row["products alone"] = f"{limit / took:.0%}"
    if shape in SHAPES:
        few = model_on(device, config_of(shape, FEW["layers"], vocab=1024), torch.float32)
        some = windows[: FEW["windows"]].to(device)
        theirs = seconds(lambda: published_procedure(few, some, plain_mixer, 0.0), device) / FEW["layers"] / len(some)
        row["published / ours"] = f"{theirs / (took / layers / len(windows)):.0f}"
    return row


def of_places(shape: str, dtype: torch.dtype, windows: Tensor, device: torch.device, layers: int) -> list[dict[str, str]]:
    """A row for each place of the block inputs."""
    rows, first = [], None
    for place in ("device", "cpu", "disk"):
        torch.manual_seed(0)
        model = model_on(device, config_of(shape, layers, vocab=1024), dtype)
        masks: dict[str, Tensor] = {}
        took = seconds(lambda: masks.update(prune_by(A_LOG, model, windows, device, offload=place)), device)  # noqa: B023
        first = first or masks
        same = all(masks[name].equal(first[name]) for name in masks)
        rows.append({"shape": shape, "block inputs": place, "seconds": f"{took:.2f}", "masks": "same" if same else "OTHERS"})
    return rows


def of_weights(shape: str, dtype: torch.dtype, windows: Tensor, device: torch.device, layers: int) -> dict[str, str]:
    """A row of the table of OBS."""
    warm(WEIGHTS, shape, dtype, windows.shape[1], device)
    model = model_on(device, config_of(shape, layers, vocab=1024), dtype)
    took = seconds(lambda: prune_by(WEIGHTS, model, windows, device), device)
    return {"shape": shape, "dtype": str(dtype)[6:], "layers": str(layers), "seconds a layer": f"{took / layers:.2f}"}


def profile(flags: Flags, shape: str, dtype: torch.dtype, windows: Tensor, device: torch.device) -> str:
    """The operations that take longest in a layer, by the time of the device."""
    model = model_on(device, config_of(shape, 1, vocab=1024), dtype)
    kinds = [torch.profiler.ProfilerActivity.CPU]
    kinds += [torch.profiler.ProfilerActivity.CUDA] if device.type == "cuda" else []
    with torch.profiler.profile(activities=kinds) as seen:
        prune_by(flags, model, windows, device)
        wait(device)
    by = "self_cuda_time_total" if device.type == "cuda" else "self_cpu_time_total"
    return str(seen.key_averages().table(sort_by=by, row_limit=12, max_name_column_width=60))


def differing_masks(device: torch.device) -> str:
    """How many entries of the demo model's masks the device chooses otherwise than the CPU, in float32."""
    source = checkpoint.find("demo")
    windows = text.calibration_windows("demo", load_tokenizer(source), 32, 256, 0).ids
    here, there = (prune_by(A_LOG, checkpoint.load(source), windows, where) for where in (torch.device("cpu"), device))
    differing, total = sum(int((here[name] != there[name]).sum()) for name in here), sum(m.numel() for m in here.values())
    return f"{differing} of {total} entries of the demo's masks differ from the CPU's"


def bench(*, shapes: list[str], nsamples: int, seqlen: int, only: list[str], device: str, layers: int = 4) -> None:
    """Prints all of it."""
    where = torch.device(device)
    windows = torch.randint(1024, (nsamples, seqlen), generator=torch.Generator().manual_seed(1))
    print(f"{machine()}; on {torch.cuda.get_device_name(where) if where.type == 'cuda' else 'cpu'}")
    known = rates(where, 8192 if where.type == "cuda" else 256) if "rates" in only else {}
    if known:
        told = ", ".join(f"{known[name] / 1e12:.3g} TFLOP/s of {name}" for name in ("float32", "bfloat16"))
        print(f"a copy has {known['copy'] / 1e9:.3g} GB/s, products {told}")
    pairs = [(shape, dtype) for shape in shapes for dtype in (torch.float32, torch.bfloat16)]
    pairs = [(shape, dtype) for shape, dtype in pairs if dtype == torch.bfloat16 or (SHAPES | HEADS)[shape][0] < 1024]
    if "A_log" in only:
        print(f"\nA_log, {nsamples} windows of {seqlen}")
        print(text_table([of_A_log(shape, dtype, windows, where, known) for shape, dtype in pairs]))
    if "places" in only:
        print(f"\nA_log of {layers} layers")
        print(text_table([row for shape in shapes for row in of_places(shape, torch.bfloat16, windows, where, layers)]))
    if "weights" in only:
        print("\nweights by OBS")
        print(text_table([of_weights(shape, torch.bfloat16, windows[: nsamples // 2 or 1], where, 2) for shape in shapes]))
    if "profile" in only:
        for shape in shapes:
            for name, flags in (("A_log", A_LOG), ("weights", WEIGHTS)):
                print(f"\n{name} of a layer of {shape}\n{profile(flags, shape, torch.bfloat16, windows, where)}")
    if "masks" in only:
        print(differing_masks(where))


def main() -> int:
    """The command; returns its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["130m", "2.8b", "mamba2-130m"], choices=(*SHAPES, *HEADS))
    parser.add_argument("--nsamples", type=int, default=64)
    parser.add_argument("--seqlen", type=int, default=2048)
    parser.add_argument("--only", nargs="+", default=list(PARTS), choices=PARTS)
    parser.add_argument("--device", default="cuda")
    chosen = parser.parse_args()
    if chosen.device.startswith("cuda") and not torch.cuda.is_available():
        print(f"error: no CUDA GPU is available to torch {torch.__version__}: give --device cpu to try it", file=sys.stderr)
        return 2
    bench(**vars(chosen))
    return 0


if __name__ == "__main__":
    sys.exit(main())
