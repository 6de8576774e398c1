"""Mamba-2 at the shape of mamba2-130m: evaluation against stock transformers, pruning against that and a plain re-creation.

    python scripts/bench_heads.py [--layers 24] [--batch 8] [--seqlen 512] [--threads 2] [--rounds 3]

Evaluation: perplexity of the same windows from the same random float32 weights. Pruning: half of A_log of all layers by one
pass, statistics of every kind, each as a ratio to one evaluation of the same windows. The re-creation takes one layer and
one sample after the other, holds the state of every step (L,H,P,N), adds their squares, selects with one topk per time step,
and runs all samples through the pruned layer once more; each side runs in a separate process, seconds are those of
pruning alone, memory is the peak of the process less what it held at the start.
"""

from __future__ import annotations

import argparse
import statistics
import time

import torch
import torch.nn.functional as F
from benchmarking import (
    alone,
    in_turn,
    machine,
    median_ratio,
    peak_memory,
    published_procedure,
    random_model,
    resident_memory,
    stock_perplexity,
)
from torch import Tensor, nn

from sparsessm.layerwise.memory import keep_freed
from sparsessm.layerwise.stream import Stream
from sparsessm.metrics.perplexity import perplexity
from sparsessm.models.architecture import Layout
from sparsessm.procedure.driver import Job, masks_of, run_pass
from sparsessm.procedure.plan import TransitionPlan
from sparsessm.procedure.transitions import PruneTransitions
from sparsessm.pruning.patterns import Unstructured
from sparsessm.report.tables import text_table

HALF = Unstructured(0.5)
PLANS = {
    "sparsessm (h2)": TransitionPlan(HALF, saliency="a_log", aggregate="vote"),
    "sparsessm_dev (h2, abar)": TransitionPlan(HALF, saliency="transition", aggregate="power"),
    "sparsegpt (hh)": TransitionPlan(HALF, obs=True),
    "output (gram)": TransitionPlan(HALF, saliency="output", search="greedy"),
}


def prune(model: nn.Module, windows: Tensor, plan: TransitionPlan, batch: int) -> list[Tensor]:
    """Prunes by a plan and puts A_log back; the masks (H,) by layer."""
    layout = Layout(model)
    before = [layer.mixer.A_log.clone() for layer in layout.layers]
    job = Job(layout, lambda: Stream.embed(layout, windows, device="cpu", offload="cpu", batch=batch), 0, len(before))
    masks = list(masks_of(run_pass(job, PruneTransitions(plan))).values())
    for layer, value in zip(layout.layers, before, strict=True):
        layer.mixer.A_log.data.copy_(value)
    return masks


def plain_mixer(mixer: nn.Module, x: Tensor, held: bool) -> tuple[Tensor, Tensor | None]:
    """A mixer the plain way: (1,L,M) -> (1,L,M), and the states that enter each step, (L,H,P,N), where they are wanted."""
    H, P, N = mixer.num_heads, mixer.head_dim, mixer.ssm_state_size
    z, mixed, dt = mixer.in_proj(x).split([H * P, H * P + 2 * N, H], dim=-1)
    L = x.shape[1]
    mixed = mixer.conv1d(mixed.transpose(1, 2))[..., :L].transpose(1, 2)
    u, B, C = F.silu(mixed).split([H * P, N, N], dim=-1)
    dt, A = F.softplus(dt + mixer.dt_bias)[0], -torch.exp(mixer.A_log)
    abar = torch.exp(dt * A) * (mixer.A_log < 30)  # (L,H)
    inflow = (dt[..., None] * u[0].view(L, H, P))[..., None] * B[0, :, None, None]  # (L,H,P,N)
    state, states, ys = torch.zeros(H, P, N), [], []
    for t in range(L):
        if held:
            states.append(state)
        state = abar[t, :, None, None] * state + inflow[t]
        ys.append(state @ C[0, t])
    y = torch.stack(ys)[None] + mixer.D[:, None] * u.view(1, L, H, P)
    return mixer.out_proj(mixer.norm(y.flatten(2), z)), torch.stack(states).square().sum((2, 3)) if held else None


