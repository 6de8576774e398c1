"""The command from end to end, in this process: what it prints, writes, saves and refuses."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

ROOT = Path(__file__).resolve().parents[1]
QUICK = ["demo", "demo", "--seqlen", "128", "--nsamples", "8", "--eval_windows", "12"]
HALF = ["--sparsity", "0.5"]

pytestmark = pytest.mark.usefixtures("tokenised_once")


def digest(folder):
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(Path(folder).iterdir())}


def perplexity(outcome):
    assert outcome.code == 0, outcome.stderr
    (value,) = outcome.metrics["perplexity"].values()
    return value


def test_a_run_leaves_its_folder_and_prints_its_row(run_main):
    outcome = run_main([*QUICK, "--method", "sparsessm", "--prune_A", *HALF, "--eval_dense"])
    assert outcome.code == 0
    header, _, row = outcome.stdout.strip().splitlines()
    assert header.split()[:2] == ["method", "sparsity"] and row.startswith("sparsessm  ssm 50.0%")
    metrics = outcome.metrics
    assert f"{metrics['perplexity']['demo']:.2f}" in row and f"{metrics['dense_perplexity']['demo']:.2f}" in row
    assert metrics["perplexity"]["demo"] > metrics["dense_perplexity"]["demo"]
    assert metrics["sparsity"]["ssm"] == 0.5 and metrics["sparsity"]["layers"] == 0
    assert set(metrics["seconds"]) == {"load", "prune", "eval"} and metrics["peak_memory_bytes"]["process"] > 1 << 27
    assert set(metrics["data_sha256"]) == set(metrics["text_sha256"]) == {"calibration demo", "evaluation demo"}
    assert metrics["versions"]["torch"]
    assert json.loads((outcome.folder / "options.json").read_text())["nsamples"] == 8
    counts = json.loads((outcome.folder / "sparsity.json").read_text())
    assert counts["backbone.layers.5.mixer.A_log"] == {"pruned": 384 * 16 // 2, "total": 384 * 16} and len(counts) == 6
    events = [json.loads(line) for line in (outcome.folder / "events.jsonl").read_text().splitlines()]
    assert [event["layer"] for event in events if event["event"] == "layer"] == list(range(6))
    assert events[-1]["event"] == "finished"
    assert "12 windows of 128 tokens" in (outcome.folder / "output.log").read_text()
    assert "\r" not in outcome.stderr  # no progress bar where nobody watches


def test_without_a_method_the_model_is_measured_as_it_is(run_main):
    outcome = run_main(QUICK)
    assert outcome.metrics["sparsity"] == {"ssm": 0, "layers": 0, "model": 0}
    assert outcome.stdout.strip().splitlines()[-1].startswith("dense   0")
    assert list(outcome.metrics["data_sha256"]) == ["evaluation demo"]


def test_methods_come_in_the_papers_order_on_the_demo(run_main):
    """Dense below sparsessm_dev below sparsessm below magnitude, at 80 %."""
    settings = ["demo", "demo", "--seqlen", "256", "--nsamples", "16", "--eval_windows", "24"]
    found = [perplexity(run_main(settings))]
    for method in ("sparsessm_dev", "sparsessm", "magnitude"):
        found.append(perplexity(run_main([*settings, "--method", method, "--prune_A", "--sparsity", "0.8"])))
    assert found == sorted(found) and found[3] > 1.2 * found[2]


def test_the_papers_second_command(run_main, tmp_path):
    """Pruned weights of linear and conv1d modules, written as in the paper's README, against magnitude."""
    out = tmp_path / "out"
    words = [*QUICK, "--prune_layer", "True", *HALF, "--blocksize", "128", "--target_modules", "nn.Conv1d", "nn.Linear"]
    sparsessm = run_main([*words, "--method", "sparsessm", "--alpha", "0.04", "--save", str(out)])
    assert perplexity(sparsessm) < perplexity(run_main([*words, "--method", "magnitude"]))
    assert sparsessm.metrics["sparsity"]["layers"] == pytest.approx(0.5, abs=1e-4)
    masks = load_file(out / "masks.safetensors")
    model = AutoModelForCausalLM.from_pretrained(out)
    assert len(masks) == 30
    assert all((model.get_parameter(name)[mask] == 0).all() for name, mask in masks.items())
    shares = {float(mask.float().mean()) for name, mask in masks.items() if "in_proj" in name}
    assert max(shares) > 0.53 and min(shares) < 0.47  # alpha spreads them


