"""Fixtures that the tests share: random stock models, the demo checkpoint, a folder of text, the command in process."""

import json
import os
import random
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # no test may need the network
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# One thread for all tests and for the processes that they start: the tests' own processes share the cores, threads that
# wait for each other in a loop take the time of the others, and rounding is the same however the tests are run.
os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")  # the kernels for CUDA run on the CPU; before anything imports triton

from transformers import MambaConfig, MambaForCausalLM

from sparsessm.corpora import text
from sparsessm.layerwise.stream import Stream
from sparsessm.models.architecture import Layout
from sparsessm.options import Options
from sparsessm.procedure.driver import Job, no_report
from sparsessm.procedure.plan import CompensationPlan, plan_of
from sparsessm.procedure.prune import prune as prune_by_plan

REPOSITORY = Path(__file__).resolve().parent.parent
WORDS = """time state model river stone light window paper garden music silver morning letter winter engine harbour the of
and to in that was with from which over under between after before never always seven green quiet small""".split()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests come first, so that no process begins one of them when the others have nothing left to do."""
    slow = {item.path for item in items if item.get_closest_marker("slow")}
    items.sort(key=lambda item: item.path not in slow)


def random_model(*, seed: int = 0, dtype: torch.dtype = torch.float32, **sizes: Any) -> MambaForCausalLM:
    """A stock model on the CPU in which no parameter is constant, ordered or symmetric."""
    defaults = dict(vocab_size=64, hidden_size=16, num_hidden_layers=2, state_size=6, conv_kernel=4, time_step_rank=3)
    config = MambaConfig(**{**defaults, "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, **sizes})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = MambaForCausalLM(config)
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape)
            if name.endswith(".A_log"):
                new = torch.log(torch.arange(1.0, parameter.shape[1] + 1)) + 0.4 * noise
            elif name.endswith("dt_proj.bias"):
                new = -2.0 + noise
            elif "norm" in name or name.endswith(".D"):
                new = 1.0 + 0.3 * noise
            elif name.endswith(".bias"):
                new = 0.3 * noise
            elif "embeddings" in name or "lm_head" in name:
                new = 0.6 * noise
            elif name.endswith("conv1d.weight"):
                new = 0.5 * noise
            else:
                new = noise / parameter.shape[1] ** 0.5
            parameter.data.copy_(new)
    return model.to(dtype).eval().requires_grad_(False)


@pytest.fixture
def tiny_model():
    """tiny_model(seed=..., dtype=..., **config) makes a seeded random MambaForCausalLM of two layers."""
    return random_model


@pytest.fixture
def tiny_windows():
    """tiny_windows(n, L) makes seeded token ids (n,L) for a tiny model."""

    def make(n: int = 4, L: int = 24, *, seed: int = 1, vocab: int = 64) -> torch.Tensor:
        return torch.randint(vocab, (n, L), generator=torch.Generator().manual_seed(seed))

    return make


@pytest.fixture
def embed():
    """embed(model, windows, batch=...) is the stream that enters the first layer, on the CPU."""

    def make(model: MambaForCausalLM, windows: torch.Tensor, batch: int = 2, **placement: Any) -> Stream:
        return Stream.embed(Layout(model), windows, device="cpu", offload="cpu", batch=batch, **placement)

    return make


@pytest.fixture
def job(embed):
    """job(model, windows, ...) is what the driver works on: by default all layers, in batches of two windows."""

    def make(model, windows, *, first=0, stop=None, batch=2, **rest) -> Job:
        layout = Layout(model)
        stop = len(layout.layers) if stop is None else stop
        return Job(layout, lambda: embed(model, windows, batch), first, stop, **rest)

    return make


@pytest.fixture
def prune(tiny_windows, job):
    """prune(model, what="prune_A" or "prune_layers", **options) prunes in place and returns the masks.

    By the phase of the paper alone: without compensation, and without allocation by measured errors.
    """

    def run(model, what, *, windows=None, first=0, stop=None, report=no_report, **chosen):
        options = Options(model="-", dataset="-", **{what: True}, **chosen)
        windows = tiny_windows(4, 24) if windows is None else windows
        modules = Layout(model).targets(options.target_modules, options.parts, options.module)
        plan = replace(plan_of(options, modules), compensation=CompensationPlan(), allocation="uniform", importance="none")
        return prune_by_plan(job(model, windows, first=first, stop=stop, report=report), plan, windows).masks

    return run


@pytest.fixture
def broken_package(tmp_path, monkeypatch):
    """broken_package(name, lookup) makes a package that cannot be imported; lookup, a cached function, asks for it anew."""
    lookups = []

    def make(name: str, lookup: Any) -> None:
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text("raise ImportError('undefined symbol: _ZN3c10')\n")
        monkeypatch.syspath_prepend(tmp_path)
        lookup.cache_clear()
        lookups.append(lookup)

    yield make
    for lookup in lookups:
        lookup.cache_clear()


@pytest.fixture(scope="session")
def demo_dir() -> Path:
    return REPOSITORY / "data" / "mamba-demo"


@pytest.fixture(scope="session")
def shared_dir() -> Path:
    """The folder of corpora that lies beside the repository on the project's machines."""
    folder = REPOSITORY.parent / "shared"
    if not folder.is_dir():
        pytest.skip("there is no folder shared beside the repository")
    return folder


