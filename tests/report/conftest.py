"""Fixtures of the reports: real runs on the demo model, run folders made by hand, the script itself."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest

ROOT = Path(__file__).resolve().parents[2]
QUICK = ["demo", "demo", "--seqlen", "128", "--nsamples", "4", "--eval_windows", "4"]
HOSTILE = '"><script>document.title="taken"</script><img src=x onerror="document.title=1">\'&'


@pytest.fixture(scope="session")
def experiments(tmp_path_factory):
    """Real runs on the demo model: dense, three that prune A_log, one that prunes all; and one that did not finish."""
    import main

    base = tmp_path_factory.mktemp("experiments")
    half = ["--sparsity", "0.5"]
    runs = {
        "dense": [],
        "magnitude": ["--method", "magnitude", "--prune_A", *half],
        "vote": ["--method", "sparsessm", "--prune_A", "--sparsity", "0.3", "--save", str(base.parent / "saved")],
        "dev": ["--method", "sparsessm_dev", "--prune_A", *half, "--seed", "3"],
        "all": ["--method", "sparsessm", "--prune_A", "--prune_layers", *half, "--alpha", "0.04", "--eval_dense"],
    }
    for name, argv in runs.items():
        assert main.main([*QUICK, *argv, "--base_dir", str(base), "--experiment_name", name]) == 0
    (base / "stopped" / "20260101-000000").mkdir(parents=True)
    shutil.copy(next(base.glob("dense/*/options.json")), base / "stopped" / "20260101-000000")
    return base


@pytest.fixture(scope="session")
def run_report():
    """run_report([EXPERIMENTS_DIR, ...]) calls scripts/report.py in this process; returns the exit code."""
    spec = importlib.util.spec_from_file_location("report_script", ROOT / "scripts" / "report.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return lambda argv: module.main([str(word) for word in argv])


@pytest.fixture(scope="session")
def write_run():
    """write_run(folder, metrics, **options) makes a run folder by hand: a dense one on the demo, but for what is given."""

    def make(folder, metrics=(), **changed):
        folder.mkdir(parents=True)
        chosen = {"model": "demo", "dataset": "demo", "method": None, "seqlen": 128, "eval_windows": 4, "seed": 0, **changed}
        figures_of = {"perplexity": {"demo": 50.0}, "sparsity": {"ssm": 0.0}, "seconds": {"load": 1.0},
                      "peak_memory_bytes": {"process": 1 << 30}, **dict(metrics)}  # fmt: skip
        (folder / "options.json").write_text(json.dumps(chosen))
        (folder / "metrics.json").write_text(json.dumps(figures_of))
        return folder

    return make


@pytest.fixture
def hostile(tmp_path, write_run):
    """A run in which every text that a file may hold is markup."""
    folder = write_run(
        tmp_path / "e" / "javascript:alert(1)<b>&'\"", {
            "perplexity": {HOSTILE: 9.0}, "versions": {HOSTILE: HOSTILE}, "sparsity": {HOSTILE: 0.5},
            "seconds": {HOSTILE: 1.0}, "peak_memory_bytes": {HOSTILE: 5}, "zero_shot": {HOSTILE: {"value": 0.5}},
        }, model=HOSTILE, dataset=HOSTILE, method=HOSTILE, sparsity=0.5, prune_A=True, seed=1, zzz=HOSTILE,
    )  # fmt: skip
    rows = [{"event": "layer", "phase": "sensitivity", "layer": i, HOSTILE: 2.0 + i} for i in range(2)]
    rows.append({"event": "phase", "phase": "load", "peak_memory_bytes": {HOSTILE: 5}})
    (folder / "events.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n{torn")
    counts = {f"layers.{i}.{HOSTILE}": {"pruned": i, "total": 4} for i in (1, 2)}
    (folder / "sparsity.json").write_text(json.dumps(counts))
    (tmp_path / "e" / "<i>stopped").mkdir()
    (tmp_path / "e" / "<i>stopped" / "options.json").write_text("{}")
    return SimpleNamespace(folder=folder, text=HOSTILE)
