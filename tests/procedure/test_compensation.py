"""Compensation beside the dense model: what the refit is solved for, the exact error of a chosen set, resume, flags."""

import copy

import pytest
import torch

from sparsessm.errors import InputError
from sparsessm.layerwise.layer import each_layer
from sparsessm.models.architecture import Layout
from sparsessm.models.mamba1 import Mamba1Mixer
from sparsessm.options import Options
from sparsessm.procedure.allocation import measured_shares
from sparsessm.procedure.compensation import PruneCompensated
from sparsessm.procedure.driver import NoJournal, masks_of, run_pass
from sparsessm.procedure.plan import CompensationPlan, Plan, TransitionPlan, WeightPlan, plan_of
from sparsessm.procedure.prune import prune
from sparsessm.procedure.transitions import output_gram
from sparsessm.pruning.patterns import Columns, NofM, Unstructured
from sparsessm.pruning.search import set_cost
from tests.pruning_checks import prune_transitions, visit_block

MODULES = Mamba1Mixer.MODULES
REFIT = CompensationPlan(refit=True, sequential=True)


def prune_compensated(work, transitions, weights, plan):
    return masks_of(run_pass(work, PruneCompensated(transitions, weights, plan, shares={})))


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


@pytest.mark.parametrize("transition", ["zero", "unit", "removed"])
def test_cost_of_a_set_is_what_the_pruned_scan_loses(tiny_model, tiny_windows, embed, transition):
    """1^T G_SS 1 of each channel against the gated outputs of the block with the set pruned, run by itself."""
    model, windows = tiny_model(num_hidden_layers=1), tiny_windows(5, 40)
    columns = torch.tensor([True, False, True, False, False, True]).expand(32, 6)
    mask = columns if transition == "removed" else torch.rand(32, 6, generator=torch.Generator().manual_seed(2)) < 0.4
    plan = TransitionPlan(
        Columns(0.5) if transition == "removed" else Unstructured(0.4), "output",
        transition="zero" if transition == "removed" else transition,
    )  # fmt: skip
    for layer in each_layer(Layout(model), embed(model, windows)):
        G = output_gram(layer, plan)
        gated = []
        for pruned in (False, True):
            block = copy.deepcopy(layer.module)
            if pruned and transition == "removed":
                block.mixer.x_proj.weight[3 + 6 + columns[0].nonzero().flatten()] = 0  # C of the states
            elif pruned:
                prune_transitions(block, mask, transition)
            visit_block(block, layer.stream.hidden[:], hooks={"out_proj": gated.append})
        lost = (gated[0] - gated[1]).double().square().sum((0, 1))
        expected = lost * layer.module.mixer.out_proj.weight.double().square().sum(0)
        torch.testing.assert_close(set_cost(G, mask), expected, rtol=1e-4, atol=1e-8)


def test_with_nothing_pruned_the_refit_changes_nothing(tiny_model, tiny_windows, job):
    model, windows = tiny_model(use_bias=True), tiny_windows(6, 30)
    before = state(model)
    plan = TransitionPlan(Unstructured(0.0), "magnitude", "sum")
    prune_compensated(job(model, windows), plan, None, REFIT)
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=2e-6)


def test_refit_is_the_ridge_solution_toward_the_dense_stream(tiny_model, tiny_windows, job):
    """The last layer's out_proj by least squares over rows that hold the ridge, from streams of stock blocks."""
    model, windows, ridge = tiny_model(use_bias=True), tiny_windows(6, 30), 0.05
    dense = copy.deepcopy(model)
    plan = TransitionPlan(Unstructured(0.5), "magnitude", "sum")
    compensation = CompensationPlan(refit=True, ridge=ridge)
    prune_compensated(job(model, windows), plan, None, compensation)

    def after(which, layers):
        hidden = which.backbone.embeddings(windows)
        for block in which.backbone.layers[:layers]:
            hidden = block(hidden)
        return hidden

    before, gated = after(model, 1), []
    visit_block(model.backbone.layers[1], before, hooks={"out_proj": gated.append})
    mixer = dense.backbone.layers[1].mixer
    X = gated[0].flatten(0, 1).double()
    T = (after(dense, 2) - before - mixer.out_proj.bias).flatten(0, 1).double()
    root = (ridge * X.square().sum(0).mean()).sqrt()
    rows = torch.cat([X, root * torch.eye(32, dtype=torch.float64)])
    targets = torch.cat([T, root * mixer.out_proj.weight.T.double()])
    expected = torch.linalg.lstsq(rows, targets).solution.T
    torch.testing.assert_close(model.backbone.layers[1].mixer.out_proj.weight.double(), expected, rtol=1e-3, atol=1e-5)


