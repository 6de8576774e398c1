"""Zero-shot accuracy against figures taken by hand from stock logits, and what is said where it cannot be taken."""

import hashlib
import importlib.util
import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from sparsessm.metrics import zero_shot
from sparsessm.metrics.tasks import TASKS
from tests.family import family_checkpoint
from tests.processes import job

pytest.importorskip("lm_eval", reason="pip install -r requirements-zero-shot.txt")

ROOT = Path(__file__).resolve().parents[2]
QUICK = ["demo", "demo", "--seqlen", "128", "--nsamples", "4", "--eval_windows", "1"]

pytestmark = pytest.mark.usefixtures("tokenised_once")

# Questions with choices of different lengths, in letters of one, two and three bytes; the last number is the right one.
DOCUMENTS = [
    {"text": text, "choices": choices, "label": label}
    for text, choices, label in [
        ("The method returns the number of", ["elements", "the", "the elements that are in it"], 1),
        ("The river runs into the", ["sea", "ümläut ähre", "sea of the north and the south"], 2),
        ("He was born in the city of", ["élève", "漢字漢字"], 0),
        ("Return True if the", ["file exists", "of", "object is a file or a folder"], 1),
        ("In the year of the war", ["he died", "élève", "the king and his army went over the river"], 0),
        ("Raises an error if the", ["argument", "argument is not of the right type", "ø"], 1),
        ("Once upon a time there was a", ["naïve", "日本日本"], 0),
        ("The first and the last of the", ["list", "things that were said in the house", "ñ"], 1),
        ("God said, Let there be", ["light", "light: and there was light", "äöü"], 1),
        ("The value of this option is", ["used", "a string that is used for the name of a file", "ß"], 1),
        ("It has no effect when the", ["option", "cursor is at the end of the line", "日本"], 2),
    ]
]
LABELS = [document["label"] for document in DOCUMENTS]


def write_task(folder, name, documents=DOCUMENTS, **changes):
    """A task of the harness that reads its documents from a file beside it; a change to None takes a key out."""
    folder.mkdir(exist_ok=True)
    data = folder / f"{name}.jsonl"
    data.write_text("".join(json.dumps(document) + "\n" for document in documents), encoding="utf-8")
    task = {
        "task": name, "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}, "cache_dir": str(folder / "cache")},
        "output_type": "multiple_choice", "test_split": "test",
        "doc_to_text": "text", "doc_to_choice": "choices", "doc_to_target": "label",
        "metric_list": [{"metric": m, "aggregation": "mean", "higher_is_better": True} for m in ("acc", "acc_norm")],
    } | changes  # fmt: skip
    # JSON is YAML
    (folder / f"{name}.yaml").write_text(json.dumps({key: value for key, value in task.items() if value is not None}))
    return folder


def flags(folder, *names, batch=16):
    return ["--eval_zero_shot", "--zero_shot_include", str(folder), "--zero_shot_tasks", *names,
            "--zero_shot_batch", str(batch)]  # fmt: skip


ONLY_ACC = [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}]


