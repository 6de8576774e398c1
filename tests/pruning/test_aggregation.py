import math

import pytest
import torch

from sparsessm.pruning.aggregation import WEIGHTS, Aggregator, time_weights
from sparsessm.pruning.methods import AGGREGATES
from sparsessm.pruning.patterns import Columns, NofM, Unstructured

L, D, N = 11, 3, 8


@pytest.fixture
def scores():
    """(L,D,N) whose first step is zero, as no state enters it, and whose steps differ much in scale."""
    generator = torch.Generator().manual_seed(0)
    values = torch.rand(L, D, N, generator=generator) * torch.logspace(-3, 3, L)[:, None, None]
    values[0] = 0
    return values


def lowest_first(values: list[float], k: int) -> list[int]:
    return sorted(range(len(values)), key=lambda i: values[i])[:k]


def entries_to_go(step: torch.Tensor, rule: str) -> set[tuple[int, int]]:
    """What each pattern chooses of one (D,N), in plain Python: half of the entries, 2 of 4, or 3 of 8 columns."""
    if rule == "entries":
        return {divmod(i, N) for i in lowest_first(step.flatten().tolist(), 12)}
    if rule == "n:m":
        groups = [(d, start) for d in range(D) for start in (0, 4)]
        return {(d, a + i) for d, a in groups for i in lowest_first(step[d, a : a + 4].tolist(), 2)}
    columns = lowest_first([float(step[:, n].sum()) for n in range(N)], 3)
    return {(d, n) for d in range(D) for n in columns}


PATTERNS = {"entries": Unstructured(0.5), "n:m": NofM(2, 4), "columns": Columns(3 / 8)}


@pytest.mark.parametrize("rule", PATTERNS)
def test_vote_is_a_count_of_choices_step_by_step(scores, rule):
    aggregator = Aggregator("vote", L, PATTERNS[rule])
    aggregator.update(scores, 0)

    votes = torch.zeros(D, N)
    for t in range(1, L):  # the first step has no vote
        for d, n in entries_to_go(scores[t], rule):
            votes[d, n] += 1
    assert torch.equal(aggregator.scores(), -votes)

    mask = PATTERNS[rule](aggregator.scores())
    assert {tuple(index) for index in mask.nonzero().tolist()} == entries_to_go(-votes, rule)


def test_vote_by_hand():
    """Each step chooses one of four; ties of the count go to the lower index."""
    steps = torch.tensor([[0, 0, 0, 0], [3, 1, 2, 9], [3, 2, 1, 9], [1, 2, 3, 9], [9, 8, 7, 6]]).float().view(5, 1, 4)
    aggregator = Aggregator("vote", 5, Unstructured(0.25))
    aggregator.update(steps, 0)
    assert aggregator.scores().tolist() == [[-1, -1, -1, -1]]
    assert Unstructured(0.25)(aggregator.scores()).tolist() == [[True, False, False, False]]


def test_vote_weighs_no_step_by_its_scale(scores):
    plain, scaled = (Aggregator("vote", L, Unstructured(0.5)) for _ in range(2))
    plain.update(scores, 0)
    scaled.update(scores * torch.linspace(1, 100, L)[:, None, None], 0)
    assert torch.equal(plain.scores(), scaled.scores())


@pytest.mark.parametrize("size", [1, 2, 3, 5, 11])
@pytest.mark.parametrize("rule", AGGREGATES)
def test_pieces_make_the_whole(scores, rule, size):
    whole, pieces = (Aggregator(rule, L, Unstructured(0.5)) for _ in range(2))
    whole.update(scores, 0)
    for start in range(0, L, size):
        pieces.update(scores[start : start + size], start)
    if rule == "vote":
        assert torch.equal(pieces.scores(), whole.scores())
    torch.testing.assert_close(pieces.scores(), whole.scores())


def test_many_steps_are_voted_on_in_chunks(scores, monkeypatch):
    import sparsessm.pruning.aggregation as module

    whole, chunked = (Aggregator("vote", L, NofM(2, 4)) for _ in range(2))
    whole.update(scores, 0)
    monkeypatch.setattr(module, "_VOTE_ELEMENTS", 2 * D * N)
    chunked.update(scores, 0)
    assert torch.equal(chunked.scores(), whole.scores())


CLOSED = {
    ("sum", None): lambda t, length: 1,
    ("power", None): lambda t, length: (t + 1) ** -1.0,
    ("power", 0.5): lambda t, length: (t + 1) ** -0.5,
    ("discount", None): lambda t, length: 0.9**t,
    ("discount", 0.3): lambda t, length: 0.3**t,
    ("linear", None): lambda t, length: length - t,
    ("window", None): lambda t, length: 1 if t < math.ceil(0.25 * length) else 0,
    ("window", 0.6): lambda t, length: 1 if t < math.ceil(0.6 * length) else 0,
}


@pytest.mark.parametrize("length", [1, 2, 7, 12])
@pytest.mark.parametrize(("rule", "parameter"), CLOSED)
def test_time_weights_follow_their_formula(rule, parameter, length):
    raw = [CLOSED[rule, parameter](t, length) for t in range(length)]
    weights = time_weights(rule, length, parameter)
    assert weights.shape == (length,)
    assert weights.tolist() == pytest.approx([value / sum(raw) for value in raw], rel=1e-12)
    assert float(weights.sum()) == pytest.approx(1.0, abs=1e-12)


@pytest.mark.parametrize("rule", [rule for rule in AGGREGATES if rule != "vote"])
def test_weighted_rules_sum_over_time(scores, rule):
    aggregator = Aggregator(rule, L, Unstructured(0.5))
    aggregator.update(scores, 0)
    expected = sum(weight * scores[t].double() for t, weight in enumerate(time_weights(rule, L)))
    torch.testing.assert_close(aggregator.scores(), expected.float())


def test_every_rule_of_the_specification_is_there():
    assert set(AGGREGATES) == {"vote", *WEIGHTS} == {"vote", "sum", "power", "discount", "linear", "window"}
    with pytest.raises(ValueError, match="unknown aggregate 'median', known are vote, sum"):
        time_weights("median", 3)
