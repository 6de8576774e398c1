"""The paper's tables by one command: which runs they ask for, what their files say, and that a job resumes."""

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
from sparsessm.options import PLACES
from sparsessm.runs import paper, paper_output
from sparsessm.runs.paper import Changes, entries
from tests.latex import rows_of

ROOT = Path(__file__).resolve().parents[2]
PUBLISHED = json.loads((ROOT / "sparsessm" / "metrics" / "paper_tables.json").read_text())["tables"]
SMALL = ["--seqlen", "64", "--nsamples", "4", "--eval_windows", "2"]


def cells_of(name, **changes):
    """Options of a table's runs by row, for one model."""
    lines = entries(paper.load(name), Changes(**changes))
    return {line.row: line.cells[0].options for line in lines}


def leave_run(base, cell, perplexity, zero_shot=None):
    """What a finished run of a cell leaves, with the given figures by data set."""
    run = base / cell.name / "20260101-000000"
    run.mkdir(parents=True)
    (run / "options.json").write_text(json.dumps(cell.settings))
    metrics = {"perplexity": perplexity, "zero_shot": zero_shot or {}}
    (run / "metrics.json").write_text(json.dumps(metrics))
    return run


@pytest.mark.parametrize("name", paper.names())
def test_every_cell_of_every_table_is_a_command_that_main_takes(name):
    table = paper.load(name)
    lines = entries(table, Changes(models=[*paper.MODELS, "demo"]))
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
    heads = [line for line in entries(paper.load("ssm_50_v2"), Changes()) if line.model == "state-spaces/mamba2-780m"]
    assert [line.row for line in heads] == ["dense", "magnitude", "mamba-shedder", "sparsegpt", "sparsessm_dev"]
    found = paper.load("ssm_50_v2").published_figures("mamba2-780m", "sparsessm_dev")
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
        table = paper.load(name)
        for line in entries(table, Changes()):
            figures = table.published_figures(paper.bare_name(line.model), line.row)
            for column, value in figures.items():
                placed.setdefault(table.published, []).append((value, column))
    for name, published in PUBLISHED.items():
        expected = [(value, column) for rows in published["rows"].values() for figures in rows.values()
                    for column, value in figures.items()]  # fmt: skip
        assert sorted(placed[name]) == sorted(expected)


def test_published_figures_of_one_model_are_not_shown_for_another():
    table = paper.load("structured_370m")
    assert table.published_figures("mamba-370m", "sparsessm 25 %")["wikitext2"] == 15.22
    assert table.published_figures("mamba-130m", "sparsessm 25 %") == {}
    assert paper.load("ssm_50").published_figures("demo", "dense") == {}
    assert paper.load("sparsity").published_figures("mamba-130m", "sparsessm") == {}


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
    lines = {line.row: line.cells for line in entries(paper.load("ssm_50"), Changes(models=["demo"], seeds=[0, 1, 2, 0]))}
    assert [cell.options.seed for cell in lines["sparsessm"]] == [0, 1, 2] and len(lines["dense"]) == 1
    assert len({cell.name for cell in lines["sparsessm"]}) == 3


@pytest.mark.parametrize(
    ("table", "changes", "message"),
    [
        ("ssm_51", {}, "there is no table ssm_51; there are: .*ssm_50"),
        ("ssm_50", {"only": ["magnitud"]}, "no row magnitud; it has: dense, magnitude"),
        ("ssm_50", {"dataset": ["ptb", "c4"]}, "give --dataset one name"),
        ("ssm_50", {"argv": ["--save", "x"]}, "--save would send all runs"),
        ("ssm_50", {"argv": ["--base_dir=x"]}, "--base_dir=x would send all runs"),
        ("ssm_50", {"argv": ["--sparsty", "0.1"]}, "unrecognized arguments: --sparsty"),
        ("nsamples", {"flags": {"nsamples": 8}}, "nsamples varies --nsamples itself"),
    ],
)
def test_mistakes_are_named(table, changes, message):
    with pytest.raises(InputError, match=message):
        entries(paper.load(table), Changes(**changes))


