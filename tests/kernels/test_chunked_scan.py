"""The scan of heads: the reference against loops in plain Python, the scan in chunks against the reference in float64.

The scan in chunks gets random float32 inputs, other ones in each test and the same in every run, the reference the same
numbers in float64. Results are compared entry by entry, relative to what the terms that make an entry up come to where
none cancels another (`sizes`): TOLERANCE of that, for ordinary inputs and for extreme ones, and for each step and head
by itself, so that a small head is not hidden behind a large one. They compute on the GPU where there is one.
"""

import math

import pytest
import torch

from sparsessm.kernels.chunked_scan import CHUNK, chunked_scan, chunked_scan_ref
from tests.scans_of_heads import P, by_loops, close, compare, empty, inputs, run, sizes, wide

pytestmark = pytest.mark.usefixtures("kernel")


@pytest.mark.parametrize("by_state", [False, True])
@pytest.mark.parametrize(("h0", "D"), [(False, True), (True, False), (True, True)])
@pytest.mark.parametrize(("groups", "heads"), [(1, 2), (2, 1), (2, 2)])
def test_the_reference_is_the_formula(groups, heads, h0, D, by_state, seed):
    values = wide(inputs(4, groups=groups, heads=heads, p=2, n=3, h0=h0, D=D, seed=seed))
    sums = empty(values, by_state)
    y, state = chunked_scan_ref(**values, statistics=sums)
    expected_y, expected_state, expected = by_loops(values, by_state)
    torch.testing.assert_close(y, expected_y, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(state, expected_state, rtol=1e-12, atol=1e-12)
    for name, value in expected.items():
        torch.testing.assert_close(getattr(sums, name), value, rtol=1e-12, atol=1e-12)


def test_the_first_step_by_hand():
    """One head, one channel, one state: S = e^{-1} 5 + 0.5 3 2, y = 4 S + 7 3; the state that enters is 5."""
    one = {"u": 3.0, "dt": 0.5, "A": -2.0, "B": 2.0, "C": 4.0, "D": 7.0, "h0": 5.0}
    axes = {"u": 4, "dt": 3, "A": 1, "B": 4, "C": 4, "D": 1, "h0": 4}
    values = {name: torch.full((1,) * axes[name], value) for name, value in one.items()}
    S = math.exp(-1) * 5 + 3
    for function in (chunked_scan_ref, chunked_scan):
        sums = empty(values, by_state=True)
        y, state = function(**values, statistics=sums)
        assert float(state) == pytest.approx(S, rel=1e-6) and float(y) == pytest.approx(4 * S + 21, rel=1e-6)
        assert [float(value) for value in sums.tensors()] == pytest.approx([25, math.exp(-1), 25, 16 * S * S], rel=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_reference_computes_in_float32_for_all_but_float64(dtype):
    values = inputs(3)
    values["u"] = values["u"].to(dtype)
    y, state = chunked_scan_ref(**values)
    assert y.dtype == state.dtype == torch.float32
    expected, _ = chunked_scan_ref(**wide(values))
    close(y, expected, sizes(values)["y"], "y")


def test_float64_inputs_go_to_the_reference():
    values = wide(inputs(40, h0=True))
    sums, expected = empty(values), empty(values)
    found, theirs = chunked_scan(**values, statistics=sums), chunked_scan_ref(**values, statistics=expected)
    assert all(torch.equal(a, b) for a, b in zip(found, theirs, strict=True))
    assert all(torch.equal(a, b) for a, b in zip(sums.tensors(), expected.tensors(), strict=True))
    with pytest.raises(ValueError, match="does not stop at chunks"):
        chunked_scan(**values, at_chunks=lambda t, states: None)


# --- the scan in chunks


@pytest.mark.parametrize("D", [True, False], ids=["D", "no D"])
@pytest.mark.parametrize("h0", [True, False], ids=["h0", "no h0"])
@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("heads", [1, 3])
@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("steps", [1, 31, 32, 33, 70])
def test_chunks_are_the_reference(steps, groups, heads, batch, h0, D, seed):
    assert CHUNK == 32  # the steps above lie around its multiples
    compare(inputs(steps, batch=batch, groups=groups, heads=heads, h0=h0, D=D, seed=seed))


@pytest.mark.parametrize(("p", "n"), [(1, 1), (1, 16), (16, 1), (64, 3)])
def test_channels_and_states_of_any_number(p, n, seed):
    compare(inputs(45, p=p, n=n, h0=True, seed=seed))


def test_inputs_may_be_views_and_of_another_dtype(seed):
    """As the mixer gives them: parts of one projection in bfloat16; what comes out is float32 and not rounded to it."""
    H, groups, n, steps = 4, 2, 8, 50
    mixed = torch.randn(3, steps, H * P + 2 * groups * n, generator=torch.Generator().manual_seed(seed)).bfloat16()
    u, B, C = mixed.split([H * P, groups * n, groups * n], dim=-1)
    values = inputs(steps, batch=3, n=n, seed=seed, h0=True) | {
        "u": u.unflatten(-1, (H, P)), "B": B.unflatten(-1, (groups, n)), "C": C.unflatten(-1, (groups, n)),
    }  # fmt: skip
    assert not values["u"].is_contiguous()
    compare(values)


def test_inputs_are_left_as_they_are(seed):
    values = inputs(40, h0=True, seed=seed)
    before = {name: value.clone() for name, value in values.items()}
    chunked_scan(**values, statistics=empty(values, by_state=True))
    chunked_scan(**values, statistics=empty(values))
    assert all(torch.equal(values[name], before[name]) for name in values)


@pytest.mark.parametrize("by_state", [False, True])
@pytest.mark.parametrize("h0", [False, True])
@pytest.mark.parametrize("cut", [1, 20, 32, 35, 69])
def test_two_pieces_with_the_state_between_them_make_the_whole(cut, h0, by_state, seed):
    values = inputs(70, batch=3, h0=h0, seed=seed)
    size, whole = sizes(values, by_state), empty(values, by_state)
    y, state = chunked_scan_ref(**wide(values), statistics=whole)
    parts, sums, between = [], [], values["h0"]
    for part in (slice(cut), slice(cut, None)):
        piece = {n: v[:, part] if n in ("u", "dt", "B", "C") else v for n, v in values.items()} | {"h0": between}
        sums.append(empty(piece, by_state))
        out, between = run(piece, sums[-1])
        parts.append(out)
    close(torch.cat(parts, 1), y, size["y"], "y")
    close(between, state, size["state"], "the last state")
    close(sums[0].hh + sums[1].hh, whole.hh, size["hh"], "hh")
    for name in ("h2", "abar", "ch2"):
        close(torch.cat([getattr(s, name) for s in sums]), getattr(whole, name), size[name], name)


@pytest.mark.parametrize("by_state", [False, True])
def test_the_last_sum_and_the_first_of_the_next_piece_meet(by_state, seed):
    """h2 is of the state that enters a step: that of the first one is |h0|^2, and zero without."""
    for h0 in (True, False):
        values = inputs(33, h0=h0, seed=seed)
        sums = empty(values, by_state)
        run(values, sums)
        if h0:
            entered = values["h0"].double().square().sum((0, 2))
            torch.testing.assert_close(sums.h2[0], entered if by_state else entered.sum(-1)[None], rtol=1e-12, atol=0)
        else:
            assert not sums.h2[0].any() and sums.h2[1:].all()


# --- extreme values


def extreme(case, seed):
    """70 steps of 6 heads in 2 groups, with one kind of numbers out of the ordinary."""
    values = inputs(70, batch=2, groups=2, heads=3, h0=True, seed=seed)
    u, dt, A = values["u"], values["dt"], values["A"]
    chosen = torch.rand(dt.shape, generator=torch.Generator().manual_seed(seed + 1))
    if case == "no time passes":
        dt.zero_()
    elif case == "no time passes at some steps":
        dt[chosen < 0.4] = 0
    elif case == "all forgotten at some steps":
        dt[chosen < 0.2] = 1e4
    elif case == "all forgotten by far at some steps":
        dt[chosen < 0.2] = 1e13
    elif case == "all forgotten at every step":
        dt.fill_(1e4)
    elif case == "nothing forgotten":
        A.fill_(-1e-8)
    elif case == "A of -1e4":
        A.fill_(-1e4)
        dt[chosen < 0.5] = 1e-5
        dt[chosen < 0.2] = 0
    elif case == "transitions that are pruned":
        A[::2] = -math.exp(30)
        dt[chosen < 0.2] = 0
    elif case == "large inputs":
        for name in ("u", "B", "C", "h0"):
            values[name] *= 1e3
    elif case == "small inputs":
        for name in ("u", "B", "C", "h0"):
            values[name] *= 1e-6
    elif case == "heads of all sizes":
        A.copy_(-torch.tensor([1e-8, 1e4, 1e-3, 1.0, 1e4, 1e-8]))
        u *= torch.tensor([1e3, 1e-3, 1.0, 1e-3, 1e3, 1e-3])[:, None]
        dt[chosen < 0.1] = 1e3
        dt[chosen > 0.9] = 0
    return values


@pytest.mark.parametrize(
    "case",
    ["no time passes", "no time passes at some steps", "all forgotten at some steps", "all forgotten by far at some steps",
     "all forgotten at every step", "nothing forgotten", "A of -1e4", "transitions that are pruned", "large inputs",
     "small inputs", "heads of all sizes"],
)  # fmt: skip
def test_extreme_values(case, seed):
    """Finite, and right to TOLERANCE like any other."""
    compare(extreme(case, seed))


def test_where_no_time_passes_the_state_stays_to_the_bit(seed):
    values = extreme("no time passes", seed)
    sums = empty(values)
    _, state = run(values, sums)
    assert torch.equal(state, values["h0"])
    assert torch.equal(sums.h2, sums.h2[:1].expand_as(sums.h2)) and (sums.abar == 2).all()


def test_where_all_is_forgotten_only_the_last_input_counts(seed):
    """exp(dt A) is below the smallest number: S_t = dt u B^T."""
    values = extreme("all forgotten at every step", seed)
    sums = empty(values)
    _, state = run(values, sums)
    assert float(sums.abar.max()) < 1e-300
    B = values["B"].double().repeat_interleave(3, 2)
    left = (1e4 * values["u"].double())[..., None] * B[..., None, :]
    torch.testing.assert_close(state.double(), left[:, -1], rtol=1e-6, atol=0)
    torch.testing.assert_close(sums.h2[1:, 0], left[:, :-1].square().sum((0, 3, 4)), rtol=1e-6, atol=0)


def test_squares_that_all_but_vanish_are_not_negative(seed):
    """Each second step takes away what the one before it has put in, and the recurrence over numbers ends near zero."""
    values = inputs(64, seed=seed)
    values["A"].fill_(-1e-8)
    for name in ("u", "dt", "B"):
        values[name][:, 1::2] = values[name][:, ::2]
    values["u"][:, 1::2] *= -1
    for by_state in (False, True):
        sums = empty(values, by_state)
        run(values, sums)
        between = sums.h2[1::2].mean()
        assert float(sums.h2.min()) >= 0 and float(sums.h2[2::2].max()) < 1e-4 * float(between)