def error(model, dense, windows):
    return float((model(windows).logits - dense(windows).logits).square().mean())


@pytest.mark.parametrize("pattern", [Unstructured(0.5), NofM(2, 4), Columns(0.5)], ids=repr)
def test_refit_brings_the_model_nearer_to_the_dense_one(tiny_model, tiny_windows, job, pattern):
    windows, errors = tiny_windows(12, 48), []
    for refit in (False, True):
        model = tiny_model(state_size=8)
        plan = TransitionPlan(pattern, "output", search="greedy")
        compensation = CompensationPlan(refit=refit, sequential=True)
        masks = prune(job(model, windows), Plan(plan, None, compensation), windows).masks
        errors.append(error(model, tiny_model(state_size=8), windows))
        assert all(int(mask.sum()) == 32 * 4 for mask in masks.values())
    assert errors[1] < errors[0]
    assert model.config.state_size == (4 if isinstance(pattern, Columns) else 8)


def test_weights_are_solved_one_after_the_other(tiny_model, tiny_windows, job):
    """x_proj is pruned on what the pruned in_proj and conv1d make: its input differs from that of the dense block."""
    found = []
    for sequential in (False, True):
        model, windows = tiny_model(), tiny_windows(8, 40)
        plan = WeightPlan(Unstructured(0.5), "obs", MODULES)
        masks = prune_compensated(job(model, windows), None, plan, CompensationPlan(sequential=sequential))
        assert all(not tensor[masks[name]].any() for name, tensor in model.state_dict().items() if name in masks)
        counts = {name: int(mask.sum()) / mask.numel() for name, mask in masks.items()}
        assert all(share == pytest.approx(0.5, abs=0.02) for share in counts.values())
        found.append(state(model))
    same = {name for name in found[0] if torch.equal(found[0][name], found[1][name])}
    assert "backbone.layers.0.mixer.in_proj.weight" in same
    assert "backbone.layers.0.mixer.x_proj.weight" not in same


def test_layers_out_of_range_are_left_as_they_are(tiny_model, tiny_windows, job):
    model, windows = tiny_model(num_hidden_layers=3), tiny_windows(6, 30)
    before = state(model)
    plan = WeightPlan(Unstructured(0.5), "obs", MODULES)
    prune_compensated(job(model, windows, first=1, stop=2), None, plan, REFIT)
    changed = {name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])}
    assert changed == {f"backbone.layers.1.mixer.{name}.weight" for name in MODULES}


class Memory(NoJournal):
    """Keeps what a run records, as the journal does on disk."""

    def __init__(self):
        self.layers, self.figures = {}, {}

    def load(self, phase, layer, values, masks):
        return self.layers.get((phase, layer))

    def store(self, phase, layer, values, masks):
        copies = ({name: tensor.clone() for name, tensor in found.items()} for found in (values, masks))
        self.layers[phase, layer] = tuple(copies)

    def load_figures(self, name, check):
        found = self.figures.get(name)
        assert found is None or check(found)
        return found

    def store_figures(self, name, figures):
        self.figures[name] = figures


@pytest.mark.parametrize("pattern", [Unstructured(0.5), Columns(0.5)], ids=repr)
def test_a_resumed_run_ends_with_the_same_weights(tiny_model, tiny_windows, job, pattern):
    windows, memory, ends = tiny_windows(6, 30), Memory(), []
    for _ in range(2):
        model = tiny_model()
        masks = prune_compensated(
            job(model, windows, journal=memory), TransitionPlan(pattern, "output", search="greedy"),
            WeightPlan(Unstructured(0.5), "obs", MODULES), REFIT,
        )  # fmt: skip
        ends.append((state(model), masks))
        del memory.layers["compensated", 1]  # the second time only the first layer is found
    assert ends[0][0].keys() == ends[1][0].keys()
    assert all(torch.equal(ends[0][0][name], ends[1][0][name]) for name in ends[0][0])
    assert all(torch.equal(ends[0][1][name], ends[1][1][name]) for name in ends[0][1])