@pytest.fixture(scope="session")
def text_folder(tmp_path_factory) -> Path:
    """train.txt and test.txt of fixed words, enough for some windows of 64 of the demo tokenizer."""
    folder = tmp_path_factory.mktemp("text")
    for split, lines in (("train", 120), ("test", 40)):
        draw = random.Random(split)
        rows = "\n".join(" ".join(draw.choices(WORDS, k=12)) + " ." for _ in range(lines))
        (folder / f"{split}.txt").write_text(rows + "\n", encoding="utf-8")
    return folder


@pytest.fixture
def tiny_checkpoint(tmp_path, demo_dir):
    """tiny_checkpoint(name, **config) saves a tiny model with the demo's tokenizer and vocabulary; returns the folder."""

    def make(name: str = "tiny", **sizes: Any) -> Path:
        folder = tmp_path / name
        random_model(**{"vocab_size": 4096, **sizes}).save_pretrained(folder)
        for file in ("tokenizer.json", "tokenizer_config.json"):
            shutil.copy(demo_dir / file, folder)
        return folder

    return make


_TOKENS: dict[tuple[str, str], torch.Tensor] = {}


@pytest.fixture
def tokenised_once(monkeypatch):
    """Runs in this process share the tokens of a text, which take as long as a small run itself."""
    tokenise = text._tokenise

    def once(tokenizer: Any, content: str) -> torch.Tensor:
        key = (tokenizer.backend_tokenizer.to_str(), content)
        if key not in _TOKENS:
            _TOKENS[key] = tokenise(tokenizer, content)
        return _TOKENS[key].clone()

    monkeypatch.setattr(text, "_tokenise", once)


class Outcome(NamedTuple):
    """What a call of the command left: exit code, output, and what metrics.json holds (None where there is none)."""

    code: int
    stdout: str
    stderr: str
    metrics: dict[str, Any] | None
    folder: Path | None = None  # the run's, where there is one


@pytest.fixture
def run_main(tmp_path, capsys):
    """run_main([MODEL, DATASET, ...]) calls the command in this process, each call with its own base_dir."""
    import main

    calls = 0

    def call(args, base_dir: bool = True) -> Outcome:
        nonlocal calls
        calls += 1
        base = tmp_path / f"runs-{calls}"
        capsys.readouterr()
        code = main.main([*(["--base_dir", str(base)] if base_dir else []), *map(str, args)])
        captured = capsys.readouterr()
        folder = next(base.glob("*/*"), None)
        found = folder and folder / "metrics.json"
        metrics = json.loads(found.read_text()) if found and found.is_file() else None
        return Outcome(code, captured.out, captured.err, metrics, folder)

    return call
