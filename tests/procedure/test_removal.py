"""Mamba-Shedder against brute force by stock transformers, and what it leaves: counts, folders, records."""

import hashlib
import json
from contextlib import suppress

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from sparsessm.errors import DivergenceError
from sparsessm.layerwise.layer import each_layer
from sparsessm.layerwise.stream import Stream
from sparsessm.models import checkpoint
from sparsessm.models.architecture import Layout
from sparsessm.procedure.driver import Job
from sparsessm.procedure.plan import RemovalPlan
from sparsessm.procedure.removal import remove_parts
from sparsessm.pruning.methods import REMOVAL_TARGETS
from sparsessm.runs.journal import Journal
from tests.processes import job

BLOCK_PARAMETERS = ("norm.weight", "mixer.A_log", "mixer.D", "mixer.in_proj.weight", "mixer.conv1d.weight",
                    "mixer.conv1d.bias", "mixer.x_proj.weight", "mixer.dt_proj.weight", "mixer.dt_proj.bias",
                    "mixer.out_proj.weight")  # fmt: skip
FLAGS = {"ssm": ["--prune_A"], "mamba_block": ["--prune_layers"]}
SEQLEN = 64


def stock_perplexity(model, windows) -> float:
    """By the stock forward pass, without a cache."""
    with torch.no_grad():
        logits = model(windows, use_cache=False).logits[:, :-1].double()
    return float(F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten()).exp())


def without(make, target, layers):
    """A new stock model without the named layers, or with the rows of x_proj that make C zero in them."""
    model = make()
    if target == "mamba_block":
        kept = [block for i, block in enumerate(model.backbone.layers) if i not in layers]
        model.backbone.layers = torch.nn.ModuleList(kept)
    else:
        for i in layers:
            mixer = model.backbone.layers[i].mixer
            mixer.x_proj.weight.data[mixer.time_step_rank + mixer.ssm_state_size :] = 0
    return model


def by_brute_force(make, target, windows, candidates, steps):
    """[(layer, perplexity)] of each greedy step, every removal run by the stock model."""
    found = []
    for _ in range(steps):
        gone = [layer for layer, _ in found]
        every = {i: stock_perplexity(without(make, target, [*gone, i]), windows) for i in candidates if i not in gone}
        first, second = sorted(every.values())[:2] if len(every) > 1 else (0, 1)
        assert second - first > 1e-3  # a choice that rounding cannot turn
        found.append(min(every.items(), key=lambda item: item[1]))
    return found


@pytest.fixture
def removals(tiny_windows, embed):
    """removals(model, target, sparsity) removes in place; returns what came back and [(layer, perplexity)] by step."""

    def run(model, target, sparsity, *, windows=None, first=0, stop=None, stream=embed, transition="zero"):
        windows = tiny_windows(5, 17) if windows is None else windows
        stop = len(model.backbone.layers) if stop is None else stop
        steps = []

        def report(phase, layer, **figures):
            if figures:
                steps.append((layer, figures["perplexity"]))

        job = Job(Layout(model), lambda: stream(model, windows), first, stop, report)
        return remove_parts(job, windows, RemovalPlan(target, sparsity, transition)), steps

    return run


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("target", REMOVAL_TARGETS)
def test_every_choice_is_that_of_brute_force(tiny_model, tiny_windows, removals, target, seed):
    def make():
        return tiny_model(seed=seed, num_hidden_layers=4)

    model = make()
    _, steps = removals(model, target, 0.75)
    expected = by_brute_force(make, target, tiny_windows(5, 17), range(4), 3)
    assert [layer for layer, _ in steps] == [layer for layer, _ in expected]
    for (_, ours), (_, stock) in zip(steps, expected, strict=True):
        assert ours == pytest.approx(stock, rel=1e-5)
    assert stock_perplexity(model, tiny_windows(5, 17)) == pytest.approx(steps[-1][1], rel=1e-5)


