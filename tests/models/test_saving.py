"""What is saved is what was evaluated, it is there whole or not at all, and it never takes the place of something else."""

import hashlib
import json
import os
import resource
import subprocess
import sys
from functools import partial
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from sparsessm.metrics.perplexity import perplexity
from sparsessm.models import checkpoint, saving
from sparsessm.models.architecture import Layout
from tests.processes import Command
from tests.pruning_checks import prune_transitions

REPOSITORY = Path(__file__).resolve().parents[2]
SEQLEN = 64


def prune_flags(*extra) -> list:
    return ["--sparsity", 0.5, "--nsamples", 4, "--seqlen", SEQLEN, "--eval_windows", 3, *extra]


def stock_perplexity(folder: Path, text: str) -> float:
    """Of the first three windows of a text, by stock transformers on a saved folder, its tokenizer included."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    ids = torch.tensor(tokenizer(text)["input_ids"])[: 3 * SEQLEN].view(3, SEQLEN)
    with torch.no_grad():
        log_p = torch.log_softmax(model.eval()(ids).logits[:, :-1].double(), dim=-1)
    return float(torch.exp(-log_p.gather(-1, ids[:, 1:, None]).mean()))


def test_text(text_folder: Path) -> str:
    """The evaluation text by WikiText-2's rule: lines joined by two newlines."""
    with (text_folder / "test.txt").open(encoding="utf-8") as file:
        return "\n\n".join(file)


test_text.__test__ = False

WAYS = {
    "A_log, zero": ["--method", "sparsessm", "--prune_A", "--pruned_transition", "zero"],
    "A_log, unit": ["--method", "sparsessm", "--prune_A", "--pruned_transition", "unit"],
    "A_log by OBS": ["--method", "sparsegpt", "--prune_A"],
    "states removed": ["--method", "structure_ts", "--prune_A"],
    "weights": ["--method", "sparsegpt", "--prune_layers"],
    "both": ["--method", "sparsessm_dev", "--prune_A", "--prune_layers", "--alpha", 0.05],
}


@pytest.mark.parametrize("way", WAYS)
def test_stock_transformers_gives_the_perplexity_that_was_reported(tmp_path, demo_dir, text_folder, run_main, way):
    out = tmp_path / "out"
    done = run_main([demo_dir, text_folder, *WAYS[way], *prune_flags("--save", out)])
    assert done.code == 0, done.stderr
    reported = done.metrics["perplexity"][str(text_folder)]
    assert stock_perplexity(out, test_text(text_folder)) == pytest.approx(reported, rel=1e-5)


@pytest.mark.parametrize("way", ["A_log, zero", "A_log, unit", "states removed", "weights"])
def test_the_state_spaces_layout_reads_back_as_what_was_evaluated(tmp_path, demo_dir, text_folder, run_main, way):
    out = tmp_path / "out"
    done = run_main([demo_dir, text_folder, *WAYS[way], *prune_flags("--save", out, "--save_format", "state-spaces")])
    assert done.code == 0, done.stderr
    assert {"config.json", "pytorch_model.bin", "tokenizer.json", "masks.safetensors"} <= {p.name for p in out.iterdir()}
    assert "model_type" not in json.loads((out / "config.json").read_text())
    names = torch.load(out / "pytorch_model.bin", weights_only=True)
    assert "backbone.embedding.weight" in names and "backbone.embeddings.weight" not in names

    again = run_main([out, text_folder, "--seqlen", SEQLEN, "--eval_windows", 3])
    assert again.code == 0, again.stderr
    dataset = str(text_folder)
    assert again.metrics["perplexity"][dataset] == pytest.approx(done.metrics["perplexity"][dataset], rel=1e-6)


# --- the folder, without the command -------------------------------------------------------------------------------


@pytest.fixture
def tokenizer(demo_dir):
    return AutoTokenizer.from_pretrained(demo_dir)


@pytest.fixture
def pruned(tiny_model):
    """A model with a third of its transitions pruned, and their masks."""
    model, masks = tiny_model(), {}
    for i, layer in enumerate(model.backbone.layers):
        mask = torch.rand(32, 6, generator=torch.Generator().manual_seed(i)) < 0.3
        prune_transitions(layer, mask, "zero")
        masks[f"backbone.layers.{i}.mixer.A_log"] = mask
    return model, masks


