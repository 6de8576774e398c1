"""The paper's tables by one command: which runs they ask for, and that a job resumes."""

import csv
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from scripts import reproduce
from sparsessm import commandline
from sparsessm.errors import InputError
from sparsessm.metrics.published import published_figures
from sparsessm.options import PLACES
from sparsessm.runs import paper
from tests.finished_runs import leave_run

ROOT = Path(__file__).resolve().parents[2]
PUBLISHED = json.loads((ROOT / "sparsessm" / "metrics" / "paper_tables.json").read_text())["tables"]
SMALL = ["--seqlen", "64", "--nsamples", "4", "--eval_windows", "2"]


def lines_of(name, **changes):
    return paper.experiment(paper.load(name), **changes).lines


def row_of(line):
    """A line's row with what varies, as it stands in a label."""
    varied = list(line.names.items())[2:]
    return ", ".join([line.names["row"], *(f"{flag} {value}" for flag, value in varied)])


def cells_of(name, **changes):
    """Options of a table's runs by row, for one model."""
    return {row_of(line): line.cells[0].options for line in lines_of(name, **changes)}


@pytest.mark.parametrize("name", paper.names())
def test_every_cell_of_every_table_is_a_command_that_main_takes(name):
    table = paper.load(name)
    lines = lines_of(name, models=[*paper.MODELS, "demo"])
    assert len(lines) % (len(paper.MODELS) + 1) == 0 and {line.model for line in lines} == {*paper.MODELS.values(), "demo"}
    for line in lines:
        (cell,) = line.cells
        chosen, resumed = commandline.parse(cell.command(Path("runs")))
        assert resumed is None and chosen.model == line.model and chosen.ppl_datasets == tuple(table.ppl_datasets)
        assert (chosen.base_dir, chosen.experiment_name) == (str(Path("runs").absolute()), cell.name)
    assert len({line.cells[0].name for line in lines}) == len(lines)


def test_the_published_tables_ask_for_what_was_published():
    ssm, whole, later = (cells_of(name, models=["130m"]) for name in ("ssm_50", "whole_50", "ssm_50_v2"))
    for row, chosen in ssm.items():
        assert chosen.model == "state-spaces/mamba-130m-hf" and chosen.ppl_datasets == ("wikitext2", "ptb", "c4")
        if row != "dense":
            found = (chosen.method, chosen.prune_A, chosen.prune_layers, chosen.sparsity, chosen.nsamples, chosen.seqlen)
            assert found == (row, True, False, 0.5, 64, 2048)
    assert (whole["sparsessm"].prune_A, whole["sparsessm"].prune_layers, whole["sparsessm"].alpha) == (True, True, 0.04)
    assert (ssm["mamba-shedder"].shed_target, whole["mamba-shedder"].shed_target) == ("ssm", "mamba_block")
    assert later["sparsessm_dev"].method == "sparsessm_dev" and "sparsessm" not in later
    heads = [line for line in lines_of("ssm_50_v2") if line.model == "state-spaces/mamba2-780m"]
    assert [line.names["row"] for line in heads] == ["dense", "magnitude", "mamba-shedder", "sparsegpt", "sparsessm_dev"]
    found = published_figures("ssm_50_v2", "mamba2-780m", "sparsessm_dev")
    assert (found["wikitext2"], found["ptb"], found["average"]) == (12.7, 19.2, 50.36)
    structured = cells_of("structured_370m")
    found = {row: (chosen.method, chosen.sparsity) for row, chosen in structured.items()}
    assert found["sparsessm 25 %"] == ("structure_ts", 0.25) and found["magnitude 50 %"] == ("structure_mag", 0.5)


def test_the_grids_cover_what_they_say():
    sparsity = cells_of("sparsity", only=["sparsessm"])
    assert [chosen.sparsity for chosen in sparsity.values()] == [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9]
    aggregation = cells_of("aggregation")
    assert {(chosen.aggregate, chosen.saliency) for row, chosen in aggregation.items() if row != "dense"} == {
        (rule, saliency) for rule in ("vote", "sum", "power", "discount", "linear", "window")
        for saliency in ("a_log", "transition")
    }  # fmt: skip
    patterns = {(chosen.method, chosen.prunen, chosen.prunem) for chosen in cells_of("n_of_m", models=["130m"]).values()}
    assert {("ts_semi", 2, 4), ("mag_semi", 2, 4), ("ts_semi", 4, 8), ("wanda", 2, 4)} <= patterns
    assert {chosen.nsamples for chosen in cells_of("nsamples", only=["sparsessm"]).values()} == {4, 8, 16, 32, 64, 128, 256}
    transfer = cells_of("transfer", only=["sparsessm"])
    assert {row: chosen.dataset for row, chosen in transfer.items()} == {
        "sparsessm, dataset wikitext2": "wikitext2", "sparsessm, dataset ptb": "ptb", "sparsessm, dataset c4": "c4"
    }  # fmt: skip
    assert {chosen.ppl_datasets for chosen in transfer.values()} == {("wikitext2", "ptb", "c4")}


