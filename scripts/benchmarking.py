"""What the benchmarks share: functions timed in turn in one process, medians, and a line about the machine."""

from __future__ import annotations

import math
import multiprocessing
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, Mamba2Config, MambaConfig, PretrainedConfig, PreTrainedModel

from sparsessm.kernels.matmul import linear
from sparsessm.layerwise.stream import Stream
from sparsessm.models import checkpoint
from sparsessm.models.architecture import Layout
from sparsessm.models.mamba1 import Mamba1Mixer
from sparsessm.procedure.driver import Job, masks_of, run_pass
from sparsessm.procedure.plan import TransitionPlan
from sparsessm.procedure.transitions import PruneTransitions
from sparsessm.pruning.patterns import Unstructured

transformers.utils.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()

# Sizes of the published models: d_model, layers.
SHAPES = {"130m": (768, 24), "370m": (1024, 48), "790m": (1536, 48), "1.4b": (2048, 48), "2.8b": (2560, 64)}
HEADS = {
    "mamba2-130m": (768, 24), "mamba2-370m": (1024, 48), "mamba2-780m": (1536, 48), "mamba2-1.3b": (2048, 48),
    "mamba2-2.7b": (2560, 64),
}  # fmt: skip


def machine() -> str:
    """One line: processor, threads, versions."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    versions = f"torch {torch.__version__}, transformers {transformers.__version__}, Python {platform.python_version()}"
    return f"{name}, {torch.get_num_threads()} threads of {os.cpu_count()}; {versions}"


def in_turn(calls: Mapping[str, Callable[[], Any]], rounds: int, *, twice: bool = False) -> dict[str, list[float]]:
    """Seconds of each call in each round; one call each to warm up, then all calls one after the other, round by round.

    twice: makes each call twice in a round and counts the second one, which has its memory back from the call before:
        for calls of a few milliseconds.
    """
    for call in calls.values():
        call()
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            if twice:
                call()
            start = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - start)
    return seconds


def median_ratio(slow: list[float], fast: list[float]) -> float:
    """Median over the rounds of slow / fast: measuring in turn cancels the drift of a shared machine."""
    return statistics.median(a / b for a, b in zip(slow, fast, strict=True))


def config_of(shape: str, layers: int | None = None, *, vocab: int) -> PretrainedConfig:
    """The config of a published shape, of SHAPES or HEADS, with this number of layers or all."""
    d_model, all_layers = (SHAPES | HEADS)[shape]
    sizes = {"hidden_size": d_model, "num_hidden_layers": layers or all_layers, "vocab_size": vocab}
    if shape in SHAPES:
        return MambaConfig(**sizes, time_step_rank=-(-d_model // 16))
    heads = {"num_heads": d_model * 2 // 64, "head_dim": 64, "state_size": 128, "n_groups": 1}
    tokens = dict.fromkeys(("bos_token_id", "eos_token_id", "pad_token_id"), 0)
    return Mamba2Config(**sizes, **heads, **tokens, tie_word_embeddings=True)


def random_model(shape: str, layers: int | None = None, *, vocab: int = 50288, seed: int = 0) -> PreTrainedModel:
    """A stock model of a published shape with random weights and this number of layers, or all."""
    torch.manual_seed(seed)
    return model_on(torch.device("cpu"), config_of(shape, layers, vocab=vocab), torch.float32)


def model_on(device: torch.device, config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """A stock model with random weights, made on a device; A_log is float32."""
    with device:
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    checkpoint.widen_A_log(model.eval().requires_grad_(False))
    return model


def prune_half(model: nn.Module, windows: Tensor, layers: int | None = None, **placement: Any) -> list[Tensor]:
    """Half of A_log of the first layers, of all by default, by method sparsessm; the masks (D,N) by layer."""
    layout = Layout(model)
    plan = TransitionPlan(Unstructured(0.5), saliency="a_log", aggregate="vote")
    stop = len(layout.layers) if layers is None else layers
    job = Job(layout, lambda: Stream.embed(layout, windows, **placement), 0, stop)
    return list(masks_of(run_pass(job, PruneTransitions(plan))).values())


@torch.no_grad()
def stock_perplexity(model: nn.Module, windows: Tensor) -> float:
    """Perplexity by transformers' own forward, without its cache."""
    logits = model(windows, use_cache=False).logits[:, :-1].flatten(0, 1)
    return math.exp(float(F.cross_entropy(logits.float(), windows[:, 1:].flatten())))


