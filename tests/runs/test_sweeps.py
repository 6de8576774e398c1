"""Sweep files: what wandb makes of them and what is made of them here is the same; the runner and its results."""

import copy
import csv
import itertools
import json
import os
import re
import subprocess
from pathlib import Path

import pytest
import yaml

from scripts import sweep_local
from sparsessm import commandline
from sparsessm.errors import InputError
from sparsessm.runs import experiment_output, sweeps
from sparsessm.runs.experiment import fill_in
from sparsessm.runs.grid import Cell
from tests.finished_runs import leave_run
from tests.latex import rows_of

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / "scripts" / "sweeps").glob("*.yaml"))
SMALL = ["model_path=demo", "seqlen=64", "nsamples=4", "eval_windows=2"]


def sweep_file(folder, text):
    file = folder / "mine.yaml"
    file.write_text(text)
    return file


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_sweep_files_are_what_wandb_documents(file):
    config = yaml.safe_load(file.read_text())
    assert config.keys() <= {"program", "entity", "project", "description", "name", "method", "metric", "parameters",
                             "early_terminate", "command", "run_cap"}  # fmt: skip
    assert (ROOT / config["program"]).is_file() and config["method"] == "grid" and config["name"] == file.stem
    assert config["metric"].keys() == {"name", "goal"} and config["metric"]["goal"] in ("minimize", "maximize")
    for name, said in config["parameters"].items():
        assert re.fullmatch(r"[A-Za-z_][A-Za-z0-9_.-]*", name)
        assert said.keys() in ({"value"}, {"values"})  # all that grid takes
    assert {"model_path", "dataset"} <= config["parameters"].keys()


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_wandbs_agent_and_the_local_runner_start_the_same_runs(file):
    """The agent's own functions write the words of each point; main.py must read the same from them as from ours."""
    utils = pytest.importorskip("wandb.sdk.launch.sweeps.utils")
    config, sweep = yaml.safe_load(file.read_text()), sweeps.load(file)
    parameters = {name: said.get("values", [said.get("value")]) for name, said in config["parameters"].items()}
    for values, line in zip(itertools.product(*parameters.values()), sweep.lines, strict=True):
        (cell,) = line.cells
        given = {name: {"value": value} for name, value in zip(parameters, values, strict=True)}
        words = utils.create_sweep_command_args({"args": given})
        words |= {"env": ["/usr/bin/env"], "interpreter": ["python"], "program": [config["program"]]}
        command = []
        for chunk in utils.create_sweep_command(copy.copy(config["command"])):
            command += words[chunk[2:-1]] if chunk.startswith("${") else [chunk]
        assert command[:3] == ["/usr/bin/env", "python", "main.py"]
        by_agent, _ = commandline.parse(command[3:])
        assert by_agent.log_wandb and not cell.options.log_wandb
        assert Cell("", tuple(command[3:])).settings == cell.settings


@pytest.mark.parametrize(
    ("name", "count", "varied", "first", "last"),
    [("sparsity", 27, ("method", "sparsity"), ("magnitude", 0.1), ("sparsessm_dev", 0.9)),
     ("alpha", 15, ("sparsity", "alpha"), (0.4, 0.0), (0.6, 0.08)),
     ("aggregation", 12, ("saliency", "aggregate"), ("a_log", "vote"), ("transition", "window"))],
)  # fmt: skip
def test_sweeps_expand_to_their_points(name, count, varied, first, last):
    sweep = sweeps.load(ROOT / "scripts" / "sweeps" / f"{name}.yaml")
    assert (len(sweep.lines), len({cell.name for cell in sweep.cells})) == (count, count)
    for index, values in ((0, first), (-1, last)):
        line = sweep.lines[index]
        assert line.names == dict(zip(varied, map(str, values), strict=True))
        assert tuple(getattr(line.cells[0].options, key) for key in varied) == values
    chosen = sweep.cells[1].options
    assert (chosen.model, chosen.dataset, chosen.nsamples) == ("state-spaces/mamba-130m-hf", "wikitext2", 64)
    assert (chosen.prune_A, chosen.prune_layers) == ((False, True) if name == "alpha" else (True, False))
    assert f"# {count} points: " in (ROOT / "scripts" / "sweeps" / f"{name}.yaml").read_text()


