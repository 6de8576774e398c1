"""Pruning A_log on random models, and what both phases have in common: counts, what is left alone, which sums decided."""

import pytest
import torch

from sparsessm.kernels.selective_scan import ScanStatistics
from sparsessm.pruning.methods import AGGREGATES, METHODS
from sparsessm.pruning.obs import prune_obs
from sparsessm.pruning.patterns import Columns, NofM, Unstructured
from sparsessm.pruning.saliency import SALIENCIES
from tests.pruning_checks import (
    HALF,
    SIZES,
    TWO_OF_FOUR,
    assert_untouched,
    parameters,
    prune_transitions,
    visit_block,
)

ON_A_LOG = [name for name, method in METHODS.items() if method.prunes_A_log]


@pytest.mark.parametrize("transition", ["zero", "unit"])
@pytest.mark.parametrize("name", [n for n in ON_A_LOG if METHODS[n].structure == "entries" and not METHODS[n].needs_n_of_m])
def test_unstructured_A_log(tiny_model, prune, name, transition):
    model = tiny_model(**SIZES)
    before = parameters(model)
    masks = prune(model, "prune_A", method=name, sparsity=0.3, pruned_transition=transition)
    assert list(masks) == [f"backbone.layers.{i}.mixer.A_log" for i in range(2)]
    for key, mask in masks.items():
        A_log = model.state_dict()[key]
        assert mask.dtype == torch.bool and mask.shape == A_log.shape
        assert int(mask.sum()) == round(0.3 * A_log.numel())
        assert (A_log[mask] == {"zero": 30.0, "unit": 0.0}[transition]).all()
        if not METHODS[name].obs_on_A_log:
            assert torch.equal(A_log[~mask], before[key][~mask])
    assert_untouched(model, before, masks)


@pytest.mark.parametrize("name", [n for n in ON_A_LOG if METHODS[n].structure != "columns"])
def test_n_of_m_on_A_log(tiny_model, prune, name):
    model = tiny_model(**SIZES)
    before = parameters(model)
    masks = prune(model, "prune_A", method=name, **TWO_OF_FOUR)
    for mask in masks.values():
        assert (mask.view(32, 2, 4).sum(-1) == 2).all()
    assert_untouched(model, before, masks)


@pytest.mark.parametrize("name", ["structure_ts", "structure_mag"])
def test_structured_pruning_removes_states(tiny_model, tiny_windows, prune, name):
    model, windows = tiny_model(**SIZES), tiny_windows()
    before = parameters(model)
    masks = prune(model, "prune_A", method=name, sparsity=0.3)
    assert model.config.state_size == 6
    for i, layer in enumerate(model.backbone.layers):
        mask = masks[f"backbone.layers.{i}.mixer.A_log"]
        assert mask.shape == (32, 8) and (mask == mask[0]).all() and int(mask[0].sum()) == 2
        keep = ~mask[0]
        assert torch.equal(layer.mixer.A_log, before[f"backbone.layers.{i}.mixer.A_log"][:, keep])
        rows = torch.cat([torch.ones(4, dtype=torch.bool), keep, keep])
        assert torch.equal(layer.mixer.x_proj.weight, before[f"backbone.layers.{i}.mixer.x_proj.weight"][rows])
    model(windows)  # the stock forward runs on what is left


def test_structured_by_magnitude_is_the_smallest_sum_of_A_log(tiny_model, prune):
    model = tiny_model(**SIZES)
    sums = [layer.mixer.A_log.abs().sum(0) for layer in model.backbone.layers]
    masks = prune(model, "prune_A", method="structure_mag", sparsity=0.5)
    for total, mask in zip(sums, masks.values(), strict=True):
        assert set(mask[0].nonzero().flatten().tolist()) == set(total.argsort()[:4].tolist())


@pytest.mark.parametrize("aggregate", AGGREGATES)
@pytest.mark.parametrize("saliency", SALIENCIES)
@pytest.mark.parametrize("pattern", [Unstructured(0.5), NofM(2, 4), Columns(0.5)], ids=repr)
def test_any_saliency_with_any_aggregation_and_pattern(tiny_model, prune, saliency, aggregate, pattern):
    kind = {NofM: ("ts_semi", TWO_OF_FOUR), Columns: ("structure_ts", HALF)}.get(type(pattern), ("sparsessm", HALF))
    masks = prune(tiny_model(**SIZES), "prune_A", method=kind[0], saliency=saliency, aggregate=aggregate, **kind[1])
    for mask in masks.values():
        assert int(mask.sum()) == 128
        if isinstance(pattern, NofM):
            assert (mask.view(32, 2, 4).sum(-1) == 2).all()
        if isinstance(pattern, Columns):
            assert (mask == mask[0]).all()


