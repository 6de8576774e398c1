"""Prefill and decoding of models side by side by stock transformers, and a sentence on what their sparsity gained.

    python scripts/bench_inference.py CKPT [CKPT ...] [--compact] [--prompt 512] [--tokens 64] [--batch 1 16] [--rounds 5]
    python scripts/bench_inference.py --shape mamba2-2.7b [--layers 64] [--dtype bfloat16] ...

The others are compared with the first checkpoint: give the dense one. A checkpoint is a folder in either layout,
a hub id, or demo. --compact adds each that has pruned heads once more, without the states of these (sparsessm.compact).
--shape: random weights of that size, dense, with half of the states or of the heads removed, and with half of the heads
pruned; on a GPU also with 2:4 weights by torch's own sparse products. Runs on the GPU where there is one. `state` is the
cache of all sequences, its parts are those of each; `spread` goes from the fastest round to the slowest, of prefill and
decoding. A difference inside of it is called none.
"""

from __future__ import annotations

import argparse
import copy
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import transformers
from torch import nn

import sparsessm
from scripts.benchmarking import HEADS, machine, random_model
from sparsessm.errors import InputError
from sparsessm.metrics.speed import Subject, cells, measure, subjects_of, verdict
from sparsessm.models.architecture import Layout
from sparsessm.report.tables import text_table


def compacted(subject: Subject) -> Subject:
    """The same weights, without the states of pruned heads."""
    shared = {id(parameter): parameter for parameter in subject.model.parameters()}
    model = sparsessm.compact(copy.deepcopy(subject.model, shared))  # type: ignore[arg-type]
    return Subject(f"{subject.name}, compact", model, subject.nonzero, subject.file_bytes)


def of_shape(shape: str, layers: int | None, dtype: torch.dtype, device: torch.device) -> list[Subject]:
    """Random weights of a shape, dense and pruned in several ways, on a device."""
    dense = random_model(shape, layers).to(device, dtype)
    found = [Subject("dense", dense, 1.0)]
    for structure, what in (("columns", "states"), ("heads", "heads")):
        model = copy.deepcopy(dense)
        layout = Layout(model)
        for layer in layout.layers:
            mixer = layout.mixer(layer)
            scored = mixer.scored(structure)
            mixer.remove(structure, torch.arange(scored.shape[1]) % 2 == 1)
        found.append(Subject(f"half of the {what} removed", model, 1.0))
    pruned = copy.deepcopy(dense)
    for layer in Layout(pruned).layers:
        layer.mixer.A_log.data[1::2] = 30.0
    found.append(Subject("half of the heads pruned", pruned, 1.0))
    found.append(compacted(found[-1]))
    if device.type == "cuda" and dtype in (torch.float16, torch.bfloat16):
        found.append(Subject("2:4 weights", two_of_four(copy.deepcopy(dense)), 0.5))
    return found


def two_of_four(model: nn.Module) -> nn.Module:
    """The projections of all mixers with two of four weights, in the form of torch's sparse products; CUDA alone."""
    from torch.sparse import to_sparse_semi_structured

    for layer in Layout(model).layers:
        for projection in (layer.mixer.in_proj, layer.mixer.out_proj):
            weight = projection.weight.data
            order = weight.abs().unflatten(-1, (-1, 4)).argsort(-1)
            kept = torch.zeros_like(order, dtype=torch.bool).scatter_(-1, order[..., 2:], True).flatten(-2)
            rows = len(weight) // 32 * 32  # its kernels take whole tiles of rows; the few behind them go as well
            sparse = to_sparse_semi_structured((weight * kept)[:rows].contiguous())
            projection.forward = lambda x, sparse=sparse, rest=(weight * kept)[rows:]: torch.cat(
                [nn.functional.linear(x, sparse), nn.functional.linear(x, rest)], -1
            )
    return model


def bench(
    *, checkpoints: list[str], compact: bool, shape: str | None, layers: int | None, dtype: str, prompt: int, tokens: int,
    batch: list[int], rounds: int,
) -> None:  # fmt: skip
    """Prints the machine, and a table and a verdict for each batch."""
    transformers.utils.logging.set_verbosity_error()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if (shape is None) == (not checkpoints):
        raise InputError("give checkpoints, or --shape")
    subjects = of_shape(shape, layers, getattr(torch, dtype), device) if shape else subjects_of(checkpoints)
    if compact and not shape:
        subjects = [one for subject in subjects for one in (subject, compacted(subject))]
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    print(f"{machine()}; on {where}")
    for size in batch:
        costs = measure(subjects, device=device, prompt=prompt, tokens=tokens, batch=size, rounds=rounds)
        named = f"{shape}, {layers or 'all'} layers, {dtype}, " if shape else ""
        print(f"{named}batch {size}, prompts of {prompt} tokens, {tokens} decoded, medians of {rounds} rounds")
        print(text_table([cells(one) for one in costs]))
        if len(costs) > 1:
            print(verdict(costs))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="*", metavar="CKPT")
    parser.add_argument("--compact", action="store_true", help="each once more without the states of pruned heads")
    parser.add_argument("--shape", choices=tuple(HEADS), help="random weights of this size")
    parser.add_argument("--layers", type=int, help="layers of --shape, all by default")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16", "float16"), help="of --shape")
    parser.add_argument("--batch", type=int, nargs="+", default=[1], help="prompts that run together (default: 1)")
    for flag, (value, about) in {
        "prompt": (512, "tokens of each prompt"),
        "tokens": (64, "tokens decoded after it"),
        "rounds": (5, "timed turns of each checkpoint"),
    }.items():
        parser.add_argument(f"--{flag}", type=int, default=value, help=f"{about} (default: {value})")
    try:
        bench(**vars(parser.parse_args()))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
