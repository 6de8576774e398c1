"""The pictures for papers and for wandb."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
QUICK = ["demo", "demo", "--seqlen", "128", "--nsamples", "4", "--eval_windows", "4"]

pytestmark = pytest.mark.usefixtures("tokenised_once")


@pytest.mark.slow
def test_plots_for_papers(experiments, run_report, tmp_path, capsys):
    for name in ("one", "two"):
        assert run_report([experiments, "-o", tmp_path / "r.html", "--plots", tmp_path / name]) == 0
    assert "15 plots" in capsys.readouterr().out
    files = {file.name: file.read_bytes() for file in (tmp_path / "one").iterdir()}
    kinds = [("png", b"\x89PNG"), ("pdf", b"%PDF")]
    assert len(files) == 30 and all(sum(n.endswith(k) and d.startswith(m) for n, d in files.items()) == 15 for k, m in kinds)
    assert files == {file.name: file.read_bytes() for file in (tmp_path / "two").iterdir()}
    names = {"states-demo-50-of-a-log-mean-over-layers.pdf", "time-weights-windows-of-128-tokens-weights-sum-to-1.png"}
    assert names <= files.keys()


def test_plots_take_any_name(hostile, write_run, run_report, tmp_path):
    write_run(tmp_path / "e" / "dollar", model="$\\frac", method="_x$", sparsity=0.5, prune_A=True)
    assert run_report([tmp_path / "e", "-o", tmp_path / "r.html", "--plots", tmp_path / "p"]) == 0
    assert len(list((tmp_path / "p").glob("*.pdf"))) == 4
    assert all(re.fullmatch(r"[A-Za-z0-9.-]+", file.name) for file in (tmp_path / "p").iterdir())


def test_a_run_and_its_help_wait_for_no_matplotlib():
    script = "import sparsessm.run, sparsessm.runs.tracking, sys; assert 'matplotlib' not in sys.modules"
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT).returncode == 0


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")


def test_wandb_gets_the_pictures_of_a_run(run_main, offline):
    outcome = run_main([*QUICK, "--method", "sparsessm", "--prune_A", "--sparsity", "0.5", "--log_wandb"])
    assert outcome.code == 0 and outcome.metrics
    files = outcome.folder.glob("wandb/offline-run-*/files/media/images/plots/*.png")
    kinds = {file.name.rsplit("_", 2)[0] for file in files}
    assert kinds == {"states", "time_weights", "state_shares", "masks"}
