"""A table that was filled: as text, Markdown, CSV, LaTeX and JSON."""

import csv
import json
import os
import re
import shlex
from pathlib import Path

import pytest

from sparsessm import commandline
from sparsessm.runs import experiment_output, paper
from sparsessm.runs.experiment import ACCURACY, PERPLEXITY, Experiment, Line, fill_in
from sparsessm.runs.grid import Cell
from tests.finished_runs import leave_run
from tests.latex import rows_of

ROOT = Path(__file__).resolve().parents[2]
PUBLISHED = json.loads((ROOT / "sparsessm" / "metrics" / "paper_tables.json").read_text())["tables"]


@pytest.fixture
def measured(tmp_path):
    """ssm_50 with made-up runs of a folder mamba-130m-hf: dense, and sparsessm under three seeds; sparsegpt failed."""
    model = tmp_path / "mamba-130m-hf"
    model.mkdir()
    base, table = tmp_path / "runs", paper.load("ssm_50")
    rows = ["dense", "magnitude", "sparsegpt", "sparsessm"]
    experiment = paper.experiment(table, models=[str(model)], seeds=[0, 1, 2], only=rows)
    cells = {line.names["row"]: line.cells for line in experiment.lines}
    scores = {"piqa": 0.63, "arc_easy": 0.4815, "arc_challenge": 0.25, "winogrande": 0.5, "openbookqa": 0.286, "mean": 0.5}
    scores = {task: {"metric": "acc", "value": value, "stderr": 0.01} for task, value in scores.items()}
    leave_run(base, cells["dense"][0], {"wikitext2": 20.61, "ptb": 32.5, "c4": float("inf")}, scores)
    for cell, value in zip(cells["sparsessm"], (27.0, 28.0, 30.0), strict=True):
        leave_run(base, cell, {"wikitext2": value, "ptb": 50.0, "c4": 31.47})
    failures = dict.fromkeys(cells["sparsegpt"], "error: no | memory_left (exit code 1; log)")
    return fill_in(experiment, base, failures), base


# mean 28.333, published 27.7; squares of the distances 1.778 + 0.111 + 2.778 = 4.667, halved 2.333, root 1.528
def test_markdown_shows_published_ours_and_difference(measured, tmp_path):
    filled, base = measured
    lines = experiment_output.markdown(filled, tmp_path / "out").splitlines()
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
    assert "In parentheses the difference to the dense model. Mean ± standard deviation of the sample over seeds." in lines


def test_csv_has_every_figure_unrounded(measured):
    filled, _ = measured
    lines = list(csv.DictReader(experiment_output.comma_separated(filled).splitlines()))
    rows = {(row["row"], row["column"]): row for row in lines}
    assert len(lines) == len(rows) == 4 * 12
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
    text = experiment_output.latex(filled)
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
    experiment = paper.experiment(paper.load("sparsity"), models=list(map(str, models)), only=["dense", "sparsessm"])
    assert experiment.cells[1].label == "a/mamba, sparsessm, sparsity 0.1"
    for cell, value in zip(experiment.cells, (20.0, 19.5, None), strict=False):
        leave_run(tmp_path, cell, {"wikitext2": value})
    filled = fill_in(experiment, tmp_path, {})
    shown = experiment_output.text(filled).splitlines()
    assert shown[1].split() == ["model", "row", "sparsity", "wikitext2"]
    assert shown[3].split()[:4] == ["a/mamba", "dense", "–", "20.00"]
    assert shown[4].split() == ["a/mamba", "sparsessm", "0.1", "19.50", "(-0.50)"]
    assert shown[5].split() == ["a/mamba", "sparsessm", "0.2", "inf", "(+inf)"]
    rows = rows_of(experiment_output.latex(filled))
    assert rows[2] == ["a/mamba", "sparsessm", "0.1", r"\textbf{19.50 ($-$0.50)}"]
    assert experiment_output.latex(filled).count(r"\midrule") == 2  # below the head, and between the models


def test_json_leads_from_figures_to_runs(measured):
    filled, _ = measured
    lines = {line["row"]: line for line in json.loads(experiment_output.as_json(filled))["lines"]}
    assert [run["state"] for run in lines["sparsessm"]["runs"]] == ["done"] * 3
    assert lines["sparsessm"]["figures"]["Perplexity"]["wikitext2"]["ours"] == [27.0, 28.0, 30.0]
    assert {run["state"] for run in lines["sparsegpt"]["runs"]} == {"failed"}
    assert {run["state"] for run in lines["magnitude"]["runs"]} == {"to do"}
    (dense,) = lines["dense"]["runs"]
    assert (Path(dense["folder"]) / "metrics.json").is_file()
    words = shlex.split(dense["command"])
    assert words[:2] == ["python", "main.py"] and commandline.parse(words[2:])[0].method is None


