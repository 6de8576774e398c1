"""The optimal brain compressor against brute force: every step the cheapest, every cost exact, the rest optimal."""

import itertools

import numpy as np
import pytest
import torch

from sparsessm.errors import NumericalError
from sparsessm.pruning import obc
from sparsessm.pruning.obc import prune_obc, remove_in_turn, remove_in_turn_ref
from sparsessm.pruning.obs import prune_obs, refine
from sparsessm.pruning.patterns import NofM, Unstructured
from tests.pruning.test_obs import damped, hessian, inputs, weights


def literal(w, H, removals, forced=(), group=0, most=0):
    """Greedy removal of a row, each trial solved anew by least squares: (order, cost of each step, weights)."""
    gone, costs, last = [], [], 0.0
    kept_best = w.copy()
    for step in range(removals):
        trials = []
        for i in range(len(w)):
            if i in gone or (group and step >= len(forced) and sum(g // group == i // group for g in gone) >= most):
                continue
            if step < len(forced) and i != forced[step]:
                continue
            some = [*gone, i]
            kept = [k for k in range(len(w)) if k not in some]
            new = np.zeros_like(w)
            if kept:
                new[kept] = w[kept] + np.linalg.solve(H[np.ix_(kept, kept)], H[np.ix_(kept, some)] @ w[some])
            trials.append((float((w - new) @ H @ (w - new)), i, new))
        if not trials:
            break
        total, i, kept_best = min(trials, key=lambda trial: trial[0])
        gone.append(i)
        costs.append(total - last)
        last = total
    return gone, costs, kept_best


@pytest.mark.parametrize("remove", [remove_in_turn_ref, remove_in_turn])
@pytest.mark.parametrize("group, most", [(0, 0), (3, 1), (4, 2)])
@pytest.mark.parametrize("with_gone", [False, True])
def test_every_step_is_the_cheapest_of_all_that_are_left(remove, group, most, with_gone):
    W, H = weights(5, 12), damped(hessian(inputs(12, 50)))
    limits = torch.tensor([0, 1, 5, 12, 8])
    gone = torch.zeros(5, 12, dtype=torch.bool)
    gone[2, [1, 7]] = gone[3, 4] = gone[4, 0] = True
    new, order, cost = remove(W, torch.linalg.inv(torch.from_numpy(H)), limits, group, most, gone if with_gone else None)
    for row in range(5):
        forced = gone[row].nonzero().flatten().tolist() if with_gone else []
        went, costs, best = literal(W[row].numpy(), H, int(limits[row]), forced[: int(limits[row])], group, most)
        assert order[row, : len(went)].tolist() == went
        assert sorted(order[row].tolist()) == list(range(12))
        np.testing.assert_allclose(cost[row, : len(went)], costs, rtol=1e-8, atol=1e-10)
        assert torch.isinf(cost[row, len(went) :]).all()
        np.testing.assert_allclose(new[row], best, atol=1e-10)
        assert (new[row, went] == 0).all()


@pytest.mark.parametrize("n", [1, 15, 16, 17, 130])
def test_compiled_removal_is_the_readable_one_in_float32(n):
    W, H = weights(7, n).float(), hessian(inputs(n, 4 * n)).float() + 0.05 * torch.eye(n)
    inverse, limits = torch.linalg.inv(H), torch.arange(7) * n // 6
    exact = remove_in_turn_ref(W.double(), inverse.double(), limits)
    found = remove_in_turn(W, inverse, limits)
    went = torch.isfinite(exact[2]).sum(-1)
    same = ((found[1] == exact[1]) | (torch.arange(n) >= went[:, None])).all(-1)
    assert same.float().mean() > 0.5  # near ties may go either way, after which all differs
    assert ((found[0].double() - exact[0])[same].norm(dim=-1) < 1e-2 * exact[0][same].norm(dim=-1).clamp_min(1e-9)).all()
    assert torch.equal(torch.isfinite(found[2]).sum(-1), went)
    ratio = found[2].nan_to_num(posinf=0).double().sum(-1) / exact[2].nan_to_num(posinf=0).sum(-1).clamp_min(1e-30)
    assert (ratio[went > 0] - 1).abs().max() < 1e-3


def test_mask_takes_the_cheapest_steps_of_all_rows():
    """Against the best of all ways to divide the number among three rows, of which each goes along its trace."""
    W, X = weights(3, 6), inputs(6, 40)
    H = damped(hessian(X))
    importance = torch.tensor([1.0, 5.0, 0.3], dtype=torch.float64)
    new, mask = prune_obc(W, hessian(X), Unstructured(0.5), importance=importance)
    found = [literal(row.numpy(), H, 6) for row in W]
    cumulated = [np.concatenate([[0.0], np.cumsum(costs)]) for _, costs, _ in found]
    best = min(
        (sum(f * c[k] for f, c, k in zip(importance.tolist(), cumulated, counts, strict=True)), counts)
        for counts in itertools.product(range(7), repeat=3) if sum(counts) == 9
    )  # fmt: skip
    error = (((W - new).numpy() @ H) * (W - new).numpy()).sum(-1)
    assert mask.sum(-1).tolist() == list(best[1])
    np.testing.assert_allclose((error * importance.numpy()).sum(), best[0], rtol=1e-9)


@pytest.mark.parametrize("pattern", [Unstructured(0.5), NofM(2, 4)])
@pytest.mark.parametrize("blocksize", [4, 8, 24])
def test_what_remains_is_best_for_the_mask_and_better_than_obs(monkeypatch, pattern, blocksize):
    monkeypatch.setattr(obc, "WHOLE", 8)
    W, X = weights(9, 24), inputs(24, 100)
    H = hessian(X)
    errors = {}
    for name, prune in {"obc": prune_obc, "obs": prune_obs}.items():
        new, mask = prune(W, H, pattern, blocksize)
        assert int(mask.sum()) == 108 and (new[mask] == 0).all()
        new = refine(new, mask, W, H, iterations=200)
        errors[name] = float(((W - new) @ torch.from_numpy(damped(H)) * (W - new)).sum())
    assert errors["obc"] < errors["obs"]
    if blocksize == 24:
        new, mask = prune_obc(W, H, pattern, blocksize)
        refined = refine(new, mask, W, H, iterations=200)
        torch.testing.assert_close(new, refined, rtol=1e-6, atol=1e-8)


def test_blocks_compensate_to_the_right_alone():
    """The weights of a block are final when the next one is pruned, and those take up its error exactly."""
    W, X = weights(2, 6), inputs(6, 40)
    H = damped(hessian(X))
    mask = torch.zeros(2, 6, dtype=torch.bool)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(obc, "WHOLE", 3)
        new, mask = prune_obc(W, hessian(X), Unstructured(0.5), 3)
    expected = W.numpy().copy()
    for part in (slice(0, 3), slice(3, 6)):
        rest, inverse = slice(part.start, 6), np.linalg.inv(H[part.start :, part.start :])
        for row in range(2):
            went = np.flatnonzero(mask[row, part]).tolist()
            change = -inverse[:, went] @ np.linalg.solve(inverse[np.ix_(went, went)], expected[row, part][went])
            expected[row, rest] += change
    expected[mask.numpy()] = 0
    np.testing.assert_allclose(new, expected, atol=1e-9)


def test_channels_of_a_convolution_are_problems_of_their_own():
    X = torch.stack([inputs(4, 30, seed) for seed in range(5)])
    H, W = torch.stack([hessian(x) for x in X]), weights(5, 1, 4)
    new, mask = prune_obc(W, H, Unstructured(0.5), importance=torch.tensor([1.0, 1.0, 1e9, 1.0, 1.0]).double())
    assert int(mask.sum()) == 10 and not mask[2].any()
    for channel in range(5):
        _, _, best = literal(W[channel, 0].numpy(), damped(H[channel]), int(mask[channel].sum()))
        np.testing.assert_allclose(new[channel, 0], best, atol=1e-9)


def test_what_was_pruned_before_counts_and_stays():
    W, H = weights(6, 8), hessian(inputs(8, 30))
    gone = torch.rand(6, 8, generator=torch.Generator().manual_seed(3)) < 0.3
    new, mask = prune_obc(W, H, Unstructured(0.5), gone=gone)
    assert int(mask.sum()) == 24 and mask[gone].all() and (new[mask] == 0).all()
    torch.testing.assert_close(refine(new, mask, W.masked_fill(gone, 0), H, iterations=100), new, rtol=1e-6, atol=1e-8)


def test_inputs_that_were_never_seen_and_weights_without_a_value():
    W, X = weights(3, 6), inputs(6, 30)
    X[2] = 0
    new, mask = prune_obc(W, hessian(X), Unstructured(0.5))
    assert (new[:, 2] == 0).all() and mask[:, 2].all()  # they cost nothing
    W[1, 1] = torch.nan
    with pytest.raises(NumericalError, match="not finite"):
        prune_obc(W, hessian(X), Unstructured(0.5))
