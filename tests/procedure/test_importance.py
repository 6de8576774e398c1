"""Fisher information of rows and tokens against stock transformers, and what it changes."""

import copy
from dataclasses import replace

import torch

from sparsessm.layerwise.layer import each_layer
from sparsessm.layerwise.statistics import Gram, ShiftedGram
from sparsessm.procedure.driver import Job
from sparsessm.procedure.importance import measured_importance
from sparsessm.procedure.plan import Plan, TransitionPlan, WeightPlan
from sparsessm.procedure.prune import prune
from sparsessm.pruning.patterns import Unstructured

WEIGHTS = WeightPlan(Unstructured(0.5), "obc", ("in_proj", "conv1d", "x_proj", "dt_proj", "out_proj"))


def measured(job, model, windows, importance="tokens", seed=0, **rest):
    plan = Plan(weights=WEIGHTS, importance=importance, seed=seed, **rest)
    return measured_importance(job(model, windows), plan).embed().importance


def test_rows_and_tokens_are_squared_derivatives_of_drawn_labels(tiny_model, tiny_windows, job):
    """Stock's own autograd in float64, with labels drawn as the pass draws them, batch after batch."""
    model, windows = tiny_model(), tiny_windows(4, 24)
    found = measured(job, model, windows)
    exact = copy.deepcopy(model).double()
    squares = {}
    for index, layer in enumerate(exact.backbone.layers):
        for name in ("in_proj", "out_proj"):
            def note(module, inputs, output, full=f"backbone.layers.{index}.mixer.{name}.weight"):
                output.register_hook(lambda g: squares.setdefault(full, []).append(g.square()))

            getattr(layer.mixer, name).register_forward_hook(note)
    for number, batch in enumerate(windows.split(2)):
        exact.get_input_embeddings().weight.requires_grad_()
        logs = exact(batch, use_cache=False).logits.log_softmax(-1)
        generator = torch.Generator().manual_seed(number)
        labels = torch.multinomial(model(batch, use_cache=False).logits.softmax(-1).flatten(0, 1), 1, generator=generator)
        (-logs.flatten(0, 1).gather(-1, labels).sum()).backward()
    assert len(squares) == 4
    for name, parts in squares.items():
        whole = torch.cat(parts)  # (n,L,rows)
        torch.testing.assert_close(found[name].rows.double(), whole.mean((0, 1)), rtol=1e-4, atol=1e-9)
        tokens = whole.sum(-1)
        torch.testing.assert_close(found[name].tokens.double(), tokens / tokens.mean(), rtol=1e-4, atol=1e-6)


def test_the_seed_of_the_labels_is_the_runs(tiny_model, tiny_windows, job):
    model, windows = tiny_model(), tiny_windows(4, 24)
    once, again, other = (measured(job, model, windows, seed=seed) for seed in (1, 1, 2))
    for name, known in once.items():
        assert torch.equal(known.rows, again[name].rows)
        assert not torch.equal(known.rows, other[name].rows)
        assert torch.allclose(known.rows.sum(), other[name].rows.sum(), rtol=0.7)


def test_rows_alone_leave_the_tokens_alike(tiny_model, tiny_windows, job):
    found = measured(job, tiny_model(), tiny_windows(4, 24), "rows")
    assert len(found) == 10 and all(known.tokens is None for known in found.values())


def test_for_A_log_alone_the_last_modules_are_measured(tiny_model, tiny_windows, job):
    plan = Plan(TransitionPlan(Unstructured(0.5), "output", search="greedy"), importance="rows")
    found = measured_importance(job(tiny_model(), tiny_windows(4, 24)), plan).embed().importance
    assert sorted(found) == [f"backbone.layers.{i}.mixer.out_proj.weight" for i in (0, 1)]


def test_tokens_weigh_the_inputs_in_every_piece_and_batch(tiny_model, tiny_windows, job):
    """Grams of weighed inputs against those of each token alone, in pieces of 7 steps and batches of 2 and 1 windows."""
    model, windows = tiny_model(), tiny_windows(3, 24)
    plain = job(model, windows)
    weighed = measured_importance(plain, Plan(weights=WEIGHTS, importance="tokens"))

    def grams(work: Job):
        stream = replace(work.embed(), steps=7)
        layer = next(each_layer(work.layout, stream))
        made = {"in_proj": Gram(16), "conv1d": ShiftedGram(32, 4), "out_proj": Gram(32)}
        inputs = {name: [] for name in made}
        layer.observe(made)
        for rows in stream.batches():
            layer.forward(rows, stream.hidden[rows, :], {name: inputs[name].append for name in made})
        return made, {name: torch.cat(parts) for name, parts in inputs.items()}, stream.importance

    made, inputs, known = grams(weighed)
    for name in ("in_proj", "out_proj"):
        tokens = known[f"backbone.layers.0.mixer.{name}.weight"].tokens.double()
        expected = torch.einsum("bl,bli,blj->ij", tokens, inputs[name].double(), inputs[name].double())
        torch.testing.assert_close(made[name].total, expected, rtol=1e-4, atol=1e-4)
    tokens = known["backbone.layers.0.mixer.conv1d.weight"].tokens.double()
    shifted = inputs["conv1d"].double().unfold(1, 4, 1)  # (B,L,D,K)
    torch.testing.assert_close(
        made["conv1d"].total, torch.einsum("bl,bldi,bldj->dij", tokens, shifted, shifted), rtol=1e-4, atol=1e-4
    )
    assert not torch.allclose(made["in_proj"].total, grams(plain)[0]["in_proj"].total, rtol=1e-2)


def test_importance_decides_between_rows(tiny_model, tiny_windows, job):
    """A row of out_proj whose stream channel is read by norms alone is pruned before others."""
    model = tiny_model()
    with torch.no_grad():
        model.backbone.layers[1].norm.weight[3] = 0
        model.backbone.norm_f.weight[3] = 0
    found = measured(job, model, tiny_windows(4, 24), "rows")
    rows = found["backbone.layers.0.mixer.out_proj.weight"].rows
    assert rows.argmin() == 3
    plan = Plan(weights=replace(WEIGHTS, modules=("out_proj",)), importance="rows")
    masks = prune(job(model, tiny_windows(4, 24)), plan, tiny_windows(4, 24)).masks
    mask = masks["backbone.layers.0.mixer.out_proj.weight"]
    assert mask.sum(1).argmax() == 3 and int(mask.sum()) == mask.numel() // 2


def test_one_budget_is_exact_over_all_modules(tiny_model, tiny_windows, job):
    transitions = TransitionPlan(Unstructured(0.3), "output", search="greedy")
    plan = Plan(transitions, WEIGHTS, allocation="loss", importance="tokens")
    masks = prune(job(tiny_model(), tiny_windows(4, 24)), plan, tiny_windows(4, 24)).masks
    weights = {name: mask for name, mask in masks.items() if not name.endswith("A_log")}
    entries = sum(mask.numel() for mask in weights.values())
    assert sum(int(mask.sum()) for mask in weights.values()) == round(0.5 * entries)
    shares = [float(mask.float().mean()) for mask in weights.values()]
    assert max(shares) <= 0.99 and max(shares) - min(shares) > 0.05
    transitions = [mask for name, mask in masks.items() if name.endswith("A_log")]
    assert sum(int(mask.sum()) for mask in transitions) == round(0.3 * sum(mask.numel() for mask in transitions))
