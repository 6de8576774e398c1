import numpy as np
import pytest
import torch

from sparsessm import commandline
from sparsessm.kernels.selective_scan import ScanStatistics, selective_scan
from sparsessm.pruning.saliency import SALIENCIES, register_saliency

B, L, D, N = 3, 9, 4, 5


@pytest.fixture
def scan_inputs():
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator)

    return {
        "u": draw(B, L, D), "delta": draw(B, L, D), "A": -torch.exp(draw(D, N)), "B": draw(B, L, N),
        "C": draw(B, L, N), "delta_bias": draw(D), "delta_softplus": True,
    }  # fmt: skip


def brute_force(inputs, A_log, name):
    """S[t,d,n] from explicit states in float64, one sample and one step after the other."""
    u, delta, B_t, bias = (inputs[key].double().numpy() for key in ("u", "delta", "B", "delta_bias"))
    A, A_log = inputs["A"].double().numpy(), A_log.double().numpy()
    squares, transitions = np.zeros((L, D, N)), np.zeros((L, D, N))
    for b in range(B):
        h = np.zeros((D, N))
        for t in range(L):
            dt = np.log1p(np.exp(delta[b, t] + bias))
            abar = np.exp(dt[:, None] * A)
            squares[t] += h**2  # the state that enters step t
            transitions[t] += abar
            h = abar * h + dt[:, None] * B_t[b, t][None, :] * u[b, t][:, None]
    return {"a_log": A_log**2 * squares, "transition": transitions**2 * squares}[name]


@pytest.mark.parametrize("name", ["a_log", "transition"])
def test_saliency_of_every_step_against_explicit_states(scan_inputs, name):
    saliency, A_log = SALIENCIES[name], torch.log(-scan_inputs["A"])
    statistics = ScanStatistics.zeros(saliency.needs, L, D, N, "cpu")
    selective_scan(**scan_inputs, statistics=statistics)
    scores = saliency(A_log, statistics)
    assert scores.shape == (L, D, N)
    assert not scores[0].any()
    np.testing.assert_allclose(scores.double().numpy(), brute_force(scan_inputs, A_log, name), rtol=2e-4, atol=1e-9)


def test_magnitude_needs_no_data():
    A_log = torch.tensor([[-2.0, 0.5], [0.0, -0.0]])
    saliency = SALIENCIES["magnitude"]
    assert saliency.needs == ()
    assert saliency.score(A_log).tolist() == [[[2.0, 0.5], [0.0, 0.0]]]


def test_a_log_squares_the_logarithm_and_not_the_transition():
    """A_log = 0 is never salient, however large the state; its sign does not matter."""
    scores = SALIENCIES["a_log"].score(torch.tensor([[0.0, 2.0, -2.0]]), torch.full((1, 1, 3), 5.0))
    assert scores.tolist() == [[[0.0, 20.0, 20.0]]]


def test_transition_squares_the_sum_over_samples():
    scores = SALIENCIES["transition"].score(torch.zeros(1, 1), torch.full((1, 1, 1), 2.0), torch.full((1, 1, 1), 3.0))
    assert scores.item() == 18.0


@pytest.fixture
def registry():
    """The table of saliencies, as it was again afterwards."""
    before = dict(SALIENCIES)
    yield SALIENCIES
    SALIENCIES.clear()
    SALIENCIES.update(before)


def test_a_registered_saliency_gets_the_sums_that_it_needs_by_their_names(registry, prune, tiny_model):
    register_saliency("calm", lambda A_log, abar, h2: abar * h2 + 0 * A_log, needs=("h2", "abar"), source="here")
    statistics = ScanStatistics(h2=torch.full((1, 1, 2), 2.0), abar=torch.full((1, 1, 2), 3.0))
    assert registry["calm"](torch.zeros(1, 2), statistics).tolist() == [[[6.0, 6.0]]]
    (mask,) = prune(tiny_model(), "prune_A", method="sparsessm", saliency="calm", sparsity=0.5, stop=1).values()
    assert int(mask.sum()) == mask.numel() // 2
    words = ["demo", "demo", "--method", "sparsessm", "--prune_A", "--sparsity", "0.5", "--saliency", "calm"]
    assert commandline.parse(words)[0].recipe.saliency == "calm"


@pytest.mark.parametrize(("name", "needs", "says"), [
    ("a_log", (), "taken"), ("two words", (), "not an identifier"), ("mine", ("h3",), "unknown sums h3, known are h2, abar"),
])  # fmt: skip
def test_what_cannot_be_registered_is_refused(registry, name, needs, says):
    before = dict(registry)
    with pytest.raises(ValueError, match=says):
        register_saliency(name, lambda A_log: A_log, needs)
    assert registry == before
