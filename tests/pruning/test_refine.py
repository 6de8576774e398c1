"""The refinement after OBS against the least squares solution on the weights that stay."""

import pytest
import torch

from sparsessm.pruning.obs import prune_obs, refine
from sparsessm.pruning.patterns import NofM, Unstructured


def problem(rows=6, cols=12, tokens=60, seed=0):
    g = torch.Generator().manual_seed(seed)
    mix = torch.randn(cols, cols, generator=g, dtype=torch.float64)
    X = mix @ torch.randn(cols, tokens, generator=g, dtype=torch.float64)
    return torch.randn(rows, cols, generator=g, dtype=torch.float64), X, 2 * X @ X.T


def best_for(mask, W, X):
    """Row by row: least squares of W X on the inputs that the row keeps."""
    best = torch.zeros_like(W)
    for row, keep in enumerate(~mask):
        best[row, keep] = torch.linalg.lstsq(X[keep].T, X.T @ W[row]).solution
    return best


def error(V, W, X):
    return float(((V - W) @ X).square().sum())


@pytest.mark.parametrize("pattern", [Unstructured(0.5), NofM(2, 4)], ids=repr)
def test_enough_iterations_reach_the_optimum_for_the_mask(pattern):
    W, X, H = problem()
    new, mask = prune_obs(W, H, pattern, percdamp=1e-9)
    refined = refine(new, mask, W, H, percdamp=0.0, iterations=60)
    torch.testing.assert_close(refined, best_for(mask, W, X), atol=1e-6, rtol=1e-6)
    assert not refined[mask].any()


@pytest.mark.parametrize("seed", range(4))
def test_a_few_iterations_are_better_than_none_and_never_worse(seed):
    W, X, H = problem(seed=seed)
    new, mask = prune_obs(W, H, Unstructured(0.6))
    errors = [error(refine(new, mask, W, H, 0.0, n), W, X) for n in (0, 3, 10)]
    assert errors[0] == pytest.approx(error(new, W, X))
    assert errors[2] < errors[0] and errors[1] < errors[0] * (1 + 1e-9)


def test_a_batch_of_problems_and_inputs_never_seen():
    W, X, H = problem(rows=1, cols=4)
    X[2] = 0
    H = 2 * X @ X.T
    pair = torch.stack([W, W])
    new, mask = prune_obs(pair, torch.stack([H, H]), Unstructured(0.25))
    refined = refine(new, mask, pair, torch.stack([H, H]), 0.01, 10)
    assert torch.isfinite(refined).all() and not refined[mask].any()
    alone = refine(new[1], mask[1], W, H, 0.01, 10)
    torch.testing.assert_close(refined[1], alone)
