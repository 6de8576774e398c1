import pytest
import torch

from sparsessm.errors import NumericalError
from sparsessm.pruning.patterns import Columns, NofM, PerRow, Unstructured, lowest


def first_lowest(scores: list[float], k: int) -> list[bool]:
    """The k lowest by a stable sort: of equals, the ones that come first."""
    chosen = set(sorted(range(len(scores)), key=lambda i: scores[i])[:k])
    return [i in chosen for i in range(len(scores))]


def with_ties(*shape: int, values: int, seed: int) -> torch.Tensor:
    return torch.randint(values, shape, generator=torch.Generator().manual_seed(seed)).float()


@pytest.mark.parametrize("values", [1, 2, 5, 1000])
@pytest.mark.parametrize("sparsity", [0.0, 0.013, 0.25, 0.5, 0.77, 1.0])
def test_unstructured_takes_exactly_the_lowest_and_of_equals_the_first(values, sparsity):
    for seed in range(5):
        scores = with_ties(7, 9, values=values, seed=seed)
        mask = Unstructured(sparsity)(scores)
        assert mask.dtype == torch.bool and mask.shape == scores.shape
        assert int(mask.sum()) == round(sparsity * 63)
        assert mask.flatten().tolist() == first_lowest(scores.flatten().tolist(), round(sparsity * 63))


def test_all_equal_scores_go_in_flat_index_order():
    mask = Unstructured(0.5)(torch.full((3, 4), 2.5))
    assert mask.tolist() == [[True] * 4, [True, True, False, False], [False] * 4]


def test_ties_at_the_threshold_only_fill_the_count():
    scores = torch.tensor([[3.0, 1.0, 2.0, 2.0], [2.0, 0.0, 2.0, 9.0]])
    assert Unstructured(0.5)(scores).tolist() == [[False, True, True, True], [False, True, False, False]]


def test_negative_zero_and_zero_are_equal():
    assert lowest(torch.tensor([0.0, -0.0, 0.0, -0.0]), 2).tolist() == [True, True, False, False]
    assert lowest(torch.tensor([1.0, 0.0, -0.0, -0.0]), 2).tolist() == [False, True, True, False]


def test_infinite_scores_are_ordered_too():
    inf = float("inf")
    assert lowest(torch.tensor([inf, 1.0, inf, -inf, inf]), 3).tolist() == [True, True, False, True, False]


@pytest.mark.parametrize(
    "pattern", [Unstructured(0.4), PerRow(0.4), NofM(2, 4), NofM(1, 2), Columns(0.4)], ids=lambda pattern: repr(pattern)
)
def test_a_batch_is_chosen_slice_by_slice(pattern):
    scores = with_ties(2, 3, 5, 8, values=4, seed=3)
    batched = pattern(scores)
    for i in range(2):
        for j in range(3):
            assert torch.equal(batched[i, j], pattern(scores[i, j]))


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.9])
def test_per_row_takes_the_same_number_of_every_row(sparsity):
    scores = with_ties(6, 11, values=3, seed=0)
    mask = PerRow(sparsity)(scores)
    for row, chosen in zip(scores, mask, strict=True):
        assert chosen.tolist() == first_lowest(row.tolist(), round(sparsity * 11))


@pytest.mark.parametrize(("n", "m"), [(1, 2), (2, 4), (3, 4), (1, 4), (4, 8), (2, 3)])
def test_n_of_m_takes_the_n_lowest_of_every_group(n, m):
    scores = with_ties(5, 24, values=3, seed=n)
    groups, chosen = scores.view(-1, m), NofM(n, m)(scores).view(-1, m)
    for group, mask in zip(groups, chosen, strict=True):
        assert mask.tolist() == first_lowest(group.tolist(), n)


def test_n_of_m_refuses_columns_that_m_does_not_divide():
    with pytest.raises(ValueError, match="4 does not divide 10"):
        NofM(2, 4)(torch.zeros(3, 10))


@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.8])
def test_columns_takes_whole_columns_with_the_lowest_sum(sparsity):
    scores = with_ties(6, 16, values=50, seed=2)
    mask = Columns(sparsity)(scores)
    expected = first_lowest([float(scores[:, j].sum()) for j in range(16)], round(sparsity * 16))
    assert mask.shape == scores.shape
    for row in mask:
        assert row.tolist() == expected


def test_columns_that_are_equal_go_from_the_left():
    assert Columns(0.5)(torch.ones(3, 4))[0].tolist() == [True, True, False, False]


def test_nothing_and_everything_can_be_chosen():
    scores = with_ties(4, 6, values=9, seed=0)
    for pattern in (Unstructured, PerRow, Columns):
        assert not pattern(0.0)(scores).any()
        assert pattern(1.0)(scores).all()
    assert not lowest(scores, 0).any() and lowest(scores, 6).all()


@pytest.mark.parametrize("pattern", [Unstructured(0.5), PerRow(0.5), NofM(2, 4), Columns(0.5)], ids=lambda p: repr(p))
def test_nan_is_an_error_and_never_a_choice(pattern):
    with pytest.raises(NumericalError, match="NaN"):
        pattern(torch.full((4, 8), float("nan")))
    one = torch.rand(4, 8)
    one[2, 3] = float("nan")
    with pytest.raises(NumericalError, match="NaN"):
        pattern(one)