@pytest.fixture
def measured(tmp_path):
    """ssm_50 with made-up runs of a folder mamba-130m-hf: dense, and sparsessm under three seeds; sparsegpt failed."""
    model = tmp_path / "mamba-130m-hf"
    model.mkdir()
    base, table = tmp_path / "runs", paper.load("ssm_50")
    changes = Changes(models=[str(model)], seeds=[0, 1, 2], only=["dense", "magnitude", "sparsegpt", "sparsessm"])
    lines = entries(table, changes)
    cells = {line.row: line.cells for line in lines}
    scores = {"piqa": 0.63, "arc_easy": 0.4815, "arc_challenge": 0.25, "winogrande": 0.5, "openbookqa": 0.286, "mean": 0.5}
    scores = {task: {"metric": "acc", "value": value, "stderr": 0.01} for task, value in scores.items()}
    leave_run(base, cells["dense"][0], {"wikitext2": 20.61, "ptb": 32.5, "c4": float("inf")}, scores)
    for cell, value in zip(cells["sparsessm"], (27.0, 28.0, 30.0), strict=True):
        leave_run(base, cell, {"wikitext2": value, "ptb": 50.0, "c4": 31.47})
    failures = dict.fromkeys(cells["sparsegpt"], "error: no | memory_left (exit code 1; log)")
    return paper.fill_in(table, lines, base, failures), base


# mean 28.333, published 27.7; squares of the distances 1.778 + 0.111 + 2.778 = 4.667, halved 2.333, root 1.528
def test_markdown_shows_published_ours_and_difference(measured, tmp_path):
    filled, base = measured
    lines = paper_output.markdown(filled, tmp_path / "out").splitlines()
    accuracies = lines.index("## Zero-shot accuracy, %")
    head, _, dense, magnitude, sparsegpt, sparsessm = (line for line in lines[:accuracies] if line.startswith("|"))
    assert head.startswith("| model | row | wikitext2 published | wikitext2 ours | difference | ptb published |")
    assert dense == "| mamba-130m | dense | 20.6 | 20.61 | +0.01 | 32.75 | 32.50 | -0.25 | 25.66 | inf | +inf | [1] |"
    assert magnitude == "| mamba-130m | magnitude | 740.3 | – | – | 1109 | – | – | 273 | – | – | – |"
    assert sparsegpt == "| mamba-130m | sparsegpt | 2.4e+07 | failed | – | 6.1e+06 | failed | – | 390000 | failed | – | – |"
    assert sparsessm.startswith("| mamba-130m | sparsessm | 27.7 | 28.33 ± 1.53 (+7.72) | +0.63 | 47.81 | 50.00 ± 0.00 (+")
    assert sparsessm.endswith("| [2] [3] [4] |")
    head, _, dense, magnitude, *_ = (line for line in lines[accuracies:] if line.startswith("|"))
    assert head.startswith("| model | row | openbookqa published | openbookqa ours | difference | piqa published |")
    assert dense.startswith("| mamba-130m | dense | 28.6 | 28.60 | +0.00 | 63.28 | 63.00 | -0.28 | 48.02 | 48.15 | +0.13 |")
    assert dense.endswith("| 43.36 | 50.00 | +6.64 | [1] |") and magnitude.endswith("| 39.84 | – | – | – |")
    assert "- mamba-130m, sparsegpt, seed 1: error: no | memory_left (exit code 1; log)" in lines
    run = next(base.glob("mamba-130m-hf-dense-*/*"))
    assert f"1. `{os.path.relpath(run, tmp_path / 'out')}`" in lines
    assert any("one of them looks like a slip" in line for line in lines)
    assert any("sample over 3 seeds" in line for line in lines)


def test_csv_has_every_figure_unrounded(measured):
    filled, _ = measured
    rows = {(row["row"], row["column"]): row for row in csv.DictReader(paper_output.comma_separated(filled).splitlines())}
    assert len(rows) == 4 * 9
    found = rows["sparsessm", "wikitext2"]
    assert float(found["published"]) == PUBLISHED["ssm_50"]["rows"]["mamba-130m"]["sparsessm"]["wikitext2"]
    assert float(found["ours"]) == pytest.approx(85 / 3) and float(found["difference"]) == pytest.approx(85 / 3 - 27.7)
    assert float(found["standard_deviation"]) == pytest.approx((7 / 3) ** 0.5) and found["seeds"] == "3"
    assert all((Path(run) / "metrics.json").is_file() for run in found["runs"].split(";"))
    assert found["runs"].count(";") == 2
    assert (rows["dense", "c4"]["ours"], rows["dense", "c4"]["standard_deviation"]) == ("inf", "")
    missing = rows["magnitude", "wikitext2"]
    assert (missing["published"], missing["ours"], missing["difference"], missing["runs"]) == ("740.3", "", "", "")
    assert float(rows["dense", "average"]["ours"]) == 50.0


