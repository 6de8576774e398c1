"""Prefill and decoding of checkpoints side by side by stock transformers, and a sentence on what their sparsity gained.

    python scripts/bench_inference.py CKPT [CKPT ...] [--prompt 512] [--tokens 64] [--batch 1] [--rounds 5]

The others are compared with the first checkpoint: give the dense one. A checkpoint is a folder in either layout,
a hub id, or demo. Runs on the GPU where there is one. `state` is the cache of all sequences, its parts are those of each;
`spread` goes from the fastest round to the slowest, of prefill and decoding. A difference inside of it is called none.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import transformers

from scripts.benchmarking import machine
from sparsessm.errors import InputError
from sparsessm.metrics.speed import cells, measure, verdict
from sparsessm.report.tables import text_table


def bench(*, checkpoints: list[str], prompt: int, tokens: int, batch: int, rounds: int) -> None:
    """Prints the machine, the table and the verdict."""
    transformers.utils.logging.set_verbosity_error()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    costs = measure(checkpoints, device=device, prompt=prompt, tokens=tokens, batch=batch, rounds=rounds)
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"
    print(f"{machine()}; on {where}")
    print(f"batch {batch}, prompts of {prompt} tokens, {tokens} decoded, medians of {rounds} rounds")
    print(text_table([cells(one) for one in costs]))
    if len(costs) > 1:
        print(verdict(costs))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="+", metavar="CKPT")
    for flag, (value, about) in {
        "prompt": (512, "tokens of each prompt"),
        "tokens": (64, "tokens decoded after it"),
        "batch": (1, "prompts that run together"),
        "rounds": (5, "timed turns of each checkpoint"),
    }.items():
        parser.add_argument(f"--{flag}", type=int, default=value, help=f"{about} (default: {value})")
    try:
        bench(**vars(parser.parse_args()))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