def test_changes_replace_parameters_and_add_others(tmp_path, text_folder):
    file = ROOT / "scripts" / "sweeps" / "aggregation.yaml"
    changes = ["model_path=demo", f"dataset={text_folder}", "seqlen=128", "aggregate=[vote, sum]", "raw_zeros=true"]
    sweep = sweeps.load(file, changes)
    assert len(sweep.lines) == 4
    chosen = sweep.cells[0].options
    assert (chosen.model, chosen.dataset, chosen.seqlen, chosen.raw_zeros) == ("demo", str(text_folder), 128, True)
    assert sweep.cells[3].label == "saliency transition, aggregate sum"
    assert sweeps.load(file, ["log_wandb=true"]).cells[0].options.log_wandb


def test_a_sweep_of_any_name_can_be_written(tmp_path):
    text = "{method: grid, name: ../a/b c, parameters: {model_path: {value: demo}, dataset: {value: demo}}}"
    filled = fill_in(sweeps.load(sweep_file(tmp_path, text)), tmp_path, {})
    files = experiment_output.write(filled, tmp_path / "out")
    assert [file.name for file in files] == [f"..-a-b c.{suffix}" for suffix in ("md", "csv", "tex", "json")]
    assert all(file.is_file() and file.parent == tmp_path / "out" for file in files)


def test_the_words_of_the_command_reach_the_runs(tmp_path):
    text = """{method: grid, command: ["${env}", "${interpreter}", "${program}", --log_wandb, --dtype, float32, "${args}"],
               parameters: {model_path: {value: demo}, dataset: {value: demo}}}"""
    sweep = sweeps.load(sweep_file(tmp_path, text))
    assert sweep.cells[0].argv == ("--dtype", "float32", "--model_path=demo", "--dataset=demo")
    assert (sweep.name, sweep.cells[0].label, sweep.lines[0].names) == ("mine", "mine", {"sweep": "mine"})


@pytest.mark.parametrize(
    ("text", "changes", "message"),
    [
        ("[1, 2]", [], "has no parameters"),
        ("{method: grid, parameters: [", [], "cannot be read as a sweep"),
        ("{method: bayes, parameters: {sparsity: {min: 0, max: 1}}}", [], "method bayes needs wandb's server"),
        ("{method: grid, parameters: {sparsity: {min: 0, max: 1}}}", [], "parameter sparsity needs value or a list values"),
        ("{method: grid, parameters: {sparsity: {values: []}}}", [], "parameter sparsity needs value or a list values"),
        ("{method: grid, parameters: {ppl_datasets: {value: [ptb, c4]}}}", [], r"a value of ppl_datasets is \['ptb', "),
        ("{method: grid, parameters: {module: {value: null}}}", [], "a value of module is None"),
        ("{method: grid, parameters: {model_path: {value: demo}}}", [], "give a MODEL and a DATASET"),
        ("{method: grid, parameters: {modle: {value: demo}}}", [], "mine.yaml: unrecognized arguments: --modle=demo"),
        ("{method: grid, parameters: {seed: {value: 0}}}", ["seed"], "--set seed is not NAME=VALUE"),
        ("{method: grid, parameters: {seed: {value: 0}}}", ["seed="], "--set seed= is not NAME=VALUE"),
        ("{method: grid, parameters: {seed: {value: 0}}}", ["seed=[1"], "--set seed=.1 is not NAME=VALUE"),
    ],
)
def test_mistakes_in_a_sweep_are_named(tmp_path, text, changes, message):
    with pytest.raises(InputError, match=message):
        sweeps.load(sweep_file(tmp_path, text), changes)


