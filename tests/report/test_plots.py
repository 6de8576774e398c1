"""The pictures for papers and for wandb, drawn with matplotlib where it is installed."""

from __future__ import annotations

import re

import pytest

QUICK = ["demo", "demo", "--seqlen", "128", "--nsamples", "4", "--eval_windows", "4"]

pytestmark = pytest.mark.usefixtures("tokenised_once")


@pytest.mark.slow
def test_plots_for_papers(experiments, run_report, tmp_path, capsys):
    pytest.importorskip("matplotlib")
    for name in ("one", "two"):
        assert run_report([experiments, "-o", tmp_path / "r.html", "--plots", tmp_path / name]) == 0
    assert "15 plots" in capsys.readouterr().out
    files = {file.name: file.read_bytes() for file in (tmp_path / "one").iterdir()}
    kinds = [("png", b"\x89PNG"), ("pdf", b"%PDF")]
    assert len(files) == 30 and all(sum(n.endswith(k) and d.startswith(m) for n, d in files.items()) == 15 for k, m in kinds)
    assert files == {file.name: file.read_bytes() for file in (tmp_path / "two").iterdir()}
    assert {"weights-128.pdf", "sensitivity-demo-1.png", "states-demo-50.pdf"} <= files.keys()


def test_plots_take_any_name(hostile, write_run, run_report, tmp_path):
    pytest.importorskip("matplotlib")
    write_run(tmp_path / "e" / "dollar", model="$\\frac", method="_x$", sparsity=0.5, prune_A=True)
    assert run_report([tmp_path / "e", "-o", tmp_path / "r.html", "--plots", tmp_path / "p"]) == 0
    assert len(list((tmp_path / "p").glob("*.pdf"))) == 4
    assert all(re.fullmatch(r"[A-Za-z0-9.-]+", file.name) for file in (tmp_path / "p").iterdir())


def test_matplotlib_missing_is_said_before_anything_is_written(experiments, run_report, tmp_path, no_matplotlib, capsys):
    argv = [experiments, "-o", tmp_path / "r.html"]
    assert run_report([*argv, "--plots", tmp_path / "p"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "pip install -r requirements-plots.txt" in line and not list(tmp_path.iterdir())
    assert run_report(argv) == 0


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")


def logged(run_main):
    """Kinds of the pictures that wandb was given in a run, and the run's log."""
    outcome = run_main([*QUICK, "--method", "sparsessm", "--prune_A", "--sparsity", "0.5", "--log_wandb"])
    assert outcome.code == 0 and outcome.metrics
    files = outcome.folder.glob("wandb/offline-run-*/files/media/images/plots/*.png")
    return {file.name.rsplit("_", 2)[0] for file in files}, (outcome.folder / "output.log").read_text()


def test_wandb_gets_the_pictures_of_a_run(run_main, offline):
    pytest.importorskip("matplotlib")
    kinds, log = logged(run_main)
    assert kinds == {"states", "time_weights", "state_shares", "masks"} and "requirements-plots" not in log


def test_wandb_gets_no_pictures_without_matplotlib_and_the_log_says_so(run_main, offline, no_matplotlib):
    kinds, log = logged(run_main)
    assert not kinds and "pip install -r requirements-plots.txt" in log
