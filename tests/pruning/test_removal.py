"""The greedy search, and the options that ask for it."""

import random

import pytest
import torch
from transformers import MambaConfig, MambaForCausalLM

from sparsessm.commandline import parse
from sparsessm.errors import InputError
from sparsessm.models.architecture import Layout
from sparsessm.procedure.fitness import check_model
from sparsessm.procedure.plan import Plan, RemovalPlan, plan_of
from sparsessm.pruning.removal import greedy


def of_set(seed):
    """A cost for every set of removed candidates, drawn once."""
    known, rng = {}, random.Random(seed)
    return lambda removed: known.setdefault(frozenset(removed), rng.random())


def ask(cost):
    """What `greedy` takes: costs of one more removal each."""
    return lambda removed, left: {candidate: cost({*removed, candidate}) for candidate in left}


@pytest.mark.parametrize("seed", range(5))
def test_every_step_is_the_best_single_removal(seed):
    cost, found = of_set(seed), []
    for best, value in greedy(range(2, 9), ask(cost), 4):
        every = {candidate: cost({*found, candidate}) for candidate in range(2, 9) if candidate not in found}
        assert best == min(every, key=every.get) and value == every[best]
        found.append(best)
    assert len(found) == 4 and found != sorted(found, key=lambda candidate: cost({candidate}))[:4]


def test_ties_go_to_the_lowest_candidate():
    assert [c for c, _ in greedy([5, 3, 4], lambda removed, left: dict.fromkeys(left, 1.0), 3)] == [3, 4, 5]
    assert next(greedy([5, 3, 4], lambda removed, left: {5: 2.0, 3: 7.0, 4: 2.0}, 1)) == (4, 2.0)


def test_what_was_done_before_counts_and_is_not_asked_for_again():
    cost, asked = of_set(1), []

    def watched(removed, left):
        asked.append((removed, left))
        return ask(cost)(removed, left)

    whole = list(greedy(range(5), ask(cost), 3))
    (first, _), *rest = whole
    assert list(greedy(range(5), watched, 3, [first])) == rest
    assert [len(removed) for removed, _ in asked] == [1, 2]
    assert set(asked[0][1]) == set(range(5)) - {first}
    assert list(greedy(range(5), watched, 3, [candidate for candidate, _ in whole])) == [] and len(asked) == 2


def test_a_removal_is_handed_out_before_the_next_is_weighed():
    taken = []

    def cost(removed, left):
        assert list(removed) == taken
        return {candidate: -candidate for candidate in left}

    for candidate, _ in greedy(range(4), cost, 4):
        taken.append(candidate)
    assert taken == [3, 2, 1, 0]


def test_infinite_costs_lose_and_nan_is_refused():
    inf, nan = float("inf"), float("nan")
    assert next(greedy(range(3), lambda removed, left: {0: inf, 1: inf, 2: 9.0}, 1)) == (2, 9.0)
    with pytest.raises(ValueError, match="NaN"):
        next(greedy(range(2), lambda removed, left: {0: 1.0, 1: nan}, 1))


def test_more_steps_than_candidates():
    with pytest.raises(ValueError, match="3 of 2"):
        next(greedy(range(2), lambda removed, left: dict.fromkeys(left, 0.0), 3))


# --- on the command line -------------------------------------------------------------------------------------------

BASE = ["demo", "demo", "--method", "mamba-shedder"]


@pytest.mark.parametrize(
    ("argv", "target"),
    [
        (["--prune_A"], "ssm"),
        (["--prune_layers"], "mamba_block"),
        (["--prune_A", "--shed_target", "ssm"], "ssm"),
        (["--prune_layers", "--shed_target", "mamba_block"], "mamba_block"),
        (["--prune_A", "--prune_layers", "--shed_target", "mamba_block"], "mamba_block"),
    ],
)
def test_what_is_removed(argv, target):
    chosen, _ = parse([*BASE, *argv, "--sparsity", "0.5", "--pruned_transition", "unit"])
    assert plan_of(chosen, ("in_proj",)) == Plan(removal=RemovalPlan(target, 0.5, "unit"))


HALF = ["--sparsity", "0.5"]


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ([*BASE, *HALF], "give --prune_A, --prune_layers or both"),
        ([*BASE, "--prune_A"], "needs --sparsity"),
        ([*BASE, "--prune_A", "--sparsity", "1"], "must lie between 0 and 1"),
        ([*BASE, "--prune_layers", "--shed_target", "ssm", *HALF], "ssm needs --prune_A"),
        ([*BASE, "--prune_A", "--prune_layers", "--shed_target", "ssm", *HALF], "without --prune_layers"),
        ([*BASE, "--prune_A", "--prune_layers", *HALF], "give --prune_layers and --shed_target mamba_block"),
        ([*BASE, "--prune_A", "--shed_target", "mamba_block", *HALF], "give --prune_layers"),
        ([*BASE, "--prune_A", "--prunen", "2", "--prunem", "4"], "give --sparsity, not --prunen"),
        ([*BASE, "--prune_layers", *HALF, "--module", "x_proj"], "leave out --saliency"),
        ([*BASE, "--prune_A", *HALF, "--saliency", "a_log"], "leave out --saliency"),
        ([*BASE, "--prune_A", *HALF, "--shed_target", "heads"], "invalid choice"),
        (["demo", "demo", "--method", "sparsessm", "--prune_A", *HALF, "--shed_target", "ssm"], "leave out --shed_target"),
    ],
)
def test_mistakes_are_named_in_one_line(argv, says):
    with pytest.raises(InputError, match=says) as caught:
        parse(argv)
    assert "\n" not in str(caught.value)


@pytest.fixture
def three_layers():
    with torch.device("meta"):
        return Layout(MambaForCausalLM(MambaConfig(num_hidden_layers=3)))


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ([*BASE, "--prune_A", "--sparsity", "0.1"], "removes none of the 3 layers in range"),
        ([*BASE, "--prune_A", "--sparsity", "0.5", "--maxlayer", "1"], "removes none of the 1 layers in range"),
        ([*BASE, "--prune_layers", "--sparsity", "0.9"], "leaves none of the model's 3 blocks"),
    ],
)
def test_mistakes_that_the_config_shows(argv, says, three_layers):
    chosen, _ = parse(argv)
    with pytest.raises(InputError, match=says):
        check_model(chosen, three_layers)


def test_all_blocks_of_a_range_and_all_ssms_may_go(three_layers):
    assert check_model(parse([*BASE, "--prune_A", "--sparsity", "0.9"])[0], three_layers) == (0, 3)
    argv = [*BASE, "--prune_layers", "--sparsity", "0.9", "--minlayer", "1"]
    assert check_model(parse(argv)[0], three_layers) == (1, 3)