def test_latex_shows_the_same(measured):
    filled, base = measured
    text = paper_output.latex(filled)
    rows = rows_of(text)
    assert rows[0] == ["", "", *(rf"\multicolumn{{3}}{{c}}{{{name}}}" for name in ("wikitext2", "ptb", "c4"))]
    assert r"\cmidrule(lr){3-5} \cmidrule(lr){6-8} \cmidrule(lr){9-11}" in text.splitlines()
    assert rows[1] == ["model", "row", *("published", "ours", "difference") * 3]
    figures = {row[1]: row[2:] for row in rows[2:6]}
    assert figures["dense"][:6] == ["20.6", "20.61", "+0.01", "32.75", "32.50", "$-$0.25"]
    assert figures["sparsessm"][:3] == [r"\textbf{27.7}", r"\textbf{28.33 $\pm$ 1.53 (+7.72)}", "+0.63"]
    assert figures["magnitude"][:3] == ["740.3", "--", "--"]
    assert r"\multicolumn{3}{c}{arc\_easy}" in rows[6] and len(rows) == 12
    labels = re.findall(r"\\label\{(.*)\}", text)
    assert labels == ["tab:ssm-50-perplexity", "tab:ssm-50-zero-shot-accuracy"]
    assert r"\caption{50 \% of A\_log pruned, unstructured. Perplexity; in bold the best of the pruned models." in text
    run = next(base.glob("mamba-130m-hf-dense-*/*"))
    assert text.splitlines()[text.splitlines().index(f"% {run}") + 1].startswith("mamba-130m & dense & 20.6 & 20.61 &")


def test_what_varies_has_its_own_columns_and_two_folders_of_one_name_their_parents(tmp_path):
    models = [tmp_path / one / "mamba" for one in "ab"]
    for folder in models:
        folder.mkdir(parents=True)
    lines = entries(paper.load("sparsity"), Changes(models=list(map(str, models)), only=["dense", "sparsessm"]))
    assert lines[1].cells[0].label == "a/mamba, sparsessm, sparsity 0.1"
    for line, value in zip(lines, (20.0, 19.5, None), strict=False):
        leave_run(tmp_path, line.cells[0], {"wikitext2": value})
    filled = paper.fill_in(paper.load("sparsity"), lines, tmp_path, {})
    shown = paper_output.text(filled).splitlines()
    assert shown[1].split() == ["model", "row", "sparsity", "wikitext2"]
    assert shown[3].split()[:4] == ["a/mamba", "dense", "–", "20.00"]
    assert shown[4].split() == ["a/mamba", "sparsessm", "0.1", "19.50", "(-0.50)"]
    assert shown[5].split() == ["a/mamba", "sparsessm", "0.2", "inf", "(+inf)"]
    rows = rows_of(paper_output.latex(filled))
    assert rows[2] == ["a/mamba", "sparsessm", "0.1", r"\textbf{19.50 ($-$0.50)}"]
    assert paper_output.latex(filled).count(r"\midrule") == 2  # below the head, and between the models


def test_json_leads_from_figures_to_runs(measured):
    filled, base = measured
    lines = {line["row"]: line for line in paper_output.trace(filled, base)["lines"]}
    assert [run["state"] for run in lines["sparsessm"]["runs"]] == ["done"] * 3
    assert lines["sparsessm"]["figures"]["wikitext2"]["ours"] == [27.0, 28.0, 30.0]
    assert {run["state"] for run in lines["sparsegpt"]["runs"]} == {"failed"}
    assert {run["state"] for run in lines["magnitude"]["runs"]} == {"to do"}
    (dense,) = lines["dense"]["runs"]
    assert (Path(dense["folder"]) / "metrics.json").is_file()
    words = shlex.split(dense["command"])
    assert words[:2] == ["python", "main.py"] and commandline.parse(words[2:])[0].method is None


@pytest.mark.parametrize("name", ["transfer", "ssm_50"])
def test_a_table_without_published_figures_shows_ours_alone(tmp_path, name):
    table = paper.load(name)
    lines = entries(table, Changes(models=["demo"], only=["dense"]))
    leave_run(tmp_path, lines[0].cells[0], {"wikitext2": 1.5, "ptb": 123456.0, "c4": 3.0})
    filled = paper.fill_in(table, lines, tmp_path, {})
    page = paper_output.markdown(filled, tmp_path)
    assert "| model | row | wikitext2 | ptb | c4 | runs |" in page
    assert "| demo | dense | 1.50 | 1.23e+05 | 3.00 | [1] |" in page
    assert r"\begin{tabular}{llrrr}" in paper_output.latex(filled) and "slip" not in page


def test_data_sets_of_one_name_keep_their_columns_apart(tmp_path):
    folders = [tmp_path / one / "news" for one in "ab"]
    for folder in folders:
        folder.mkdir(parents=True)
    changes = Changes(models=["demo"], ppl_datasets=[str(folder) for folder in folders], only=["dense"])
    lines = entries(paper.load("ssm_50"), changes)
    leave_run(tmp_path, lines[0].cells[0], {str(folder): i for i, folder in enumerate(folders)})
    filled = paper.fill_in(paper.load("ssm_50"), lines, tmp_path, {})
    assert filled.perplexities == ["a/news", "b/news"]
    assert [filled.lines[0].figures[column].mean for column in filled.perplexities] == [0, 1]


