"""Sets of interacting entries: costs by hand, greedy step by step, and the optimum by trying everything."""

import itertools

import pytest
import torch

from sparsessm.pruning.patterns import Columns, NofM, Unstructured
from sparsessm.pruning.search import SEARCHES, marginal_costs, select, set_cost


def gram(D: int, N: int, seed: int = 0, rank: int = 3) -> torch.Tensor:
    g = torch.Generator().manual_seed(seed)
    e = torch.randn(D, rank, N, generator=g, dtype=torch.float64) * torch.rand(D, 1, N, generator=g, dtype=torch.float64)
    return e.mT @ e + 0.01 * torch.eye(N, dtype=torch.float64)


def cost(G, mask):
    return float(set_cost(G, mask).sum())


def literal_greedy(G, k):
    mask = torch.zeros(G.shape[:2], dtype=torch.bool)
    for _ in range(k):
        best = min(
            ((d, n) for d, n in itertools.product(*map(range, mask.shape)) if not mask[d, n]),
            key=lambda at: float(G[at[0], at[1], at[1]] + 2 * G[at[0], at[1], mask[at[0]]].sum()),
        )
        mask[best] = True
    return mask


def test_cost_of_a_set_is_the_square_of_its_summed_errors():
    g = torch.Generator().manual_seed(0)
    e = torch.randn(4, 9, 5, generator=g, dtype=torch.float64)  # (D,tokens,N)
    mask = torch.rand(4, 5, generator=g) < 0.5
    expected = (e * mask[:, None]).sum(-1).square().sum(-1)
    torch.testing.assert_close(set_cost(e.mT @ e, mask), expected)


def test_marginal_costs_add_up_to_the_cost_of_everything():
    G = gram(5, 6)
    order, steps = marginal_costs(G)
    assert all(sorted(row.tolist()) == list(range(6)) for row in order)
    torch.testing.assert_close(steps.sum(-1), G.sum((-1, -2)))


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("share", [0.1, 0.5, 0.8])
def test_greedy_is_the_literal_one(seed, share):
    G = gram(5, 6, seed)
    assert torch.equal(select(G, Unstructured(share), "greedy"), literal_greedy(G, round(share * 30)))


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("pattern", [Unstructured(0.37), NofM(2, 4), NofM(3, 8), Columns(0.25), Columns(0.7)], ids=str)
def test_counts_are_exact(pattern, search):
    mask = select(gram(7, 16), pattern, search)
    assert mask.shape == (7, 16)
    if isinstance(pattern, Unstructured):
        assert int(mask.sum()) == round(0.37 * 7 * 16)
    elif isinstance(pattern, NofM):
        assert (mask.unflatten(-1, (-1, pattern.m)).sum(-1) == pattern.n).all()
    else:
        assert (mask == mask[0]).all() and int(mask[0].sum()) == round(pattern.sparsity * 16)


@pytest.mark.parametrize("seed", range(6))
def test_each_search_is_at_least_as_good_as_the_one_before(seed):
    for pattern in (Unstructured(0.5), NofM(2, 4), Columns(0.5)):
        G = gram(9, 8, seed)
        costs = [cost(G, select(G, pattern, search)) for search in SEARCHES]
        assert costs[3] <= costs[2] * 1.001 and costs[2] <= costs[1] * (1 + 1e-12) and costs[1] <= costs[0] * 1.05


def optimum(G, k):
    D, N = G.shape[:2]
    sets = itertools.combinations(range(D * N), k)
    return min(cost(G, torch.zeros(D * N, dtype=torch.bool).scatter_(0, torch.tensor(s), True).view(D, N)) for s in sets)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("k", [1, 4, 7])
def test_exact_is_the_optimum_of_all_sets_of_a_channel(seed, k):
    G = gram(1, 8, seed)
    assert cost(G, select(G, Unstructured(k / 8), "exact")) == pytest.approx(optimum(G, k))


@pytest.mark.parametrize("seed", range(6))
def test_exact_is_near_the_optimum_over_channels(seed):
    """On the convex hull it is the optimum; between its corners one channel may be off by a step."""
    G = gram(3, 4, seed)
    assert cost(G, select(G, Unstructured(0.5), "exact")) <= 1.3 * optimum(G, 6)


def test_exact_n_of_m_is_the_optimum():
    G = gram(1, 8)
    sets = [s for s in itertools.combinations(range(8), 4) if sum(n < 4 for n in s) == 2]
    best = min(float(G[0][list(s)][:, list(s)].sum()) for s in sets)
    assert cost(G, select(G, NofM(2, 4), "exact")) == pytest.approx(best)


def test_columns_are_the_optimum_of_all_sets():
    G = gram(6, 7)
    best = min(float(G.sum(0)[list(s)][:, list(s)].sum()) for s in itertools.combinations(range(7), 3))
    assert cost(G, select(G, Columns(3 / 7), "greedy")) == pytest.approx(best)


def test_entries_that_cancel_go_together():
    """Two states with opposite errors cost nothing together, and much alone."""
    G = torch.tensor([[[4.0, -4.0, 0.0], [-4.0, 4.0, 0.0], [0.0, 0.0, 3.0]]])
    assert select(G, Unstructured(2 / 3), "independent").tolist() == [[True, False, True]]
    assert select(G, Unstructured(2 / 3), "exchange").tolist() == [[True, True, False]]