def test_results_have_a_row_for_each_point(tmp_path):
    file = ROOT / "scripts" / "sweeps" / "aggregation.yaml"
    sweep = sweeps.load(file, ["model_path=demo", "dataset=demo", "aggregate=[vote, sum]"])
    done = leave_run(tmp_path, sweep.cells[0], {"demo": 123.456}, {"piqa": {"value": 0.25}, "mean": {"value": 0.25}})
    failures = {sweep.cells[1]: "error: no memory (exit code 1; log)"}
    filled = fill_in(sweep, tmp_path, failures)
    lines = list(csv.DictReader(experiment_output.comma_separated(filled).splitlines()))
    columns = ["demo", "piqa", "mean", "A_log %", "weights %", "seconds"]
    assert [line["column"] for line in lines] == 4 * columns
    assert [line["ours"] for line in lines[:6]] == ["123.456", "25.0", "25.0", "50.0", "0.0", "4.0"]
    assert {(line["saliency"], line["aggregate"], line["state"], line["runs"]) for line in lines} == {
        ("a_log", "vote", "done", str(done)), ("a_log", "sum", "failed", ""), ("transition", "vote", "to do", ""),
        ("transition", "sum", "to do", ""),
    }  # fmt: skip
    page = experiment_output.markdown(filled, tmp_path)
    assert "| a_log | vote | 123.46 | [1] |" in page and "| a_log | vote | 50.00 | 0.00 | 4.00 | done | [1] |" in page
    assert f"1. `{done.relative_to(tmp_path)}`" in page and "| transition | sum | – | – | – | to do | – |" in page
    assert "- saliency a_log, aggregate sum: error: no memory (exit code 1; log)" in page
    shown = experiment_output.text(filled).splitlines()
    assert "a_log       sum        failed" in shown
    assert "transition  sum        –        –          –        to do" in shown


def test_seeds_repeat_every_run_and_make_mean_and_deviation(tmp_path):
    file = ROOT / "scripts" / "sweeps" / "aggregation.yaml"
    sweep = sweeps.load(file, ["model_path=demo", "dataset=demo", "aggregate=[vote, sum]"], [3, 4, 5, 3])
    assert (len(sweep.lines), len(sweep.cells)) == (4, 12)
    assert [cell.options.seed for cell in sweep.lines[1].cells] == [3, 4, 5]
    assert sweep.cells[2].label == "saliency a_log, aggregate vote, seed 5"
    runs = [leave_run(tmp_path, cell, {"demo": value}, dense={"demo": 25.5})
            for cell, value in zip(sweep.cells, (27.0, 28.0, 30.0, None), strict=False)]  # fmt: skip
    filled = fill_in(sweep, tmp_path, {})
    assert [line.state(*line.cells) for line in filled.lines] == ["done", "to do", "to do", "to do"]
    rows = [one for one in csv.DictReader(experiment_output.comma_separated(filled).splitlines()) if one["column"] == "demo"]
    assert float(rows[0]["ours"]) == pytest.approx(85 / 3)
    assert float(rows[0]["standard_deviation"]) == pytest.approx((7 / 3) ** 0.5)
    assert float(rows[0]["difference_to_dense"]) == pytest.approx(85 / 3 - 25.5)
    assert rows[0]["runs"] == ";".join(map(str, runs[:3]))
    assert (rows[1]["ours"], rows[1]["standard_deviation"], rows[1]["difference_to_dense"]) == ("inf", "", "inf")
    tex = experiment_output.latex(filled)
    assert rows_of(tex)[0] == ["saliency", "aggregate", "demo"]
    assert r"a\_log & vote & \textbf{28.33 $\pm$ 1.53 (+2.83)} \\" in tex and r"a\_log & sum & inf (+inf) \\" in tex
    assert r"\caption{Sweep over saliency and aggregate. Perplexity; in bold the best of the pruned models." in tex
    assert r"\label{tab:aggregation-perplexity}" in tex
    assert tex.count(r"\midrule") == 2  # below the head, and between saliencies
    with pytest.raises(InputError, match="seed is a parameter already"):
        sweeps.load(file, ["seed=[0, 1]"], [0, 1])


