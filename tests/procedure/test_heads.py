"""Pruning Mamba-2 against the definitions written out: every state held, one step after the other, in float64."""

import json

import pytest
import torch
from safetensors.torch import load_file

from sparsessm.layerwise.layer import each_layer
from sparsessm.models import mamba2
from sparsessm.models.architecture import Layout
from sparsessm.pruning.patterns import NofM, Unstructured
from sparsessm.pruning.search import select
from tests.family import family_checkpoint, random_model_of, stock_perplexity

SIZES = {"n_groups": 2, "use_bias": True, "num_hidden_layers": 1}
L, HALF = 40, {"sparsity": 0.5}


def seen_by_hand(model, windows):
    """What one layer's scan sees: u (B,L,H,P), dt (B,L,H), B and C (B,L,H,N) by head, z, and all states (B,L+1,H,P,N)."""
    layout = Layout(model)
    hidden, _ = layout.enter(windows)
    mixer = layout.mixer(layout.layers[0])
    inputs, _ = mixer.prepare(layout.layers[0].norm(hidden), None, {})
    H, P, G, N = mixer.sizes
    u, B, C = (x.double() for x in inputs.mixed.split([H * P, G * N, G * N], -1))
    u, B, C = u.unflatten(-1, (H, P)), *(x.unflatten(-1, (G, N)).repeat_interleave(H // G, 2) for x in (B, C))
    dt = torch.nn.functional.softplus(inputs.dt.double() + mixer.module.dt_bias.double())
    A = -mixer.module.A_log.double().exp()
    return u, dt, B, C, inputs.z.double(), states_by_hand(u, dt, B, A)


def states_by_hand(u, dt, B, A):
    S = [torch.zeros(*u.shape[0:1], *u.shape[2:], B.shape[-1], dtype=torch.float64)]
    for t in range(u.shape[1]):
        entered = dt[:, t, :, None, None] * u[:, t, :, :, None] * B[:, t, :, None, :]
        S.append(torch.exp(dt[:, t] * A)[..., None, None] * S[-1] + entered)
    return torch.stack(S, 1)


def by_the_definition(model, windows, method):
    """(1,H) the heads to go: the table of saliencies with the state summed over its entries."""
    _, dt, _, _, _, S = seen_by_hand(model, windows)
    A_log = model.backbone.layers[0].mixer.A_log.double()
    h2 = S[:, :-1].square().sum((0, 3, 4))  # (L,H)
    abar = torch.exp(-dt * A_log.exp()).sum(0)
    if method == "magnitude":
        scores = A_log.abs()
    elif method == "ts_real":
        scores = (A_log.square() * h2).mean(0)
    elif method == "sparsessm_dev":
        weights = 1 / torch.arange(1, len(h2) + 1)
        scores = (weights[:, None] * abar.square() * h2).sum(0)
    else:
        votes = torch.zeros(len(A_log))
        for row in (A_log.square() * h2)[1:]:
            votes[row.argsort()[: len(A_log) // 2]] += 1
        scores = -votes
    mask = torch.zeros(1, len(A_log), dtype=torch.bool)
    mask[0, scores.argsort(stable=True)[: len(A_log) // 2]] = True
    return mask


@pytest.mark.parametrize("seed", [0, 1, 2])
@pytest.mark.parametrize("method", ["magnitude", "sparsessm", "sparsessm_dev", "ts_real"])
def test_heads_are_pruned_by_the_definition(prune, tiny_windows, method, seed):
    model, windows = random_model_of("mamba2", seed=seed, **SIZES), tiny_windows(4, L)
    expected = by_the_definition(model, windows, method)
    masks = prune(model, "prune_A", windows=windows, method=method, **HALF)
    name = "backbone.layers.0.mixer.A_log"
    assert masks.keys() == {name} and torch.equal(masks[name], expected[0])
    assert (model.backbone.layers[0].mixer.A_log[expected[0]] == 30).all()


def test_obs_on_heads_solves_for_the_heads_that_stay(prune, tiny_windows):
    """SparseGPT on A_log as W (1,H), by inverting what is left of its Hessian for every choice made."""
    model, windows = random_model_of("mamba2", **SIZES), tiny_windows(4, L)
    S = seen_by_hand(model, windows)[-1][:, :-1].flatten(3)
    H = torch.einsum("bthx,btkx->hk", S, S)
    H += 0.01 * H.diagonal().mean() * torch.eye(len(H))
    A_log = model.backbone.layers[0].mixer.A_log.double()
    scores = A_log.square() / torch.linalg.inv(H).diagonal()  # the scores of a first block of 128
    factor = torch.linalg.cholesky(torch.linalg.inv(H), upper=True)
    scores = A_log.square() / factor.diagonal().square()
    expected = torch.zeros(8, dtype=torch.bool)
    expected[scores.argsort()[:4]] = True
    weights = A_log.clone()
    for i in range(8):
        error = weights[i] / factor[i, i] if expected[i] else 0.0
        weights[i + 1 :] -= error * factor[i, i + 1 :]
    masks = prune(model, "prune_A", windows=windows, method="sparsegpt", **HALF)
    assert torch.equal(masks["backbone.layers.0.mixer.A_log"], expected)
    kept = model.backbone.layers[0].mixer.A_log[~expected].double()
    torch.testing.assert_close(kept, weights[~expected], atol=1e-5, rtol=1e-5)


def test_n_of_m_over_heads(prune, tiny_windows):
    model, windows = random_model_of("mamba2", **SIZES), tiny_windows(4, L)
    h2 = seen_by_hand(model, windows)[-1][:, :-1].square().sum((0, 3, 4))
    scores = model.backbone.layers[0].mixer.A_log.double().square() * h2
    votes = sum(NofM(2, 4)(row[None]).int() for row in scores[1:])
    masks = prune(model, "prune_A", windows=windows, method="sparsessm", prunen=2, prunem=4)
    (mask,) = masks.values()
    assert torch.equal(mask[None], NofM(2, 4)(-votes.float())) and mask.view(2, 4).sum(1).tolist() == [2, 2]


@pytest.mark.parametrize("effect", ["zero", "unit", "removed"])
def test_losses_of_heads_are_the_derivative_of_the_output(tiny_windows, embed, effect):
    model, windows = random_model_of("mamba2", **SIZES), tiny_windows(3, L)
    u, dt, B, C, z, S = seen_by_hand(model, windows)
    mixer = model.backbone.layers[0].mixer
    D, A = mixer.D.double()[:, None], -mixer.A_log.double().exp()

    def read(states):
        return (states[:, 1:] * C[:, :, :, None]).sum(-1) + D * u

    y = read(S)
    without = {"zero": torch.full_like(A, -1e6), "unit": -torch.ones_like(A)}
    lost = y if effect == "removed" else y - read(states_by_hand(u, dt, B, without[effect]))
    expected = torch.zeros(8, 8, dtype=torch.float64)
    double = random_model_of("mamba2", dtype=torch.float64, **SIZES).backbone.layers[0].mixer

    def out(y):
        q = y.flatten(2) * torch.nn.functional.silu(z)
        q = q.unflatten(-1, (2, -1))
        q = (q * (q.square().mean(-1, keepdim=True) + double.norm.variance_epsilon).rsqrt()).flatten(2)
        return (q * double.norm.weight) @ double.out_proj.weight.T

    losses = []
    for h in range(8):
        alone = torch.zeros_like(y)
        alone[:, :, h] = lost[:, :, h]
        losses.append(torch.func.jvp(out, (y,), (alone,))[1].flatten())
    losses = torch.stack(losses)
    expected = losses @ losses.T
    for layer in each_layer(Layout(model), embed(model, windows)):
        found = sum(s.gram for _, s in layer.scan_statistics(("gram",), effect, "heads"))[0]
    torch.testing.assert_close(found, expected, rtol=2e-4, atol=1e-5 * float(expected.abs().max()))


def test_losses_of_states_are_those_of_sampled_steps(tiny_windows, embed):
    model, windows = random_model_of("mamba2", **SIZES), tiny_windows(3, 70)
    _, _, _, C, z, S = seen_by_hand(model, windows)
    u = seen_by_hand(model, windows)[0]
    double = random_model_of("mamba2", dtype=torch.float64, **SIZES).backbone.layers[0].mixer
    y = (S[:, 1:] * C[:, :, :, None]).sum(-1) + double.D[:, None] * u

    def out(y, z):
        q = (y.flatten(2) * torch.nn.functional.silu(z)).unflatten(-1, (2, -1))
        q = (q * (q.square().mean(-1, keepdim=True) + double.norm.variance_epsilon).rsqrt()).flatten(2)
        return (q * double.norm.weight) @ double.out_proj.weight.T

    steps = [mamba2.SAMPLED - 1, 2 * mamba2.SAMPLED - 1]
    lost = S[:, 1:][:, steps] * C[:, steps][:, :, :, None]  # (B,2,H,P,N)
    losses = torch.stack(
        [torch.func.jvp(lambda y: out(y, z[:, steps]), (y[:, steps],), (lost[..., n],))[1].flatten() for n in range(6)]
    )
    expected = losses @ losses.T
    for layer in each_layer(Layout(model), embed(model, windows)):
        found = sum(s.gram for _, s in layer.scan_statistics(("gram",), "removed", "columns"))[0]
    torch.testing.assert_close(found, expected, rtol=2e-4, atol=1e-5 * float(expected.abs().max()))


@pytest.mark.parametrize("method", ["structure_ts", "structure_mag", "ghost"])
def test_states_are_removed_by_the_definition(prune, tiny_windows, method):
    model, windows = random_model_of("mamba2", **SIZES), tiny_windows(4, L)
    _, _, _, C, _, S = seen_by_hand(model, windows)
    mixer = model.backbone.layers[0].mixer
    if method == "structure_mag":
        rows = mixer.in_proj.weight[64:88].double().square().sum(1)
        scores = sum(rows[start : start + 6] for start in (0, 6, 12, 18))
    elif method == "ghost":
        scores = (S[:, 1:].square() * C[:, :, :, None].square()).sum((0, 1, 2, 3)).sqrt()
    else:
        steps = (mixer.A_log.double().square()[:, None] * S[:, :-1].square().sum((0, 3))).sum(1)[1:]  # (L-1,N)
        scores = -sum(torch.zeros(6).scatter_(0, row.argsort()[:3], 1.0) for row in steps)
    expected = torch.zeros(6, dtype=torch.bool)
    expected[scores.argsort(stable=True)[:3]] = True
    masks = prune(model, "prune_A", windows=windows, method=method, **HALF)
    assert model.config.state_size == 3
    conv = masks["backbone.layers.0.mixer.conv1d.weight"].all(-1).flatten()
    assert torch.equal(conv, torch.cat([torch.zeros(32, dtype=torch.bool), expected.repeat(4)]))


def test_the_same_number_of_heads_is_removed_from_every_group(prune, tiny_windows):
    model, windows = random_model_of("mamba2", **SIZES), tiny_windows(4, L)
    masks = prune(model, "prune_A", windows=windows, method="sparsessm", structure="heads", **HALF)
    assert masks["backbone.layers.0.mixer.A_log"].view(2, 4).sum(1).tolist() == [2, 2]
    assert model.config.num_heads == 4 and model.backbone.layers[0].mixer.in_proj.weight.shape == (16 + 16 + 24 + 4, 16)


def test_sets_of_heads_are_chosen_over_the_whole_layer():
    G = torch.tensor([[[4.0, -3.9, 0, 0], [-3.9, 4.0, 0, 0], [0, 0, 1.0, 0.9], [0, 0, 0.9, 1.0]]])
    assert select(G, Unstructured(0.5), "exact").tolist() == [[True, True, False, False]]


METHODS = [
    ("magnitude", "entries"), ("sparsegpt", "entries"), ("sparsessm", "entries"), ("sparsessm_dev", "entries"),
    ("sparsessm_obs", "entries"), ("structure_ts", "columns"), ("structure_mag", "columns"), ("ghost", "columns"),
    ("sparsessm_obs", "columns"), ("sparsessm", "heads"), ("sparsessm_obs", "heads"),
]  # fmt: skip


@pytest.mark.parametrize(("method", "structure"), METHODS)
def test_stock_transformers_opens_what_was_saved(run_main, demo_dir, text_folder, tmp_path, method, structure):
    model = family_checkpoint(tmp_path / "in", demo_dir, "mamba2", n_groups=2, tie_word_embeddings=False)
    out = tmp_path / "out"
    argv = [model, text_folder, "--method", method, "--prune_A", "--sparsity", "0.5", "--structure", structure]
    outcome = run_main([*argv, "--seqlen", "64", "--nsamples", "4", "--save", out])
    assert outcome.code == 0, outcome.stderr
    (value,) = outcome.metrics["perplexity"].values()
    assert stock_perplexity(out, text_folder / "test.txt", 64) == pytest.approx(value, rel=1e-3)
    masks = load_file(out / "masks.safetensors")
    config = json.loads((out / "config.json").read_text())
    if structure == "entries":
        assert outcome.metrics["sparsity"]["ssm"] == 0.5 and sum(int(mask.sum()) for mask in masks.values()) == 8
        saved = load_file(out / "model.safetensors")
        assert all((saved[name][mask] == 30).all() for name, mask in masks.items())
    elif structure == "columns":
        assert config["state_size"] == 3
        assert all(int(mask.all(-1).flatten().sum()) == 12 for name, mask in masks.items() if name.endswith("conv1d.weight"))
    else:
        assert (config["num_heads"], config["expand"]) == (4, 1)
        assert outcome.metrics["sparsity"]["ssm"] == 0.5


@pytest.mark.parametrize("kind", ["mamba2", "falcon_mamba"])
def test_the_whole_model_is_pruned_and_resumed(run_main, demo_dir, text_folder, tmp_path, kind):
    model = family_checkpoint(tmp_path / "in", demo_dir, kind)
    argv = [model, text_folder, "--method", "sparsessm_obs", "--prune_A", "--prune_layers", "--sparsity", "0.5"]
    argv += ["--seqlen", "64", "--nsamples", "4"]
    outcome = run_main([*argv, "--save", tmp_path / "out"])
    assert outcome.code == 0, outcome.stderr
    assert outcome.metrics["sparsity"]["ssm"] == 0.5
    assert outcome.metrics["sparsity"]["layers"] == pytest.approx(0.5, abs=0.002)
    (value,) = outcome.metrics["perplexity"].values()
    assert stock_perplexity(tmp_path / "out", text_folder / "test.txt", 64) == pytest.approx(value, rel=1e-3)
    masks = load_file(tmp_path / "out" / "masks.safetensors")
    modules = {name.split(".mixer.")[1] for name in masks}
    assert modules >= {"A_log", "in_proj.weight", "conv1d.weight", "out_proj.weight"}
    saved = load_file(tmp_path / "out" / "model.safetensors")
    assert all(not saved[name][mask].any() for name, mask in masks.items() if "A_log" not in name)


@pytest.mark.parametrize(
    ("kind", "argv", "says"),
    [
        ("mamba2", ["--structure", "heads", "--sparsity", "0.25"], "of its 8 heads 4 can stay"),
        ("falcon_mamba", ["--structure", "heads", "--sparsity", "0.5"], "use columns"),
        ("mamba2", ["--prunen", "8", "--prunem", "16"], "--prunem 16 does not divide the 8"),
    ],
)
def test_what_an_architecture_cannot_hold_is_refused(run_main, demo_dir, text_folder, tmp_path, kind, argv, says):
    model = family_checkpoint(tmp_path / "in", demo_dir, kind)
    argv = ["--method", "sparsessm", "--prune_A", *argv, "--seqlen", "64", "--nsamples", "4"]
    outcome = run_main([model, text_folder, *argv])
    assert outcome.code == 2 and says in outcome.stderr


@pytest.mark.parametrize("target", ["ssm", "mamba_block"])
def test_mamba_shedder_removes_ssm_branches_and_blocks(run_main, demo_dir, text_folder, tmp_path, target):
    model = family_checkpoint(tmp_path / "in", demo_dir, "mamba2", num_hidden_layers=4)
    argv = [model, text_folder, "--method", "mamba-shedder", "--prune_A", "--sparsity", "0.5", "--shed_target", target]
    argv += ["--prune_layers"] if target == "mamba_block" else []
    outcome = run_main([*argv, "--seqlen", "64", "--nsamples", "4", "--save", tmp_path / "out"])
    assert outcome.code == 0, outcome.stderr
    (value,) = outcome.metrics["perplexity"].values()
    assert stock_perplexity(tmp_path / "out", text_folder / "test.txt", 64) == pytest.approx(value, rel=1e-3)
