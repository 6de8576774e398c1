"""Sweep files: what wandb makes of them and what is made of them here is the same; the runner and its results."""

import copy
import csv
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
from sparsessm.runs import sweeps
from tests.latex import rows_of

ROOT = Path(__file__).resolve().parents[2]
FILES = sorted((ROOT / "scripts" / "sweeps").glob("*.yaml"))
SMALL = ["model_path=demo", "seqlen=64", "nsamples=4", "eval_windows=2"]


def sweep_file(folder, text):
    file = folder / "mine.yaml"
    file.write_text(text)
    return file


def leave_run(base, cell, dataset, perplexity, dense=None):
    """What a finished run of a cell leaves, as far as the results read it."""
    run = base / cell.name / "20260101-000000"
    run.mkdir(parents=True)
    (run / "options.json").write_text(json.dumps(cell.settings))
    metrics = {"perplexity": {dataset: perplexity}, "dense_perplexity": {dataset: dense} if dense else {},
               "sparsity": {"ssm": 0.5, "layers": 0.0}, "seconds": {"load": 1.25, "prune": 2.5, "eval": 0.25}}  # fmt: skip
    (run / "metrics.json").write_text(json.dumps(metrics))
    return run


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
    for point in sweep.points:
        (cell,) = point.cells
        words = utils.create_sweep_command_args({"args": {name: {"value": value} for name, value in point.values.items()}})
        words |= {"env": ["/usr/bin/env"], "interpreter": ["python"], "program": [config["program"]]}
        command = []
        for chunk in utils.create_sweep_command(copy.copy(config["command"])):
            command += words[chunk[2:-1]] if chunk.startswith("${") else [chunk]
        assert command[:3] == ["/usr/bin/env", "python", "main.py"]
        by_agent, _ = commandline.parse(command[3:])
        assert by_agent.log_wandb and not cell.options.log_wandb
        assert sweeps.Cell("", tuple(command[3:])).settings == cell.settings


@pytest.mark.parametrize(
    ("name", "count", "varied", "first", "last"),
    [("sparsity", 27, ("method", "sparsity"), ("magnitude", 0.1), ("sparsessm_dev", 0.9)),
     ("alpha", 15, ("sparsity", "alpha"), (0.4, 0.0), (0.6, 0.08)),
     ("aggregation", 12, ("saliency", "aggregate"), ("a_log", "vote"), ("transition", "window"))],
)  # fmt: skip
def test_sweeps_expand_to_their_points(name, count, varied, first, last):
    sweep = sweeps.load(ROOT / "scripts" / "sweeps" / f"{name}.yaml")
    assert (sweep.varied, len(sweep.points), len({cell.name for cell in sweep.cells})) == (varied, count, count)
    for index, values in ((0, first), (-1, last)):
        point = sweep.points[index]
        assert tuple(point.values[key] for key in varied) == values
        assert tuple(getattr(point.cells[0].options, key) for key in varied) == values
    chosen = sweep.cells[1].options
    assert (chosen.model, chosen.dataset, chosen.nsamples) == ("state-spaces/mamba-130m-hf", "wikitext2", 64)
    assert (chosen.prune_A, chosen.prune_layers) == ((False, True) if name == "alpha" else (True, False))
    assert f"# {count} points: " in (ROOT / "scripts" / "sweeps" / f"{name}.yaml").read_text()


def test_changes_replace_parameters_and_add_others(tmp_path, text_folder):
    file = ROOT / "scripts" / "sweeps" / "aggregation.yaml"
    changes = ["model_path=demo", f"dataset={text_folder}", "seqlen=128", "aggregate=[vote, sum]", "raw_zeros=true"]
    sweep = sweeps.load(file, changes)
    assert len(sweep.points) == 4
    chosen = sweep.cells[0].options
    assert (chosen.model, chosen.dataset, chosen.seqlen, chosen.raw_zeros) == ("demo", str(text_folder), 128, True)
    assert sweep.cells[3].label == "saliency transition, aggregate sum"
    assert sweeps.load(file, ["log_wandb=true"]).cells[0].options.log_wandb


