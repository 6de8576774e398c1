"""Recovery: nearer to the dense model, masks to the bit, the best values kept, interrupted and resumed."""

import copy
import json
from contextlib import suppress

import pytest
import torch
from safetensors.torch import load_file

from sparsessm.errors import Interrupted
from sparsessm.layerwise.layer import each_layer
from sparsessm.models.architecture import Layout
from sparsessm.options import Options
from sparsessm.procedure.plan import Plan, RecoveryPlan, RemovalPlan, plan_of
from sparsessm.procedure.prune import prune, reports
from sparsessm.procedure.recovery import recover
from sparsessm.runs.journal import Journal
from tests.family import OTHERS, random_model_of
from tests.processes import job as processes

IDS = torch.randint(64, (16, 20), generator=torch.Generator().manual_seed(4))
PLANS = {
    "blocks": RecoveryPlan(("blocks",), passes=10),
    "model": RecoveryPlan(("model",), steps=40, model_rate=2e-3),
    "both": RecoveryPlan(("blocks", "model"), passes=3, steps=20),
}


def pruned(job, kind, **sizes):
    dense = random_model_of(kind, **sizes)
    model = copy.deepcopy(dense)
    options = Options(model="-", dataset="-", method="magnitude", prune_A=True, prune_layers=True, sparsity=0.5)
    layout = Layout(model)
    plan = plan_of(options, layout.targets(options.target_modules, options.parts, options.module))
    return dense, model, prune(job(model, IDS), plan, IDS).masks


def divergence(model, dense):
    """Of stock transformers' predictions."""
    with torch.no_grad():
        logs, wanted = (some(IDS, use_cache=False).logits.log_softmax(-1) for some in (model, dense))
    return float((wanted.exp() * (wanted - logs)).sum(-1).mean())


@pytest.mark.parametrize("how", PLANS)
@pytest.mark.parametrize(
    "kind, sizes", [("mamba", {}), ("mamba2", {}), ("nemotron_h", OTHERS["nemotron_h"]), ("zamba2", {})]
)
def test_nearer_to_dense_and_what_is_pruned_stays_to_the_bit(job, kind, sizes, how):
    dense, model, masks = pruned(job, kind, **sizes)
    before, state = divergence(model, dense), {name: p.clone() for name, p in model.named_parameters()}
    recover(job(model, IDS), job(dense, IDS), masks, PLANS[how])
    assert divergence(model, dense) < 0.95 * before
    for name, mask in masks.items():
        assert torch.equal(model.get_parameter(name)[mask], state[name][mask])
        assert not torch.equal(model.get_parameter(name)[~mask], state[name][~mask]) or mask.all()
    assert torch.equal(model.get_input_embeddings().weight, dense.get_input_embeddings().weight)
    assert all(not p.requires_grad and p.grad is None for p in model.parameters())


def test_blocks_come_nearer_one_by_one(job):
    """Each layer's output on the dense stream, by itself, for windows that nothing was learned from."""
    dense, model, masks = pruned(job, "mamba")

    def errors():
        found = []
        for layer in each_layer(Layout(dense), job(dense, IDS).embed()):
            rows, hidden = slice(14, 16), layer.stream.hidden[14:]
            out, wanted = layer.copy(model.backbone.layers[layer.index]).forward(rows, hidden), layer.forward(rows, hidden)
            found.append(float((out - wanted).square().sum()))
        return found

    before = errors()
    recover(job(model, IDS), job(dense, IDS), masks, PLANS["blocks"])
    after = errors()
    assert all(now < then for now, then in zip(after, before, strict=True))


@pytest.mark.parametrize("how", ["blocks", "model"])
def test_a_rate_that_ruins_the_model_leaves_it_as_it_was(job, how):
    """Once a step makes numbers that are not finite, none follows."""
    dense, model, masks = pruned(job, "mamba")
    state = {name: p.clone() for name, p in model.named_parameters()}
    plan = RecoveryPlan((how,), steps=10, passes=2, model_rate=1e9, block_rate=1e9)
    recover(job(model, IDS), job(dense, IDS), masks, plan)
    assert all(torch.equal(p, state[name]) for name, p in model.named_parameters())


def test_a_part_that_was_removed_stays_removed(job):
    """Mamba-Shedder's scans read zero: their rows are no parameters to tune."""
    dense = random_model_of("mamba")
    model = copy.deepcopy(dense)
    masks = prune(job(model, IDS), Plan(removal=RemovalPlan("ssm", 0.5)), IDS).masks
    shed = [i for i in range(2) if masks.get(f"backbone.layers.{i}.mixer.A_log") is not None]
    assert len(shed) == 1
    recover(job(model, IDS), job(dense, IDS), masks, PLANS["both"])
    rows = model.backbone.layers[shed[0]].mixer.x_proj.weight
    assert (rows[-6:] == 0).all() and (rows[:-6] != 0).any()
    other = model.backbone.layers[1 - shed[0]].mixer.x_proj.weight
    assert not torch.equal(other, dense.backbone.layers[1 - shed[0]].mixer.x_proj.weight)


