import pytest
import torch

from sparsessm.errors import DivergenceError
from sparsessm.kernels.selective_scan import ScanStatistics
from sparsessm.layerwise.layer import each_layer
from sparsessm.layerwise.memory import DiskTensor
from sparsessm.layerwise.statistics import Gram, SquaredNorms
from sparsessm.layerwise.stream import Stream
from sparsessm.models.architecture import Layout
from sparsessm.procedure.driver import masks_of, run_pass
from sparsessm.procedure.plan import TransitionPlan
from sparsessm.procedure.transitions import PruneTransitions
from sparsessm.pruning.patterns import Unstructured
from tests.pruning_checks import prune_transitions, visit_block


def stock_inputs(model, windows) -> list[torch.Tensor]:
    """The residual stream that enters each layer of the stock model, and what leaves the last one."""
    outputs = model(windows, output_hidden_states=True).hidden_states[:-1]  # the last is after the final norm
    return [model.backbone.embeddings(windows), *outputs]


@pytest.mark.parametrize("batch", [1, 2, 5, 8])
def test_embed_looks_up_every_window(tiny_model, tiny_windows, embed, batch):
    model, windows = tiny_model(), tiny_windows(5, 9)
    stream = embed(model, windows, batch)
    assert torch.equal(stream.hidden, model.backbone.embeddings(windows))
    covered = [i for rows in stream.batches() for i in range(len(stream))[rows]]
    assert covered == [0, 1, 2, 3, 4] and len(stream) == 5


@pytest.mark.parametrize(("fp32", "dtype"), [(True, torch.float32), (False, torch.bfloat16)])
def test_the_stream_has_the_dtype_of_the_residuals(tiny_model, tiny_windows, embed, fp32, dtype):
    model = tiny_model(dtype=torch.bfloat16, residual_in_fp32=fp32)
    assert embed(model, tiny_windows()).hidden.dtype == dtype