def test_every_published_figure_has_its_place():
    placed = {}
    for name in paper.names():
        for line in lines_of(name):
            for column, value in line.published.items():
                placed.setdefault(name, []).append((value, column))
    for name, published in PUBLISHED.items():
        expected = [(value, column) for rows in published["rows"].values() for figures in rows.values()
                    for column, value in figures.items()]  # fmt: skip
        assert sorted(placed[name]) == sorted(expected)


def test_published_figures_of_one_model_are_not_shown_for_another():
    assert published_figures("structured_370m", "mamba-370m", "sparsessm 25 %")["wikitext2"] == 15.22
    assert published_figures("structured_370m", "mamba-130m", "sparsessm 25 %") == {}
    assert published_figures("ssm_50", "demo", "dense") == {}
    assert published_figures("sparsity", "mamba-130m", "sparsessm") == {}


def test_changes_reach_the_runs(text_folder, tmp_path):
    flags = {"seqlen": 64, "nsamples": 4, "eval_windows": 2}
    chosen = cells_of("ssm_50", models=["demo"], dataset=[str(text_folder)], flags=flags)
    assert {(one.dataset, one.ppl_datasets, one.seqlen, one.eval_windows) for one in chosen.values()} == {
        (str(text_folder), (str(text_folder),), 64, 2)
    }
    assert chosen["sparsessm"].nsamples == 4 and chosen["dense"].nsamples == 128  # which draws none
    elsewhere = cells_of("ssm_50", models=["demo"], dataset=["ptb"], ppl_datasets=["wikitext2", "c4"])
    assert (elsewhere["dense"].dataset, elsewhere["dense"].ppl_datasets) == ("ptb", ("wikitext2", "c4"))
    further = cells_of("ssm_50", models=["demo"], argv=["--pruned_transition", "unit", "--data_dir", str(tmp_path)])
    assert further["sparsessm"].pruned_transition == "unit" and further["dense"].data_dir == str(tmp_path)
    assert cells_of("ssm_50", models=["demo"], argv=["--eval_zero_shot"])["sparsessm"].eval_zero_shot
    assert list(cells_of("sparsity", only=["dense", "magnitude"]))[:2] == ["dense", "magnitude, sparsity 0.1"]
    assert set(cells_of("n_of_m", models=["demo"], only=["ts_semi"])) == {"A_log 2:4, ts_semi", "A_log 4:8, ts_semi"}
    texts = ["demo", str(text_folder)]
    transfer = cells_of("transfer", models=["demo"], dataset=texts, only=["sparsessm"])
    assert [one.dataset for one in transfer.values()] == texts
    assert f"sparsessm, dataset {text_folder.name}" in transfer


def test_seeds_repeat_the_runs_that_prune():
    lines = {row_of(line): line.cells for line in lines_of("ssm_50", models=["demo"], seeds=[0, 1, 2, 0])}
    assert [cell.options.seed for cell in lines["sparsessm"]] == [0, 1, 2] and len(lines["dense"]) == 1
    assert len({cell.name for cell in lines["sparsessm"]}) == 3


@pytest.mark.parametrize(
    ("table", "changes", "message"),
    [
        ("ssm_51", {}, "there is no table ssm_51; there are: .*ssm_50"),
        ("ssm_50", {"only": ["magnitud"]}, "no row magnitud; it has: dense, magnitude"),
        ("ssm_50", {"only": []}, "ssm_50 asks for no run"),
        ("ssm_50", {"dataset": ["ptb", "c4"]}, "give --dataset one name"),
        ("ssm_50", {"argv": ["--save", "x"]}, "--save would send all runs"),
        ("ssm_50", {"argv": ["--base_dir=x"]}, "--base_dir=x would send all runs"),
        ("ssm_50", {"argv": ["--sparsty", "0.1"]}, "unrecognized arguments: --sparsty"),
        ("nsamples", {"flags": {"nsamples": 8}}, "nsamples varies --nsamples itself"),
    ],
)
def test_mistakes_are_named(table, changes, message):
    with pytest.raises(InputError, match=message):
        lines_of(table, **changes)