def test_folders_of_one_name_are_told_apart(tmp_path):
    texts = [tmp_path / one / "news" for one in "ab"]
    for folder in texts:
        folder.mkdir(parents=True)
    file = ROOT / "scripts" / "sweeps" / "aggregation.yaml"
    changes = ["model_path=demo", f"dataset=[{texts[0]}, {texts[1]}]", "saliency=a_log", "aggregate=vote"]
    sweep = sweeps.load(file, changes)
    assert [cell.label for cell in sweep.cells] == ["dataset a/news", "dataset b/news"]
    for cell, folder in zip(sweep.cells, texts, strict=True):
        leave_run(tmp_path, cell, {str(folder): 2.0})
    lines = experiment_output.text(fill_in(sweep, tmp_path, {})).splitlines()
    assert lines[1].split() == ["dataset", "a/news", "b/news"]
    assert [line.split() for line in lines[3:5]] == [["a/news", "2.00", "–"], ["b/news", "–", "2.00"]]


def test_the_command_counts_and_names_mistakes(capsys, tmp_path):
    file = str(ROOT / "scripts" / "sweeps" / "aggregation.yaml")
    assert sweep_local.main([file, "--count", "--set", "aggregate=[vote, sum]", "--set", "seqlen=64"]) == 0
    assert capsys.readouterr().out == "4\n"
    assert sweep_local.main([file, "--count", "--seeds", "0", "1", "2"]) == 0
    assert capsys.readouterr().out == "36\n"
    assert sweep_local.main([file, "--index", "12", "--base_dir", str(tmp_path)]) == 2
    assert capsys.readouterr().err == "error: --index 12 is not a run of aggregation: it has 0 to 11\n"
    assert sweep_local.main([str(tmp_path / "none.yaml")]) == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path / 'none.yaml'} cannot be read as a sweep")
    assert sweep_local.main([file, "--workers", "two"]) == 2


def test_a_job_of_the_array_runs_its_point():
    """`echo` takes the place of Python."""
    script = ROOT / "scripts" / "slurm_array.sh"
    environment = os.environ | {"SLURM_SUBMIT_DIR": str(ROOT), "SLURM_ARRAY_TASK_ID": "7", "PYTHON": "echo"}
    words = ["bash", str(script), "FILE", "--set", "seqlen=64", "--seeds", "0", "1"]
    ended = subprocess.run(words, env=environment, capture_output=True, text=True)
    assert ended.stdout == "scripts/sweep_local.py FILE --set seqlen=64 --seeds 0 1 --index 7\n"
    directives = [line for line in script.read_text().splitlines()[1:] if line.startswith("#SBATCH ")]
    assert script.read_text().splitlines()[1].startswith("#SBATCH") and len(directives) == 4


@pytest.mark.slow
def test_a_sweep_runs_in_parallel_and_its_points_are_there_for_the_array(tmp_path, text_folder, capsys):
    file, base = ROOT / "scripts" / "sweeps" / "aggregation.yaml", tmp_path / "runs"
    words = [str(file), "--set", *SMALL, f"dataset={text_folder}", "aggregate=vote", "--base_dir", str(base),
             "--out", str(tmp_path / "out")]  # fmt: skip

    assert sweep_local.main([*words, "--index", "1"]) == 0
    (alone,) = base.glob("*/*/metrics.json")
    assert json.loads((alone.parent / "options.json").read_text())["saliency"] == "transition"
    assert not (tmp_path / "out").exists()
    assert sweep_local.main([*words, "--workers", "2"]) == 0 and "failed" not in capsys.readouterr().err
    runs = {path: path.stat().st_mtime_ns for path in base.glob("*/*/metrics.json")}
    assert len(runs) == 2 and alone in runs
    with (tmp_path / "out" / "aggregation.csv").open() as stream:
        rows = list(csv.DictReader(stream))
    for row in rows:
        metrics = json.loads((Path(row["runs"]) / "metrics.json").read_text())
        found = {text_folder.name: metrics["perplexity"][str(text_folder)], "A_log %": 50.0, "weights %": 0.0}
        assert float(row["ours"]) == found.get(row["column"], pytest.approx(sum(metrics["seconds"].values())))
    assert {row["saliency"] for row in rows} == {"a_log", "transition"}
    assert sweep_local.main([*words, "--workers", "2"]) == 0
    assert runs == {path: path.stat().st_mtime_ns for path in base.glob("*/*/metrics.json")}
