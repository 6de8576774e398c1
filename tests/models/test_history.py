"""Entries pruned before are found, stay pruned, count in every total, and are neither candidates nor calibrated."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import sparsessm
from sparsessm.errors import InputError
from sparsessm.models import checkpoint
from sparsessm.models.architecture import Layout
from sparsessm.models.history import read_history
from tests.conftest import random_model

SMALL = ["--seqlen", 64, "--nsamples", 4, "--eval_windows", 2]


def history_of(folder: Path):
    source = checkpoint.find(str(folder))
    return read_history(source.folder, Layout(checkpoint.load(source)))


def change(folder: Path, edit) -> None:
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / "model.safetensors").items()}
    edit(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def gone(folder: Path) -> dict[str, torch.Tensor]:
    """Entries of a saved checkpoint that are pruned, by its values alone."""
    tensors = load_file(folder / "model.safetensors")
    return {name: (t >= 20) if name.endswith("A_log") else t == 0 for name, t in tensors.items() if "mixer." in name}


@pytest.fixture
def pruned(run_main, tiny_checkpoint, text_folder, tmp_path):
    """pruned(name, *argv, model=...) prunes a tiny checkpoint, or another folder, and returns what was saved and told."""

    def run(name, *argv, model=None):
        model = model or tiny_checkpoint(f"{name}-dense", state_size=8)
        done = run_main([model, text_folder, *argv, *SMALL, "--save", tmp_path / name])
        assert done.code == 0, done.stderr
        return tmp_path / name, done

    return run


A_LOG = ("--prune_A", "--sparsity", 0.5)
WEIGHTS = tuple(f"mixer.{name}.weight" for name in ("in_proj", "conv1d", "out_proj"))


def test_a_dense_model_has_no_history(tiny_checkpoint, tiny_model, tmp_path):
    folder = tiny_checkpoint()
    assert not history_of(folder)
    # as it is initialised: the first state of every channel is log 1 = 0
    change(folder, lambda tensors: [t[:, 0].zero_() for name, t in tensors.items() if name.endswith("A_log")])
    # a few zeros may be there by chance
    change(folder, lambda tensors: [t[0, :1].zero_() for name, t in tensors.items() if name.endswith("out_proj.weight")])
    assert not history_of(folder)


@pytest.mark.parametrize("sidecar", [True, False])
@pytest.mark.parametrize("argv", [(), ("--pruned_transition", "unit"), ("--raw_zeros",)], ids=str)
def test_pruned_transitions_are_found_beside_the_model_or_in_it(pruned, sidecar, argv):
    folder, _ = pruned("one", "--method", "sparsessm", *A_LOG, *argv)
    masks = load_file(folder / "masks.safetensors")
    if not sidecar:
        (folder / "masks.safetensors").unlink()
        (folder / "sparsessm.json").unlink()
    found = history_of(folder)
    assert found.masks.keys() == masks.keys() and all(torch.equal(found.masks[name], masks[name]) for name in masks)
    assert [run["options"]["method"] for run in found.runs] == (["sparsessm"] if sidecar else [])


@pytest.mark.parametrize("sidecar", [True, False])
def test_pruned_weights_are_found(pruned, sidecar):
    folder, _ = pruned("one", "--method", "magnitude", "--prune_layers", "--sparsity", 0.3)
    masks = load_file(folder / "masks.safetensors")
    if not sidecar:
        (folder / "masks.safetensors").unlink()
    found = history_of(folder).masks
    assert found.keys() == masks.keys() and all(torch.equal(found[name], masks[name]) for name in masks)


SECOND = [
    ("magnitude", A_LOG), ("ts_real", A_LOG), ("sparsessm", A_LOG), ("sparsessm_dev", A_LOG), ("gpt_extend", A_LOG),
    ("sparsessm_obs", A_LOG), ("sparsessm_obs", (*A_LOG, "--search", "exact")),
    ("sparsessm_obs", (*A_LOG, "--search", "exchange")), ("sparsessm_obs", (*A_LOG, "--search", "independent")),
    ("ts_semi", ("--prune_A", "--prunen", 4, "--prunem", 8)),
]  # fmt: skip


@pytest.mark.parametrize(("method", "argv"), SECOND, ids=str)
def test_more_of_A_log_goes_on_top_of_what_is_gone(pruned, method, argv):
    """30 % first, then half in all: the first masks are kept, and exactly half is gone, by the file and by the figures."""
    one, _ = pruned("one", "--method", "magnitude", "--prune_A", "--sparsity", 0.3)
    two, done = pruned("two", "--method", method, *argv, model=one)
    first, both, told = load_file(one / "masks.safetensors"), load_file(two / "masks.safetensors"), done.metrics["sparsity"]
    true = {name: mask for name, mask in gone(two).items() if name.endswith("A_log")}
    assert both.keys() == first.keys() == true.keys()
    for name in first:
        assert not (first[name] & ~both[name]).any() and torch.equal(both[name], true[name])
    share = sum(int(mask.sum()) for mask in true.values()) / sum(mask.numel() for mask in true.values())
    assert told["ssm"] == pytest.approx(share, abs=1e-9) and share >= 0.5
    if method != "ts_semi":  # a group that had lost more than its share keeps that
        assert share == 0.5
    counts = json.loads((done.folder / "sparsity.json").read_text())
    assert all(counts[name] == {"pruned": int(true[name].sum()), "total": true[name].numel()} for name in true)
    record = json.loads((two / "sparsessm.json").read_text())
    assert [run["options"]["method"] for run in record["history"]] == ["magnitude"]


@pytest.mark.parametrize("method", ["magnitude", "wanda", "sparsegpt", "sparsessm_obs"])
def test_more_weights_go_on_top_of_what_is_gone(pruned, method):
    one, _ = pruned("one", "--method", "magnitude", "--prune_layers", "--sparsity", 0.3)
    two, done = pruned("two", "--method", method, "--prune_layers", "--sparsity", 0.5, "--allocation", "uniform", model=one)
    first, both, true = load_file(one / "masks.safetensors"), load_file(two / "masks.safetensors"), gone(two)
    assert both.keys() == first.keys()
    for name in first:
        assert not (first[name] & ~both[name]).any() and not (both[name] & ~true[name]).any()
        if method != "wanda":  # which compares within rows
            assert abs(int(both[name].sum()) - 0.5 * both[name].numel()) <= 1
    total = sum(mask.numel() for mask in both.values())
    assert done.metrics["sparsity"]["layers"] == pytest.approx(sum(int(mask.sum()) for mask in both.values()) / total)


def test_a_refit_leaves_pruned_weights_at_zero(pruned):
    one, _ = pruned("one", "--method", "magnitude", "--prune_layers", "--sparsity", 0.3)
    two, _ = pruned("two", "--method", "sparsessm_obs", *A_LOG, model=one)
    first, true = load_file(one / "masks.safetensors"), gone(two)
    assert all(not (mask & ~true[name]).any() for name, mask in first.items())
    before, after = (load_file(folder / "model.safetensors") for folder in (one, two))
    name = "backbone.layers.0.mixer.out_proj.weight"
    assert not torch.equal(before[name], after[name])


def test_states_that_were_removed_count_and_stay_gone(pruned, run_main, text_folder):
    one, _ = pruned("one", "--method", "structure_mag", *A_LOG)
    measured = run_main([one, text_folder, *SMALL])
    assert measured.metrics["sparsity"]["ssm"] == 0.5
    assert measured.stdout.strip().splitlines()[-1].startswith("pruned before  ssm 50.0%")
    two, done = pruned("two", "--method", "magnitude", "--prune_A", "--sparsity", 0.5, model=one)  # of what is there
    masks, first = load_file(two / "masks.safetensors"), load_file(one / "masks.safetensors")
    for name, mask in masks.items():
        assert mask.shape == first[name].shape == (32, 8) and not (first[name] & ~mask).any()
        assert int(mask.sum()) == 32 * 8 * 3 // 4
    assert done.metrics["sparsity"]["ssm"] == 0.75
    assert history_of(two).masks.keys() == masks.keys()
    again = run_main([two, text_folder, *SMALL])
    assert again.metrics["sparsity"]["ssm"] == 0.75
    assert again.metrics["perplexity"] == done.metrics["perplexity"]


def test_whole_blocks_that_were_removed_count(pruned, run_main, tiny_checkpoint, text_folder):
    dense = tiny_checkpoint("deep", state_size=8, num_hidden_layers=4)
    argv = ("--method", "mamba-shedder", "--prune_A", "--prune_layers", "--sparsity", 0.5, "--shed_target", "mamba_block")
    one, first = pruned("one", *argv, model=dense)
    again = run_main([one, text_folder, *SMALL])
    assert again.metrics["sparsity"] == first.metrics["sparsity"] and again.metrics["sparsity"]["ssm"] == 0.5
    _, done = pruned("two", "--method", "magnitude", *A_LOG, model=one)
    assert done.metrics["sparsity"]["ssm"] == 0.75


def test_masks_follow_their_layers_when_blocks_are_removed(pruned, tiny_checkpoint):
    dense = tiny_checkpoint("deep", state_size=8, num_hidden_layers=4)
    one, _ = pruned("one", "--method", "magnitude", *A_LOG, model=dense)
    argv = ("--method", "mamba-shedder", "--prune_A", "--prune_layers", "--sparsity", 0.25, "--shed_target", "mamba_block")
    two, done = pruned("two", *argv, model=one)
    (lost,) = done.metrics["removed_layers"]
    masks, true = load_file(two / "masks.safetensors"), gone(two)
    assert {int(name.split(".")[2]) for name in masks} == {0, 1, 2}
    assert all(torch.equal(mask, true[name]) for name, mask in masks.items())
    assert done.metrics["sparsity"]["ssm"] == pytest.approx(0.25 + 0.75 * 0.5)
    assert f"backbone.layers.{lost}.mixer.A_log" in json.loads((done.folder / "sparsity.json").read_text())


@pytest.mark.parametrize("structure", ["columns", "heads"])
def test_structures_and_weights_that_go_in_one_run_count_together(pruned, checkpoint_of, run_main, text_folder, structure):
    """Of a Mamba-2 both take from the same weights: what is gone is all that is not there and not zero."""
    dense = checkpoint_of("mamba2")
    argv = ("--method", "sparsessm", *A_LOG, "--prune_layers", "--structure", structure)
    one, done = pruned("one", *argv, model=dense)

    def alive(folder):
        tensors = load_file(folder / "model.safetensors")
        return sum(int(tensors[name].count_nonzero()) for name in tensors if name.endswith(WEIGHTS))

    share = 1 - alive(one) / alive(dense)
    assert done.metrics["sparsity"]["layers"] == pytest.approx(share, abs=1e-6)
    again = run_main([one, text_folder, *SMALL])
    assert again.metrics["sparsity"] == done.metrics["sparsity"]


@pytest.mark.parametrize("sparsity", [0.3, 0.5])
def test_a_share_that_is_gone_already_is_refused(pruned, run_main, text_folder, sparsity):
    one, _ = pruned("one", "--method", "magnitude", *A_LOG)
    done = run_main([one, text_folder, "--method", "sparsessm", "--prune_A", "--sparsity", sparsity, *SMALL])
    assert done.code == 2 and "50.0% of what is named is gone already: give a higher --sparsity" in done.stderr


def test_a_share_that_is_gone_already_is_refused_in_python():
    model, windows = random_model(), torch.arange(64).view(2, 32)
    sparsessm.prune(model, windows, "magnitude", sparsity=0.5)
    with pytest.raises(InputError, match=r"50\.0% of what is named is gone already"):
        sparsessm.prune(model, windows, "sparsessm", sparsity=0.4)


def test_marks_that_the_values_deny_are_said_and_do_not_count(pruned, run_main, text_folder):
    """As after training without holding the masks."""
    one, _ = pruned("one", "--method", "magnitude", *A_LOG)
    name = "backbone.layers.0.mixer.A_log"
    change(one, lambda tensors: tensors[name].fill_(0.5))
    done = run_main([one, text_folder, *SMALL])
    assert done.metrics["sparsity"]["ssm"] == 0.25
    assert f"marks 128 entries of {name} that hold other values" in done.stderr


def broken_masks(folder: Path, case: str) -> None:
    masks = load_file(folder / "masks.safetensors")
    name = next(iter(masks))
    if case == "cut short":
        content = (folder / "masks.safetensors").read_bytes()
        (folder / "masks.safetensors").write_bytes(content[: len(content) // 2])
        return
    if case == "another model's":
        masks["backbone.layers.9.mixer.A_log"] = masks[name].clone()
    if case == "numbers":
        masks[name] = masks[name].float()
    if case == "another shape":
        masks[name] = masks[name][:5].clone()
    save_file(masks, folder / "masks.safetensors")


@pytest.mark.parametrize("case", ["cut short", "another model's", "numbers", "another shape"])
def test_masks_that_are_invalid_are_refused(pruned, run_main, text_folder, case):
    one, _ = pruned("one", "--method", "magnitude", *A_LOG)
    broken_masks(one, case)
    done = run_main([one, text_folder, *SMALL])
    assert done.code == 2 and "masks.safetensors" in done.stderr.splitlines()[-1]


@pytest.mark.parametrize(
    "text", ["{", "[]", '{"gone": 3}', '{"gone": {"ssm": -1}}', '{"gone": {"ssm": true}}', '{"removed": {"a": "b"}}',
             '{"removed": {"a": [0, 1]}}', '{"removed": {"a": {"dim": 1, "index": [true]}}}', '{"removed": 1}',
             '{"history": 3}', '{"options": []}', "[" * 3000],
)  # fmt: skip
def test_a_record_that_is_invalid_is_refused(tiny_checkpoint, text):
    folder = tiny_checkpoint()
    (folder / "sparsessm.json").write_text(text)
    source = checkpoint.find(str(folder))
    with pytest.raises(InputError, match=r"sparsessm.json") as caught:
        read_history(source.folder, Layout(checkpoint.load(source)))
    assert "\n" not in str(caught.value)
    shutil.rmtree(folder)