def test_other_settings_than_the_published_ones_are_said_where_figures_are_compared(tmp_path):
    model = tmp_path / "mamba-130m"
    model.mkdir()
    table, small = paper.load("ssm_50"), {"seqlen": 128, "eval_windows": 8, "nsamples": 4}
    remarks = {}
    for name, flags in ((str(model), small), (str(model), {}), ("demo", small)):
        lines = entries(table, Changes(models=[name], flags=flags))
        remarks[name, len(flags)] = " ".join(paper.fill_in(table, lines, tmp_path, {}).remarks)
    said = "(windows of 128 tokens, not 2048; the first windows of the text only; calibrated on 4 windows of wikitext2)"
    assert said in remarks[str(model), 3]
    assert "not measured" not in remarks[str(model), 0] and remarks["demo", 3] == ""


def test_a_mean_over_other_tasks_is_not_compared_with_the_published_average(tmp_path):
    model = tmp_path / "mamba-130m"
    model.mkdir()
    lines = entries(paper.load("ssm_50"), Changes(models=[str(model)], only=["dense"], argv=["--eval_zero_shot"]))
    scores = {"mine": {"value": 0.25}, "piqa": {"value": 0.75}, "mean": {"value": 0.5}}
    leave_run(tmp_path, lines[0].cells[0], {"wikitext2": 1.0}, scores)
    filled = paper.fill_in(paper.load("ssm_50"), lines, tmp_path, {})
    figures = filled.lines[0].figures
    assert filled.accuracies[-2:] == ["mine", "mean"]
    assert (figures["piqa"].mean, figures["mine"].mean, figures["mean"].mean) == (75.0, 25.0, 50.0)
    assert figures["average"].published == 43.36 and figures["average"].mean is None


def test_dry_run_lists_what_is_to_do_and_runs_nothing(tmp_path, capsys):
    lines = entries(paper.load("ssm_50"), Changes(models=["demo"]))
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
        table = paper.load(name)
        if table.published:
            model, row, value = re.search(r"(mamba-\S+) under (.+) gives (\S+) on wikitext2", " ".join(comments)).groups()
            assert table.published_figures(model, row)["wikitext2"] == float(value)


def command(*words, **more):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, str(ROOT / "scripts" / "reproduce.py"), *map(str, words)], env=environment,
                            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **more)  # fmt: skip


def snapshot(base):
    """Everything in the run folders, with its time."""
    return {path: path.stat().st_mtime_ns for path in base.glob("*/*/**/*")}


@pytest.mark.slow
def test_a_grid_is_filled_killed_gone_on_with_and_left_alone_when_done(tmp_path, text_folder):
    """On the demo model; of a second model, which is broken, every run fails."""
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "config.json").write_text('{"model_type": "mamba"}')
    base, out = tmp_path / "runs", tmp_path / "out"
    words = ["ssm_50", "--dataset", text_folder, *SMALL, "--only", "dense", "sparsessm", "--base_dir", base, "--out", out]

    process = command(*words, "--models", "demo", start_new_session=True)
    while not (list(base.glob("demo-dense-*/*/metrics.json")) and list(base.glob("demo-sparsessm-*/*/options.json"))):
        assert process.poll() is None
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    done = {path: time for path, time in snapshot(base).items() if path.parent.parent.name.startswith("demo-dense-")}
    assert not out.exists()

    process = command(*words, "--models", broken, "demo")
    _, err = process.communicate()
    assert process.returncode == 1
    failed = [line for line in err.splitlines() if line.startswith("failed: ")]
    assert len(failed) == 2 and all("broken has a config but no weights" in line for line in failed)
    assert done.items() <= snapshot(base).items()
    assert len(list(base.glob("demo-sparsessm-*/*/"))) == 1  # the killed run went on
    with (out / "ssm_50.csv").open() as stream:
        rows = {(row["model"], row["row"]): row for row in csv.DictReader(stream)}
    for method in ("dense", "sparsessm"):
        (run,) = base.glob(f"demo-{method}-*/*/metrics.json")
        metrics = json.loads(run.read_text())
        assert float(rows["demo", method]["ours"]) == metrics["perplexity"][str(text_folder)]
        assert rows["demo", method]["runs"] == str(run.parent) and rows["broken", method]["ours"] == ""
    assert metrics["sparsity"]["ssm"] == 0.5

    before = snapshot(base)
    process = command(*words, "--models", "demo")
    process.communicate()
    assert process.returncode == 0 and snapshot(base) == before
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
        assert [row["ours"] for row in csv.DictReader(stream)] == ["", ""]