def test_every_layer_meets_the_stream_of_the_stock_model(tiny_model, tiny_windows, embed):
    model, windows = tiny_model(num_hidden_layers=4), tiny_windows(5, 17)
    expected = stock_inputs(model, windows)
    stream = embed(model, windows)
    for layer in each_layer(Layout(model), stream):
        torch.testing.assert_close(stream.hidden, expected[layer.index], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(("first", "stop"), [(0, 4), (1, 3), (2, None), (0, 1), (3, 4), (2, 2)])
def test_skipped_layers_pass_their_activations_on(tiny_model, tiny_windows, embed, first, stop):
    model, windows = tiny_model(num_hidden_layers=4), tiny_windows(3, 17)
    expected, stream = stock_inputs(model, windows), embed(model, windows)
    whole = embed(model, windows)
    visited = []
    for layer in each_layer(Layout(model), stream, first, stop):
        visited.append(layer.index)
        torch.testing.assert_close(stream.hidden, expected[layer.index], atol=1e-5, rtol=1e-5)
    for _ in each_layer(Layout(model), whole):
        pass
    assert visited == list(range(first, 4 if stop is None else stop))
    assert torch.equal(stream.hidden, whole.hidden)


def test_a_changed_layer_changes_what_the_next_one_meets(tiny_model, tiny_windows, embed):
    model, pruned, windows = tiny_model(), tiny_model(), tiny_windows(3, 17)
    mask = torch.rand(32, 6, generator=torch.Generator().manual_seed(0)) < 0.5
    stream = embed(model, windows)
    for layer in each_layer(Layout(model), stream):
        if layer.index == 0:
            prune_transitions(layer.module, mask, "zero")
        else:
            met = stream.hidden.clone()
    dense = stock_inputs(pruned, windows)[1]
    prune_transitions(pruned.backbone.layers[0], mask, "zero")
    torch.testing.assert_close(met, stock_inputs(pruned, windows)[1], atol=1e-5, rtol=1e-5)
    assert float((met - dense).abs().max()) > 1e-2


def test_observing_does_not_advance_unless_asked_to(tiny_model, tiny_windows, embed):
    model, windows = tiny_model(num_hidden_layers=3), tiny_windows(5, 17)
    plain = embed(model, windows)
    for layer in each_layer(Layout(model), plain):
        before = plain.hidden.clone()
        layer.observe({"in_proj": SquaredNorms(16)})
        list(layer.scan_statistics(("h2",)))
        assert torch.equal(plain.hidden, before)
    looking = embed(model, windows)
    for layer in each_layer(Layout(model), looking):
        layer.observe({"in_proj": SquaredNorms(16)}, advance=True)
    assert torch.equal(looking.hidden, plain.hidden)


def test_observe_shows_all_windows(tiny_model, tiny_windows, embed):
    model, windows = tiny_model(), tiny_windows(5, 17)
    x = model.backbone.layers[0].norm(model.backbone.embeddings(windows)).double().flatten(0, 1)
    for layer in each_layer(Layout(model), embed(model, windows), 0, 1):
        gram = Gram(16)
        layer.observe({"in_proj": gram})
        torch.testing.assert_close(gram.total, x.T @ x, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("batch", [1, 2, 5])
@pytest.mark.parametrize("steps", [1, 4, 17, 100])
def test_pieces_of_the_states_are_those_of_one_long_scan(tiny_model, tiny_windows, embed, steps, batch):
    model, windows = tiny_model(), tiny_windows(5, 17)
    needs = ("h2", "abar", "hh")
    whole = ScanStatistics.zeros(needs, 17, 32, 6, "cpu")
    visit_block(model.backbone.layers[0], model.backbone.embeddings(windows), statistics=whole)

    for layer in each_layer(Layout(model), embed(model, windows, batch, steps=steps), 0, 1):
        pieces = list(layer.scan_statistics(needs))
    assert [start for start, _ in pieces] == list(range(0, 17, steps))
    torch.testing.assert_close(torch.cat([m.h2 for _, m in pieces]), whole.h2, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(torch.cat([m.abar for _, m in pieces]), whole.abar, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(sum(m.hh for _, m in pieces), whole.hh, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("offload", ["cpu", "disk"])
def test_the_counterfactual_state_continues_from_piece_to_piece(tiny_model, tiny_windows, tmp_path, offload):
    model, windows = tiny_model(), tiny_windows(5, 17)
    whole = ScanStatistics.zeros(("gram",), 17, 32, 6, "cpu", "unit")
    visit_block(model.backbone.layers[0], model.backbone.embeddings(windows), statistics=whole)
    stream = Stream.embed(Layout(model), windows, device="cpu", offload=offload, batch=2, scratch=tmp_path, steps=4)
    for layer in each_layer(Layout(model), stream, 0, 1):
        gram = sum(statistics.gram for _, statistics in layer.scan_statistics(("gram",), "unit"))
    torch.testing.assert_close(gram, whole.gram, atol=1e-6, rtol=1e-5)


def test_what_goes_with_a_stream_on_disk_is_on_disk(tiny_model, tiny_windows, tmp_path):
    layout, windows = Layout(tiny_model()), tiny_windows(5, 17)
    stream = Stream.embed(layout, windows, device="cpu", offload="disk", batch=2, scratch=tmp_path)
    beside = stream.beside(3, 4, torch.bfloat16)
    values = torch.randn(5, 3, 4).bfloat16()
    beside[1:3, :] = values[1:3]
    beside[3:5, 1:3] = values[3:5, 1:3]
    assert isinstance(beside, DiskTensor) and list(tmp_path.iterdir()) == []
    assert torch.equal(beside[1:3, :], values[1:3]) and torch.equal(beside[4:5, 1:2], values[4:5, 1:2])


def test_modules_can_be_observed_after_the_states(tiny_model, tiny_windows, embed):
    model, windows = tiny_model(), tiny_windows(5, 17)
    x = model.backbone.layers[0].norm(model.backbone.embeddings(windows)).double().flatten(0, 1)
    for layer in each_layer(Layout(model), embed(model, windows), 0, 1):
        list(layer.scan_statistics(("h2",)))
        gram = Gram(16)
        layer.observe({"in_proj": gram})
        torch.testing.assert_close(gram.total, x.T @ x, atol=1e-4, rtol=1e-5)


@pytest.mark.parametrize("budget", [0, 20_000, 1 << 30])
def test_what_is_kept_between_two_passes_changes_nothing(tiny_model, tiny_windows, embed, budget):
    """Layer 1 outputs what the stock model does after a change of A_log, whatever was kept of its first pass."""
    model, windows = tiny_model(), tiny_windows(5, 17)
    stream = embed(model, windows, budget=budget, steps=5)
    for layer in each_layer(Layout(model), stream):
        list(layer.scan_statistics(("h2",)))
        prune_transitions(layer.module, torch.arange(6).expand(32, 6) % 2 == 0, "zero")
    torch.testing.assert_close(stream.hidden, stock_inputs(model, windows)[-1], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("name", ["A_log", "in_proj.weight", "x_proj.weight"])
def test_what_is_kept_is_dropped_where_it_depends_on_what_is_written(tiny_model, tiny_windows, embed, name):
    model, windows = tiny_model(), tiny_windows(5, 17)
    before = stock_inputs(model, windows)[-1]
    stream = embed(model, windows, budget=1 << 30, steps=5)
    for layer in each_layer(Layout(model), stream):
        list(layer.scan_statistics(("h2",)))
        layer.write(name, layer.parameter(name) * 0.5)
    expected = stock_inputs(model, windows)[-1]
    assert float((expected - before).abs().max()) > 1e-2
    torch.testing.assert_close(stream.hidden, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("value", [float("inf"), float("nan")])
@pytest.mark.parametrize("layer", [0, 2])
def test_divergence_names_the_layer(tiny_model, tiny_windows, embed, layer, value):
    model = tiny_model(num_hidden_layers=3)
    model.backbone.layers[layer].mixer.out_proj.weight[3, 4] = value
    with pytest.raises(DivergenceError, match=f"layer {layer} "):
        for _ in each_layer(Layout(model), embed(model, tiny_windows())):
            pass


def test_parameters_are_named_as_in_the_checkpoint(tiny_model, tiny_windows, embed):
    model = tiny_model()
    names = dict(model.named_parameters())
    for layer in each_layer(Layout(model), embed(model, tiny_windows())):
        assert names[layer.full_name("A_log")] is layer.module.mixer.A_log
        assert torch.equal(layer.A_log, layer.module.mixer.A_log)


@pytest.mark.parametrize("saliency", ["a_log", "transition"])
@pytest.mark.parametrize("aggregate", ["vote", "sum", "power"])
def test_masks_do_not_depend_on_batches_or_the_order_of_samples(tiny_model, tiny_windows, job, saliency, aggregate):
    windows = tiny_windows(7, 40)
    shuffled = windows[torch.randperm(7, generator=torch.Generator().manual_seed(2))]
    plan = TransitionPlan(Unstructured(0.5), saliency, aggregate)
    found = []
    for ids, batch in ((windows, 1), (windows, 3), (windows, 7), (shuffled, 2)):
        model = tiny_model()
        found.append(masks_of(run_pass(job(model, ids, batch=batch), PruneTransitions(plan))))
    for other in found[1:]:
        for name, mask in found[0].items():
            assert int((mask ^ other[name]).sum()) <= 2, "more than one pair of ties within rounding"