@pytest.mark.parametrize("transition", ["zero", "unit"])
def test_what_is_saved_is_what_was_measured(run_main, tmp_path, transition):
    out = tmp_path / "out"
    outcome = run_main([*QUICK, "--method", "sparsessm", "--prune_A", *HALF, "--pruned_transition", transition,
                        "--save", str(out)])  # fmt: skip
    again = run_main([str(out), "demo", *QUICK[2:]])
    assert perplexity(again) == pytest.approx(perplexity(outcome), rel=1e-6)
    record = json.loads((out / "sparsessm.json").read_text())
    assert record["perplexity"] == outcome.metrics["perplexity"] and record["options"]["pruned_transition"] == transition
    A_log = AutoModelForCausalLM.from_pretrained(out).backbone.layers[2].mixer.A_log
    mask = load_file(out / "masks.safetensors")["backbone.layers.2.mixer.A_log"]
    assert set(A_log[mask].tolist()) == {{"zero": 30.0, "unit": 0.0}[transition]}
    assert AutoTokenizer.from_pretrained(out).encode("a word")


def test_the_same_command_gives_the_same_bytes(run_main, tmp_path):
    words = [*QUICK, "--method", "sparsessm", "--prune_A", "--prune_layers", *HALF, "--alpha", "0.04"]
    for name in ("one", "two"):
        assert run_main([*words, "--save", str(tmp_path / name)]).code == 0
    assert digest(tmp_path / "one") == digest(tmp_path / "two")


def test_evaluation_batch_does_not_matter(run_main):
    one, eight, auto = (run_main([*QUICK, "--eval_batch", batch]) for batch in ("1", "8", "auto"))
    assert perplexity(one) == pytest.approx(perplexity(eight), rel=1e-6) and perplexity(auto) == perplexity(eight)
    assert "8 windows at once to evaluate\n" in auto.stderr and "at once to evaluate" not in eight.stderr


def test_calibration_batch_does_not_matter_but_for_ties(run_main, tmp_path):
    words = [*QUICK, "--method", "sparsessm", "--prune_A", *HALF]
    for batch in ("1", "8"):
        run_main([*words, "--calib_batch", batch, "--save", str(tmp_path / batch)])
    one, eight = (load_file(tmp_path / batch / "masks.safetensors") for batch in ("1", "8"))
    differing = sum(int((one[name] != eight[name]).sum()) for name in one)
    assert differing <= 6 * 384 * 16 * 0.001


def test_bfloat16_keeps_what_stock_loads(run_main, tmp_path):
    out = tmp_path / "out"
    outcome = run_main([*QUICK, "--method", "sparsessm_dev", "--prune_A", *HALF, "--dtype", "bfloat16", "--save", str(out)])
    stored = load_file(out / "model.safetensors")
    assert stored["backbone.layers.0.mixer.A_log"].dtype == torch.float32
    assert stored["backbone.layers.0.mixer.in_proj.weight"].dtype == torch.bfloat16
    assert perplexity(run_main([str(out), "demo", *QUICK[2:]])) == pytest.approx(perplexity(outcome), rel=1e-6)


def test_generate_shows_what_stock_writes_before_and_after(run_main, tmp_path, demo_dir):
    text, out = "The function returns", tmp_path / "out"
    outcome = run_main([*QUICK, "--method", "magnitude", "--prune_A", *HALF, "--generate", text, "--save", str(out)])
    expected = {}
    for when, folder in (("before", demo_dir), ("after", out)):
        tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModelForCausalLM.from_pretrained(folder)
        written = model.generate(**tokenizer(text, return_tensors="pt"), do_sample=False, max_new_tokens=40)
        expected[when] = tokenizer.decode(written[0], skip_special_tokens=True)
        assert f"written {when} pruning: {json.dumps(expected[when], ensure_ascii=False)}\n" in outcome.stderr
    assert outcome.metrics["generated"] == expected and expected["before"] != expected["after"]