def contents(folder: Path) -> dict[str, str]:
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in sorted(folder.iterdir())}


@pytest.mark.parametrize("layout", ["hf", "state-spaces"])
def test_masks_are_named_and_shaped_as_the_parameters(tmp_path, pruned, tokenizer, layout):
    model, masks = pruned
    out = saving.save(model, tokenizer, masks, {"a": 1}, str(tmp_path / "out"), layout=layout)
    saved = load_file(out / "masks.safetensors")
    weights = (
        load_file(out / "model.safetensors")
        if layout == "hf"
        else torch.load(out / "pytorch_model.bin", weights_only=True)
    )
    assert set(saved) == set(masks)
    for name, mask in saved.items():
        assert mask.dtype == torch.bool and torch.equal(mask, masks[name])
        assert weights[name].shape == mask.shape and (weights[name][mask] == 30).all()
    assert json.loads((out / "sparsessm.json").read_text()) == {"a": 1}


def test_saved_logits_are_those_in_memory(tmp_path, pruned, tokenizer, tiny_windows):
    model, masks = pruned
    out = saving.save(model, tokenizer, masks, {}, str(tmp_path / "out"))
    again, windows = AutoModelForCausalLM.from_pretrained(out).eval(), tiny_windows()
    torch.testing.assert_close(again(windows).logits, model(windows).logits, atol=1e-5, rtol=1e-5)
    again = checkpoint.load(checkpoint.find(str(out)))
    here, ours = (perplexity(Layout(m), windows, device="cpu", offload="cpu", batch=2) for m in (model, again))
    assert ours == here


def test_untied_heads_are_saved(tmp_path, tiny_model, tokenizer, tiny_windows):
    model, windows = tiny_model(tie_word_embeddings=False), tiny_windows()
    for layout in ("hf", "state-spaces"):
        out = saving.save(model, tokenizer, {}, {}, str(tmp_path / layout), layout=layout)
        again = checkpoint.load(checkpoint.find(str(out)))
        assert torch.equal(again(windows).logits, model(windows).logits), layout


def test_bfloat16_is_saved_so_that_stock_rounds_nothing(tmp_path, tiny_model, tokenizer, tiny_windows):
    tiny_model(dtype=torch.bfloat16).save_pretrained(tmp_path / "dense")
    model = checkpoint.load(checkpoint.find(str(tmp_path / "dense")))
    mask = torch.rand(32, 6, generator=torch.Generator().manual_seed(0)) < 0.3
    prune_transitions(model.backbone.layers[0], mask, "zero")
    out = saving.save(model, tokenizer, {}, {}, str(tmp_path / "out"))
    stock = AutoModelForCausalLM.from_pretrained(out).eval()
    assert stock.dtype == torch.bfloat16
    assert torch.equal(stock.backbone.layers[0].mixer.A_log.float(), model.backbone.layers[0].mixer.A_log)
    windows = tiny_windows()
    assert torch.equal(stock(windows).logits.float(), model(windows).logits.float())


def test_removed_states_make_a_smaller_model(tmp_path, tiny_model, tokenizer, tiny_windows):
    model, columns = tiny_model(), torch.tensor([True, False, True, False, False, True])
    masks = {f"backbone.layers.{i}.mixer.A_log": columns.expand(32, 6) for i in range(2)}
    dense = saving.save(model, tokenizer, {}, {}, str(tmp_path / "dense"))
    layout = Layout(model)
    for layer in layout.layers:
        layout.mixer(layer).remove("columns", columns)
    layout.shrink("columns")
    assert model.config.state_size == 3
    out = saving.save(model, tokenizer, masks, {}, str(tmp_path / "out"))
    assert json.loads((out / "config.json").read_text())["state_size"] == 3
    less = 2 * (3 * 32 + 2 * 3 * 32) * 4  # two layers, columns of A_log and rows of x_proj for B and C, float32
    sizes = [(folder / "model.safetensors").stat().st_size for folder in (dense, out)]
    assert sizes[0] - sizes[1] == pytest.approx(less, abs=64)
    windows = tiny_windows()
    again = AutoModelForCausalLM.from_pretrained(out).eval()
    torch.testing.assert_close(again(windows).logits, model(windows).logits, atol=1e-5, rtol=1e-5)
    assert load_file(out / "masks.safetensors")["backbone.layers.1.mixer.A_log"].shape == (32, 6)


