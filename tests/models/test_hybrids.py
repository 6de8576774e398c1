"""Hybrids: our way through their layers against stock transformers, what of them is pruned, and what stock makes of it."""

import json
from contextlib import suppress

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from sparsessm.errors import InputError
from sparsessm.kernels.selective_scan import force_kernel
from sparsessm.layerwise.layer import each_layer
from sparsessm.layerwise.statistics import Gram
from sparsessm.layerwise.stream import Stream
from sparsessm.models.architecture import Layout
from sparsessm.models.family import ARCHITECTURES
from sparsessm.models.mamba2 import _OutputLoss
from sparsessm.options import Options
from sparsessm.procedure.plan import plan_of
from sparsessm.procedure.prune import prune
from sparsessm.report.wording import grouped
from sparsessm.runs.journal import Journal
from tests.family import (
    GATE_FIRST,
    HYBRIDS,
    OTHERS,
    VARIANTS,
    family_checkpoint,
    logits_of,
    random_model_of,
    stock_perplexity,
)
from tests.processes import job

IDS = torch.randint(64, (5, 21), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize(("kind", "sizes"), VARIANTS)
def test_logits_are_those_of_stock_transformers(kind, sizes, tmp_path):
    model = random_model_of(kind, **sizes)
    stock, layout = model(IDS, use_cache=False).logits, Layout(model)
    assert float(stock.std()) > 0.1
    for how in ({"batch": 5}, {"batch": 2}, {"offload": "disk", "scratch": tmp_path}, {"steps": 64}):
        assert (logits_of(layout, IDS, **how) - stock).abs().max() <= 1e-4


def test_a_layer_with_attention_sees_whole_windows_and_no_other_layer_does():
    layout = Layout(random_model_of("nemotron_h"))  # Mamba-2, MLP, attention, Mamba-2
    assert [layout.whole_windows(layer) for layer in layout.layers] == [False, False, True, False]
    assert [layout.mixer(layer) is not None for layer in layout.layers] == [True, False, False, True]


def test_time_steps_of_nemotron_h_are_clamped_as_stock_does_and_not_as_the_config_says():
    model = random_model_of("nemotron_h", time_step_min=0.5)
    stock, layout = model(IDS, use_cache=False).logits, Layout(model)
    assert model.config.time_step_limit[0] == 0
    assert (logits_of(layout, IDS) - stock).abs().max() <= 1e-4
    for layer in layout.layers:
        if mixer := layout.mixer(layer):
            mixer.module.time_step_limit = (0.0, float("inf"))
    assert (logits_of(layout, IDS) - stock).abs().max() > 1e-2


PARTS = {
    "nemotron_h": {"mixer": 3, "attention": 4, "mlp": 2},
    "bamba": {"mixer": 3, "attention": 4, "mlp": 3},
    "granitemoehybrid": {"mixer": 3, "attention": 4, "mlp": 2},
    "falcon_h1": {"mixer": 3, "attention": 4, "mlp": 3},
    "zamba2": {"mixer": 3, "mlp": 1},  # the transformer block is shared
    "jamba": {"mixer": 5, "attention": 4, "mlp": 3},
}


@pytest.mark.parametrize("kind", HYBRIDS)
def test_modules_that_read_one_tensor_share_their_sums_and_no_others_do(kind):
    """Each has what it would have alone; queries, keys and values have one, and so have the branches of a gated MLP."""
    layout = Layout(random_model_of(kind))
    stream = Stream.embed(layout, IDS, device="cpu", offload="cpu", batch=2, steps=8)
    for layer in each_layer(layout, stream):
        linear = [name for name in layer.modules if layer.weight(name).dim() == 2]
        together = {name: Gram(layer.weight(name).shape[1]) for name in linear}
        layer.observe(together)
        for name in linear:
            alone = {name: Gram(layer.weight(name).shape[1])}
            layer.observe(alone)
            assert torch.equal(together[name].total, alone[name].total)
        named = grouped((id(gram.total), name.split(".")[-1]) for name, gram in together.items())
        shared = {tuple(names) for names in named.values() if len(names) > 1}
        last = {name.split(".")[-1] for name in linear}
        expected = {one for one in (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")) if last.issuperset(one)}
        assert shared == expected


@pytest.mark.parametrize("kind", HYBRIDS)
def test_what_of_a_hybrid_can_be_pruned(kind):
    layout = Layout(random_model_of(kind))
    found = {name: module.part for layer in layout.layers for name, module in layout.modules(layer).items()}
    counts = {part: sum(1 for value in found.values() if value == part) for part in set(found.values())}
    assert counts == PARTS[kind]
    assert layout.targets(["nn.Conv1d"], ["mixer", "attention", "mlp"], None) == ("conv1d",)
    assert not any("router" in name or "expert" in name or "shared_transformer" in name for name in layout.parts())


def test_weights_that_stay_dense_are_named_with_their_sizes():
    assert Layout(random_model_of("jamba")).dense() == {
        "feed_forward.router.weight": 4 * 16, "feed_forward.experts.gate_up_proj": 4 * 48 * 16,
        "feed_forward.experts.down_proj": 4 * 16 * 24,
    }  # fmt: skip
    shared = Layout(random_model_of("zamba2")).dense()
    assert shared["shared_transformer.self_attn.q_proj.weight"] == 32 * 32  # once, and two layers use it
    assert Layout(random_model_of("bamba")).dense() == {}


def test_arguments_of_layers_that_differ_from_batch_to_batch_are_refused(monkeypatch):
    model = random_model_of("bamba")
    plain = model.model.forward
    monkeypatch.setattr(model.model, "forward", lambda **given: plain(**{**given, "position_ids": given["input_ids"]}))
    with pytest.raises(InputError, match="depend on the text in a way that is not known"):
        Stream.embed(Layout(model), IDS, device="cpu", offload="cpu", batch=2)


@pytest.mark.parametrize("states", [False, True], ids=["heads", "states"])
@pytest.mark.parametrize("sizes", [{}, OTHERS["falcon_h1"], GATE_FIRST], ids=["no norm", "norm first", "gate first"])
def test_losses_of_falcon_h1_are_the_derivative_of_its_output(sizes, states):
    layout = Layout(random_model_of("falcon_h1", **sizes))
    mixer = layout.mixer(layout.layers[0])
    H, P, G, N = mixer.sizes
    generator = torch.Generator().manual_seed(1)
    shapes = ((2, 7, H, P), (2, 7, H, P), (2, 7, H * P), (2, H, P, N))
    y, lost, z, last = (torch.randn(shape, generator=generator) for shape in shapes)
    C = torch.randn(2, G, N, generator=generator)
    gram = torch.zeros(1, N, N) if states else torch.zeros(1, H, H)
    loss = _OutputLoss(mixer, z, gram.double())
    if states:
        loss.add_states(y, 3, last, C)
        parts = last * C.repeat_interleave(H // G, 1)[:, :, None]
        y, z, alone = y[:, 3:4], z[:, 3:4], [parts[:, None, ..., n] for n in range(N)]
    else:
        loss.add_heads(y, lost)
        alone = [torch.zeros_like(lost).index_copy(2, torch.tensor([h]), lost[:, :, h : h + 1]) for h in range(H)]

    def out(y):
        return mixer._gated_norm(y.flatten(2), z) @ mixer.module.out_proj.weight.T

    with force_kernel("ref"):
        losses = torch.stack([torch.func.jvp(out, (y,), (one,))[1].flatten() for one in alone])
    scale = float(losses.norm() ** 2 / len(alone))
    torch.testing.assert_close(loss.gram[0].float(), losses @ losses.T, rtol=1e-3, atol=1e-4 * scale)


# --- whole runs

# decoding by stock ignores what its prefill does: limits of time steps
UNLIMITED = {"nemotron_h": {"time_step_min": 1e-6}, "bamba": {"time_step_limit": (0.0, float("inf"))}}


def run(run_main, demo_dir, text_folder, tmp_path, kind, *argv, sizes=None):
    model = family_checkpoint(tmp_path / "in", demo_dir, kind, **{**(sizes or {}), **UNLIMITED.get(kind, {})})
    argv = [model, text_folder, "--seqlen", "32", "--nsamples", "4", "--eval_windows", "8", *argv]
    return run_main([*argv, "--save", tmp_path / "out"])


def opened(folder):
    """The saved model as stock opens it, after a look whether decoding computes what prefill does."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    prompt = torch.randint(1, 4096, (1, 9), generator=torch.Generator().manual_seed(1))
    options = {"do_sample": False, "max_new_tokens": 6, "min_new_tokens": 6, "output_scores": True}
    told = model.generate(prompt, return_dict_in_generate=True, **options)
    with torch.no_grad():
        whole = model(told.sequences[:, :-1], use_cache=False).logits[:, 8:]
    assert (torch.stack([score[0] for score in told.scores])[:, 1:] - whole[0, :, 1:]).abs().max() < 1e-3
    return model


@pytest.mark.parametrize("kind", HYBRIDS)
def test_the_whole_model_is_pruned_saved_and_opened_by_stock(run_main, demo_dir, text_folder, tmp_path, kind):
    argv = ["--method", "sparsessm_obs", "--prune_A", "--prune_layers", "--sparsity", "0.5"]
    outcome = run(run_main, demo_dir, text_folder, tmp_path, kind, *argv)
    assert outcome.code == 0, outcome.stderr
    shares = outcome.metrics["sparsity"]
    assert set(shares) == {"ssm", "layers", *PARTS[kind], "model"}
    assert shares["ssm"] == 0.5 and shares["layers"] == pytest.approx(0.5, abs=0.01)
    assert all(0.2 < shares[part] < 0.8 for part in PARTS[kind])  # one budget for all modules
    saved, masks = load_file(tmp_path / "out" / "model.safetensors"), load_file(tmp_path / "out" / "masks.safetensors")
    row = ARCHITECTURES[kind]
    assert set(masks) <= set(saved)  # named as there
    assert {row.here(name, ()) for name in masks} == set(Layout(random_model_of(kind)).parts())
    assert all((saved[name][mask] == (30 if name.endswith("A_log") else 0)).all() for name, mask in masks.items())
    opened(tmp_path / "out")
    (value,) = outcome.metrics["perplexity"].values()
    assert stock_perplexity(tmp_path / "out", text_folder / "test.txt", 32, 8) == pytest.approx(value, rel=1e-3)


REMOVED = [
    *((kind, "columns", {}) for kind in HYBRIDS),
    *((kind, "columns", OTHERS[kind]) for kind in ("falcon_h1", "zamba2", "jamba")),
    *((kind, "heads", {}) for kind in ("nemotron_h", "bamba", "granitemoehybrid", "falcon_h1")),
    ("nemotron_h", "heads", OTHERS["nemotron_h"]),
    ("falcon_h1", "heads", OTHERS["falcon_h1"]),
    ("falcon_mamba", "columns", {}),
]
STATES = {"nemotron_h": "ssm_state_size", "falcon_mamba": "state_size"}
HEADS = {"nemotron_h": "mamba_num_heads"}


@pytest.mark.parametrize(("kind", "structure", "sizes"), REMOVED)
def test_states_and_heads_are_removed(run_main, demo_dir, text_folder, tmp_path, kind, structure, sizes):
    argv = ["--method", "sparsessm_obs", "--prune_A", "--sparsity", "0.5", "--structure", structure]
    outcome = run(run_main, demo_dir, text_folder, tmp_path, kind, *argv, sizes=sizes)
    assert outcome.code == 0, outcome.stderr
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    key, left = (STATES.get(kind, "mamba_d_state"), 3) if structure == "columns" else (HEADS.get(kind, "mamba_n_heads"), 4)
    assert config[key] == left
    opened(tmp_path / "out")
    (value,) = outcome.metrics["perplexity"].values()
    assert stock_perplexity(tmp_path / "out", text_folder / "test.txt", 32, 8) == pytest.approx(value, rel=1e-3)


@pytest.mark.parametrize(
    ("kind", "argv", "says"),
    [
        ("zamba2", ["magnitude", "--structure", "heads"], "heads cannot be removed from zamba2 models: use columns"),
        ("jamba", ["magnitude", "--structure", "heads"], "heads cannot be removed from jamba models: use columns"),
        ("jamba", ["mamba-shedder", "--prune_layers", "--shed_target", "mamba_block"], "cannot say that a layer is removed"),
        ("zamba2", ["mamba-shedder", "--prune_layers", "--shed_target", "mamba_block"], "use --shed_target ssm"),
    ],
)
def test_what_a_hybrid_cannot_hold_is_refused(run_main, demo_dir, text_folder, tmp_path, kind, argv, says):
    outcome = run(run_main, demo_dir, text_folder, tmp_path, kind, "--prune_A", "--sparsity", "0.5", "--method", *argv)
    assert outcome.code == 2 and says in outcome.stderr


@pytest.mark.parametrize("kind", ["nemotron_h", "bamba", "granitemoehybrid", "falcon_h1"])
def test_a_pruned_model_is_pruned_further(run_main, demo_dir, text_folder, tmp_path, kind):
    """Its masks are found again by the names in the checkpoint."""
    argv = ["--method", "magnitude", "--prune_A", "--prune_layers", "--sparsity"]
    assert run(run_main, demo_dir, text_folder, tmp_path, kind, *argv, "0.5").code == 0
    again = run_main([tmp_path / "out", text_folder, "--seqlen", "32", "--nsamples", "4", *argv, "0.75"])
    assert again.code == 0 and again.metrics["sparsity"]["layers"] == pytest.approx(0.75, abs=0.01)
    assert "stays pruned" in (again.folder / "output.log").read_text()
    refused = run_main([tmp_path / "out", text_folder, "--seqlen", "32", "--nsamples", "4", *argv, "0.5"])
    assert refused.code == 2 and "is gone already" in refused.stderr


@pytest.mark.parametrize("kind", ["nemotron_h", "bamba", "granitemoehybrid", "falcon_h1"])
def test_whole_layers_are_removed(run_main, demo_dir, text_folder, tmp_path, kind):
    argv = ["--method", "mamba-shedder", "--prune_A", "--prune_layers", "--shed_target", "mamba_block", "--sparsity", "0.4"]
    outcome = run(run_main, demo_dir, text_folder, tmp_path, kind, *argv, sizes=OTHERS[kind])
    assert outcome.code == 0, outcome.stderr
    before = len(Layout(random_model_of(kind, **OTHERS[kind])).layers)
    assert len(Layout(opened(tmp_path / "out")).layers) == before - 1
    (value,) = outcome.metrics["perplexity"].values()
    assert stock_perplexity(tmp_path / "out", text_folder / "test.txt", 32, 8) == pytest.approx(value, rel=1e-3)


@pytest.mark.parametrize("part", ["mixer", "attention", "mlp"])
def test_parts_are_pruned_alone(run_main, demo_dir, text_folder, tmp_path, part):
    argv = ["--method", "wanda", "--prune_layers", "--sparsity", "0.5", "--parts", part]
    outcome = run(run_main, demo_dir, text_folder, tmp_path, "falcon_h1", *argv)
    assert outcome.code == 0, outcome.stderr
    shares = {name: share for name, share in outcome.metrics["sparsity"].items() if name in PARTS["falcon_h1"]}
    assert shares == {name: pytest.approx(0.5, abs=0.03) if name == part else 0 for name in PARTS["falcon_h1"]}


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("kind", HYBRIDS)
def test_an_interrupted_run_resumes(job, tmp_path, kind):
    options = Options(model="-", dataset="-", method="sparsessm_obs", prune_A=True, prune_layers=True, sparsity=0.5)

    def run(journal, stop=None):
        model, visited = random_model_of(kind, **OTHERS[kind]), []

        def report(phase, layer, **figures):
            visited.append((phase, layer))
            if phase == "compensated" and layer == stop:
                raise Interrupted

        layout = Layout(model)
        plan = plan_of(options, layout.targets(options.target_modules, options.parts, options.module))
        with suppress(Interrupted):
            prune(job(model, IDS, report=report, journal=journal), plan, IDS)
        return model, visited

    whole, visited = run(Journal(None))
    assert {layer for _, layer in visited} == set(range(len(Layout(whole).layers)))  # also those without a mixer
    run(Journal(tmp_path), stop=1)
    resumed, _ = run(Journal(tmp_path))
    assert all(torch.equal(a, b) for a, b in zip(whole.state_dict().values(), resumed.state_dict().values(), strict=True))


def test_the_log_says_what_stays_dense(run_main, demo_dir, text_folder, tmp_path):
    argv = ["--method", "magnitude", "--prune_layers", "--sparsity", "0.5"]
    outcome = run(run_main, demo_dir, text_folder, tmp_path, "jamba", *argv)
    log = (outcome.folder / "output.log").read_text()
    assert "0.00M entries of 3 weights, as feed_forward.experts.gate_up_proj, feed_forward.experts.down_proj" in log


def test_the_log_says_which_layers_have_no_ssm(run_main, demo_dir, text_folder, tmp_path):
    argv = ["--method", "magnitude", "--prune_A", "--sparsity", "0.5", "--minlayer", "1"]
    outcome = run(run_main, demo_dir, text_folder, tmp_path, "nemotron_h", *argv)
    assert "layers without an SSM, whose A_log is not there to prune: 1, 2\n" in (outcome.folder / "output.log").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "batch", "share"), [("sparsessm", 1, 1e-3), ("sparsegpt", 4, 1e-3), ("sparsessm_obs", 1, 0.05)]
)
def test_two_processes_agree_with_one(run_main, demo_dir, text_folder, tmp_path, method, batch, share):
    """Layers of three kinds; the masks of weights but for near ties, which a refit after each layer adds to.

    Of 4 windows at once the second process has none.
    """
    how = ["--method", method, "--prune_A", "--prune_layers", "--sparsity", "0.5", "--calib_batch", batch]
    one = run(run_main, demo_dir, text_folder, tmp_path, "nemotron_h", *how)
    argv = [tmp_path / "in", text_folder, "--seqlen", "32", "--nsamples", "4", "--eval_windows", "8", *how]
    job(2, *argv, "--base_dir", tmp_path / "two", "--save", tmp_path / "both")
    masks, expected = (load_file(tmp_path / name / "masks.safetensors") for name in ("both", "out"))
    assert masks.keys() == expected.keys() and len(masks) > 8
    unequal = {name: float((masks[name] != expected[name]).float().mean()) for name in masks}
    assert not any(unequal[name] for name in masks if name.endswith("A_log")) and max(unequal.values()) < share
    (folder,) = tmp_path.glob("two/default/*")
    two = json.loads((folder / "metrics.json").read_text())
    assert two["perplexity"] == pytest.approx(one.metrics["perplexity"], rel=share)
    assert two["sparsity"] == pytest.approx(one.metrics["sparsity"], rel=share)
