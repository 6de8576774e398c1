import numpy as np
import pytest
import torch

from sparsessm.layerwise.statistics import Gram, Readers, ShiftedGram, SquaredNorms, hessian

B, L, D, K = 3, 10, 4, 3


@pytest.fixture
def inputs():
    """(B,K-1+L,D): what the hook of conv1d shows at the start of a window, zeros first."""
    values = torch.randn(B, K - 1 + L, D, generator=torch.Generator().manual_seed(0))
    values[:, : K - 1] = 0
    return values


def test_gram_sums_outer_products_over_windows_and_steps(inputs):
    gram = Gram(D)
    gram.update(inputs[:2])
    gram.update(inputs[2:])
    expected = sum(np.outer(x, x) for window in inputs.double().numpy() for x in window)
    np.testing.assert_allclose(gram.total.numpy(), expected, rtol=1e-5, atol=1e-5)


def test_gram_skips_the_history_of_a_convolution(inputs):
    inputs[:, : K - 1] = 7.0
    gram = Gram(D, skip=K - 1)
    gram.update(inputs)
    x = inputs[:, K - 1 :].double().flatten(0, 1)
    torch.testing.assert_close(gram.total, x.T @ x, rtol=1e-5, atol=1e-5)


def test_squared_norms_are_the_diagonal_of_gram(inputs):
    gram, norms = Gram(D), SquaredNorms(D)
    gram.update(inputs)
    norms.update(inputs)
    torch.testing.assert_close(norms.total, gram.total.diagonal(), rtol=1e-5, atol=1e-5)


def test_shifted_gram_is_the_gram_of_each_channels_shifted_inputs(inputs):
    """Weight k meets the input K-1-k steps back, zero before the window."""
    gram = ShiftedGram(D, K)
    gram.update(inputs)
    expected = np.zeros((D, K, K))
    for window in inputs[:, K - 1 :].double().numpy():
        for d in range(D):
            for t in range(L):
                seen = [window[t - (K - 1 - k), d] if t - (K - 1 - k) >= 0 else 0.0 for k in range(K)]
                expected[d] += np.outer(seen, seen)
    np.testing.assert_allclose(gram.total.numpy(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("make", [lambda: Gram(D, skip=K - 1), lambda: ShiftedGram(D, K)], ids=["Gram", "ShiftedGram"])
def test_pieces_with_their_history_make_the_whole(inputs, make):
    whole, pieces = make(), make()
    whole.update(inputs)
    for start in range(0, L, 4):
        pieces.update(inputs[:, start : start + 4 + K - 1])
    torch.testing.assert_close(pieces.total, whole.total, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "make",
    [lambda: Gram(D), lambda: SquaredNorms(D), lambda: ShiftedGram(D, K)],
    ids=["Gram", "SquaredNorms", "ShiftedGram"],
)
def test_merge_adds_another_share_of_the_windows(inputs, make):
    whole, one, other = make(), make(), make()
    whole.update(inputs)
    one.update(inputs[:1])
    other.update(inputs[1:])
    one.merge(other)
    torch.testing.assert_close(one.total, whole.total, rtol=1e-6, atol=1e-6)


def test_sums_are_kept_in_float64_whatever_comes_in(inputs):
    for accumulator in (Gram(D), SquaredNorms(D), ShiftedGram(D, K)):
        accumulator.update(inputs.bfloat16())
        assert accumulator.total.dtype == torch.float64


def test_products_of_bfloat16_inputs_are_not_rounded_to_it():
    norms = SquaredNorms(1)
    norms.update(torch.full((1, 1000, 1), 1.0078125, dtype=torch.bfloat16))
    assert float(norms.total) == pytest.approx(1000 * 1.0078125**2, rel=1e-6)


def test_hessian_divides_by_samples_and_not_by_tokens():
    H = hessian(torch.full((2, 2), 12.0, dtype=torch.float64), nsamples=8)
    assert H.dtype == torch.float32 and H.tolist() == [[3.0, 3.0], [3.0, 3.0]]


def test_readers_share_only_what_is_one_tensor_of_one_kind_that_counts_alike(inputs):
    kinds = {"first": Gram, "same": Gram, "norms": SquaredNorms, "equal": Gram, "weighted": Gram, "changed": Gram}
    readers = Readers({name: kind(D) for name, kind in kinds.items()} | {"later": Gram(D, skip=K - 1)})
    tokens = torch.full(inputs.shape[:2], 2.0)
    for _ in range(2):
        x = inputs.clone()
        for name in ("first", "same", "norms", "later"):
            readers.update(name, None, x)
        readers.update("equal", None, x.clone())
        readers.update("weighted", tokens, x)
        x *= 3.0
        readers.update("changed", None, x)
    assert len(readers.finish(readers.leaders)) == 6
    flat = inputs.double().flatten(0, 1)
    sums = {name: one.total for name, one in readers.accumulators.items()}
    assert sums["first"] is sums["same"] and sums["first"] is not sums["equal"]
    later = inputs[:, K - 1 :].double().flatten(0, 1)
    torch.testing.assert_close(sums["later"], 2 * later.T @ later, rtol=1e-5, atol=1e-5)
    for name, times in {"first": 2, "equal": 2, "weighted": 4, "changed": 18}.items():
        torch.testing.assert_close(sums[name], times * flat.T @ flat, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(sums["norms"], 2 * flat.square().sum(0), rtol=1e-5, atol=1e-5)


def test_a_reader_that_never_reads_has_sums_of_its_own(inputs):
    """As an expert that no token went to: all processes add up the same sums."""
    readers = Readers({"first": Gram(D), "never": Gram(D)})
    readers.update("first", None, inputs)
    assert len(readers.finish(readers.leaders)) == 2 and not readers.accumulators["never"].total.any()