def test_dry_run_lists_what_is_to_do_and_runs_nothing(tmp_path, capsys):
    lines = lines_of("ssm_50", models=["demo"])
    done = leave_run(tmp_path, lines[0].cells[0], {"wikitext2": 1.0})
    broken_off = leave_run(tmp_path, lines[1].cells[0], {})
    recorded = {**lines[1].cells[0].settings, **dict.fromkeys(PLACES)}
    (broken_off / "options.json").write_text(json.dumps(recorded))
    (broken_off / "metrics.json").unlink()
    assert reproduce.main(["ssm_50", "--models", "demo", "--base_dir", str(tmp_path), "--dry_run"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert listed[:2] == [f"# done: {done}", f"python main.py --resume {broken_off}"]
    assert [shlex.split(line)[2:] for line in listed[2:]] == [line.cells[0].command(tmp_path) for line in lines[2:]]
    assert reproduce.main(["ssm_50", "--models", "demo", "--dry_run", "--sparsity", "0.3"]) == 0  # dense has none
    assert capsys.readouterr().out.startswith("# fails: demo wikitext2 ")


def test_the_command_says_in_one_line_what_is_wrong(capsys):
    assert reproduce.main(["ssm_50", "--models", "demo", "--modles", "x"]) == 2
    assert capsys.readouterr().err == "error: unrecognized arguments: --modles x\n"
    assert reproduce.main(["--models", "demo"]) == 2
    assert capsys.readouterr().err == "error: the following arguments are required: table\n"
    assert reproduce.main(["ssm_50", "--models", "demo", "--workers", "0"]) == 2


def test_each_table_has_its_script_whose_header_tells_the_truth():
    scripts = {path.stem.removeprefix("table_"): path for path in (ROOT / "scripts").glob("table_*.sh")}
    assert scripts.keys() == set(paper.names())
    for name, path in scripts.items():
        text = path.read_text()
        comments = [line for line in text.splitlines()[1:] if line.startswith("#")]
        assert f"bash scripts/{path.name}" in text and len(text.splitlines()) - len(comments) <= 5
        assert f"scripts/reproduce.py {name} " in text and os.access(path, os.X_OK)
        assert subprocess.run(["bash", "-n", str(path)]).returncode == 0
        if name in PUBLISHED:
            model, row, value = re.search(r"(mamba-\S+) under (.+) gives (\S+) on wikitext2", " ".join(comments)).groups()
            assert published_figures(name, model, row)["wikitext2"] == float(value)


def command(*words, **more):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, str(ROOT / "scripts" / "reproduce.py"), *map(str, words)], env=environment,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **more)  # fmt: skip


def snapshot(base):
    """Everything in the run folders, with its time."""
    return {path: path.stat().st_mtime_ns for path in base.glob("*/*/**/*")}


@pytest.mark.slow
def test_a_grid_is_filled_killed_gone_on_with_and_left_alone_when_done(tmp_path, text_folder, capsys):
    """On the demo model; of a second model, which is broken, every run fails."""
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text('{"model_type": "mamba"}')
    base, out = tmp_path / "runs", tmp_path / "out"
    words = ["ssm_50", "--dataset", str(text_folder), *SMALL, "--only", "dense", "sparsessm", "--base_dir", str(base),
             "--out", str(out)]  # fmt: skip

    process = command(*words, "--models", "demo", start_new_session=True)
    while not (list(base.glob("demo-dense-*/*/metrics.json")) and list(base.glob("demo-sparsessm-*/*/options.json"))):
        assert process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    done = {path: time for path, time in snapshot(base).items() if path.parent.parent.name.startswith("demo-dense-")}
    assert not out.exists()

    assert reproduce.main([*words, "--models", str(broken), "demo"]) == 1
    failed = [line for line in capsys.readouterr().err.splitlines() if line.startswith("failed: ")]
    assert len(failed) == 2 and all("broken has a config but no weights" in line for line in failed)
    assert done.items() <= snapshot(base).items()
    assert len(list(base.glob("demo-sparsessm-*/*/"))) == 1  # the killed run went on
    with (out / "ssm_50.csv").open() as stream:
        rows = {(row["model"], row["row"]): row for row in csv.DictReader(stream) if row["column"] == text_folder.name}
    for method in ("dense", "sparsessm"):
        (run,) = base.glob(f"demo-{method}-*/*/metrics.json")
        metrics = json.loads(run.read_text())
        assert float(rows["demo", method]["ours"]) == metrics["perplexity"][str(text_folder)]
        assert rows["demo", method]["runs"] == str(run.parent) and rows["broken", method]["ours"] == ""
    assert metrics["sparsity"]["ssm"] == 0.5

    before = snapshot(base)
    assert reproduce.main([*words, "--models", "demo"]) == 0 and snapshot(base) == before
    assert sorted(path.name for path in out.iterdir()) == ["ssm_50.csv", "ssm_50.json", "ssm_50.md", "ssm_50.tex"]


@pytest.mark.slow
def test_sigterm_ends_the_running_child_and_the_table_says_what_is_there(tmp_path, text_folder):
    base = tmp_path / "runs"
    words = ["ssm_50", "--models", "demo", "--dataset", text_folder, *SMALL, "--only", "dense", "magnitude"]
    words += ["--base_dir", base]
    process = command(*words)
    while not list(base.glob("demo-dense-*/*/options.json")):
        assert process.poll() is None
        time.sleep(0.01)
    process.terminate()
    _, err = process.communicate(timeout=30)
    assert process.returncode == 128 + signal.SIGTERM and "stopped by SIGTERM; the same command continues" in err
    assert not list(base.glob("*/*/metrics.json"))
    assert not list(base.glob("demo-magnitude-*"))
    with (base / "tables" / "ssm_50.csv").open() as stream:
        assert [(row["row"], row["column"], row["ours"]) for row in csv.DictReader(stream)] == [
            (row, text_folder.name, "") for row in ("dense", "magnitude")
        ]