def test_the_brute_force_cases_differ_from_counting_up(tiny_model, removals):
    """Whoever took the layers in order, or one at a time by their single costs, would not pass the test above."""
    orders = {tuple(layer for layer, _ in removals(tiny_model(seed=seed, num_hidden_layers=4), target, 0.75)[1])
              for seed in range(3) for target in REMOVAL_TARGETS}  # fmt: skip
    assert len(orders) >= 4 and not orders & {(0, 1, 2)}


@pytest.mark.parametrize("target", REMOVAL_TARGETS)
def test_only_layers_in_range_are_candidates(tiny_model, tiny_windows, removals, target):
    def make():
        return tiny_model(seed=1, num_hidden_layers=5)

    _, steps = removals(make(), target, 0.66, first=1, stop=4)
    expected = by_brute_force(make, target, tiny_windows(5, 17), range(1, 4), 2)
    assert [layer for layer, _ in steps] == [layer for layer, _ in expected]
    assert [value for _, value in steps] == pytest.approx([value for _, value in expected], rel=1e-5)


def test_a_removed_block_is_gone_and_the_rest_is_as_it_was(tiny_model, tiny_windows, removals):
    model, before = tiny_model(num_hidden_layers=4), tiny_model(num_hidden_layers=4)
    found, steps = removals(model, "mamba_block", 0.5)
    gone = [layer for layer, _ in steps]
    assert found.layers == gone and found.masks == {}
    assert len(model.backbone.layers) == model.config.num_hidden_layers == 2
    kept = [i for i in range(4) if i not in gone]
    for place, i in enumerate(kept):
        old, new = before.backbone.layers[i].state_dict(), model.backbone.layers[place].state_dict()
        assert all(torch.equal(new[name], old[name]) for name in old)
    shapes = before.backbone.layers[0].state_dict()
    expected = {f"backbone.layers.{i}.{name}": shapes[name].numel() for i in gone for name in BLOCK_PARAMETERS}
    assert found.gone == expected
    total = sum(parameter.numel() for parameter in before.parameters())
    assert sum(parameter.numel() for parameter in model.parameters()) == total - sum(expected.values())


def test_a_model_without_a_block_generates_with_its_cache(tiny_model, tiny_windows):
    """The cache is looked up by the index that each block has."""
    model = tiny_model(num_hidden_layers=4)
    Layout(model).remove_layer(1)
    prompt = tiny_windows(2, 5)
    plain = dict(max_new_tokens=6, do_sample=False, eos_token_id=None)
    assert torch.equal(model.generate(prompt, use_cache=True, **plain), model.generate(prompt, use_cache=False, **plain))


@pytest.mark.parametrize("transition", ["zero", "unit"])
def test_of_a_removed_ssm_the_path_past_the_state_stays(tiny_model, tiny_windows, removals, transition):
    model, before = tiny_model(num_hidden_layers=4), tiny_model(num_hidden_layers=4)
    found, steps = removals(model, "ssm", 0.5, transition=transition)
    layers = [layer for layer, _ in steps]
    assert list(found.masks) == [f"backbone.layers.{i}.mixer.A_log" for i in layers]
    assert found.layers == [] and found.gone == {}
    seen = {}
    for i, block in enumerate(model.backbone.layers):
        for name in ("in_proj", "x_proj", "out_proj"):
            def keep(module, inputs, output, key=(i, name)):
                seen[key] = inputs[0], output
            block.mixer.get_submodule(name).register_forward_hook(keep)
    model(tiny_windows())
    for i, block in enumerate(model.backbone.layers):
        u, z = seen[i, "x_proj"][0], seen[i, "in_proj"][1].chunk(2, -1)[1]
        past = u * block.mixer.D * F.silu(z)
        difference = float((seen[i, "out_proj"][0] - past).abs().max())
        assert difference == pytest.approx(0, abs=1e-6) if i in layers else difference > 1e-2
        if i in layers:
            A_log = block.mixer.A_log
            assert found.masks[f"backbone.layers.{i}.mixer.A_log"].all() and A_log.shape == (32, 6)
            assert set(A_log.flatten().tolist()) == {{"zero": 30.0, "unit": 0.0}[transition]}
    old, new = before.state_dict(), model.state_dict()
    changed = {name for name in old if not torch.equal(old[name], new[name])}
    assert changed == {f"backbone.layers.{i}.mixer.{name}" for i in layers for name in ("A_log", "x_proj.weight")}
    for i in layers:
        name = f"backbone.layers.{i}.mixer.x_proj.weight"
        assert torch.equal(old[name][:9], new[name][:9]) and (new[name][9:] == 0).all()  # dt and B, then C


