"""Pruning the weights of random models: counts, what is left alone, and which inputs decided."""

import pytest
import torch

from sparsessm.models.mamba1 import Mamba1Mixer
from sparsessm.procedure.driver import masks_of, run_pass
from sparsessm.procedure.plan import WeightPlan
from sparsessm.procedure.weights import PruneWeights, sensitive_shares
from sparsessm.pruning.methods import METHODS
from sparsessm.pruning.obs import prune_obs, prune_wanda
from sparsessm.pruning.patterns import NofM, Unstructured
from sparsessm.pruning.sensitivity import spread
from tests.pruning_checks import (
    HALF,
    SIZES,
    TWO_OF_FOUR,
    assert_untouched,
    hessian_of,
    module_inputs,
    parameters,
    prune_transitions,
    weight_of,
)

ON_WEIGHTS = [name for name, method in METHODS.items() if method.weights]


@pytest.mark.parametrize("share", [HALF, {"sparsity": 0.3}, TWO_OF_FOUR], ids=str)
@pytest.mark.parametrize("name", ON_WEIGHTS)
def test_weights_of_all_modules(tiny_model, prune, name, share):
    model = tiny_model(**SIZES)
    before = parameters(model)
    masks = prune(model, "prune_layers", method=name, **share)
    spared = {"conv1d"} if "prunem" in share and METHODS[name].spares_conv else set()
    modules = set(Mamba1Mixer.MODULES) - spared
    assert set(masks) == {f"backbone.layers.{i}.mixer.{module}.weight" for i in range(2) for module in modules}
    for key, mask in masks.items():
        weight = model.state_dict()[key]
        assert mask.dtype == torch.bool and mask.shape == weight.shape
        assert torch.equal(weight == 0, mask)
        if "prunem" in share:
            assert (mask.view(-1, 4).sum(-1) == 2).all()
        elif name == "wanda":
            rows = mask.view(mask.shape[0], -1)
            assert (rows.sum(-1) == round(share["sparsity"] * rows.shape[1])).all()
        else:
            assert int(mask.sum()) == round(share["sparsity"] * mask.numel())
        if METHODS[name].weights in ("magnitude", "wanda"):
            assert torch.equal(weight[~mask], before[key][~mask])
    assert_untouched(model, before, masks)


def test_counts_are_exact_in_every_block_of_columns(tiny_model, prune):
    masks = prune(tiny_model(**SIZES), "prune_layers", method="sparsegpt", sparsity=0.37, blocksize=8)
    for key, mask in masks.items():
        if "conv1d" not in key:
            for block in mask.split(8, dim=1):
                assert int(block.sum()) == round(0.37 * block.numel())


def test_magnitude_takes_the_smallest_of_each_module(tiny_model, prune):
    model = tiny_model(**SIZES)
    before = parameters(model)
    for key, mask in prune(model, "prune_layers", method="magnitude", **HALF).items():
        assert before[key][mask].abs().max() <= before[key][~mask].abs().min()


@pytest.mark.parametrize(
    ("chosen", "modules"),
    [
        ({"target_modules": ("nn.Linear",)}, {"in_proj", "x_proj", "dt_proj", "out_proj"}),
        ({"target_modules": ("nn.Conv1d",)}, {"conv1d"}),
        ({"module": "x_proj"}, {"x_proj"}),
    ],
)
def test_only_the_chosen_modules_are_pruned(tiny_model, prune, chosen, modules):
    model = tiny_model(**SIZES)
    before = parameters(model)
    masks = prune(model, "prune_layers", method="sparsegpt", **HALF, **chosen)
    assert {key.split(".")[4] for key in masks} == modules
    assert_untouched(model, before, masks)


def assert_same_solution(model, masks, layer, module, new, mask):
    """Equal weights; the masks may differ by a pair whose scores tie within the rounding of the Hessians."""
    found = masks[f"backbone.layers.{layer}.mixer.{module}.weight"]
    assert int((found ^ mask.view_as(found)).sum()) <= 2, module
    if torch.equal(found, mask.view_as(found)):
        got = weight_of(model, layer, module)
        torch.testing.assert_close(got, new.view_as(got), atol=2e-3, rtol=1e-3, msg=lambda text: f"{module}: {text}")


@pytest.mark.parametrize("share", [HALF, TWO_OF_FOUR], ids=str)
def test_obs_solves_each_linear_module_with_the_hessian_of_its_inputs(tiny_model, tiny_windows, prune, share):
    """Layer 0 on the embeddings; layer 1 on the outputs of the pruned layer 0, itself still dense."""
    windows = tiny_windows(4, 24)
    model, reference = tiny_model(**SIZES), tiny_model(**SIZES)
    masks = prune(model, "prune_layers", method="sparsegpt", **share)
    pattern = NofM(2, 4) if "prunem" in share else Unstructured(0.5)
    for layer in range(2):
        inputs = module_inputs(reference, windows, layer)
        for module in ("in_proj", "x_proj", "dt_proj", "out_proj"):
            new, mask = prune_obs(weight_of(reference, layer, module), hessian_of(inputs[module]), pattern)
            assert_same_solution(model, masks, layer, module, new, mask)
        reference.backbone.layers[layer].load_state_dict(model.backbone.layers[layer].state_dict())


