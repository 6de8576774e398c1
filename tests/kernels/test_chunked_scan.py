"""The scan of heads: the reference against loops in plain Python, the scan in chunks against the reference in float64.

The scan in chunks gets random float32 inputs, other ones in each test and the same in every run, the reference the same
numbers in float64. Results are compared entry by entry, relative to what the terms that make an entry up come to where
none cancels another (`sizes`): TOLERANCE of that, for ordinary inputs and for extreme ones, and for each step and head
by itself, so that a small head is not hidden behind a large one. They compute on the GPU where there is one.
"""

import itertools
import math
import weakref
import zlib
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sparsessm.kernels.chunked_scan import CHUNK, HeadStatistics, chunked_scan, chunked_scan_ref

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = 2e-6
SUMS = ("h2", "abar", "hh", "ch2")  # all that the scan fills
P, N = 5, 7


@pytest.fixture
def seed(request):
    """Another one for each test, the same in every run."""
    return zlib.crc32(request.node.name.encode())


def inputs(steps, *, batch=2, groups=2, heads=2, p=P, n=N, seed=0, h0=False, D=True):
    """Arguments of a scan of groups * heads heads, float32 on the CPU."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator)

    H = groups * heads
    return {
        "u": draw(batch, steps, H, p),
        "dt": torch.nn.functional.softplus(draw(batch, steps, H) - 1),
        "A": -torch.exp(draw(H)),
        "B": draw(batch, steps, groups, n),
        "C": draw(batch, steps, groups, n),
        "D": draw(H) if D else None,
        "h0": draw(batch, H, p, n) if h0 else None,
    }


def wide(values):
    return {name: None if value is None else value.double() for name, value in values.items()}


def empty(values, by_state=False, needs=SUMS):
    """Sums for a scan of some values."""
    H, n = len(values["A"]), values["B"].shape[-1]
    return HeadStatistics.zeros(needs, values["u"].shape[1], H, n, values["u"].device, by_state=by_state)


def run(values, sums=None, **more):
    """`chunked_scan` where it computes; results, and what it adds to the sums, come back to the CPU."""
    there = {name: None if value is None else value.to(DEVICE) for name, value in values.items()}
    if sums is None:
        y, state = chunked_scan(**there, **more)
        return y.cpu(), state.cpu()
    device = {name: value.to(DEVICE) if isinstance(value, torch.Tensor) else value for name, value in vars(sums).items()}
    moved = HeadStatistics(**device)
    y, state = chunked_scan(**there, statistics=moved, **more)
    for ours, theirs in zip(sums.tensors(), moved.tensors(), strict=True):
        ours.copy_(theirs)
    return y.cpu(), state.cpu()


def sizes(values, by_state=False):
    """Bounds of the terms of every result, as if no term took anything away from another; float64.

    The norm of a column of a state is at most m_t[n] = a_t m_{t-1}[n] + dt_t |u_t| |B_t[n]|.
    """
    v = wide(values)
    (batch, steps, H), (groups, n) = v["dt"].shape, v["B"].shape[2:]
    B, C = (v[name].repeat_interleave(H // groups, 2).abs() for name in ("B", "C"))
    abar = torch.exp(v["dt"] * v["A"])
    inflow = (v["dt"] * v["u"].norm(dim=-1))[..., None] * B
    m = torch.zeros(batch, steps + 1, H, n, dtype=torch.float64)
    if v["h0"] is not None:
        m[:, 0] = v["h0"].norm(dim=2)
    for t in range(steps):
        m[:, t + 1] = abar[:, t, :, None] * m[:, t] + inflow[:, t]
    entered, left = m[:, :-1], m[:, 1:]
    y = (left * C).sum(-1)  # (B,L,H)
    if v["D"] is not None:
        y = y + v["D"].abs() * v["u"].norm(dim=-1)
    heads, h2, ch2 = entered.norm(dim=-1), entered.square().sum(0), (left * C).square().sum(0)
    sums = {"h2": h2, "abar": abar.sum(0)[..., None], "ch2": ch2}
    if not by_state:
        sums = {name: value.sum(-1)[:, None] for name, value in sums.items()}
    hh = torch.einsum("blh,blk->hk", heads, heads)
    return {"y": y[..., None], "state": left[:, -1][:, :, None], "hh": hh, **sums}


def close(found, expected, size, what):
    """Whether all is finite and no entry is farther off than a share of its size."""
    assert found.shape == expected.shape, what
    assert torch.isfinite(found).all(), f"{what} is not finite"
    share = (found.double() - expected.double()).abs() / size.clamp_min(1e-300)
    assert float(share.max()) <= TOLERANCE, f"{what}: off by {float(share.max()):.2g} of what its terms come to"


def compare(values):
    """The scan in chunks with and without sums, of heads and of states, against the reference in float64."""
    for by_state in (False, True):
        size, sums, expected = sizes(values, by_state), empty(values, by_state), empty(values, by_state)
        y, state = run(values, sums)
        expected_y, expected_state = chunked_scan_ref(**wide(values), statistics=expected)
        assert y.dtype == state.dtype == torch.float32 and expected_y.dtype == torch.float64
        close(y, expected_y, size["y"], "y")
        close(state, expected_state, size["state"], "the last state")
        for name in SUMS:
            close(getattr(sums, name), getattr(expected, name), size[name], f"{name}, by_state {by_state}")
    plain_y, plain_state = run(values)
    assert torch.equal(plain_y, y) and torch.equal(plain_state, state)  # sums change no result


# --- the reference


def by_loops(v, by_state):
    """S_t[h] = exp(dt A) S + dt u B^T and y = S C + D u, number by number, and what is summed of S."""
    (batch, steps, H, p), (groups, n) = v["u"].shape, v["B"].shape[2:]
    R = range(H)
    u, dt, A, B, C = (v[name].tolist() for name in ("u", "dt", "A", "B", "C"))
    D = [0.0] * H if v["D"] is None else v["D"].tolist()
    y = torch.zeros(batch, steps, H, p, dtype=torch.float64)
    end = torch.zeros(batch, H, p, n, dtype=torch.float64)
    h2, ch2 = (torch.zeros(steps, H, n, dtype=torch.float64) for _ in range(2))
    abar, hh = torch.zeros(steps, H, 1, dtype=torch.float64), torch.zeros(H, H, dtype=torch.float64)
    for b in range(batch):
        S = [[[0.0] * n for _ in range(p)] for _ in R] if v["h0"] is None else v["h0"][b].tolist()
        for t in range(steps):
            for h, k in itertools.product(R, R):
                hh[h, k] += sum(S[h][i][j] * S[k][i][j] for i in range(p) for j in range(n))
            for h in R:
                g = h // (H // groups)
                a = math.exp(dt[b][t][h] * A[h])
                abar[t, h, 0] += a
                for j in range(n):
                    h2[t, h, j] += sum(S[h][i][j] ** 2 for i in range(p))
                for i, j in itertools.product(range(p), range(n)):
                    S[h][i][j] = a * S[h][i][j] + dt[b][t][h] * u[b][t][h][i] * B[b][t][g][j]
                for j in range(n):
                    ch2[t, h, j] += sum((S[h][i][j] * C[b][t][g][j]) ** 2 for i in range(p))
                for i in range(p):
                    y[b, t, h, i] = sum(S[h][i][j] * C[b][t][g][j] for j in range(n)) + D[h] * u[b][t][h][i]
        end[b] = torch.tensor(S, dtype=torch.float64)
    sums = {"h2": h2, "abar": abar, "ch2": ch2}
    return y, end, {"hh": hh} | (sums if by_state else {name: value.sum(-1)[:, None] for name, value in sums.items()})


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


# --- sums


@pytest.mark.parametrize("function", [chunked_scan, chunked_scan_ref])
@pytest.mark.parametrize("by_state", [False, True])
def test_sums_are_added_to_what_is_there(function, by_state, seed):
    values = inputs(40, h0=True, seed=seed)
    once, more = empty(values, by_state), empty(values, by_state)
    for i, tensor in enumerate(more.tensors()):
        tensor.fill_(100.0 + i)
    function(**values, statistics=once)
    function(**values, statistics=more)
    for i, (a, b) in enumerate(zip(once.tensors(), more.tensors(), strict=True)):
        assert float(a.abs().max()) > 0
        torch.testing.assert_close(b, a + 100 + i, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("by_state", [False, True])
def test_a_sum_that_is_not_wanted_is_left_out_and_changes_no_other(by_state, seed):
    values = inputs(40, h0=True, seed=seed)
    every = empty(values, by_state)
    run(values, every)
    for name in SUMS:
        alone = empty(values, by_state, needs=(name,))
        run(values, alone)
        assert torch.equal(getattr(alone, name), getattr(every, name)) and len(alone.tensors()) == 1


@pytest.mark.parametrize(
    ("by_state", "shapes"),
    [(False, {"h2": (9, 1, 6), "abar": (9, 1, 6), "hh": (6, 6), "ch2": (9, 1, 6), "gram": (1, 6, 6)}),
     (True, {"h2": (9, 6, 4), "abar": (9, 6, 1), "hh": (6, 6), "ch2": (9, 6, 4), "gram": (1, 4, 4)})],
)  # fmt: skip
def test_shapes_of_sums(by_state, shapes):
    sums = HeadStatistics.zeros(tuple(shapes), 9, 6, 4, "cpu", by_state=by_state)
    assert {name: tuple(getattr(sums, name).shape) for name in shapes} == shapes
    assert [tuple(tensor.shape) for tensor in sums.tensors()] == [shapes[n] for n in HeadStatistics.FIELDS if n in shapes]
    assert all(tensor.dtype == torch.float64 for tensor in sums.tensors())


@pytest.mark.parametrize("by_state", [False, True])
def test_unknown_sums_are_named(by_state):
    with pytest.raises(ValueError, match="unknown sums h3, hc, known are h2, abar, hh, ch2, gram"):
        HeadStatistics.zeros(("h2", "h3", "ch2", "hc"), 9, 6, 4, "cpu", by_state=by_state)


def test_unknown_effects_are_refused():
    with pytest.raises(ValueError, match="unknown effect 'gone', known are zero, unit, removed"):
        HeadStatistics(effect="gone")
    with pytest.raises(ValueError, match="unknown effect 'gone'"):
        HeadStatistics.zeros(("gram",), 9, 6, 4, "cpu", effect="gone")


@pytest.mark.parametrize(
    ("needs", "effect", "needed"), [(("gram",), "unit", True), (("gram",), "zero", False), (("h2",), "unit", False)]
)
def test_a_second_recurrence_only_for_what_the_output_loses_with_A_of_minus_one(needs, effect, needed):
    assert HeadStatistics.zeros(needs, 9, 6, 4, "cpu", effect=effect).needs_counterfactual() is needed


def test_what_the_output_loses_is_not_the_scans_to_sum(seed):
    values = inputs(40, seed=seed)
    sums = empty(values, needs=("gram", "h2"))
    chunked_scan(**values, statistics=sums)
    assert not sums.gram.any() and sums.h2.any()


# --- states at the ends of chunks


@pytest.mark.parametrize("h0", [False, True])
@pytest.mark.parametrize(
    ("steps", "ends"), [(1, [0]), (5, [4]), (32, [31]), (33, [31, 32]), (64, [31, 63]), (70, [31, 63, 69])]
)
def test_states_are_shown_at_the_end_of_every_chunk(steps, ends, h0, seed):
    values, seen = inputs(steps, h0=h0, seed=seed), []
    _, last = run(values, at_chunks=lambda t, states: seen.append((t, states)))
    assert [t for t, _ in seen] == ends
    for t, states in seen:  # kept until here: a later chunk does not write over them
        until = {n: v[:, : t + 1] if n in ("u", "dt", "B", "C") else v for n, v in values.items()}
        _, expected = chunked_scan_ref(**wide(until))
        close(states.cpu(), expected, sizes(until)["state"], f"the state after step {t}")
    assert torch.equal(seen[-1][1].cpu(), last)


@pytest.mark.parametrize("by_state", [False, True])
def test_states_are_shown_once_whatever_is_summed(by_state, seed):
    """Other scans that the sums are made by show nothing."""
    values, seen = inputs(70, h0=True, seed=seed), []
    run(values, empty(values, by_state), at_chunks=lambda t, states: seen.append(t))
    assert seen == [31, 63, 69]


# --- memory


class Memory(TorchDispatchMode):
    """Notes the bytes of the largest storage that an operation makes, and of all that live at once."""

    def __init__(self):
        super().__init__()
        self.largest = self.living = self.peak = 0
        self.users = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.note(tensor)
        return out

    def note(self, tensor):
        storage = tensor.untyped_storage()
        place, size = storage.data_ptr(), storage.nbytes()
        self.largest = max(self.largest, size)
        if not self.users[place]:
            self.living += size
            self.peak = max(self.peak, self.living)
        self.users[place] += 1
        weakref.finalize(tensor, self.drop, place, size)

    def drop(self, place, size):
        self.users[place] -= 1
        if not self.users[place]:
            self.living -= size


def test_the_meter_counts_what_lives():
    with Memory() as memory:
        x = torch.zeros(1000)
        y = x[10:].view(2, -1) + 1
        del x
        z = torch.zeros(500, dtype=torch.float64)
        del y, z
    assert (memory.largest, memory.peak, memory.living) == (4000, 4000 + 3960, 0)


@pytest.mark.parametrize("p", [16, 64])
@pytest.mark.parametrize("by_state", [None, False, True], ids=["no sums", "of heads", "of states"])
def test_the_states_of_all_steps_never_exist(by_state, p, seed):
    """No tensor as large as they are in float32, and with channels and states as many as in models not all together."""
    batch, steps, groups, heads = 2, 256, 2, 2
    values = inputs(steps, batch=batch, groups=groups, heads=heads, p=p, n=p, h0=True, seed=seed)
    sums = None if by_state is None else empty(values, by_state)
    shown = 0

    def at_chunks(t, states):
        nonlocal shown
        shown += 1

    with Memory() as memory:
        chunked_scan(**values, statistics=sums, at_chunks=at_chunks)
    states = 4 * batch * steps * groups * heads * p * p
    assert shown == steps // CHUNK
    assert memory.largest <= states / 2
    if p == 64:
        assert memory.peak <= states / 2
