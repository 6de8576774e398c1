"""The Python interface in use: prune the bundled model, measure it, save it.

    python scripts/example.py OUT
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import sparsessm


def example(out: str) -> dict[str, float]:
    """Perplexities before, and after half of A_log and half of the weights are gone."""
    model, tokenizer = sparsessm.load("demo")
    windows = sparsessm.calibration("demo", tokenizer, nsamples=8, seqlen=128, seed=0)
    text = sparsessm.evaluation("demo", tokenizer, seqlen=128, windows=16)
    before = sparsessm.perplexity(model, text)
    result = sparsessm.prune(model, windows, "sparsessm_obs", sparsity=0.5, parts=["A_log", "weights"])
    after = sparsessm.perplexity(model, text)
    sparsessm.save(model, tokenizer, out, result)
    return {"before": before, "after": after, "ssm": result.sparsity["ssm"], "layers": result.sparsity["layers"]}


if __name__ == "__main__":
    for name, value in example(sys.argv[1] if len(sys.argv) > 1 else "pruned").items():
        print(f"{name:8} {value:.4g}")
