"""The pictures as files, for papers and for wandb."""

from __future__ import annotations

import re
from itertools import product

import pytest

from sparsessm.report.plots import write_plots
from sparsessm.report.results import read_runs

QUICK = ["demo", "demo", "--seqlen", "128", "--nsamples", "4", "--eval_windows", "4"]

pytestmark = pytest.mark.usefixtures("tokenised_once")


@pytest.mark.slow
def test_plots_for_papers(experiments, run_report, tmp_path, capsys):
    assert run_report([experiments, "-o", tmp_path / "r.html", "--plots", tmp_path / "one"]) == 0
    assert "15 plots" in capsys.readouterr().out
    files = {file.name: file.read_bytes() for file in (tmp_path / "one").iterdir()}
    kinds = [("png", b"\x89PNG"), ("pdf", b"%PDF")]
    for ending, start in kinds:
        mine = [data for name, data in files.items() if name.endswith(ending)]
        assert len(mine) == 15 and all(data.startswith(start) for data in mine)
    assert {"weights-128.pdf", "sensitivity-demo-1.png", "states-demo-50.pdf"} <= files.keys()
    (vote,) = [record for record in read_runs(experiments).finished if record.name.startswith("vote/")]
    names = [name for name in write_plots([vote], tmp_path / "two") if name.startswith(("masks", "state-shares"))]
    assert len(names) == 2
    for name, (ending, _) in product(names, kinds):  # the same runs give the same bytes
        assert (tmp_path / "two" / f"{name}.{ending}").read_bytes() == files[f"{name}.{ending}"]


def test_plots_take_any_name(hostile, write_run, run_report, tmp_path):
    write_run(tmp_path / "e" / "dollar", model="$\\frac", method="_x$", sparsity=0.5, prune_A=True)
    assert run_report([tmp_path / "e", "-o", tmp_path / "r.html", "--plots", tmp_path / "p"]) == 0
    assert len(list((tmp_path / "p").glob("*.pdf"))) == 4
    assert all(re.fullmatch(r"[A-Za-z0-9.-]+", file.name) for file in (tmp_path / "p").iterdir())


@pytest.fixture
def offline(monkeypatch):
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")


def test_wandb_gets_the_pictures_of_a_run(run_main, offline):
    outcome = run_main([*QUICK, "--method", "sparsessm", "--prune_A", "--sparsity", "0.5", "--log_wandb"])
    assert outcome.code == 0 and outcome.metrics
    files = outcome.folder.glob("wandb/offline-run-*/files/media/images/plots/*.png")
    assert {file.name.rsplit("_", 2)[0] for file in files} == {"states", "time_weights", "state_shares", "masks"}