def test_wanda_scores_each_module_with_the_norm_of_its_inputs(tiny_model, tiny_windows, prune):
    model, dense = tiny_model(**SIZES), tiny_model(**SIZES)
    masks = prune(model, "prune_layers", method="wanda", **HALF, stop=1)
    for module, x in module_inputs(dense, tiny_windows(4, 24), 0).items():
        weight = weight_of(dense, 0, module)
        if module == "conv1d":
            norms = torch.stack([shifted.square().sum((0, 1)) for shifted in shifts(x, 4)], dim=1)  # (D,K)
        else:
            norms = x.square().sum((0, 1))
        new, mask = prune_wanda(weight.view(weight.shape[0], -1), norms, Unstructured(0.5))
        assert torch.equal(masks[f"backbone.layers.0.mixer.{module}.weight"], mask.view_as(weight)), module
        assert torch.equal(weight_of(model, 0, module), new.view_as(weight)), module


def shifts(u: torch.Tensor, K: int) -> list[torch.Tensor]:
    """The input (B,L,D) that weight k of the causal convolution meets: K-1-k steps back, zero before the window."""
    padded = torch.cat([torch.zeros(len(u), K - 1, u.shape[-1]), u], dim=1)
    return [padded[:, k : k + u.shape[1]] for k in range(K)]


@pytest.mark.parametrize("share", [HALF, TWO_OF_FOUR], ids=str)
def test_conv1d_by_tap_has_one_small_hessian_per_channel(tiny_model, tiny_windows, prune, share):
    model, dense = tiny_model(**SIZES), tiny_model(**SIZES)
    masks = prune(model, "prune_layers", method="sparsegpt", module="conv1d", **share, stop=1)
    x = torch.stack(shifts(module_inputs(dense, tiny_windows(4, 24), 0)["conv1d"], 4), dim=-1).double()  # (B,L,D,K)
    H = torch.einsum("bldi,bldj->dij", x, x) * 2 / 4
    pattern = NofM(2, 4) if "prunem" in share else Unstructured(0.5)
    new, mask = prune_obs(weight_of(dense, 0, "conv1d"), H.float(), pattern)
    assert_same_solution(model, masks, 0, "conv1d", new, mask)


def test_conv1d_by_channel_has_one_hessian_over_channels(tiny_model, tiny_windows, prune):
    model, dense = tiny_model(**SIZES), tiny_model(**SIZES)
    masks = prune(
        model, "prune_layers", method="sparsegpt", module="conv1d", conv_hessian="channel", blocksize=16, **HALF, stop=1
    )
    H = hessian_of(module_inputs(dense, tiny_windows(4, 24), 0)["conv1d"])
    weights_as_rows = weight_of(dense, 0, "conv1d").squeeze(1).T
    new, mask = prune_obs(weights_as_rows, H, Unstructured(0.5), blocksize=16)
    assert_same_solution(model, masks, 0, "conv1d", new.T.reshape(32, 1, 4), mask.T.reshape(32, 1, 4))
    assert torch.equal(weight_of(model, 0, "conv1d") == 0, masks["backbone.layers.0.mixer.conv1d.weight"])


@pytest.mark.parametrize("conv_hessian", ["tap", "channel"])
def test_n_of_m_of_conv1d_holds_along_the_columns_that_are_solved(tiny_model, prune, conv_hessian):
    """Along the K weights of a channel; with the released Hessian, whose columns are channels, along the channels."""
    chosen = {"method": "sparsegpt", "module": "conv1d", "conv_hessian": conv_hessian, **TWO_OF_FOUR}
    for mask in prune(tiny_model(**SIZES), "prune_layers", **chosen).values():
        columns_last = mask.squeeze(1) if conv_hessian == "tap" else mask.squeeze(1).T
        assert (columns_last.reshape(-1, 4).sum(-1) == 2).all()


def output_error(model, dense, windows) -> float:
    return float((model(windows).logits - dense(windows).logits).square().mean())


def test_obs_hurts_the_model_less_than_magnitude_on_unseen_windows(tiny_model, tiny_windows, prune):
    dense, unseen = tiny_model(**SIZES), tiny_windows(16, 24, seed=7)
    errors = {}
    for method in ("magnitude", "sparsegpt"):
        model = tiny_model(**SIZES)
        prune(model, "prune_layers", method=method, windows=tiny_windows(32, 24), **HALF)
        errors[method] = output_error(model, dense, unseen)
    assert errors["sparsegpt"] < errors["magnitude"]


# --- sparsity from sensitivity -------------------------------------------------------------------------------------


