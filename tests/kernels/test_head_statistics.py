"""Sums over the states of heads: what they count, what they leave alone, and the memory that they take."""

import weakref
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sparsessm.kernels.chunked_scan import CHUNK, HeadStatistics, chunked_scan, chunked_scan_ref
from tests.scans_of_heads import SUMS, close, empty, inputs, run, sizes, wide

pytestmark = pytest.mark.usefixtures("kernel")


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