@pytest.mark.parametrize("how", PLANS)
def test_interrupted_anywhere_it_ends_the_same(job, tmp_path, how):
    def run(folder, stop=None):
        dense, model, masks = pruned(job, "mamba")
        seen = []

        def report(phase, layer, **figures):
            seen.append((phase, layer))
            if len(seen) == stop:
                raise Interrupted

        journal = Journal(folder)
        with suppress(Interrupted):
            work = {"journal": journal, "report": report}
            recover(job(model, IDS, **work), job(dense, IDS, **work), masks, PLANS[how])
        return model, seen

    whole, seen = run(None)
    assert len(seen) == reports(job(whole, IDS), Plan(recovery=PLANS[how]))
    for stop in {1, len(seen) - 1}:
        folder = tmp_path / str(stop)
        folder.mkdir()
        run(folder, stop)
        resumed, again = run(folder)
        assert len(again) <= len(seen)
        assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


def test_bfloat16_is_tuned_on_float32_copies(job):
    """Steps that are smaller than a weight's rounding add up."""
    dense, model, masks = pruned(job, "mamba", dtype=torch.bfloat16)
    plan = RecoveryPlan(("model",), steps=40, model_rate=1e-3)
    before = divergence(model.float(), dense.float())
    model, dense = model.bfloat16(), dense.bfloat16()
    recover(job(model, IDS), job(dense, IDS), masks, plan)
    assert model.backbone.layers[0].mixer.in_proj.weight.dtype == torch.bfloat16
    assert divergence(model.float(), dense.float()) < before


@pytest.mark.slow
def test_two_processes_that_share_an_odd_number_of_batches_tune_alike_and_stay_sparse(run_main, tmp_path, text_folder):
    """One has two batches, the other one: they take the same steps, and both write what both learned."""
    argv = ["demo", str(text_folder), "--method", "magnitude", "--prune_A", "--prune_layers", "--sparsity", "0.6",
            "--seqlen", "64", "--nsamples", "6", "--calib_batch", "2", "--eval_windows", "8"]  # fmt: skip
    plain = run_main([*argv, "--save", tmp_path / "plain"]).metrics["perplexity"][str(text_folder)]
    how = ["--recover", "blocks", "model", "--recover_steps", "10", "--recover_passes", "2"]
    processes(2, *argv, *how, "--base_dir", tmp_path / "runs", "--save", tmp_path / "tuned")
    (folder,) = tmp_path.glob("runs/default/*")
    assert json.loads((folder / "metrics.json").read_text())["perplexity"][str(text_folder)] < 0.8 * plain
    masks, weights = (load_file(tmp_path / "tuned" / f"{file}.safetensors") for file in ("masks", "model"))
    before = load_file(tmp_path / "plain" / "masks.safetensors")
    assert all(mask.equal(before[name]) for name, mask in masks.items())
    assert all((weights[key][mask] == (30.0 if key.endswith("A_log") else 0.0)).all() for key, mask in masks.items())


@pytest.mark.slow
def test_a_process_without_windows_to_learn_from_is_refused_before_anything_is_pruned(tmp_path, text_folder):
    argv = ["demo", str(text_folder), "--method", "magnitude", "--prune_A", "--sparsity", "0.6", "--seqlen", "64",
            "--nsamples", "6", "--recover", "model", "--eval_windows", "8", "--base_dir", tmp_path]  # fmt: skip
    with pytest.raises(AssertionError, match="--recover needs a batch of windows for each of the 2 processes"):
        processes(2, *argv)


def test_the_command_tunes_what_it_saves(run_main, tiny_checkpoint, text_folder, tmp_path):
    """And says how long that took; the same command without recovery has the same masks and another perplexity."""
    common = [
        tiny_checkpoint(), text_folder, "--method", "magnitude", "--prune_A", "--prune_layers", "--sparsity", "0.5",
        "--seqlen", "32", "--nsamples", "8", "--calib_batch", "2", "--eval_windows", "8",
    ]  # fmt: skip
    how = ["--recover", "blocks", "model", "--recover_steps", "10", "--recover_passes", "2", "--recover_rate", "0.002"]
    found = []
    for name, more in (("plain", []), ("tuned", [*how, "--recover_block_rate", "0.001"])):
        outcome = run_main([str(word) for word in [*common, "--save", tmp_path / name, *more]])
        assert outcome.code == 0, outcome.stderr
        masks, weights = (load_file(tmp_path / name / f"{file}.safetensors") for file in ("masks", "model"))
        assert all((weights[key][mask] == (30.0 if key.endswith("A_log") else 0.0)).all() for key, mask in masks.items())
        found.append((outcome.metrics, masks))
    assert ("recover" in found[0][0]["seconds"], "recover" in found[1][0]["seconds"]) == (False, True)
    assert all(torch.equal(mask, found[1][1][key]) for key, mask in found[0][1].items())
    assert found[0][0]["perplexity"] != found[1][0]["perplexity"]