@pytest.mark.parametrize("layout", ["hf", "state-spaces"])
def test_raw_zeros_writes_zero_and_leaves_the_model_as_it_is(tmp_path, pruned, tokenizer, layout):
    model, masks = pruned
    out = saving.save(model, tokenizer, masks, {}, str(tmp_path / "out"), layout=layout, raw_zeros=True)
    saved = checkpoint.load(checkpoint.find(str(out)))
    for name, mask in masks.items():
        A_log = saved.state_dict()[name]
        assert not A_log[mask].any()
        assert torch.equal(A_log[~mask], model.state_dict()[name][~mask])
        assert (model.state_dict()[name][mask] == 30).all()


@pytest.mark.parametrize("layout", ["hf", "state-spaces"])
def test_saved_twice_it_is_the_same_to_the_byte(tmp_path, pruned, tokenizer, layout):
    model, masks = pruned
    folders = [
        saving.save(model, tokenizer, masks, {"a": 1}, str(tmp_path / name), layout=layout) for name in ("one", "other")
    ]
    assert contents(folders[0]) == contents(folders[1])


def test_the_same_command_twice_saves_the_same_bytes(tmp_path, tiny_checkpoint, text_folder, run_main):
    folder, out = tiny_checkpoint(), tmp_path / "out"
    seen = []
    for _ in range(2):
        command = [folder, text_folder, *WAYS["both"], *prune_flags("--save", out, "--overwrite")]
        assert run_main(command).code == 0
        seen.append({name: digest for name, digest in contents(out).items() if name != "sparsessm.json"})
        record = json.loads((out / "sparsessm.json").read_text())
        record["options"].pop("base_dir", None)  # the fixture's, another one each time
        seen[-1]["sparsessm.json"] = json.dumps(record)
    assert seen[0] == seen[1]


def test_a_padded_vocabulary_round_trips_through_the_state_spaces_layout(tmp_path, tiny_model, tokenizer, tiny_windows):
    original = {
        "d_model": 16, "n_layer": 2, "vocab_size": 61, "ssm_cfg": {"d_state": 6, "dt_rank": 3}, "rms_norm": True,
        "residual_in_fp32": True, "fused_add_norm": False, "pad_vocab_size_multiple": 8,
    }  # fmt: skip
    model, windows = tiny_model(), tiny_windows()
    out = saving.save(
        model, tokenizer, {}, {}, str(tmp_path / "out"), layout="state-spaces", original_config=original
    )
    config = json.loads((out / "config.json").read_text())
    assert config["vocab_size"] == 61 and config["fused_add_norm"] is False
    source = checkpoint.find(str(out))
    assert source.config.vocab_size == 64
    assert torch.equal(checkpoint.load(source)(windows).logits, model(windows).logits)


# --- the command and its target ------------------------------------------------------------------------------------


def test_a_refused_target_stops_the_command_before_the_model_is_loaded(tmp_path, tiny_checkpoint, text_folder, run_main):
    folder = tiny_checkpoint()
    done = run_main([folder, text_folder, *WAYS["weights"], *prune_flags("--save", folder)])
    assert done.code == 2 and done.metrics is None
    assert done.stderr.strip().count("\n") == 0 and "the model itself" in done.stderr
    assert not (tmp_path / "runs-1").exists()


def test_a_layout_that_does_not_know_the_model_is_refused_before_anything_heavy(
    tmp_path, checkpoint_of, text_folder, run_main
):
    argv = [*WAYS["A_log, zero"], *prune_flags("--save", tmp_path / "out", "--save_format", "state-spaces")]
    done = run_main([checkpoint_of("falcon_mamba"), text_folder, *argv])
    assert done.code == 2 and "--save_format" in done.stderr.splitlines()[-1]
    assert done.folder is None and not (tmp_path / "out").exists()


