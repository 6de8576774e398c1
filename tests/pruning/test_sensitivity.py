import numpy as np
import pytest
import torch

from sparsessm.pruning.sensitivity import sensitivity, sparsities, spread


def by_hand(scores, p, alpha):
    """The rule for a group, written as what each module keeps, from the least to the most sensitive."""
    m = len(scores)
    n = min(24, m // 2)
    order = sorted(range(m), key=lambda i: scores[i])
    keep = [1 - p] * m
    for rank in range(n):
        share = rank / (n - 1) if n > 1 else 0.5
        keep[order[rank]] = (1 - p - alpha) + share * alpha
        keep[order[m - n + rank]] = (1 - p) + share * alpha
    return [1 - value for value in keep]


@pytest.mark.parametrize("m", [1, 2, 3, 5, 6, 24, 47, 48, 49, 60])
def test_spread_follows_the_rule_and_keeps_the_mean(m):
    scores = np.random.default_rng(m).permutation(m) * 1.7 + 3
    result = spread(scores.tolist(), 0.5, 0.04)
    assert result == pytest.approx(by_hand(scores.tolist(), 0.5, 0.04), abs=1e-12)
    assert sum(result) / m == pytest.approx(0.5, abs=1e-12)


def test_spread_of_small_groups_by_hand():
    assert spread([7.0], 0.5, 0.1) == pytest.approx([0.5])
    assert spread([7.0, 3.0], 0.5, 0.1) == pytest.approx([0.45, 0.55])
    assert spread([2.0, 1.0, 3.0], 0.5, 0.1) == pytest.approx([0.5, 0.55, 0.45])
    assert spread([1.0, 2.0, 3.0, 4.0, 5.0], 0.6, 0.1) == pytest.approx([0.7, 0.6, 0.6, 0.6, 0.5])


def test_spread_of_24_layers_moves_twelve_each_way():
    result = spread([float(i) for i in range(24)], 0.5, 0.11)
    assert result[:12] == pytest.approx([0.61 - 0.01 * i for i in range(12)])
    assert result[12:] == pytest.approx([0.5 - 0.01 * i for i in range(12)])


def test_spread_of_60_layers_leaves_the_middle_alone():
    result = spread([float(i) for i in range(60)], 0.5, 0.23)
    assert result[0] == pytest.approx(0.73) and result[23] == pytest.approx(0.5)
    assert result[24:36] == pytest.approx([0.5] * 12)
    assert result[36] == pytest.approx(0.5) and result[59] == pytest.approx(0.27)


def test_the_more_sensitive_keep_more():
    scores = np.random.default_rng(0).random(30).tolist()
    result = spread(scores, 0.5, 0.2)
    assert [result[i] for i in np.argsort(scores)] == sorted(result, reverse=True)


def test_equal_scores_are_ranked_in_layer_order():
    assert spread([1.0] * 4, 0.5, 0.1) == pytest.approx([0.6, 0.5, 0.5, 0.4])


def test_sensitivity_is_the_mean_square_of_the_diagonal():
    assert sensitivity(torch.tensor([1.0, 2.0, 3.0])) == pytest.approx(14 / 3)


def test_sensitivity_does_not_overflow_float32():
    assert sensitivity(torch.full((4,), 1e25)) == pytest.approx(1e50)


def test_groups_are_ranked_among_their_own_kind():
    scores = {(0, "in_proj"): 100.0, (1, "in_proj"): 200.0, (0, "out_proj"): 2.0, (1, "out_proj"): 1.0}
    result = sparsities(scores, 0.5, 0.1)
    assert result == pytest.approx(
        {(0, "in_proj"): 0.55, (1, "in_proj"): 0.45, (0, "out_proj"): 0.45, (1, "out_proj"): 0.55}
    )


def test_layers_are_ranked_by_number_and_not_by_name():
    scores = {(layer, "in_proj"): float(layer) for layer in reversed(range(12))}
    result = sparsities(scores, 0.5, 0.05)
    assert result[0, "in_proj"] == pytest.approx(0.55) and result[11, "in_proj"] == pytest.approx(0.45)


def test_only_in_proj_and_out_proj_move():
    assert sparsities({(0, "in_proj"): 1.0}, 0.5, 0.1) == {(0, "in_proj"): 0.5}
    assert (0, "x_proj") not in sparsities({(0, "in_proj"): 1.0}, 0.5, 0.1)