@pytest.mark.parametrize("name", ["transfer", "ssm_50"])
def test_a_table_without_published_figures_shows_ours_alone(tmp_path, name):
    table = paper.load(name)
    experiment = paper.experiment(table, models=["demo"], only=["dense"])
    leave_run(tmp_path, experiment.cells[0], {"wikitext2": 1.5, "ptb": 123456.0, "c4": 3.0})
    filled = fill_in(experiment, tmp_path, {})
    page = experiment_output.markdown(filled, tmp_path)
    assert "| model | row | wikitext2 | ptb | c4 | runs |" in page
    assert "| demo | dense | 1.50 | 1.23e+05 | 3.00 | [1] |" in page
    assert r"\begin{tabular}{llrrr}" in experiment_output.latex(filled) and "slip" not in page


def test_data_sets_of_one_name_keep_their_columns_apart(tmp_path):
    folders = [tmp_path / one / "news" for one in "ab"]
    for folder in folders:
        folder.mkdir(parents=True)
    texts = [str(folder) for folder in folders]
    experiment = paper.experiment(paper.load("ssm_50"), models=["demo"], ppl_datasets=texts, only=["dense"])
    leave_run(tmp_path, experiment.cells[0], {str(folder): i for i, folder in enumerate(folders)})
    filled = fill_in(experiment, tmp_path, {})
    figures = filled.lines[0].figures[PERPLEXITY]
    assert list(figures) == ["a/news", "b/news"]
    assert [figure.mean for figure in figures.values()] == [0, 1]


def test_other_settings_than_the_published_ones_are_said_where_figures_are_compared(tmp_path):
    model = tmp_path / "mamba-130m"
    model.mkdir()
    table, small = paper.load("ssm_50"), {"seqlen": 128, "eval_windows": 8, "nsamples": 4}
    remarks = {}
    for name, flags in ((str(model), small), (str(model), {}), ("demo", small)):
        remarks[name, len(flags)] = " ".join(paper.experiment(table, models=[name], flags=flags).remarks)
    said = "(windows of 128 tokens, not 2048; the first windows of the text only; calibrated on 4 windows of wikitext2)"
    assert said in remarks[str(model), 3]
    assert "not measured" not in remarks[str(model), 0] and remarks["demo", 3] == ""


def test_a_mean_over_other_tasks_is_not_compared_with_the_published_average(tmp_path):
    model = tmp_path / "mamba-130m"
    model.mkdir()
    table = paper.load("ssm_50")
    experiment = paper.experiment(table, models=[str(model)], only=["dense"], argv=["--eval_zero_shot"])
    scores = {"mine": {"value": 0.25}, "piqa": {"value": 0.75}, "mean": {"value": 0.5}}
    leave_run(tmp_path, experiment.cells[0], {"wikitext2": 1.0}, scores)
    filled = fill_in(experiment, tmp_path, {})
    figures = filled.lines[0].figures[ACCURACY]
    assert list(figures)[-2:] == ["mine", "mean"]
    assert (figures["piqa"].mean, figures["mine"].mean, figures["mean"].mean) == (75.0, 25.0, 50.0)
    assert figures["average"].published == 43.36 and figures["average"].mean is None


def test_latex_escapes_names_and_sets_signs():
    rows = [["a_b & 5 %", "-0.25"], [r"{x}\y ~^<|>", "1e-05 (-2.00)"]]
    lines = [Line(names={"what #": row[0]}, cells=(Cell("", ("demo", "demo")),), figures={"x": {}}) for row in rows]
    part = experiment_output._Part("x", [], ["what #", "–"], rows, {(1, 1)})
    filled = Experiment("x", "50 % of A_log ± $", "", lines)
    text = "\n".join(experiment_output._environment(filled, part))
    head, first, second = rows_of(text)
    assert head == [r"what \#", "--"] and first == [r"a\_b \& 5 \%", "$-$0.25"]
    assert second[0] == r"\{x\}\textbackslash{}y \textasciitilde{}\textasciicircum{}\textless{}\textbar{}\textgreater{}"
    assert second[1] == r"\textbf{1e-05 ($-$2.00)}"
    assert r"\caption{50 \% of A\_log $\pm$ \$. x; in bold the best of the pruned models.}" in text
