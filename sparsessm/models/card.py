"""The model card of a saved checkpoint, README.md: what was pruned and how, what was measured, how to load it.

Its last line holds a hash of the rest. A card that somebody edited, or wrote, is therefore known, and stays.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCardData
from huggingface_hub.repocard import metadata_load

CARD = "README.md"

_PARTS = {
    "ssm": "transitions A_log", "layers": "linear and conv1d weights", "mixer": "weights of the mixers",
    "attention": "weights of attention", "mlp": "weights of the MLPs", "model": "all parameters",
}  # fmt: skip
_LIBRARIES = {"hf": "transformers", "state-spaces": "mamba-ssm"}
_LOADING = {
    "hf": """from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("path/to/this/folder")
tokenizer = AutoTokenizer.from_pretrained("path/to/this/folder")""",
    "state-spaces": """from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel

model = MambaLMHeadModel.from_pretrained("path/to/this/folder")""",
}


@dataclass(frozen=True)
class Origin:
    """Where a model comes from: the name to call it by, its hub id or the one its own card names, its licence."""

    name: str = "a Mamba model"
    base: str | list[str] | None = None
    licence: Mapping[str, Any] = field(default_factory=dict)


def origin_of(name: str, folder: Path) -> Origin:
    """The origin of a model that the user called `name`, a hub id or a folder, and that lies in `folder`.

    The licence is what the model's own card says. Where it says nothing, nothing is said.
    """
    try:
        front = metadata_load(folder / CARD) or {}
    except (OSError, ValueError, yaml.YAMLError):  # none, or not to be read
        front = {}
    licence = {key: front[key] for key in ("license", "license_name", "license_link") if front.get(key)}
    local = name.startswith((".", "/", "~")) or name.count("/") != 1 or Path(name).is_dir()
    if local:
        return Origin(Path(name).name or Origin.name, front.get("base_model"), licence)
    return Origin(name, name, licence)


@dataclass(frozen=True)
class Facts:
    """What a card says besides the record of a checkpoint.

    Attributes:
        datasets: hub ids of the calibration text. command: the one that pruned, without paths. dense: perplexity by text
            before pruning. zero_shot: by task, as in metrics.json.
    """

    origin: Origin = field(default_factory=Origin)
    datasets: Sequence[str] = ()
    command: str | None = None
    dense: Mapping[str, float] = field(default_factory=dict)
    zero_shot: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


def card_text(record: Mapping[str, Any], facts: Facts, model_type: str, layout: str) -> str:
    """The whole card.

    Args:
        record: what sparsessm.json holds. layout: "hf" or "state-spaces".
    """
    pruned = any(record.get("sparsity", {}).values())
    data = ModelCardData(
        base_model=facts.origin.base, library_name=_LIBRARIES[layout], pipeline_tag="text-generation",
        datasets=list(facts.datasets) or None, tags=[model_type, *(["pruned", "sparse"] if pruned else []), "sparsessm"],
        **facts.origin.licence,
    )  # fmt: skip
    name = facts.origin.name
    lines = ["---", data.to_yaml(), "---", "", f"# {name}, pruned" if pruned else f"# {name}", ""]
    if pruned:
        lines += [f"{name}, pruned in one shot by sparsessm.", ""]
        lines += _pruning(record, facts)
    lines += _results(record, facts)
    lines += ["## How to load it", "```python", _LOADING[layout], "```", ""]
    if pruned:
        lines += ["## Files beside the weights"]
        lines += ["- `masks.safetensors`: a bool tensor for each pruned parameter, True = pruned, named as the parameter"]
        lines += ["- `sparsessm.json`: all options of the run, its figures, versions and hashes of its texts", ""]
    versions = ", ".join(f"{package} {version}" for package, version in record.get("versions", {}).items())
    body = "\n".join([*lines, *(["## Versions", versions, ""] if versions else [])])
    return f"{body}\n{_mark(body)}\n"


def is_own_card(file: Path) -> bool:
    """Whether a file is a card as `card_text` made it."""
    if not file.is_file():
        return False
    try:
        body, _, mark = file.read_text(encoding="utf-8").rstrip("\n").rpartition("\n")
    except (OSError, ValueError):
        return False
    return mark == _mark(body)


def _mark(body: str) -> str:
    return f"<!-- written by sparsessm; edited cards are kept; {hashlib.sha256(body.encode()).hexdigest()[:16]} -->"


def _pruning(record: Mapping[str, Any], facts: Facts) -> Iterator[str]:
    options = record.get("options", {})
    yield "## How it was pruned"
    if options.get("method"):
        n, m = options["prunen"], options["prunem"]
        own = options["dataset"] == "-"
        text = "own windows" if own else f"{Path(options['dataset']).name}, seed {options['seed']}"
        asked = [_PARTS[part] for part, flag in (("ssm", "prune_A"), ("layers", "prune_layers")) if options[flag]]
        yield from _table(
            ("", ""),
            [("method", f"`{options['method']}`"), ("pruned", " and ".join(asked)),
             ("sparsity asked for", f"{n}:{m}" if m else f"{options['sparsity']:g}"),
             ("calibration", f"{options['nsamples']} windows of {options['seqlen']} tokens: {text}")],
        )  # fmt: skip
    earlier = [run["options"]["method"] for run in record.get("history", []) if run.get("options", {}).get("method")]
    if earlier:
        yield from (f"It was pruned before by {', '.join(f'`{method}`' for method in earlier)}; that counts below.", "")
    if facts.command:
        yield from ("```", facts.command, "```", "")
    shown = {part: share for part, share in record["sparsity"].items() if share}
    yield from _table(("part", "pruned or removed"), [(_PARTS[part], f"{share:.2%}") for part, share in shown.items()])


def _results(record: Mapping[str, Any], facts: Facts) -> Iterator[str]:
    found = record.get("perplexity", {})
    if not found and not facts.zero_shot:
        return
    yield "## Results"
    if found:
        length = record["options"]["seqlen"]
        shown = [
            (Path(name).name, f"{facts.dense[name]:.2f}" if name in facts.dense else "–", f"{value:.2f}")
            for name, value in found.items()
        ]
        yield from _table((f"perplexity, windows of {length} tokens", "before", "now"), shown)
    if facts.zero_shot:
        rows = []
        for name, figure in facts.zero_shot.items():
            error = "–" if figure["stderr"] is None else f"{figure['stderr']:.4f}"
            rows.append((name, figure.get("metric", ""), f"{figure['value']:.4f}", error))
        yield from _table(("zero-shot task", "metric", "accuracy", "standard error"), rows)


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    return [*(f"| {' | '.join(row)} |" for row in (head, ["---"] * len(head), *rows)), ""]
