"""A run folder that was damaged, edited or is in use is refused; what is resumed is never mixed with another run."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from sparsessm import files
from sparsessm.runs.journal import Journal

SMALL = ["--seqlen", 64, "--nsamples", 4, "--eval_windows", 2, "--eval_dense"]
BOTH = ["--method", "sparsessm", "--prune_A", "--prune_layers", "--sparsity", 0.5, "--alpha", 0.1]


@pytest.fixture
def interrupted(run_main, tiny_checkpoint, text_folder, tmp_path, monkeypatch):
    """interrupted(*words, after=N) is the folder of a run that was told to stop after N records of its journal."""

    def make(*words, after=5, model=None) -> Path:
        left, record = [after], Journal._write

        def write(self, name, content):
            record(self, name, content)
            left[0] -= 1
            if not left[0]:
                raise KeyboardInterrupt

        with monkeypatch.context() as patch:
            patch.setattr(Journal, "_write", write)
            model = model or tiny_checkpoint(num_hidden_layers=3)
            done = run_main([model, text_folder, *BOTH, *SMALL, *words])
        assert done.code == 130 and done.metrics is None
        assert done.stderr.splitlines()[-1] == f"interrupted: resume it by: python main.py --resume {done.folder}"
        assert "Traceback" not in done.stderr and "KeyboardInterrupt" in (done.folder / "output.log").read_text()
        return done.folder

    return make


@pytest.fixture
def resume(run_main):
    def run(folder) -> str:
        """The last line of a refusal."""
        done = run_main(["--resume", folder], base_dir=False)
        assert done.code == 2 and "Traceback" not in done.stderr
        return done.stderr.splitlines()[-1]

    return run


def edit(folder: Path, **changes) -> None:
    file = folder / "options.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_after_every_record_it_resumes_to_the_same_figures(interrupted, run_main, tmp_path):
    found = set()
    for after in range(4, 16, 3):
        folder = interrupted("--save", tmp_path / f"out-{after}", after=after, model=tmp_path / "tiny" if found else None)
        done = run_main(["--resume", folder], base_dir=False)
        assert done.code == 0, done.stderr
        assert not (folder / "layers").exists() and not (folder / ".lock").exists()
        metrics = json.loads((folder / "metrics.json").read_text())
        found.add(json.dumps([metrics[key] for key in ("perplexity", "dense_perplexity", "sparsity")]))
        assert (tmp_path / f"out-{after}" / "config.json").is_file()
    assert len(found) == 1


EDITS = {
    "a word for a number": {"sparsity": "0.5"},
    "a number for a word": {"method": 3},
    "a number for a switch": {"prune_A": 1},
    "a switch for a number": {"seed": True},
    "half a window": {"seqlen": 64.5},
    "null": {"seed": None},
    "an unknown method": {"method": "magic"},
    "an unknown dtype": {"dtype": "int8"},
    "an unknown layout": {"save_format": "gguf"},
    "an unknown rule": {"conv_hessian": "both"},
    "a list for a word": {"dataset": ["demo"]},
    "a word for a list": {"target_modules": "nn.Linear"},
    "an unknown module": {"target_modules": ["nn.Linear", "nn.Embedding"]},
    "too much": {"sparsity": 1.5},
    "less than nothing": {"nsamples": -1},
    "values by name": {"alpha": {"a": 1}},
    "a place that is no word": {"save": 7},
    "an experiment elsewhere": {"experiment_name": "../../x"},
}


@pytest.mark.parametrize("case", EDITS)
def test_options_are_checked_as_those_of_the_command_line(interrupted, resume, case):
    folder = interrupted()
    edit(folder, **EDITS[case])
    line = resume(folder)
    assert "options.json was edited" in line and "start a new run" in line


@pytest.mark.parametrize(
    "changes", [{"sparsity": 0.3}, {"seed": 1}, {"seqlen": 63}, {"alpha": 0.05}, {"percdamp": 0.5}], ids=str
)
def test_another_setting_half_way_is_refused_and_named(interrupted, resume, changes):
    folder = interrupted()
    edit(folder, **changes)
    assert f"options.json changed since the run was interrupted ({next(iter(changes))})" in resume(folder)


def test_names_that_are_no_options(interrupted, resume):
    folder = interrupted()
    edit(folder, colour="red")
    assert "written by another version (options.json: colour)" in resume(folder)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "[" * 5000])
def test_options_that_are_invalid(interrupted, resume, text):
    folder = interrupted()
    (folder / "options.json").write_text(text)
    assert "options.json" in resume(folder)


def layer_file(folder: Path) -> Path:
    return sorted((folder / "layers").glob("ssm-*.safetensors"))[0]


def damage(folder: Path, case: str) -> None:
    file = layer_file(folder)
    tensors = load_file(file)
    name = "backbone.layers.0.mixer.A_log"
    if case == "cut short":
        file.write_bytes(file.read_bytes()[:-100])
    elif case == "empty":
        file.write_bytes(b"")
    else:
        if case == "another shape":
            tensors[name] = tensors[name][:, :-1].clone()
        elif case == "a foreign name":
            tensors["backbone.layers.7.mixer.A_log"] = tensors.pop(name)
        elif case == "a name too many":
            tensors["backbone.layers.0.mixer.D"] = torch.zeros(32)
        elif case == "no mask":
            tensors["mask:" + name] = tensors["mask:" + name].float()
        elif case == "no number":
            tensors[name][0, 0] = float("nan")
        save_file(tensors, file)


@pytest.mark.parametrize(
    "case", ["cut short", "empty", "another shape", "a foreign name", "a name too many", "no mask", "no number"]
)
def test_a_layer_that_was_damaged_is_named(interrupted, resume, case):
    folder = interrupted()
    damage(folder, case)
    line = resume(folder)
    assert layer_file(folder).name in line and "is damaged or was edited" in line


@pytest.mark.parametrize(
    ("name", "text"),
    [("dense-0.json", "{"), ("dense-0.json", '{"value": "1", "note": null}'),
     ("dense-0.json", '{"value": NaN, "note": null}'), ("dense-0.json", "3"),
     ("dense-0.json", '{"value": -2.0, "note": null}'), ("sensitivity-0000.json", "[[0, 1]]"),
     ("sensitivity-0000.json", '{"in_proj": 1.0}'), ("sensitivity-0000.json", '{"in_proj": 1.0, "out_proj": "1"}'),
     ("sensitivity-0000.json", '{"in_proj": 1.0, "out_proj": NaN}'), ("sensitivity-0000.json", "7"),
     ("model.json", "[" * 5000)],
)  # fmt: skip
def test_figures_that_are_invalid_are_named(interrupted, resume, name, text):
    folder = interrupted(after=9)
    assert (folder / "layers" / name).is_file()
    (folder / "layers" / name).write_text(text)
    assert name in resume(folder)


def test_weights_that_changed_in_place_are_refused(interrupted, resume, tmp_path):
    folder = interrupted()
    file = tmp_path / "tiny" / "model.safetensors"
    tensors = load_file(file)
    tensors["backbone.layers.2.mixer.D"] *= 1.5  # the same size and names
    save_file(tensors, file, metadata={"format": "pt"})
    assert "the model changed since the run was interrupted (weights)" in resume(folder)


def test_a_tokenizer_that_changed_is_refused(interrupted, resume, tmp_path):
    folder = interrupted()
    file = tmp_path / "tiny" / "tokenizer.json"
    content = json.loads(file.read_text())
    content["model"]["merges"] = content["model"]["merges"][:-1]
    file.write_text(json.dumps(content))
    assert "changed since the run was interrupted" in resume(folder)


def test_from_another_folder_places_mean_the_same(
    run_main, interrupted, tiny_checkpoint, text_folder, tmp_path, monkeypatch
):
    shutil.copytree(text_folder, tmp_path / "t")
    model = tiny_checkpoint(num_hidden_layers=3)
    monkeypatch.chdir(tmp_path)
    folder = interrupted("--save", "out", "--data_dir", "t", model=model.name)
    options = json.loads((folder / "options.json").read_text())
    assert options["model"] == str(model)
    assert (options["save"], options["data_dir"]) == (str(tmp_path / "out"), str(tmp_path / "t"))
    (tmp_path / "else").mkdir()
    monkeypatch.chdir(tmp_path / "else")
    done = run_main(["--resume", folder], base_dir=False)
    assert done.code == 0, done.stderr
    assert (tmp_path / "out" / "config.json").is_file() and not os.listdir(tmp_path / "else")


def test_a_run_that_another_process_resumes_is_refused(interrupted, resume):
    folder = interrupted()
    lock = files.lock(folder / ".lock")
    assert "another process is working on this run" in resume(folder)
    files.unlock(lock)


def test_a_journal_that_is_a_link_is_refused(interrupted, resume, tmp_path):
    folder = interrupted()
    (folder / "layers").rename(tmp_path / "elsewhere")
    (folder / "layers").symlink_to(tmp_path / "elsewhere")
    before = sorted(os.listdir(tmp_path / "elsewhere"))
    assert "is a link" in resume(folder)
    assert sorted(os.listdir(tmp_path / "elsewhere")) == before


@pytest.mark.parametrize(
    "name", ["options.json", "events.jsonl", "output.log", "metrics.json", "layers/.dense-0.json.partial"]
)
def test_links_in_a_run_folder_are_not_written_through(interrupted, run_main, tmp_path, name):
    folder, victim = interrupted(), tmp_path / "victim"
    victim.write_text("mine")
    content = (folder / name).read_text() if (folder / name).exists() else None
    (folder / name).unlink(missing_ok=True)
    (folder / name).symlink_to(victim)
    if name == "options.json":
        victim.write_text(content)
    run_main(["--resume", folder], base_dir=False)
    assert victim.read_text() == (content if name == "options.json" else "mine")


def test_what_a_kill_left_of_the_journal_of_a_finished_run_goes_at_the_next_start(run_main, text_folder, resume):
    done = run_main(["demo", text_folder, "--seqlen", 64, "--eval_windows", 2])
    (done.folder / "layers").mkdir()
    (done.folder / "layers" / "dense-0.json").write_text("{}")
    assert "has finished" in resume(done.folder)
    assert not (done.folder / "layers").exists()
    (done.folder / "layers").mkdir()
    words = ["demo", text_folder, "--seqlen", 64, "--eval_windows", 2, "--base_dir", done.folder.parent.parent]
    assert run_main(words, base_dir=False).code == 0
    assert not (done.folder / "layers").exists()
