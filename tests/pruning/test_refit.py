"""The ridge refit against numpy's least squares."""

import numpy as np
import pytest
import torch

from sparsessm.pruning.refit import refit


def data(rows=5, cols=7, tokens=40, seed=0):
    g = torch.Generator().manual_seed(seed)
    shapes = (rows, cols), (cols, tokens), (rows, tokens)
    return [torch.randn(shape, generator=g, dtype=torch.float64) for shape in shapes]


def test_without_damping_it_is_least_squares():
    W, X, T = data()
    expected = np.linalg.lstsq(X.numpy().T, T.numpy().T, rcond=None)[0].T
    torch.testing.assert_close(refit(W, X @ X.T, T @ X.T, 0.0), torch.from_numpy(expected))


@pytest.mark.parametrize("percdamp", [0.01, 1.0])
def test_damping_pulls_toward_the_old_weights(percdamp):
    """As least squares with the damping as further rows of X, which ask for the old weights."""
    W, X, T = data()
    root = (percdamp * float((X @ X.T).diagonal().mean())) ** 0.5
    longer = np.concatenate([X.numpy(), root * np.eye(7)], axis=1)
    targets = np.concatenate([T.numpy(), root * W.numpy()], axis=1)
    expected = np.linalg.lstsq(longer.T, targets.T, rcond=None)[0].T
    torch.testing.assert_close(refit(W, X @ X.T, T @ X.T, percdamp), torch.from_numpy(expected))


def test_what_is_right_already_does_not_move():
    W, X, _ = data()
    torch.testing.assert_close(refit(W, X @ X.T, (W @ X) @ X.T, 0.5), W, atol=1e-12, rtol=0)


def test_inputs_never_seen_leave_their_weights_alone():
    W, X, T = data()
    X[3] = 0
    assert torch.equal(refit(W, X @ X.T, T @ X.T)[:, 3], W[:, 3])
    assert torch.equal(refit(W, torch.zeros(7, 7), torch.zeros(5, 7)), W)


def test_a_batch_of_problems_is_solved_one_by_one():
    problems = [data(rows=1, cols=4, seed=s) for s in range(3)]
    W, H, cross = (torch.stack(parts) for parts in zip(*[(W, X @ X.T, T @ X.T) for W, X, T in problems], strict=True))
    together = refit(W, H, cross)
    for i in range(3):
        torch.testing.assert_close(together[i], refit(W[i], H[i], cross[i]))