def test_an_existing_checkpoint_is_replaced_whole(tmp_path, pruned, tiny_model, tokenizer, tiny_windows):
    target = tmp_path / "out"
    saving.save(tiny_model(seed=5), tokenizer, {}, {"old": True}, str(target), layout="state-spaces")
    model, masks = pruned
    (target / "notes.txt").write_text("kept")
    saving.save(model, tokenizer, masks, {"old": False}, str(target))
    assert (target / "notes.txt").read_text() == "kept"
    assert not (target / "pytorch_model.bin").exists()  # nothing of the old one is left
    assert json.loads((target / "sparsessm.json").read_text()) == {"old": False}
    assert os.listdir(tmp_path) == ["out"]


def test_the_folder_has_the_permissions_of_any_new_folder(tmp_path, tiny_model, tokenizer):
    (tmp_path / "plain").mkdir()
    out = saving.save(tiny_model(), tokenizer, {}, {}, str(tmp_path / "out"))
    assert out.stat().st_mode == (tmp_path / "plain").stat().st_mode


def test_parents_are_made(tmp_path, tiny_model, tokenizer):
    out = saving.save(tiny_model(), tokenizer, {}, {}, str(tmp_path / "deep" / "er" / "out"))
    assert (out / "config.json").is_file()


# --- a disk that fills ---------------------------------------------------------------------------------------------

# Files may not grow beyond a limit, which is what a full disk looks like to the writer. Reads jobs (folder, layout,
# limit) and writes how each attempt ended; one process for all, as it takes seconds to import torch.
FILL = """
import json, resource, sys
from transformers import AutoTokenizer
from sparsessm.models import checkpoint, saving
from sparsessm.errors import InputError

model = checkpoint.load(checkpoint.find(sys.argv[1]))
tokenizer = AutoTokenizer.from_pretrained(sys.argv[2])
masks = {"backbone.layers.0.mixer.A_log": model.backbone.layers[0].mixer.A_log > 1}
ends = []
for target, layout, limit in json.loads(sys.argv[3]):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        saving.save(model, tokenizer, masks, {}, target, layout=layout)
        ends.append("saved")
    except InputError as error:
        ends.append(f"InputError: {error}")
    except Exception as error:
        ends.append(f"{type(error).__name__}: {error}")
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
print(json.dumps(ends))
"""
# Nothing fits; the config fits; weights of 40 kB fit and the tokenizer of 260 kB does not.
LIMITS = [(layout, limit) for layout in ("hf", "state-spaces") for limit in (0, 2_000, 100_000)]


def test_a_full_disk_leaves_the_target_as_it_was(tmp_path, tiny_model, tokenizer, demo_dir):
    tiny_model().save_pretrained(tmp_path / "model")
    jobs, before = [], []
    for i, (layout, limit) in enumerate([*LIMITS, *LIMITS]):
        place = tmp_path / f"place-{i}"
        place.mkdir()
        jobs.append((str(place / "out"), layout, limit))
        old = i >= len(LIMITS)
        before.append(contents(saving.save(tiny_model(), tokenizer, {}, {"old": True}, jobs[-1][0])) if old else None)
    done = subprocess.run(
        [sys.executable, "-c", FILL, str(tmp_path / "model"), str(demo_dir), json.dumps(jobs)],
        cwd=REPOSITORY, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    ends = json.loads(done.stdout)
    assert [end for end in ends if not end.startswith("InputError") or "\n" in end] == []
    for (target, _, _), old in zip(jobs, before, strict=True):
        place = Path(target).parent
        assert os.listdir(place) == (["out"] if old else [])  # no temporary folder stays behind
        assert old is None or contents(place / "out") == old


def test_a_disk_that_fills_ends_the_command_with_exit_code_2(tmp_path, demo_dir, text_folder):
    place = tmp_path / "place"
    arguments = [demo_dir, text_folder, *WAYS["weights"], "--module", "dt_proj", *prune_flags("--save", place / "out")]
    full = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))
    done = Command(*arguments, "--base_dir", tmp_path / "runs", before=full)
    _, said = done.communicate()
    assert done.returncode == 2, said[-2000:]
    errors = [line for line in said.splitlines() if line.startswith("error:")]
    assert len(errors) == 1 and str(place / "out") in errors[0]
    assert "Traceback" not in said
    assert not place.exists() or os.listdir(place) == []