def test_generate_without_a_method_writes_once_and_wants_a_text(run_main):
    outcome = run_main([*QUICK, "--generate", "The"])
    assert list(outcome.metrics["generated"]) == ["after"] and outcome.stderr.count("written by the model: ") == 1
    assert "--generate needs a text" in run_main([*QUICK, "--generate", " "]).stderr


def test_several_data_sets_and_none(run_main, text_folder):
    both = run_main([*QUICK[:2], "--seqlen", "64", "--eval_windows", "2", "--ppl_datasets", "demo", str(text_folder)])
    assert list(both.metrics["perplexity"]) == ["demo", str(text_folder)]
    nothing = run_main([*QUICK, "--method", "magnitude", "--prune_A", *HALF, "--ppl_datasets", "none"])
    assert nothing.code == 0 and nothing.metrics["perplexity"] == {}


def test_offload_device_gives_the_same(run_main):
    words = [*QUICK, "--method", "sparsessm", "--prune_A", *HALF]
    assert perplexity(run_main([*words, "--offload", "device"])) == perplexity(run_main(words))


def test_raw_zeros_are_saved_as_released(run_main, tmp_path):
    out = tmp_path / "out"
    run_main([*QUICK, "--method", "sparsessm", "--prune_A", *HALF, "--raw_zeros", "--save", str(out)])
    mask = load_file(out / "masks.safetensors")["backbone.layers.0.mixer.A_log"]
    assert (load_file(out / "model.safetensors")["backbone.layers.0.mixer.A_log"][mask] == 0).all()


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["demo", "wikitext3", "--eval_windows", "1"], "wikitext3"),
        (["nowhere/at/all", "demo"], "there is no folder"),
        ([*QUICK, "--method", "sparsessm", "--prune_A", "--sparsity", "1.2"], "--sparsity"),
        ([*QUICK, "--device", "cuda:99"], "--device cuda:99"),
        ([*QUICK, "--save", "main.py"], "is a file"),
        ([*QUICK, "--save", "tests"], "is not empty"),
        ([*QUICK, "--save", "data/mamba-demo"], "is the model itself"),
        ([*QUICK, "--base_dir", "main.py"], "--base_dir"),
        (["demo", "demo", "--seqlen", "99999999"], "--seqlen"),
    ],
)  # fmt: skip
def test_bad_input_is_one_line_and_code_2(run_main, words, says, monkeypatch):
    monkeypatch.chdir(ROOT)
    before = digest(ROOT / "data" / "mamba-demo")
    outcome = run_main(words)
    (line,) = [line for line in outcome.stderr.splitlines() if line.startswith("error: ")]
    assert outcome.code == 2 and says in line and outcome.stdout == "" and outcome.metrics is None
    assert digest(ROOT / "data" / "mamba-demo") == before


def test_a_text_shorter_than_a_window_is_refused(run_main, tmp_path):
    (tmp_path / "train.txt").write_text("few words\n")
    (tmp_path / "test.txt").write_text("few words\n")
    outcome = run_main(["demo", str(tmp_path), "--seqlen", "64"])
    assert outcome.code == 2 and "--seqlen" in outcome.stderr


def test_as_a_process_help_names_every_method():
    words = [sys.executable, "main.py", "--help"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, env=os.environ | {"COLUMNS": "200"})
    assert done.returncode == 0 and "structure_mag" in done.stdout and "--pruned_transition" in done.stdout


# An independent implementation gave these figures; procedure/test_figures.py has those of the other settings and methods.
@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "alpha", "value", "share"), [("--prune_A", "0", 69.06, 0.005), ("--prune_layers", "0.04", 81.68, 0.01)]
)
def test_independent_figures_on_wikitext2(run_main, shared_dir, kind, alpha, value, share):
    words = [str(shared_dir / "checkpoints" / "mamba-demo"), str(shared_dir / "data" / "wikitext2"), "--seqlen", "512",
             "--nsamples", "32", "--seed", "0", "--eval_windows", "64", "--method", "sparsessm", kind, *HALF,
             "--alpha", alpha]  # fmt: skip
    assert perplexity(run_main(words)) == pytest.approx(value, rel=share)