def measure(side: str, seqlen: int, threads: int) -> dict[str, object]:
    """Seconds, peak bytes and masks of one side for one layer and four windows, on the same random weights and tokens."""
    torch.set_num_threads(threads)
    if side == "here":
        keep_freed()  # as the command does
    model = random_model("mamba2-130m", 1, vocab=1024)
    windows = torch.randint(1024, (4, seqlen), generator=torch.Generator().manual_seed(1))
    prune(model, windows[:1, :64], PLANS["sparsessm (h2)"], 1)
    held, start = resident_memory(), time.perf_counter()
    if side == "re-creation":
        masks = published_procedure(model, windows, plain_mixer, pruned=30.0)
    else:
        masks = prune(model, windows, PLANS["sparsessm (h2)"], 4)
    return {"seconds": time.perf_counter() - start, "bytes": peak_memory() - held, "masks": [m.numpy() for m in masks]}


def bench(*, layers: int, batch: int, seqlen: int, threads: int, rounds: int) -> None:
    """Prints the tables."""
    torch.set_num_threads(threads)
    # first: the peak of a process includes the memory of its parent at its start
    long = 4 * seqlen
    sides: dict[str, list[dict[str, object]]] = {"here": [], "re-creation": []}
    for _ in range(rounds):
        for side, runs in sides.items():
            runs.append(alone(measure, side, long, threads))
    keep_freed()  # as the command does; it helps both sides
    model = random_model("mamba2-130m", layers)
    windows = torch.randint(model.config.vocab_size, (batch, seqlen), generator=torch.Generator().manual_seed(1))
    found: dict[str, float] = {}

    def here() -> None:
        found["here"] = perplexity(Layout(model), windows, device="cpu", offload="cpu", batch=batch).value

    def there() -> None:
        found["stock"] = stock_perplexity(model, windows)

    calls = {"evaluation": here, "stock": there}
    calls |= {name: lambda plan=plan: prune(model, windows, plan, batch) for name, plan in PLANS.items()}
    seconds = in_turn(calls, rounds)
    print(machine())
    print(f"mamba2-130m, {layers} layers, {batch} windows of {seqlen}, float32; medians of {rounds} rounds\n")
    tokens = batch * seqlen
    print(text_table([
        {
            "what": name, "seconds": f"{statistics.median(times):.2f}",
            "us per token": f"{1e6 * statistics.median(times) / tokens:.0f}",
            "times evaluation": f"{median_ratio(times, seconds['evaluation']):.2f}",
        }
        for name, times in seconds.items()
    ]))  # fmt: skip
    print(f"\nevaluation: perplexities differ by {abs(found['here'] / found['stock'] - 1):.0e}")
    spent = {side: [run["seconds"] for run in runs] for side, runs in sides.items()}
    peak = {side: statistics.median(run["bytes"] for run in runs) for side, runs in sides.items()}
    print(f"\none layer, 4 windows of {long}, method sparsessm\n")
    print(text_table([
        {"procedure": side, "seconds": f"{statistics.median(spent[side]):.2f}", "peak MiB": f"{peak[side] / 2**20:.0f}"}
        for side in sides
    ]))  # fmt: skip
    same = all((a == b).all() for a, b in zip(sides["here"][0]["masks"], sides["re-creation"][0]["masks"], strict=True))
    print(f"\n{median_ratio(spent['re-creation'], spent['here']):.1f} times faster than the re-creation, "
          f"{peak['re-creation'] / peak['here']:.1f} times smaller; masks {'agree' if same else 'differ'}")  # fmt: skip


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for flag, value in {"layers": 24, "batch": 8, "seqlen": 512, "threads": 2, "rounds": 3}.items():
        parser.add_argument(f"--{flag}", type=int, default=value)
    bench(**vars(parser.parse_args()))
