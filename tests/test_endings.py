"""Whatever ends a run ends in one line with its exit code, the traceback is in the log, and what was expensive is kept."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparsessm import steps
from sparsessm.errors import DivergenceError
from tests.processes import ROOT, Command

SMALL = ["--seqlen", 64, "--nsamples", 4, "--eval_windows", 2]
A_LOG = ["--method", "sparsessm", "--prune_A", "--sparsity", 0.5]


def last(done) -> str:
    assert "Traceback" not in done.stderr
    return done.stderr.strip().splitlines()[-1]


def raising(error):
    def call(*_, **__):
        raise error

    return call


def test_a_bug_is_named_as_one_with_its_traceback_in_the_log(run_main, text_folder, monkeypatch):
    monkeypatch.setattr(steps, "prune", raising(ZeroDivisionError("three over nothing")))
    done = run_main(["demo", text_folder, *A_LOG, *SMALL])
    assert done.code == 1 and done.metrics is None
    line = last(done)
    assert line.startswith("error: a bug in sparsessm (ZeroDivisionError: three over nothing)")
    assert str(done.folder / "output.log") in line and f"main.py --resume {done.folder}" in line
    assert "Traceback" in (done.folder / "output.log").read_text()


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), MemoryError(),
              RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate memory")],
    ids=lambda error: type(error).__name__,
)  # fmt: skip
def test_used_up_memory_says_what_to_lower_and_how_to_resume(run_main, text_folder, monkeypatch, error):
    monkeypatch.setattr(steps, "prune", raising(error))
    done = run_main(["demo", text_folder, *A_LOG, *SMALL])
    assert done.code == 2
    assert "the memory is used up" in last(done) and "--calib_batch" in last(done) and "--resume" in last(done)


def test_a_full_disk_is_called_one_and_says_how_to_resume(run_main, text_folder, monkeypatch):
    monkeypatch.setattr(steps, "prune", raising(OSError(28, os.strerror(28))))
    done = run_main(["demo", text_folder, *A_LOG, *SMALL])
    assert done.code == 2 and "is full" in last(done) and "--resume" in last(done)


def test_what_diverges_after_pruning_is_saved_all_the_same(run_main, tmp_path, text_folder, monkeypatch):
    monkeypatch.setattr(steps, "perplexity", raising(DivergenceError("layer 3 outputs values that are not finite")))
    done = run_main(["demo", text_folder, *A_LOG, *SMALL, "--save", tmp_path / "out"])
    assert done.code == 2 and "layer 3 outputs" in last(done)
    assert json.loads((tmp_path / "out" / "sparsessm.json").read_text())["sparsity"]["ssm"] == 0.5


def test_what_the_harness_raises_does_not_cost_the_checkpoint(run_main, tmp_path, text_folder, monkeypatch):
    pytest.importorskip("lm_eval", reason="pip install -r requirements-zero-shot.txt")
    tasks = tmp_path / "tasks"
    tasks.mkdir()
    documents = [{"text": "The river runs into the", "choices": ["sea", "word " * 5000], "label": 0}]
    (tasks / "long.jsonl").write_text("".join(json.dumps(document) + "\n" for document in documents))
    (tasks / "long.yaml").write_text(json.dumps({
        "task": "long", "dataset_path": "json", "output_type": "multiple_choice", "test_split": "test",
        "dataset_kwargs": {"data_files": {"test": str(tasks / "long.jsonl")}, "cache_dir": str(tmp_path / "cache")},
        "doc_to_text": "text", "doc_to_choice": "choices", "doc_to_target": "label",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }))  # fmt: skip
    argv = ["--eval_zero_shot", "--zero_shot_include", tasks, "--zero_shot_tasks", "long", "--save", tmp_path / "out"]
    done = run_main(["demo", text_folder, *A_LOG, *SMALL, *argv])
    assert done.code == 2 and "the zero-shot task long failed (AssertionError" in last(done)
    assert (tmp_path / "out" / "config.json").is_file()


def test_an_infinite_perplexity_is_null_with_the_reason(run_main, tiny_checkpoint, text_folder):
    folder = tiny_checkpoint(tie_word_embeddings=False)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] *= 1e5
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    done = run_main([folder, text_folder, *SMALL])
    assert done.code == 0 and "inf" in done.stdout

    def refuse(word):
        raise AssertionError(word)

    for file in done.folder.glob("*.json*"):
        for line in file.read_text().splitlines() if file.suffix == ".jsonl" else [file.read_text()]:
            json.loads(line, parse_constant=refuse)
    assert done.metrics["perplexity"] == {str(text_folder): None}
    assert "nats per token" in done.metrics["perplexity_notes"][f"dense {text_folder}"]


def test_a_head_that_overflows_is_named(run_main, tiny_checkpoint, text_folder):
    folder = tiny_checkpoint(tie_word_embeddings=False)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"].fill_(6e4)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    done = run_main([folder, text_folder, *SMALL, "--dtype", "float16"])
    assert done.code == 2 and "the head" in last(done) and "--dtype float32" in last(done)


# --- places and launchers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../../x", "/elsewhere", "", ".", "a/../../b"])
def test_an_experiment_outside_of_base_dir(run_main, text_folder, name, tmp_path):
    done = run_main(["demo", text_folder, *SMALL, f"--experiment_name={name}"])
    assert done.code == 2 and "--experiment_name" in last(done)
    assert sorted(os.listdir(tmp_path)) == []


def test_saving_to_where_runs_go_is_refused(run_main, text_folder, tmp_path):
    argv = ["--base_dir", tmp_path / "both", "--save", tmp_path / "both"]
    done = run_main(["demo", text_folder, *A_LOG, *SMALL, *argv], base_dir=False)
    assert done.code == 2 and "where the run folders go" in last(done) and not (tmp_path / "both").exists()


def test_one_variable_that_a_launcher_left_behind_makes_no_job(run_main, text_folder, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    done = run_main(["demo", text_folder, *SMALL])
    assert done.code == 0 and "dense" in done.stdout and done.metrics


@pytest.mark.parametrize(
    "changes", [{"RANK": "x"}, {"RANK": "2"}, {"WORLD_SIZE": "0"}, {"MASTER_PORT": "99999"}, {"LOCAL_RANK": "-1"}], ids=str
)
def test_variables_of_a_launcher_that_make_no_sense(run_main, text_folder, monkeypatch, changes):
    sane = {"RANK": "0", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29577"}
    for name, value in (sane | changes).items():
        monkeypatch.setenv(name, value)
    done = run_main(["demo", text_folder, *SMALL])
    assert done.code == 2 and "the variables of a launcher make no sense" in last(done)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_while_it_prunes_ends_with_the_line_that_resumes(run_main, tmp_path, text_folder, number):
    argv = ["demo", text_folder, *A_LOG, "--seqlen", 256, "--nsamples", 16, "--eval_windows", 2, "--base_dir", tmp_path]
    process = Command(*argv)
    while process.poll() is None and not list(tmp_path.glob("default/*/layers/ssm-0001*")):
        time.sleep(0.01)
    process.send_signal(number)
    _, text = process.communicate(timeout=60)
    (folder,) = tmp_path.glob("default/*")
    assert process.returncode == 130 and "Traceback" not in text
    assert text.strip().splitlines()[-1] == f"interrupted: resume it by: python main.py --resume {folder}"
    resumed = run_main(["--resume", folder], base_dir=False)
    assert resumed.code == 0, resumed.stderr


@pytest.mark.slow
def test_a_signal_before_anything_is_begun():
    process = subprocess.Popen([sys.executable, "main.py", "demo", "demo"], cwd=ROOT, text=True, stdout=subprocess.PIPE,
                               stderr=subprocess.STDOUT)  # fmt: skip
    time.sleep(0.5)  # while torch is imported
    process.send_signal(signal.SIGINT)
    text, _ = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in text


@pytest.mark.slow
def test_neither_code_nor_home_can_be_written(tmp_path, tiny_checkpoint, text_folder):
    """A container's image, or an install that others share: compiled code finds no place, and the run its result."""
    others = shutil.ignore_patterns("__pycache__", ".*", "experiments", "tests")
    code = Path(shutil.copytree(ROOT, tmp_path / "code", ignore=others))
    for folder in [code, *[path for path in code.rglob("*") if path.is_dir()]]:
        (folder / "__pycache__").touch()
    (tmp_path / "home").touch()
    argv = [tiny_checkpoint(), text_folder, *A_LOG, *SMALL]
    for environment in ({"HOME": tmp_path / "home", "XDG_CACHE_HOME": tmp_path / "home"}, {"NUMBA_DISABLE_JIT": "1"}):
        done = subprocess.run(
            [sys.executable, str(code / "main.py"), *map(str, argv), "--base_dir", str(tmp_path / "runs")], cwd=tmp_path,
            env={**os.environ, **{key: str(value) for key, value in environment.items()}}, capture_output=True, text=True,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-2000:]
    figures = [json.loads(file.read_text())["perplexity"] for file in tmp_path.glob("runs/default/*/metrics.json")]
    assert len(figures) == 2 and list(figures[0].values()) == pytest.approx(list(figures[1].values()), rel=1e-4)


@pytest.mark.slow
def test_two_runs_that_save_to_one_place(run_main, tmp_path, text_folder):
    """The second is refused while the first, stopped in the middle of its work, holds the place."""
    sizes = ["--seqlen", 256, "--nsamples", 16, "--eval_windows", 2]
    base = ["demo", text_folder, *A_LOG, *sizes, "--base_dir", tmp_path / "runs"]
    first = Command(*base, "--save", tmp_path / "out")
    while first.poll() is None and not list(tmp_path.glob("runs/default/*/layers/ssm-0000*")):
        time.sleep(0.01)
    first.send_signal(signal.SIGSTOP)
    second = run_main([*base, "--save", tmp_path / "out"], base_dir=False)
    assert second.code == 2 and "another run is writing there" in last(second)
    (held,) = [path for path in tmp_path.glob("runs/default/*") if list(path.glob("layers/ssm-*"))]
    resumed = run_main(["--resume", held], base_dir=False)
    assert resumed.code == 2 and "another process is working on this run" in last(resumed)
    first.send_signal(signal.SIGCONT)
    _, text = first.communicate()
    assert first.returncode == 0, text
    assert (tmp_path / "out" / "config.json").is_file() and sorted(os.listdir(tmp_path)) == ["out", "runs"]