@pytest.mark.parametrize(("sparsity", "count"), [(0.25, 1), (0.5, 2), (0.6, 3), (0.95, 5)])
def test_the_share_is_rounded_to_whole_blocks(tiny_model, removals, sparsity, count):
    found, steps = removals(tiny_model(num_hidden_layers=5), "ssm", sparsity)
    assert len(steps) == len(found.masks) == count == round(sparsity * 5)


@pytest.mark.parametrize("target", REMOVAL_TARGETS)
def test_batches_and_files_do_not_matter(tiny_model, tiny_windows, removals, tmp_path, target):
    def on_disk(model, windows):
        return Stream.embed(Layout(model), windows, device="cpu", offload="disk", scratch=tmp_path, batch=3)

    _, expected = removals(tiny_model(num_hidden_layers=4), target, 0.5)
    _, steps = removals(tiny_model(num_hidden_layers=4), target, 0.5, stream=on_disk)
    assert [layer for layer, _ in steps] == [layer for layer, _ in expected]
    assert [value for _, value in steps] == pytest.approx([value for _, value in expected], rel=1e-6)


def test_a_removal_that_makes_the_model_diverge_is_not_taken(tiny_model, embed, removals):
    """Block 0 takes the first number out of the residual stream; block 1 overflows where it stands there."""
    model, windows = tiny_model(num_hidden_layers=3), torch.zeros(3, 9, dtype=torch.int64)
    model.backbone.embeddings.weight[:, 0] = 1.0
    first, second = (model.backbone.layers[i].mixer for i in range(2))
    first.conv1d.weight.zero_()
    first.x_proj.weight.zero_()  # B = C = 0: y = D u silu(z), the same at every step of a window of one word
    seen = []
    hook = first.out_proj.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0][0, -1]))
    model(windows)
    hook.remove()
    first.out_proj.weight[0] = -seen[0] / seen[0].square().sum()  # so out_proj outputs -1 for the first number
    second.in_proj.weight[:, 0] = 1e21  # u silu(z) is beyond float32 at 1, and far from it at 1e-7
    with pytest.raises(DivergenceError):
        for _ in each_layer(Layout(model), embed(model, windows), start=1):
            pass
    found, steps = removals(model, "mamba_block", 0.34, windows=windows)
    assert found.layers == [1] or found.layers == [2]
    assert steps[0][1] < 1e6


# --- resuming after an interruption --------------------------------------------------------------------------------


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("target", REMOVAL_TARGETS)
def test_finished_steps_are_not_tried_again(tiny_model, tiny_windows, job, tmp_path, target):
    windows = tiny_windows(5, 17)

    def run(journal, stop_after=None):
        model, trials, steps = tiny_model(num_hidden_layers=4), [], []

        def report(phase, layer, **figures):
            (steps if figures else trials).append(layer)
            if len(steps) == stop_after:
                raise Interrupted

        work, found = job(model, windows, report=report, journal=journal), None
        with suppress(Interrupted):
            found = remove_parts(work, windows, RemovalPlan(target, 0.75))
        return model, found, trials, steps

    whole, expected, trials, _ = run(Journal(None))
    assert len(trials) == 4 + 3 + 2
    run(Journal(tmp_path), stop_after=2)
    model, found, trials, steps = run(Journal(tmp_path))
    assert len(trials) == 2 and len(steps) == 3
    assert found.layers == expected.layers and found.gone == expected.gone
    assert found.masks.keys() == expected.masks.keys()
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), whole.state_dict().values(), strict=True))


