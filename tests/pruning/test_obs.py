"""The blocked solver against a literal one, which inverts the Hessian of the columns not yet frozen at every column."""

import logging

import numpy as np
import pytest
import torch

from sparsessm.pruning.obs import (
    SolverError,
    inverse_factor,
    prune_magnitude,
    prune_obs,
    prune_wanda,
)
from sparsessm.pruning.patterns import NofM, PerRow, Unstructured

PERCDAMP = 0.01


def inputs(cols: int, tokens: int, seed: int = 0) -> torch.Tensor:
    """(cols,tokens) float64 with strongly correlated rows of uneven size; the mixing does not depend on the seed."""
    mixing = torch.randn(cols, cols, generator=torch.Generator().manual_seed(99), dtype=torch.float64)
    mixing = mixing * torch.logspace(0, -1.5, cols, dtype=torch.float64)
    return mixing @ torch.randn(cols, tokens, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def hessian(X: torch.Tensor) -> torch.Tensor:
    return 2 / X.shape[1] * X @ X.T


def weights(*shape: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def damped(H: torch.Tensor, percdamp: float = PERCDAMP) -> np.ndarray:
    H = H.double().numpy().copy()
    H[np.diag(H) == 0, np.diag(H) == 0] = 1
    return H + percdamp * np.diag(H).mean() * np.eye(len(H))


def literal_update(W: torch.Tensor, H: torch.Tensor, mask: torch.Tensor, percdamp: float = PERCDAMP) -> torch.Tensor:
    """The closed-form OBS update for a given mask, frozen column by frozen column, in float64."""
    W, mask, full = W.double().numpy().copy(), mask.numpy(), damped(H, percdamp)
    W[:, H.diagonal().numpy() == 0] = 0
    for i in range(W.shape[1]):
        inverse = np.linalg.inv(full[i:, i:])
        removed = np.where(mask[:, i], W[:, i], 0)
        W[:, i:] -= np.outer(removed, inverse[0] / inverse[0, 0])
        W[mask[:, i], i] = 0
    return torch.from_numpy(W)


def literal_obs(W: torch.Tensor, H: torch.Tensor, pattern, blocksize: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The same with the mask chosen on the way: per block for a share, per group for N:M, by w^2 / [H^-1]_ii."""
    W, full = W.double().numpy().copy(), damped(H)
    W[:, H.diagonal().numpy() == 0] = 0
    cols = W.shape[1]
    mask = np.zeros(W.shape, dtype=bool)
    pivots = np.array([np.linalg.inv(full[i:, i:])[0, 0] for i in range(cols)])
    for i in range(cols):
        if isinstance(pattern, NofM) and i % pattern.m == 0:
            score = W[:, i : i + pattern.m] ** 2 / pivots[i : i + pattern.m]
            order = np.argsort(score, axis=1, kind="stable")[:, : pattern.n]
            np.put_along_axis(mask[:, i : i + pattern.m], order, True, axis=1)
        if not isinstance(pattern, NofM) and i % blocksize == 0:
            score = W[:, i : i + blocksize] ** 2 / pivots[i : i + blocksize]
            chosen = np.zeros(score.size, dtype=bool)
            chosen[np.argsort(score, axis=None, kind="stable")[: round(pattern.sparsity * score.size)]] = True
            mask[:, i : i + blocksize] = chosen.reshape(score.shape)
        inverse = np.linalg.inv(full[i:, i:])
        removed = np.where(mask[:, i], W[:, i], 0)
        W[:, i:] -= np.outer(removed, inverse[0] / inverse[0, 0])
        W[mask[:, i], i] = 0
    return torch.from_numpy(W), torch.from_numpy(mask)


def error(new: torch.Tensor, W: torch.Tensor, X: torch.Tensor) -> float:
    return float(((new - W).double() @ X).square().sum())


CASES = [
    (Unstructured(0.5), 1), (Unstructured(0.5), 7), (Unstructured(0.3), 16), (Unstructured(0.8), 64),
    (Unstructured(0.5), 128), (NofM(2, 4), 4), (NofM(2, 4), 16), (NofM(2, 4), 128), (NofM(1, 2), 6), (NofM(4, 8), 8),
]  # fmt: skip


@pytest.mark.parametrize(("pattern", "blocksize"), CASES)
def test_blocks_give_the_weights_of_the_literal_update(pattern, blocksize):
    X = inputs(40, 200)
    W, H = weights(12, 40), hessian(X)
    new, mask = prune_obs(W, H, pattern, blocksize, PERCDAMP)
    assert new.dtype == torch.float64 and mask.dtype == torch.bool
    torch.testing.assert_close(new, literal_update(W, H, mask), atol=1e-5, rtol=0)
    assert not new[mask].any()


@pytest.mark.parametrize(("pattern", "blocksize"), CASES)
def test_blocks_choose_the_mask_of_the_literal_solver(pattern, blocksize):
    W, H = weights(12, 40), hessian(inputs(40, 200))
    new, mask = prune_obs(W, H, pattern, blocksize, PERCDAMP)
    expected, chosen = literal_obs(W, H, pattern, blocksize)
    assert torch.equal(mask, chosen)
    torch.testing.assert_close(new, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("pattern", [Unstructured(0.5), NofM(2, 4)], ids=repr)
def test_float32_stays_close_to_float64(pattern):
    """Within 1e-3 of weights of size one, at a condition number of the damped Hessian of some thousands."""
    W, H = weights(12, 40).float(), hessian(inputs(40, 200)).float()
    new, mask = prune_obs(W, H, pattern, 16, PERCDAMP)
    assert new.dtype == torch.float32
    torch.testing.assert_close(new.double(), literal_update(W, H, mask), atol=1e-3, rtol=0)


def test_damping_is_a_share_of_the_mean_diagonal():
    W, H = weights(6, 10), hessian(inputs(10, 50))
    for percdamp in (0.0, 0.1, 2.0):
        new, mask = prune_obs(W, H, Unstructured(0.5), 128, percdamp)
        torch.testing.assert_close(new, literal_update(W, H, mask, percdamp), atol=1e-5, rtol=0)


def test_inverse_factor_is_the_cholesky_factor_of_the_inverse():
    H = hessian(inputs(10, 50))
    U = inverse_factor(H[None], PERCDAMP, "weight")[0]
    assert torch.equal(U, U.triu()) and (U.diagonal() > 0).all()
    torch.testing.assert_close(U.T @ U, torch.from_numpy(np.linalg.inv(damped(H))), atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize(("sparsity", "blocksize"), [(0.5, 16), (0.33, 16), (0.13, 7), (0.9, 128)])
def test_counts_are_exact_in_every_block(sparsity, blocksize):
    new, mask = prune_obs(weights(9, 40), hessian(inputs(40, 200)), Unstructured(sparsity), blocksize)
    for block in mask.split(blocksize, dim=1):
        assert int(block.sum()) == round(sparsity * block.numel())
    assert int((new == 0).sum()) == int(mask.sum())


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8), (1, 2)])
def test_n_of_m_holds_in_every_group(n, m):
    new, mask = prune_obs(weights(9, 40), hessian(inputs(40, 200)), NofM(n, m), 8)
    assert (mask.view(9, -1, m).sum(-1) == n).all()
    assert ((new == 0).view(9, -1, m).sum(-1) == n).all()


def test_groups_must_not_straddle_blocks():
    W, H = weights(4, 12), torch.eye(12, dtype=torch.float64)
    with pytest.raises(ValueError, match="in_proj"):
        prune_obs(W, H, NofM(2, 4), 6, name="in_proj")
    with pytest.raises(ValueError, match="in_proj"):
        prune_obs(W, H, NofM(4, 8), 8, name="in_proj")


@pytest.mark.parametrize("pattern", [Unstructured(0.5), NofM(2, 4)], ids=repr)
def test_a_batch_solves_each_problem_with_its_own_hessian(pattern):
    H = torch.stack([hessian(inputs(8, 30, seed)) for seed in range(5)])
    W = weights(5, 3, 8)
    new, mask = prune_obs(W, H, pattern, 128, PERCDAMP)
    assert new.shape == mask.shape == W.shape
    for g in range(5):
        torch.testing.assert_close(new[g], literal_update(W[g], H[g], mask[g]), atol=1e-5, rtol=0)
    if isinstance(pattern, NofM):
        alone = [prune_obs(W[g], H[g], pattern, 128, PERCDAMP) for g in range(5)]
        assert torch.equal(mask, torch.stack([m for _, m in alone]))


def test_a_share_is_taken_of_the_whole_batch():
    """Problems whose weights matter less lose more: one choice over all of them."""
    H = torch.eye(4, dtype=torch.float64).expand(3, 4, 4)
    W = weights(3, 1, 4) * torch.tensor([1e-3, 1.0, 1e3], dtype=torch.float64)[:, None, None]
    _, mask = prune_obs(W, H, Unstructured(0.5), 128)
    assert mask.sum((1, 2)).tolist() == [4, 2, 0]


def test_dead_columns_are_cleared_and_leave_the_others_alone():
    X = inputs(16, 80)
    X[[3, 9]] = 0
    W, H = weights(5, 16), hessian(X)
    new, mask = prune_obs(W, H, Unstructured(0.5), 128, PERCDAMP)
    assert not new[:, [3, 9]].any()
    assert mask[:, [3, 9]].all() and int(mask.sum()) == 40  # a weight that is zero already is the first to go
    torch.testing.assert_close(new, literal_update(W, H, mask), atol=1e-5, rtol=0)


def test_inputs_are_not_changed():
    W, H = weights(4, 8), hessian(inputs(8, 40))
    H[2] = H[:, 2] = 0
    before = W.clone(), H.clone()
    prune_obs(W, H, Unstructured(0.5))
    assert torch.equal(W, before[0]) and torch.equal(H, before[1])


@pytest.mark.parametrize("pattern", [Unstructured(0.5), NofM(2, 4)], ids=["50 %", "2:4"])
def test_error_on_held_out_inputs_is_below_magnitudes(pattern):
    W, H = weights(32, 64), hessian(inputs(64, 4000, seed=0))
    held_out = inputs(64, 1000, seed=5)
    ours, _ = prune_obs(W, H, pattern, 16, PERCDAMP)
    theirs, _ = prune_magnitude(W, pattern)
    assert error(ours, W, held_out) < 0.5 * error(theirs, W, held_out)


def test_the_update_beats_its_own_mask_without_one():
    W, H = weights(32, 64), hessian(inputs(64, 4000, seed=0))
    held_out = inputs(64, 1000, seed=5)
    new, mask = prune_obs(W, H, Unstructured(0.5), 16, PERCDAMP)
    assert error(new, W, held_out) < error(W.masked_fill(mask, 0), W, held_out)


def indefinite(lowest: float) -> torch.Tensor:
    """(8,8) with mean diagonal 1 and one eigenvalue `lowest`."""
    basis, _ = torch.linalg.qr(weights(8, 8))
    rest = (8 - lowest) / 7
    return basis @ torch.diag(torch.tensor([lowest] + [rest] * 7, dtype=torch.float64)) @ basis.T


@pytest.mark.parametrize(("lowest", "percdamp", "warnings"), [(-0.05, 0.1, 1), (-0.5, 1.0, 2), (-5.0, 10.0, 3)])
def test_an_indefinite_hessian_is_damped_harder_with_a_warning(lowest, percdamp, warnings, caplog):
    W, H = weights(5, 8), indefinite(lowest)
    with caplog.at_level(logging.WARNING):
        new, mask = prune_obs(W, H, Unstructured(0.5), 128, PERCDAMP, "backbone.layers.3.mixer.x_proj.weight")
    assert [record.levelname for record in caplog.records] == ["WARNING"] * warnings
    assert all("backbone.layers.3.mixer.x_proj.weight" in record.getMessage() for record in caplog.records)
    torch.testing.assert_close(new, literal_update(W, H, mask, percdamp), atol=1e-5, rtol=0)


def test_after_four_tries_the_error_names_the_module(caplog):
    with pytest.raises(SolverError, match=r"layers.3.mixer.x_proj.weight"):
        prune_obs(weights(5, 8), indefinite(-50.0), Unstructured(0.5), name="layers.3.mixer.x_proj.weight")
    assert len(caplog.records) == 3


def test_a_hessian_that_is_not_finite_is_an_error():
    H = torch.eye(8)
    H[2, 3] = H[3, 2] = float("nan")
    with pytest.raises(SolverError, match="in_proj"):
        prune_obs(weights(5, 8), H, Unstructured(0.5), name="in_proj")


def test_only_the_matrices_that_need_it_are_damped_harder():
    W = weights(2, 5, 8)
    H = torch.stack([hessian(inputs(8, 40)), indefinite(-0.05)])
    new, mask = prune_obs(W, H, Unstructured(0.5), 128, PERCDAMP)
    torch.testing.assert_close(new[0], literal_update(W[0], H[0], mask[0], 0.01), atol=1e-5, rtol=0)
    torch.testing.assert_close(new[1], literal_update(W[1], H[1], mask[1], 0.1), atol=1e-5, rtol=0)


def test_magnitude_zeroes_the_smallest_and_touches_nothing_else():
    W = torch.tensor([[3.0, -1.0, 2.0], [-0.5, 4.0, -2.5]])
    new, mask = prune_magnitude(W, Unstructured(0.5))
    assert mask.tolist() == [[False, True, True], [True, False, False]]
    assert new.tolist() == [[3.0, 0.0, 0.0], [0.0, 4.0, -2.5]]


@pytest.mark.parametrize("per_row_norms", [False, True])
@pytest.mark.parametrize("sparsity", [0.25, 0.5, 0.6])
def test_wanda_compares_within_each_output_row(sparsity, per_row_norms):
    W = weights(6, 10).float()
    squared = weights(6, 10, seed=2).square() if per_row_norms else weights(10, seed=2).square()
    new, mask = prune_wanda(W, squared, Unstructured(sparsity))
    for r in range(6):
        norms = squared[r] if per_row_norms else squared
        scores = [abs(float(W[r, j])) * float(norms[j]) ** 0.5 for j in range(10)]
        chosen = sorted(range(10), key=lambda j: scores[j])[: round(sparsity * 10)]
        assert mask[r].nonzero().flatten().tolist() == sorted(chosen)
    assert torch.equal(new, torch.where(mask, 0, W))


def test_wanda_with_n_of_m():
    W, squared = weights(6, 12).float(), weights(12, seed=2).square()
    _, mask = prune_wanda(W, squared, NofM(2, 4))
    scores = (W.double().abs() * squared.sqrt()).view(6, 3, 4)
    order = scores.argsort(-1)[..., :2]
    assert torch.equal(mask.view(6, 3, 4), torch.zeros(6, 3, 4, dtype=torch.bool).scatter(-1, order, True))


def test_wanda_ignores_the_scale_of_the_norms():
    W, squared = weights(6, 10).float(), weights(10, seed=2).square()
    masks = [prune_wanda(W, squared * scale, PerRow(0.5))[1] for scale in (1e-6, 1.0, 1e6)]
    assert torch.equal(masks[0], masks[1]) and torch.equal(masks[1], masks[2])