def test_alpha_spreads_the_sparsity_by_the_sensitivities_of_the_dense_model(tiny_model, tiny_windows, prune):
    windows, sizes = tiny_windows(4, 24), {"num_hidden_layers": 5, **SIZES}
    dense, model = tiny_model(**sizes), tiny_model(**sizes)
    masks = prune(model, "prune_layers", method="sparsessm", sparsity=0.5, alpha=0.2)
    inputs = [module_inputs(dense, windows, layer) for layer in range(5)]
    for module in Mamba1Mixer.MODULES:
        counts = [int(masks[f"backbone.layers.{i}.mixer.{module}.weight"].sum()) for i in range(5)]
        size = weight_of(dense, 0, module).numel()
        if module in ("in_proj", "out_proj"):
            s = [float(hessian_of(x[module]).diagonal().square().mean()) for x in inputs]
            assert counts == [round(share * size) for share in spread(s, 0.5, 0.2)]
            assert len(set(counts)) > 1 and sum(counts) == pytest.approx(0.5 * 5 * size, abs=2)
        else:
            assert counts == [round(0.5 * size)] * 5


def test_alpha_knows_only_the_layers_in_range(tiny_model, prune):
    model = tiny_model(num_hidden_layers=5, **SIZES)
    masks = prune(model, "prune_layers", method="sparsessm", sparsity=0.5, alpha=0.2, first=1, stop=3)
    shares = sorted(float(masks[f"backbone.layers.{i}.mixer.in_proj.weight"].float().mean()) for i in (1, 2))
    assert shares == pytest.approx([0.4, 0.6], abs=1e-3)


def test_the_second_pass_starts_from_the_embeddings(tiny_model, prune):
    """With an alpha too small to move a count, pass 1 leaves no trace in the result."""
    with_pass_1, without = tiny_model(**SIZES), tiny_model(**SIZES)
    masks = prune(with_pass_1, "prune_layers", method="sparsessm", sparsity=0.5, alpha=1e-9)
    expected = prune(without, "prune_layers", method="sparsegpt", sparsity=0.5)
    for key, mask in expected.items():
        assert torch.equal(masks[key], mask)
    assert_untouched(with_pass_1, parameters(without))


def test_alpha_means_nothing_to_a_uniform_method(tiny_model, prune):
    one, other = tiny_model(**SIZES), tiny_model(**SIZES)
    prune(one, "prune_layers", method="sparsegpt", sparsity=0.5, alpha=0.2)
    prune(other, "prune_layers", method="sparsegpt", sparsity=0.5)
    assert_untouched(one, parameters(other))


def test_weights_are_solved_on_the_model_whose_transitions_are_pruned(tiny_model, tiny_windows, prune):
    windows, model, reference = tiny_windows(4, 24), tiny_model(**SIZES), tiny_model(**SIZES)
    masks = prune(model, "prune_A", method="sparsessm", sparsity=0.5)
    for i in range(2):
        prune_transitions(reference.backbone.layers[i], masks[f"backbone.layers.{i}.mixer.A_log"], "zero")
    masks |= prune(model, "prune_layers", method="sparsegpt", module="out_proj", sparsity=0.5)
    H = hessian_of(module_inputs(reference, windows, 0)["out_proj"])
    new, mask = prune_obs(weight_of(reference, 0, "out_proj"), H, Unstructured(0.5))
    assert_same_solution(model, masks, 0, "out_proj", new, mask)
    assert len(masks) == 4


def test_bfloat16_weights_stay_bfloat16_and_sparse(tiny_model, prune):
    model = tiny_model(dtype=torch.bfloat16, **SIZES)
    for layer in model.backbone.layers:
        layer.mixer.A_log.data = layer.mixer.A_log.data.float()
    masks = prune(model, "prune_layers", method="sparsegpt", **HALF)
    for key, mask in masks.items():
        weight = model.state_dict()[key]
        assert weight.dtype == torch.bfloat16
        assert not weight[mask].any() and int(mask.sum()) == round(0.5 * mask.numel())


@pytest.mark.parametrize(("batch", "shuffle"), [(1, False), (4, False), (2, True)])
def test_weights_do_not_depend_on_batches_or_the_order_of_samples(tiny_model, tiny_windows, job, batch, shuffle):
    windows, plan = tiny_windows(6, 24), WeightPlan(Unstructured(0.5), "obs", Mamba1Mixer.MODULES)

    def solve(ids, size):
        work = job(tiny_model(**SIZES), ids, batch=size)
        return masks_of(run_pass(work, PruneWeights(plan, sensitive_shares(work, plan))))

    expected = solve(windows, 3)
    ids = windows[torch.randperm(6, generator=torch.Generator().manual_seed(1))] if shuffle else windows
    for key, mask in solve(ids, batch).items():
        assert int((mask ^ expected[key]).sum()) <= 2, "more than one pair of ties within rounding"