@torch.no_grad()
def log_likelihoods(folder):
    """log p(choice | question) of each document's choices by the stock model of a folder, one at a time."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    found = []
    for document in DOCUMENTS:
        row = []
        for choice in document["choices"]:
            ids = torch.tensor(tokenizer.encode(f"{document['text']} {choice}"))
            asked = len(tokenizer.encode(document["text"]))
            log_p = model(ids[None]).logits[0, :-1].log_softmax(-1)  # (L-1,V)
            row.append(float(log_p[torch.arange(len(ids) - 1), ids[1:]][asked - 1 :].sum()))
        found.append(np.array(row))
    return found


def accuracies(folder):
    """acc, acc_norm per character, and what it would be per byte of UTF-8."""
    found = []
    for length in (lambda choice: 1, len, lambda choice: len(choice.encode())):
        scores = [row / [length(c) for c in d["choices"]] for row, d in zip(log_likelihoods(folder), DOCUMENTS, strict=True)]
        # no choice wins by so little that rounding could turn it
        assert min(np.diff(np.sort(score))[-1] for score in scores) > 1e-3
        right = [score.argmax() == label for score, label in zip(scores, LABELS, strict=True)]
        found.append(float(np.mean(right)))
    return found


@pytest.fixture(scope="module")
def dense(demo_dir):
    acc, per_character, per_byte = accuracies(demo_dir)
    assert len({acc, per_character, per_byte}) == 3  # or these documents could not tell them apart
    return acc, per_character


def test_figures_by_hand_the_metric_rule_and_the_mean(run_main, tmp_path, dense):
    folder = write_task(tmp_path / "tasks", "arc_easy")
    write_task(folder, "both")
    write_task(folder, "plain", metric_list=ONLY_ACC)
    outcome = run_main([*QUICK, *flags(folder, "both", "plain", "arc_easy")])
    assert outcome.code == 0, outcome.stderr
    found, (acc, acc_norm), n = outcome.metrics["zero_shot"], dense, len(DOCUMENTS)
    assert list(found) == ["both", "plain", "arc_easy", "mean"]
    assert [found[name]["metric"] for name in ("arc_easy", "both", "plain")] == ["acc", "acc_norm", "acc"]
    assert [found[name]["value"] for name in ("arc_easy", "both", "plain")] == pytest.approx([acc, acc_norm, acc])
    errors = [math.sqrt(p * (1 - p) / (n - 1)) for p in (acc_norm, acc, acc)]
    assert [found[name]["stderr"] for name in ("both", "plain", "arc_easy")] == pytest.approx(errors)
    assert found["both"]["documents"] == n
    mean = (acc_norm + 2 * acc) / 3
    assert found["mean"] == pytest.approx({"value": mean, "stderr": math.sqrt(sum(e * e for e in errors)) / 3})

    header, _, row = outcome.stdout.strip().splitlines()
    assert "zero-shot" in header and f"{mean:.2%}" in row
    log = (outcome.folder / "output.log").read_text()
    assert f"zero-shot both: acc_norm {acc_norm:.4f} ({n} documents)" in log and "\r" not in outcome.stderr
    events = [json.loads(line) for line in (outcome.folder / "events.jsonl").read_text().splitlines()]
    assert [event["task"] for event in events if event["event"] == "zero_shot"] == ["both", "plain", "arc_easy"]
    lines = "".join(json.dumps(document, sort_keys=True) + "\n" for document in DOCUMENTS)
    assert outcome.metrics["data_sha256"]["zero-shot both"] == hashlib.sha256(lines.encode()).hexdigest()
    assert outcome.metrics["versions"]["lm-eval"].startswith("0.4")


def test_a_hybrid_is_asked(run_main, demo_dir, tmp_path):
    model = family_checkpoint(tmp_path / "in", demo_dir, "nemotron_h")
    folder = write_task(tmp_path / "tasks", "plain", metric_list=ONLY_ACC)
    outcome = run_main([model, *QUICK[1:], *flags(folder, "plain")])
    assert outcome.code == 0, outcome.stderr
    right = [int(row.argmax()) == label for row, label in zip(log_likelihoods(model), LABELS, strict=True)]
    assert outcome.metrics["zero_shot"]["plain"]["value"] == pytest.approx(float(np.mean(right)))


def test_the_pruned_model_is_asked_and_saved_as_without_being_asked(run_main, tmp_path, dense):
    """The figure is that of the saved model in stock transformers, and asking leaves no trace in what is saved."""
    folder = write_task(tmp_path / "tasks", "both")
    prune = [*QUICK, "--method", "magnitude", "--prune_A", "--prune_layers", "--sparsity", "0.6", "--ppl_datasets", "none"]
    outcome = run_main([*prune, *flags(folder, "both"), "--save", str(tmp_path / "asked")])
    assert outcome.code == 0, outcome.stderr
    assert run_main([*prune, "--save", str(tmp_path / "not")]).code == 0
    _, acc_norm, _ = accuracies(tmp_path / "asked")
    assert outcome.metrics["zero_shot"]["both"]["value"] == pytest.approx(acc_norm) and acc_norm != dense[1]
    assert f"| both | acc_norm | {acc_norm:.4f} |" in (tmp_path / "asked" / "README.md").read_text()
    # the record and the card hold the options, and the card the figure
    files = {file.name for file in (tmp_path / "not").iterdir()} - {"sparsessm.json", "README.md"}
    assert "tokenizer_config.json" in files
    for name in files:
        assert (tmp_path / "asked" / name).read_bytes() == (tmp_path / "not" / name).read_bytes()


def test_a_task_with_examples_is_asked_without_them(tmp_path):
    folder = write_task(tmp_path / "tasks", "shots", num_fewshot=2, fewshot_split="test")
    task = zero_shot.load_tasks(["shots"], str(folder))["shots"]
    task.build_all_requests()
    asked = [request.arguments for request in task.instances]
    assert asked == [(d["text"], f" {choice}") for d in DOCUMENTS for choice in d["choices"]]


def test_the_batch_does_not_matter(run_main, tmp_path, dense):
    """Questions and choices of many lengths share a batch."""
    folder = write_task(tmp_path / "tasks", "both")
    for batch in (1, 5, 64):
        found = run_main([*QUICK, "--ppl_datasets", "none", *flags(folder, "both", batch=batch)]).metrics["zero_shot"]
        assert found["both"]["value"] == pytest.approx(dense[1])


def test_removed_states_and_a_task_of_one_document(run_main, tmp_path):
    folder = write_task(tmp_path / "tasks", "both", DOCUMENTS[:1])
    prune = [*QUICK, "--method", "structure_mag", "--prune_A", "--sparsity", "0.5", "--ppl_datasets", "none"]
    outcome = run_main([*prune, *flags(folder, "both")])
    assert outcome.code == 0, outcome.stderr
    assert outcome.metrics["zero_shot"]["mean"] == {"value": outcome.metrics["zero_shot"]["both"]["value"], "stderr": None}


def test_a_taken_figure_is_not_taken_again(run_main, tmp_path):
    folder = write_task(tmp_path / "tasks", "both")
    write_task(folder, "plain", metric_list=ONLY_ACC)
    outcome = run_main([*QUICK, *flags(folder, "both", "plain")])
    (outcome.folder / "metrics.json").unlink()
    (outcome.folder / "layers").mkdir()
    taken = {"metric": "acc_norm", "value": 0.125, "stderr": 0.25, "documents": 3}
    (outcome.folder / "layers" / "zero-shot-0.json").write_text(json.dumps(taken))
    assert run_main(["--resume", str(outcome.folder)], base_dir=False).code == 0
    found = json.loads((outcome.folder / "metrics.json").read_text())["zero_shot"]
    assert found["both"] == taken and found["plain"] == outcome.metrics["zero_shot"]["plain"]


def test_the_harness_warns_in_the_log_of_the_run(run_main, tmp_path):
    folder = write_task(tmp_path / "tasks", "off", [*DOCUMENTS, DOCUMENTS[0] | {"label": 7}])
    outcome = run_main([*QUICK, "--ppl_datasets", "none", *flags(folder, "off")])
    log = (outcome.folder / "output.log").read_text()
    assert outcome.code == 0 and "Label index was not" in log and "already-initialized" not in log


@pytest.mark.parametrize(
    ("name", "available", "metric"),
    [
        ("arc_easy", ["acc", "acc_norm"], "acc"),
        ("arc_challenge", ["acc", "acc_norm"], "acc_norm"),
        ("winogrande", ["acc"], "acc"),
        ("lambada_openai", ["perplexity", "acc"], "acc"),
    ],
)
def test_metric_of(name, available, metric):
    assert zero_shot.metric_of(name, available) == metric


def test_with_mean_of_tasks_of_different_sizes():
    figures = {"a": {"value": 0.2, "stderr": 0.3, "documents": 9}, "b": {"value": 0.6, "stderr": 0.4, "documents": 900}}
    assert zero_shot.with_mean(figures)["mean"] == pytest.approx({"value": 0.4, "stderr": 0.25})


def refused(outcome, *says):
    """One line and exit code 2, before there is a run folder, and so before the model is read."""
    (line,) = [line for line in outcome.stderr.splitlines() if line.startswith("error: ")]
    assert outcome.code == 2 and outcome.stdout == "" and outcome.folder is None
    assert outcome.stderr.strip() == line
    for part in says:
        assert part in line


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"dataset_kwargs": {"data_files": {"test": "/nowhere/all.jsonl"}}}, ["documents of", "not available", "/nowhere"]),
        ({"dataset_path": "nobody/nothing", "dataset_kwargs": None}, ["nobody/nothing", "fetch them once with a network"]),
        ({"include": "absent.yaml"}, ["broken cannot be used", "absent.yaml"]),
        ({"test_split": None}, ["broken cannot be used", "test docs"]),
        ({"doc_to_choice": "{{nothing.of_it}}"}, ["broken cannot be used", "nothing"]),
        ({"doc_to_choice": "!function absent.choices"}, ["broken cannot be used"]),
        ({"metric_list": [{"metric": "f1", "aggregation": "mean", "higher_is_better": True}]}, ["neither acc nor acc_norm"]),
        ({"output_type": "generate_until"}, ["not scored by log likelihoods"]),
        ({"task": ["both"], "group": "broken"}, ["broken stands for several tasks"]),
    ],
)
def test_a_task_that_cannot_be_used(run_main, tmp_path, changes, says):
    folder = write_task(tmp_path / "tasks", "both")
    refused(run_main([*QUICK, *flags(write_task(folder, "broken", **changes), "both", "broken")]), *says)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, ["is not a folder"]),
        ({}, ["holds no task"]),
        ({"notes.yaml": "just: notes"}, ["holds no task"]),
        ({"bad.yaml": "task: [unclosed\nmore: {"}, ["bad.yaml is not YAML", "correct or remove it"]),
    ],
)
def test_a_folder_that_cannot_be_used(run_main, tmp_path, content, says):
    folder = tmp_path / "tasks"
    if content is not None:
        folder.mkdir()
        for name, text in content.items():
            (folder / name).write_text(text)
    refused(run_main([*QUICK, *flags(folder, "piqa")]), *says)


@pytest.mark.slow
def test_names_that_the_harness_does_not_know_as_a_task(run_main):
    refused(run_main([*QUICK, "--eval_zero_shot", "--zero_shot_tasks", "arc_eazy"]), "no task arc_eazy", "arc_easy")
    refused(run_main([*QUICK, "--eval_zero_shot", "--zero_shot_tasks", "ai2_arc"]), "ai2_arc stands for several tasks")


@pytest.mark.slow
def test_the_papers_tasks_are_scored_as_in_its_tables():
    index = zero_shot._own_index().task_index
    found = {}
    for name in TASKS:
        found[name] = zero_shot.metric_of(name, {entry["metric"] for entry in index[name].cfg["metric_list"]})
    norm = dict.fromkeys(("piqa", "arc_challenge", "openbookqa"), "acc_norm")
    assert found == norm | {"arc_easy": "acc", "winogrande": "acc"}


@pytest.mark.parametrize("package", ["lm_eval", "accelerate"])
def test_a_missing_package_is_named(run_main, monkeypatch, package):
    present = importlib.util.find_spec
    found = lambda name, *rest: None if name == package else present(name, *rest)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", found)
    refused(run_main([*QUICK, "--eval_zero_shot"]), package, "pip install -r requirements-zero-shot.txt")


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["--zero_shot_tasks", "piqa"], "add --eval_zero_shot"),
        (["--zero_shot_include", "tests"], "add --eval_zero_shot"),
        (["--eval_zero_shot", "--zero_shot_tasks", "piqa", "arc_easy", "piqa"], "names a task twice"),
        (["--eval_zero_shot", "--zero_shot_tasks", "mean"], "cannot be called mean"),
        (["--eval_zero_shot", "--zero_shot_batch", "0"], "--zero_shot_batch must be at least 1"),
    ],
)
def test_options_that_cannot_be(run_main, given, says):
    refused(run_main([*QUICK, *given]), says)


def test_the_harness_is_not_loaded_where_it_is_not_asked_for():
    code = "import main, sys; sys.exit('lm_eval' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


@pytest.mark.slow
def test_the_first_of_several_processes_asks(tmp_path, dense, text_folder):
    folder = write_task(tmp_path / "tasks", "both")
    out, err = job(2, "demo", text_folder, *QUICK[2:], *flags(folder, "both"), "--base_dir", tmp_path / "runs")
    (run,) = tmp_path.glob("runs/default/*")
    assert json.loads((run / "metrics.json").read_text())["zero_shot"]["both"]["value"] == pytest.approx(dense[1])
    assert err.count("zero-shot both: acc_norm") == 1 and len(out.strip().splitlines()) == 3