def score_of_layer(model, windows, layer: int) -> torch.Tensor:
    """A_log^2 sum_b h_{t-1}^2 (L,D,N) of a layer behind those that the stock model has before it."""
    outputs = model(windows, output_hidden_states=True).hidden_states
    hidden = [model.backbone.embeddings(windows), *outputs][layer]
    block = model.backbone.layers[layer]
    statistics = ScanStatistics.zeros(("h2",), windows.shape[1], *block.mixer.A_log.shape, "cpu")
    visit_block(block, hidden, statistics=statistics)
    return (block.mixer.A_log.double().square() * statistics.h2).float()


def votes(scores: torch.Tensor, k: int) -> torch.Tensor:
    """The k entries that are most often among the k lowest of a step, by plain counting."""
    count = torch.zeros(scores[0].numel())
    for step in scores[1:]:
        count[step.flatten().argsort(stable=True)[:k]] += 1
    chosen = torch.zeros_like(count, dtype=torch.bool)
    chosen[(-count).argsort(stable=True)[:k]] = True
    return chosen.view_as(scores[0])


@pytest.mark.parametrize("transition", ["zero", "unit"])
def test_layer_one_is_judged_on_what_the_pruned_layer_zero_puts_out(tiny_model, tiny_windows, prune, transition):
    windows = tiny_windows(4, 24)
    model, half, dense = tiny_model(**SIZES), tiny_model(**SIZES), tiny_model(**SIZES)
    masks = list(prune(model, "prune_A", method="sparsessm", sparsity=0.6, pruned_transition=transition).values())
    assert torch.equal(masks[0], votes(score_of_layer(half, windows, 0), round(0.6 * 256)))
    prune_transitions(half.backbone.layers[0], masks[0], transition)
    expected = votes(score_of_layer(half, windows, 1), round(0.6 * 256))
    wrong = votes(score_of_layer(dense, windows, 1), round(0.6 * 256))
    assert int((masks[1] ^ expected).sum()) <= 2 < int((wrong ^ expected).sum())


def test_obs_on_A_log_takes_the_hessian_of_the_states(tiny_model, tiny_windows, prune):
    windows, model, dense = tiny_windows(4, 24), tiny_model(**SIZES), tiny_model(**SIZES)
    block = dense.backbone.layers[0]
    statistics, cache = ScanStatistics.zeros(("hh",), 1, 32, 8, "cpu"), None
    H = torch.zeros(8, 8, dtype=torch.float64)
    for t in range(24):  # h_{t-1} of each step, from the caches of single steps
        if cache is not None:
            H += torch.einsum("bdn,bdm->nm", cache.state.double(), cache.state.double())
        hidden = dense.backbone.embeddings(windows[:, t : t + 1])
        cache = visit_block(block, hidden, statistics=statistics, cache=cache).cache
    new, mask = prune_obs(block.mixer.A_log, H.float(), Unstructured(0.5))
    masks = prune(model, "prune_A", method="sparsegpt", sparsity=0.5, stop=1)
    assert torch.equal(masks["backbone.layers.0.mixer.A_log"], mask)
    torch.testing.assert_close(model.backbone.layers[0].mixer.A_log[~mask], new[~mask], atol=1e-4, rtol=1e-4)


def test_only_the_layers_in_range_are_pruned(tiny_model, prune):
    for what, method in (("prune_A", "sparsessm"), ("prune_layers", "sparsegpt")):
        model = tiny_model(num_hidden_layers=4, **SIZES)
        before = parameters(model)
        masks = prune(model, what, method=method, first=1, stop=3, **HALF)
        assert {key.split(".")[2] for key in masks} == {"1", "2"}
        assert_untouched(model, before, masks)


def test_skipped_layers_feed_the_ones_behind_them(tiny_model, tiny_windows, prune):
    windows, model, dense, short = tiny_windows(4, 24), *(tiny_model(**SIZES) for _ in range(3))
    (mask,) = prune(model, "prune_A", method="sparsessm", sparsity=0.5, first=1).values()
    del short.backbone.layers[0]  # what layer 1 would meet if layer 0 passed nothing on
    expected, unfed = votes(score_of_layer(dense, windows, 1), 128), votes(score_of_layer(short, windows, 0), 128)
    assert int((mask ^ expected).sum()) <= 2 < int((mask ^ unfed).sum())


def test_every_finished_layer_is_reported_with_its_sparsity(tiny_model, prune):
    told = []
    for what in ("prune_A", "prune_layers"):
        prune(
            tiny_model(**SIZES), what, method="sparsessm", sparsity=0.5, alpha=0.1 if what == "prune_layers" else 0.0,
            report=lambda phase, layer, **figures: told.append((phase, layer, sorted(figures))),
        )  # fmt: skip
    groups = ["in_proj", "out_proj"]
    assert told == [
        ("ssm", 0, ["sparsity"]), ("ssm", 1, ["sparsity"]),
        ("sensitivity", 0, groups), ("sensitivity", 1, groups),
        ("layers", 0, ["sparsity"]), ("layers", 1, ["sparsity"]),
    ]  # fmt: skip
