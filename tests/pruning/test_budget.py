"""A budget over parts: its mean, its bounds, and that no exchange between two parts would lower the error."""

import numpy as np
import pytest

from sparsessm.pruning.budget import MEASURED_AT, budget, error_curve, in_whole_entries


def parts(seed=0, count=6):
    draw = np.random.default_rng(seed)
    found = {}
    for i in range(count):
        growth = draw.uniform(3, 9)
        scale = 10 ** draw.uniform(-3, 0)
        found[i, "part"] = (int(draw.integers(100, 5000)), [scale * np.exp(growth * p) for p in MEASURED_AT])
    return found


def mean(found, sizes):
    return sum(found[key] * sizes[key][0] for key in sizes) / sum(size for size, _ in sizes.values())


def test_curve_goes_through_what_was_measured_and_grows():
    curve = error_curve([0.1, 0.2, 0.9])
    assert curve[[80, 120, 160]] == pytest.approx([0.1, 0.2, 0.9])
    assert curve[0] == 0 and (np.diff(curve) > 0).all()
    assert curve[40] == pytest.approx(0.1 / 8)  # half the sparsity below the first: an eighth
    assert curve[180] == pytest.approx(0.9 * 4.5**0.5)  # logarithms continue in a line: half a step of 0.2 to 0.9


@pytest.mark.parametrize("sparsity", [0.05, 0.3, 0.5, 0.8, 0.95])
@pytest.mark.parametrize("seed", range(3))
def test_mean_and_bounds(seed, sparsity):
    sizes = parts(seed)
    found = budget(sizes, sparsity)
    assert found.keys() == sizes.keys()
    assert mean(found, sizes) == pytest.approx(sparsity)
    assert all(sparsity / 2 - 1e-9 <= p <= (1 + sparsity) / 2 + 1e-9 for p in found.values())


def test_no_exchange_lowers_the_error():
    sizes = parts(1)
    found = budget(sizes, 0.5)
    at = np.arange(201) * 0.005

    def error(shares):
        return sum(np.interp(shares[key], at, error_curve(sizes[key][1])) for key in sizes)

    best = error(found)
    for one in sizes:
        for other in sizes:
            step = 0.02 * min(sizes[one][0], sizes[other][0])
            moved = {**found, one: found[one] + step / sizes[one][0], other: found[other] - step / sizes[other][0]}
            if one != other and moved[one] <= 0.75 and moved[other] >= 0.25:
                assert error(moved) >= best * (1 - 1e-6)


def test_parts_that_cost_the_same_give_the_same():
    found = budget({"a": (100, [0.1, 0.3, 0.9]), "b": (100, [0.1, 0.3, 0.9])}, 0.5)
    assert found["a"] == pytest.approx(found["b"], abs=0.01)


def test_the_part_that_costs_less_gives_more():
    found = budget({"dear": (1000, [1.0, 3.0, 9.0]), "cheap": (1000, [0.01, 0.03, 0.09])}, 0.5)
    assert found["cheap"] > found["dear"]


def test_parts_of_a_handful_of_entries_add_up_to_the_whole():
    """Six layers of 12 heads: rounded one by one they would give 34 of 36."""
    shares = dict(enumerate([0.29, 0.29, 0.705, 0.62, 0.37, 0.725]))
    sizes = dict.fromkeys(shares, 12)
    found = in_whole_entries(sizes, shares)
    assert sum(round(shares[i] * 12) for i in shares) == 34
    assert [round(found[i] * 12) for i in shares] == [4, 4, 8, 7, 4, 9]
    assert all(abs(found[i] - shares[i]) < 1 / 12 for i in shares)


def test_large_parts_keep_their_shares():
    shares = {"a": 0.50001, "b": 0.49999, "c": 0.50004}
    assert in_whole_entries(dict.fromkeys(shares, 6144), shares) == shares