def test_the_words_of_the_command_reach_the_runs(tmp_path):
    text = """{method: grid, command: ["${env}", "${interpreter}", "${program}", --log_wandb, --dtype, float32, "${args}"],
               parameters: {model_path: {value: demo}, dataset: {value: demo}}}"""
    sweep = sweeps.load(sweep_file(tmp_path, text))
    assert sweep.cells[0].argv == ("--dtype", "float32", "--model_path=demo", "--dataset=demo")
    assert (sweep.name, sweep.cells[0].label, sweep.varied) == ("mine", "mine", ())


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
        ("{method: grid, parameters: {modle: {value: demo}}}", [], "unrecognized arguments: --modle=demo"),
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
    done = leave_run(tmp_path, sweep.cells[0], "demo", 123.456)
    failures = {sweep.cells[1]: "error: no memory (exit code 1; log)"}
    found = sweeps.results(sweep, tmp_path, failures)
    lines = list(csv.reader(sweeps.comma_separated(sweep, found).splitlines()))
    assert lines[0] == ["saliency", "aggregate", "perplexity demo", "ssm", "layers", "seconds", "state", "run"]
    assert lines[1] == ["a_log", "vote", "123.456", "0.5", "0.0", "4.0", "done", str(done)]
    assert lines[2] == ["a_log", "sum", "", "", "", "", "failed", ""]
    assert [line[6] for line in lines[1:]] == ["done", "failed", "to do", "to do"]
    page = sweeps.markdown(sweep, found, tmp_path, failures)
    assert f"| a_log | vote | 123.46 | 0.50 | 0.00 | 4.00 | done | {done.relative_to(tmp_path)} |" in page
    assert "| transition | sum | – | – | – | – | to do | – |" in page
    assert "- saliency a_log, aggregate sum: error: no memory (exit code 1; log)" in page
    assert "a_log       sum        –                –     –       –        failed" in sweeps.text(sweep, found).splitlines()


def test_seeds_repeat_every_run_and_make_mean_and_deviation(tmp_path):
    file = ROOT / "scripts" / "sweeps" / "aggregation.yaml"
    sweep = sweeps.load(file, ["model_path=demo", "dataset=demo", "aggregate=[vote, sum]"], [3, 4, 5, 3])
    assert (len(sweep.points), len(sweep.cells)) == (4, 12)
    assert [cell.options.seed for cell in sweep.points[1].cells] == [3, 4, 5]
    assert sweep.cells[2].label == "saliency a_log, aggregate vote, seed 5"
    runs = [leave_run(tmp_path, cell, "demo", value, dense=25.5)
            for cell, value in zip(sweep.cells, (27.0, 28.0, 30.0, None), strict=False)]  # fmt: skip
    found = sweeps.results(sweep, tmp_path, {})
    assert [one.state for one in found] == ["done", "to do", "to do", "to do"]
    rows = list(csv.DictReader(sweeps.comma_separated(sweep, found).splitlines()))
    assert float(rows[0]["perplexity demo"]) == pytest.approx(85 / 3)
    assert float(rows[0]["perplexity demo standard_deviation"]) == pytest.approx((7 / 3) ** 0.5)
    assert float(rows[0]["perplexity demo difference_to_dense"]) == pytest.approx(85 / 3 - 25.5)
    assert rows[0]["run"] == ";".join(map(str, runs[:3]))
    assert (rows[1]["perplexity demo"], rows[1]["perplexity demo standard_deviation"]) == ("inf", "")
    tex = sweeps.latex(sweep, found)
    assert rows_of(tex)[0] == ["saliency", "aggregate", "perplexity demo"]
    assert r"a\_log & vote & \textbf{28.33 $\pm$ 1.53 (+2.83)} \\" in tex and r"a\_log & sum & inf (+inf) \\" in tex
    assert r"\label{tab:sweep-aggregation}" in tex and tex.count(r"\midrule") == 2  # below the head, and between saliencies
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
        leave_run(tmp_path, cell, str(folder), 2.0)
    lines = sweeps.text(sweep, sweeps.results(sweep, tmp_path, {})).splitlines()
    assert lines[0].startswith("dataset  perplexity a/news  perplexity b/news  ssm")
    assert [line.split()[:3] for line in lines[2:]] == [["a/news", "2.00", "–"], ["b/news", "–", "2.00"]]


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
        metrics = json.loads((Path(row["run"]) / "metrics.json").read_text())
        assert float(row[f"perplexity {text_folder.name}"]) == metrics["perplexity"][str(text_folder)]
        assert float(row["ssm"]) == 0.5
    assert {row["saliency"] for row in rows} == {"a_log", "transition"}
    assert sweep_local.main([*words, "--workers", "2"]) == 0
    assert runs == {path: path.stat().st_mtime_ns for path in base.glob("*/*/metrics.json")}
