"""Inference costs of checkpoints side by side, run by stock transformers.

The checkpoints take turns, round after round, each round in another order, so that the drift of a shared machine hits
all of them alike; ratios are taken within a round. Something is called faster only where three rounds of four say so.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from transformers import PreTrainedModel

from sparsessm.errors import InputError
from sparsessm.models import checkpoint
from sparsessm.models.checkpoint import Source
from sparsessm.models.family import architecture_of
from sparsessm.models.place import MASKS

# Parts of a cache, and how the attributes of stock's layers of a cache begin that hold them.
STATES = {"SSM": ("recurrent_states",), "convolution": ("conv_states",), "key-value": ("keys", "values")}

# Times closer than this are called the same.
_SAME_TIME = 0.05
# Sizes closer than this are called the same: headers of files differ by some bytes.
_SAME_SIZE = 0.001

_SMALLER = {"memory": "less memory", "state": "a smaller state", "file": "a smaller file"}
_LARGER = {"memory": "more memory", "state": "a larger state", "file": "a larger file"}


@dataclass(frozen=True)
class Costs:
    """What it takes to run a checkpoint.

    Attributes:
        prefill: seconds per token of the prompts, in each round. decode: seconds per generated token, in each round. A
            batch of B sequences has B tokens at each position.
        parameters: how many there are, tied ones once. nonzero: the share of them that is neither zero nor marked as
            pruned in masks.safetensors.
        parameter_bytes, file_bytes: in memory and on disk, None if it is not there. state_bytes: the cache of all sequences.
        states: bytes of the cache of one sequence, by STATES.
        peak_bytes: most that the device's allocator held for this model, None where the device does not count.
    """

    name: str
    prefill: tuple[float, ...]
    decode: tuple[float, ...]
    parameters: int
    nonzero: float
    parameter_bytes: int
    state_bytes: int
    file_bytes: int | None
    states: Mapping[str, int] = field(default_factory=dict)
    peak_bytes: int | None = None

    @property
    def memory(self) -> int:
        """Bytes: the peak where it is known, else what is resident while decoding, parameters and state."""
        return self.parameter_bytes + self.state_bytes if self.peak_bytes is None else self.peak_bytes


@dataclass(frozen=True)
class Subject:
    """A model to time. nonzero: see Costs. file_bytes: of its checkpoint, None for a model without one."""

    name: str
    model: PreTrainedModel
    nonzero: float
    file_bytes: int | None = None


def subjects_of(names: Sequence[str]) -> list[Subject]:
    """The models of checkpoints.

    Raises:
        InputError: a checkpoint that cannot be read.
    """
    found = []
    for source in map(checkpoint.find, names):
        model, size = checkpoint.load(source), sum(file.stat().st_size for file in source.files)
        found.append(Subject(source.name, model, nonzero_share(source, model), size))
    return found


@torch.no_grad()
def measure(
    subjects: Sequence[Subject], *, device: torch.device | str, prompt: int, tokens: int, batch: int, rounds: int
) -> list[Costs]:
    """Times all models on the same random prompts (batch,prompt), each continued greedily by `tokens`.

    Raises:
        InputError: a length below one.
    """
    for word, value in {"prompt": prompt, "tokens": tokens, "batch": batch, "rounds": rounds}.items():
        if value < 1:
            raise InputError(f"--{word} must be at least 1, not {value}")
    device = torch.device(device)
    models: list[nn.Module] = [subject.model.to(device) for subject in subjects]  # type: ignore[arg-type]  # its own self
    words = min(subject.model.config.vocab_size for subject in subjects)
    ids = torch.randint(words, (batch, prompt), generator=torch.Generator().manual_seed(0)).to(device)
    for model in models:
        _turn(model, ids, tokens)  # warms up
    turns: list[list[_Turn]] = [[] for _ in models]
    for number in range(rounds):
        for i in range(len(models)):
            i = (i + number) % len(models)
            turns[i].append(_turn(models[i], ids, tokens))
    found = []
    for subject, model, mine in zip(subjects, models, turns, strict=True):
        sizes = list(model.parameters())
        found.append(
            Costs(
                name=subject.name,
                prefill=tuple(turn.prefill / ids.numel() for turn in mine),
                decode=tuple(turn.decode / (batch * tokens) for turn in mine),
                parameters=sum(parameter.numel() for parameter in sizes),
                nonzero=subject.nonzero,
                parameter_bytes=sum(parameter.numel() * parameter.element_size() for parameter in sizes),
                state_bytes=sum(mine[0].states.values()),
                states={kind: size // batch for kind, size in mine[0].states.items()},
                file_bytes=subject.file_bytes,
                peak_bytes=None if device.type != "cuda" else max(turn.peak_bytes for turn in mine),
            )
        )
    return found


@dataclass(frozen=True)
class _Turn:
    """One prompt and its continuation: seconds, bytes of the cache by STATES, and bytes at the peak."""

    prefill: float
    decode: float
    states: dict[str, int]
    peak_bytes: int


def _turn(model: nn.Module, ids: Tensor, tokens: int) -> _Turn:
    before = 0
    if ids.is_cuda:
        torch.cuda.reset_peak_memory_stats(ids.device)
        before = torch.cuda.memory_allocated(ids.device)  # other models are there as well
    start = _now(ids.device)
    out = model(ids, use_cache=True, logits_to_keep=1)
    prompted = _now(ids.device)
    name = "cache_params" if "cache_params" in out else "past_key_values"
    for _ in range(tokens):
        out = model(out.logits[:, -1:].argmax(-1), use_cache=True, **{name: out[name]})
    done = _now(ids.device)
    peak = 0
    if ids.is_cuda:
        own = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
        peak = torch.cuda.max_memory_allocated(ids.device) - before + own
    states = dict.fromkeys(STATES, 0)
    for layer in out[name].layers:
        for kind, begins in STATES.items():
            held = [value for attribute, value in vars(layer).items() if attribute.startswith(begins)]
            states[kind] += sum(tensor.numel() * tensor.element_size() for tensor in _tensors(held))
    return _Turn(prompted - start, done - prompted, states, peak)


def _now(device: torch.device) -> float:
    """The clock, once the device is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _tensors(value: Any) -> Iterator[Tensor]:
    """All tensors of an attribute: one, or several in a list or by number."""
    return (tensor for tensor in tree_leaves(value) if isinstance(tensor, Tensor))