@pytest.mark.parametrize("target", REMOVAL_TARGETS)
def test_the_command_resumes(run_main, tmp_path, text_folder, target, tiny_checkpoint):
    """The journal of a run with one step behind it, made by hand from the events of a whole one."""
    argv = [tiny_checkpoint(num_hidden_layers=4), text_folder, "--method", "mamba-shedder", *FLAGS[target],
             "--sparsity", 0.5, "--seqlen", SEQLEN, "--nsamples", 4, "--eval_windows", 2,
             "--save", tmp_path / "out"]  # fmt: skip
    whole = run_main(argv)
    assert whole.code == 0, whole.stderr
    before = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    events = [json.loads(line) for line in (whole.folder / "events.jsonl").read_text().splitlines()]
    (first, second) = [event for event in events if event.get("phase") == "shed" and event["event"] == "layer"]
    (whole.folder / "metrics.json").unlink()
    (whole.folder / "events.jsonl").unlink()
    (whole.folder / "layers").mkdir()
    record = (first["layer"], first["perplexity"])
    (whole.folder / "layers" / "shed-0000.json").write_text(json.dumps(record))
    stamp = hashlib.sha256(before["sparsessm.json"]).hexdigest()
    (whole.folder / "layers" / "saved.json").write_text(json.dumps(stamp))
    resumed = run_main(["--resume", whole.folder], base_dir=False)
    assert resumed.code == 0, resumed.stderr
    assert {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()} == before
    again = [json.loads(line) for line in (whole.folder / "events.jsonl").read_text().splitlines()]
    assert [event["layer"] for event in again if event.get("phase") == "shed" and event["event"] == "layer"] == [
        first["layer"], second["layer"],
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("target", REMOVAL_TARGETS)
def test_two_processes_agree_with_one(run_main, tmp_path, text_folder, target):
    argv = ["demo", str(text_folder), "--method", "mamba-shedder", *FLAGS[target], "--sparsity", "0.5", "--seqlen", "128",
             "--nsamples", "7", "--calib_batch", "2", "--eval_windows", "8"]  # fmt: skip
    one = run_main(argv)
    job(2, *argv, "--base_dir", tmp_path / "two")
    (folder,) = tmp_path.glob("two/default/*")
    found = [[json.loads(line) for line in (f / "events.jsonl").read_text().splitlines()] for f in (one.folder, folder)]
    alone, shared = ([(e["layer"], e["perplexity"]) for e in events if e["event"] == "layer"] for events in found)
    assert [layer for layer, _ in alone] == [layer for layer, _ in shared] and len(alone) == 3
    assert [value for _, value in alone] == pytest.approx([value for _, value in shared], rel=1e-6)
    two = json.loads((folder / "metrics.json").read_text())
    assert two["perplexity"] == pytest.approx(one.metrics["perplexity"], rel=1e-6)


# --- what the command saves ------------------------------------------------------------------------------------


def evaluation_windows(folder, text_folder):
    """The first three windows of the test text, by WikiText-2's rule, with the saved tokenizer."""
    with (text_folder / "test.txt").open(encoding="utf-8") as file:
        ids = AutoTokenizer.from_pretrained(folder)("\n\n".join(file))["input_ids"]
    return torch.tensor(ids)[: 3 * SEQLEN].view(3, SEQLEN)


@pytest.mark.parametrize("layout", ["hf", "state-spaces"])
@pytest.mark.parametrize("target", REMOVAL_TARGETS)
def test_stock_transformers_gives_the_perplexity_that_was_reported(tmp_path, text_folder, run_main, target, layout):
    out = tmp_path / "out"
    done = run_main(["demo", text_folder, "--method", "mamba-shedder", *FLAGS[target], "--sparsity", 0.5, "--nsamples", 4,
                     "--seqlen", SEQLEN, "--eval_windows", 3, "--save", out, "--save_format", layout])  # fmt: skip
    assert done.code == 0, done.stderr
    reported = done.metrics["perplexity"][str(text_folder)]
    blocks = 3 if target == "mamba_block" else 6
    if layout == "hf":
        model = AutoModelForCausalLM.from_pretrained(out)
        assert json.loads((out / "config.json").read_text())["num_hidden_layers"] == blocks
        names = load_file(out / "model.safetensors")
    else:  # read into a stock model by the project's reader of this layout
        model = checkpoint.load(checkpoint.find(str(out)))
        assert json.loads((out / "config.json").read_text())["n_layer"] == blocks
        names = torch.load(out / "pytorch_model.bin", weights_only=True)
    assert {name.split(".")[2] for name in names if ".layers." in name} == {str(i) for i in range(blocks)}
    assert len(model.backbone.layers) == blocks
    assert stock_perplexity(model.eval(), evaluation_windows(out, text_folder)) == pytest.approx(reported, rel=1e-5)
    again = run_main([out, text_folder, "--seqlen", SEQLEN, "--eval_windows", 3])
    assert again.metrics["perplexity"][str(text_folder)] == pytest.approx(reported, rel=1e-6)


DEMO = {"A_log": 384 * 16, "in_proj": 768 * 192, "conv1d": 384 * 4, "x_proj": 44 * 384, "dt_proj": 384 * 12,
        "out_proj": 192 * 384}  # fmt: skip


def shares(run_main, out, flags, *extra):
    done = run_main(["demo", "demo", "--method", "mamba-shedder", *flags, "--seqlen", SEQLEN, "--nsamples", 2,
                     "--eval_windows", 1, "--save", out, *extra])  # fmt: skip
    assert done.code == 0, done.stderr
    counts = json.loads((done.folder / "sparsity.json").read_text())
    return done, counts, json.loads((out / "sparsessm.json").read_text())


def test_figures_of_removed_blocks(run_main, tmp_path, demo_dir):
    """Two of four blocks in range, of six: a third of everything that lies in blocks."""
    out = tmp_path / "out"
    flags = ["--prune_A", "--prune_layers", "--shed_target", "mamba_block", "--sparsity", "0.5"]
    done, counts, record = shares(run_main, out, flags, "--minlayer", "1", "--maxlayer", "5")
    gone = done.metrics["removed_layers"]
    assert len(gone) == 2 and set(gone) <= {1, 2, 3, 4} and record["removed_layers"] == gone
    assert set(counts) == {f"backbone.layers.{i}.{name}" for i in gone for name in BLOCK_PARAMETERS}
    weight = counts[f"backbone.layers.{gone[0]}.mixer.in_proj.weight"]
    assert weight == {"pruned": DEMO["in_proj"], "total": DEMO["in_proj"]}
    block = sum(DEMO.values()) + 192 + 3 * 384  # norm; D, biases of conv1d and dt_proj
    total = sum(tensor.numel() for tensor in load_file(demo_dir / "model.safetensors").values())
    expected = {"ssm": 1 / 3, "layers": 1 / 3, "model": 2 * block / total}
    assert done.metrics["sparsity"] == pytest.approx(expected)
    assert record["sparsity"] == done.metrics["sparsity"]
    assert sum(tensor.numel() for tensor in load_file(out / "model.safetensors").values()) == total - 2 * block
    assert not (out / "masks.safetensors").exists()
    assert "mamba-shedder, minlayer 1, maxlayer 5, shed_target mamba_block  ssm 33.3%, layers 33.3%" in done.stdout


def test_figures_of_removed_ssms(run_main, tmp_path, demo_dir):
    out = tmp_path / "out"
    done, counts, record = shares(run_main, out, ["--prune_A", "--sparsity", "0.34"])
    masks, weights = load_file(out / "masks.safetensors"), load_file(out / "model.safetensors")
    assert len(masks) == 2 and counts == {name: {"pruned": DEMO["A_log"], "total": DEMO["A_log"]} for name in masks}
    for name, mask in masks.items():
        assert mask.all() and mask.shape == weights[name].shape and (weights[name] == 30).all()
    total = sum(tensor.numel() for tensor in load_file(demo_dir / "model.safetensors").values())
    expected = {"ssm": 1 / 3, "layers": 0, "model": 2 * DEMO["A_log"] / total}
    assert done.metrics["sparsity"] == pytest.approx(expected)
    assert "removed_layers" not in done.metrics and "removed_layers" not in record