def plain_mixer(mixer: nn.Module, x: Tensor, held: bool) -> tuple[Tensor, Tensor | None]:
    """A mixer the plain way: (1,L,M) -> (1,L,M), and the squared states that enter each step, (L,D,N), where asked for."""
    u, z = mixer.in_proj(x).transpose(1, 2).chunk(2, dim=1)  # (1,D,L)
    L, K = x.shape[1], mixer.conv1d.weight.shape[-1]
    u = F.silu(F.conv1d(u, mixer.conv1d.weight, mixer.conv1d.bias, padding=K - 1, groups=u.shape[1])[..., :L])
    N, R = mixer.A_log.shape[1], mixer.dt_proj.weight.shape[1]
    delta, B, C = mixer.x_proj(u.transpose(1, 2)).split([R, N, N], dim=-1)
    dt = F.softplus(mixer.dt_proj(delta)).transpose(1, 2)  # (1,D,L)
    A = -torch.exp(mixer.A_log)
    abar = torch.exp(A[None, :, None, :] * dt[..., None]) * (A != -1)[None, :, None, :]  # (1,D,L,N)
    inflow = dt[..., None] * B[:, None] * u[..., None]
    h, ys, states = torch.zeros(1, u.shape[1], N, device=u.device), [], []
    for t in range(L):
        if held:
            states.append(h)
        h = abar[:, :, t] * h + inflow[:, :, t]
        ys.append((h @ C[:, t, :, None]).squeeze(-1))
    y = torch.stack(ys, dim=-1) + u * mixer.D[:, None]
    return mixer.out_proj((y * F.silu(z)).transpose(1, 2)), torch.stack(states, dim=1)[0].square() if held else None


PlainMixer = Callable[[nn.Module, Tensor, bool], tuple[Tensor, Tensor | None]]


@torch.no_grad()
def published_procedure(model: nn.Module, windows: Tensor, mixer: PlainMixer, pruned: float) -> list[Tensor]:
    """Method sparsessm at 50 % as released, one sample after the other; the masks by layer.

    mixer: of a stock mixer, its inputs (1,L,M), and whether its states are asked for: its outputs, and h^2 of the states
        that enter each step, (L,*A_log.shape). pruned: the value of A_log that it takes for no transition.
    """
    hidden, masks = model.backbone.embeddings(windows), []
    for layer in model.backbone.layers:
        h2: Tensor | float = 0.0
        for sample in hidden:
            h2 = h2 + mixer(layer.mixer, layer.norm(sample[None]), True)[1]
        A_log = layer.mixer.A_log
        k, votes = A_log.numel() // 2, torch.zeros(A_log.numel(), device=A_log.device)
        for t in range(1, windows.shape[1]):
            score = (A_log.square() * h2[t]).flatten()
            votes[torch.topk(score, k, largest=False).indices] += 1
        mask = torch.zeros(A_log.numel(), dtype=torch.bool, device=A_log.device)
        mask[torch.topk(votes, k).indices] = True
        masks.append(mask.view_as(A_log))
        A_log.data[masks[-1]] = pruned
        for j, sample in enumerate(hidden):
            hidden[j] = sample + mixer(layer.mixer, layer.norm(sample[None]), False)[0][0]
    return masks


def matrix_products(d_model: int) -> tuple[Callable[[], None], int]:
    """Some products of the size of in_proj for 1024 tokens, and their floating point operations: for the matrix rate."""
    x, weight = torch.randn(1024, d_model), torch.randn(4 * d_model, d_model)

    def products() -> None:
        for _ in range(20):
            linear(x, weight)

    return products, 20 * 2 * 1024 * d_model * 4 * d_model


def projection_operations(block: nn.Module) -> int:
    """Floating point operations of the projections of a block, for each token."""
    products = (name for name in Mamba1Mixer.MODULES if name != "conv1d")
    return 2 * sum(block.mixer.get_submodule(name).weight.numel() for name in products)


def alone(function: Callable[..., Any], *arguments: Any) -> Any:
    """Calls the function in a separate process, so that the peak of memory is that of the call."""
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        return pool.apply(function, arguments)


def peak_memory() -> int:
    """Bytes that this process has held at most."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def resident_memory() -> int:
    """Bytes that this process holds now, on Linux; elsewhere what it has held at most."""
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:
        return peak_memory()
    return pages * os.sysconf("SC_PAGE_SIZE")