def nonzero_share(source: Source, model: nn.Module) -> float:
    """Share of a checkpoint's parameters that is neither zero nor marked as pruned by the masks beside it.

    Masks of states that were removed have the shape from before, and mark nothing of what is left.
    """
    file = source.folder / MASKS
    row, parameters = architecture_of(model.config), dict(model.named_parameters())
    masks = {row.here(name, parameters): mask for name, mask in load_file(file).items()} if file.is_file() else {}
    kept = total = 0
    for name, parameter in parameters.items():
        alive = parameter.detach().cpu() != 0
        mask = masks.get(name)
        if mask is not None and mask.shape == alive.shape:
            alive &= ~mask
        kept, total = kept + int(alive.sum()), total + alive.numel()
    return kept / total


def cells(costs: Costs) -> dict[str, str]:
    """One row of a table, times as medians over the rounds."""
    row = {
        "checkpoint": costs.name,
        "prefill us/token": f"{statistics.median(costs.prefill) * 1e6:.1f}",
        "decode us/token": f"{statistics.median(costs.decode) * 1e6:.1f}",
        "parameters MiB": f"{costs.parameter_bytes / 2**20:.2f}",
        "state KiB": f"{costs.state_bytes / 2**10:.1f}",
        "spread": f"{_spread(costs.prefill):.0%}, {_spread(costs.decode):.0%}",
    }
    row |= {f"{kind} KiB each": f"{size / 2**10:.1f}" for kind, size in costs.states.items() if size}
    if costs.peak_bytes is not None:
        row["peak MiB"] = f"{costs.peak_bytes / 2**20:.2f}"
    if costs.file_bytes is not None:
        row["file MiB"] = f"{costs.file_bytes / 2**20:.2f}"
    return row | {"non-zero": f"{costs.nonzero:.1%}"}


def verdict(costs: Sequence[Costs]) -> str:
    """One line that says of each checkpoint what its sparsity gained against the first."""
    first, *others = costs
    return f"Against {first.name}: " + "; ".join(_gained(first, other) for other in others) + "."


def _gained(first: Costs, other: Costs) -> str:
    speed = {
        "prefill": _ratios(first.prefill, other.prefill),
        "decoding": _ratios(first.decode, other.decode),
    }
    size = {
        "memory": other.memory / first.memory,
        "state": other.state_bytes / first.state_bytes,
    }
    if first.file_bytes and other.file_bytes:
        size["file"] = other.file_bytes / first.file_bytes
    gains = [f"faster {what}" for what, ratios in speed.items() if ratios[len(ratios) // 4] > 1 + _SAME_TIME]
    gains += [_SMALLER[what] for what, ratio in size.items() if ratio < 1 - _SAME_SIZE]
    losses = [f"slower {what}" for what, ratios in speed.items() if ratios[-1 - len(ratios) // 4] < 1 - _SAME_TIME]
    losses += [_LARGER[what] for what, ratio in size.items() if ratio > 1 + _SAME_SIZE]
    figures = [f"{what} {statistics.median(ratios):.2f}x as fast" for what, ratios in speed.items()]
    figures += [f"{what} {ratio:.3f}x" for what, ratio in size.items()]
    cost = f" at the cost of {_listed(losses)}" if losses else ""
    return f"{other.name}, {_change(first, other)}, gained {_listed(gains) or 'nothing'}{cost} ({', '.join(figures)})"


def _spread(times: Sequence[float]) -> float:
    """From the fastest round to the slowest, as a share of the median."""
    return (max(times) - min(times)) / statistics.median(times)


def _change(first: Costs, other: Costs) -> str:
    """What was done to a checkpoint, as far as its numbers tell."""
    removed, zeros = 1 - other.parameters / first.parameters, first.nonzero - other.nonzero
    said = [f"{removed:.1%} of the parameters removed"] if removed > 0 else []
    said += [f"{zeros:.1%} of the entries pruned in place"] if zeros > _SAME_SIZE else []
    return " and ".join(said) or "nothing pruned"


def _ratios(slow: Sequence[float], fast: Sequence[float]) -> list[float]:
    """How many times as fast in each round, ascending."""
    return sorted(a / b for a, b in zip(slow, fast, strict=True))


def _listed(words: Sequence[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)