def test_allocation_measures_each_part_alone_and_leaves_the_model_as_it_was(tiny_model, tiny_windows, job):
    model, windows, memory = tiny_model(), tiny_windows(2, 30), Memory()
    before, dense = state(model), tiny_model()
    weights = WeightPlan(Unstructured(0.6), "magnitude", MODULES)
    transitions = TransitionPlan(Unstructured(0.6), "magnitude", "sum")
    shares = measured_shares(job(model, windows, journal=memory), "output", transitions, weights)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert set(shares) == {(layer, name) for layer in range(2) for name in (*MODULES, "A_log")}
    rows = {(i, name): found for i in range(2) for name, found in memory.figures[f"allocation-{i:04d}"].items()}

    block, hidden = dense.backbone.layers[0], dense.backbone.embeddings(windows)
    out = block(hidden)
    weight = block.mixer.x_proj.weight.data
    limit = weight.abs().flatten().kthvalue(round(0.6 * weight.numel())).values
    weight[weight.abs() <= limit] = 0
    expected = float((block(hidden) - out).square().sum() / hidden.square().sum())
    assert rows[0, "x_proj"][1][1] == pytest.approx(expected, rel=1e-4)
    total = sum(shares[key] * rows[key][0] for key in rows if key[1] != "A_log")
    assert total == pytest.approx(0.6 * sum(rows[key][0] for key in rows if key[1] != "A_log"))


def options(**given):
    return Options(model="demo", dataset="demo", **given)


def plan(chosen):
    return plan_of(chosen, MODULES)


def test_the_preset_and_its_overrides():
    chosen = options(method="sparsessm_obs", prune_A=True, prune_layers=True, sparsity=0.5)
    assert chosen.recipe.allocation == "loss" and plan(chosen).importance == "tokens" and plan(chosen).weights.rule == "obc"
    assert plan(chosen).transitions.search == "greedy" and plan(chosen).weights.refine_steps == 20
    assert plan(chosen).compensation == CompensationPlan(True, True, 0.1)
    plain = options(
        method="sparsessm_obs", prune_A=True, prune_layers=True, sparsity=0.5, search="independent", polish=0,
        module_order="parallel", compensate="none", allocation="uniform",
    )  # fmt: skip
    assert not plan(plain).compensation and plan(plain).transitions.search == "independent"
    groups = {"method": "sparsessm_obs", "prune_layers": True, "prunen": 2, "prunem": 4}
    assert options(**groups).recipe.allocation == "uniform" and options(**groups).target_modules == ("nn.Linear",)
    assert options(**groups, target_modules=("nn.Conv1d",)).target_modules == ("nn.Conv1d",)
    assert options(**{**groups, "method": "sparsegpt"}).target_modules == ("nn.Linear", "nn.Conv1d")
    columns = options(method="sparsessm_obs", prune_A=True, sparsity=0.5, structure="columns")
    assert plan(columns).transitions.pattern == Columns(0.5) and columns.recipe.allocation == "uniform"
    other = options(method="sparsessm", prune_A=True, sparsity=0.5, compensate="out_proj", ridge=0.5)
    assert plan(other).compensation == CompensationPlan(True, False, 0.5)


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"method": "sparsessm", "prune_A": True, "search": "greedy"}, "needs a saliency that knows"),
        ({"method": "magnitude", "prune_layers": True, "polish": 5}, "refines the weights of OBS"),
        ({"method": "sparsessm_obs", "prune_layers": True, "structure": "columns"}, "give --prune_A"),
        ({"method": "sparsessm_obs", "prune_layers": True, "alpha": 0.1}, "needs no --alpha"),
        ({"method": "sparsessm", "prune_layers": True, "alpha": 0.1, "compensate": "out_proj"}, "use --allocation output"),
        ({"method": "structure_ts", "prune_A": True, "allocation": "output"}, "leave it out with N:M and columns"),
        ({"method": "sparsessm", "prune_A": True, "ridge": -1.0}, "--ridge must not be negative"),
        ({"method": "sparsessm_obs", "prune_layers": True, "polish": -1}, "--polish must not be negative"),
        ({"method": "wanda", "prune_layers": True, "importance": "rows"}, "give --importance none"),
        ({"method": "sparsessm_obs", "prune_layers": True, "weights": "wanda", "polish": 0}, "give --importance none"),
        ({"method": "sparsessm_obs", "prune_layers": True, "weights": "obs"}, "use these, or --allocation uniform"),
        ({"method": "sparsessm", "prune_A": True, "allocation": "loss"}, "use these, or --allocation uniform"),
        ({"method": "magnitude", "prune_A": True, "recover_rate": 0.0}, "--recover_rate must be above 0"),
        ({"method": "magnitude", "prune_A": True, "recover_steps": 0}, "--recover_steps must be at least 1"),
        (
            {"method": "mamba-shedder", "prune_layers": True, "shed_target": "mamba_block", "recover": ("blocks",)},
            "use --recover model",
        ),
    ],
)
def test_mistakes_are_named(given, says):
    with pytest.raises(InputError, match=says):
        options(sparsity=0.5, **given)
