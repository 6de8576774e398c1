import math

import pytest
import torch

from sparsessm.metrics.perplexity import perplexity
from sparsessm.models.architecture import Layout


def by_hand(model, windows: torch.Tensor) -> float:
    """exp of the mean negative log likelihood of all tokens but the first of each window, from stock logits."""
    total, count = 0.0, 0
    for window in windows:  # each window alone
        log_p = torch.log_softmax(model(window[None]).logits[0].double(), dim=-1)
        for t in range(len(window) - 1):
            total -= float(log_p[t, window[t + 1]])
            count += 1
    return math.exp(total / count)


def measure(model, windows, batch=2):
    return perplexity(Layout(model), windows, device="cpu", offload="cpu", batch=batch)


@pytest.mark.parametrize("sizes", [{}, {"tie_word_embeddings": False}, {"residual_in_fp32": False}], ids=str)
def test_against_stock_logits(tiny_model, tiny_windows, sizes):
    model, windows = tiny_model(**sizes), tiny_windows(5, 30)
    result = measure(model, windows)
    assert result.value == pytest.approx(by_hand(model, windows), rel=1e-5)
    assert (result.windows, result.tokens) == (5, 5 * 29)


def test_windows_longer_than_a_piece(tiny_model, tiny_windows):
    model, windows = tiny_model(), tiny_windows(2, 150)
    assert measure(model, windows).value == pytest.approx(by_hand(model, windows), rel=1e-5)


def test_two_tokens_are_enough(tiny_model, tiny_windows):
    model, windows = tiny_model(), tiny_windows(3, 2)
    result = measure(model, windows)
    assert result.tokens == 3 and result.value == pytest.approx(by_hand(model, windows), rel=1e-5)


def test_batches_of_one_and_eight_agree(tiny_model, tiny_windows):
    model, windows = tiny_model(), tiny_windows(11, 30)
    values = [measure(model, windows, batch).value for batch in (1, 3, 8, 16)]
    assert values == pytest.approx([values[0]] * 4, rel=1e-6)


def test_logits_come_in_parts_where_the_vocabulary_is_large(tiny_model, tiny_windows, monkeypatch):
    import sparsessm.metrics.perplexity as module

    model, windows = tiny_model(), tiny_windows(3, 30)
    whole = measure(model, windows).value
    monkeypatch.setattr(module, "_LOGITS_AT_ONCE", 7 * 64)
    assert measure(model, windows).value == pytest.approx(whole, rel=1e-7)


def test_bfloat16_stays_close_to_its_stock_logits(tiny_model, tiny_windows):
    """Within 2 %: the two round at other places."""
    model, windows = tiny_model(dtype=torch.bfloat16), tiny_windows(5, 30)
    assert measure(model, windows).value == pytest.approx(by_hand(model, windows), rel=0.02)


def test_the_model_is_not_changed(tiny_model, tiny_windows):
    model, windows = tiny_model(), tiny_windows()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    first, second = measure(model, windows), measure(model, windows)
    assert first == second
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_an_infinite_perplexity_is_a_result(tiny_model, tiny_windows):
    model = tiny_model(tie_word_embeddings=False)
    model.lm_head.weight.mul_(1e6)
    assert measure(model, tiny_windows()).value == math.inf


def test_every_layer_is_reported(tiny_model, tiny_windows):
    told = []
    perplexity(
        Layout(tiny_model(num_hidden_layers=3)), tiny_windows(), device="cpu", offload="cpu", batch=2,
        report=lambda phase, layer: told.append((phase, layer)),
    )  # fmt: skip
    assert told == [("eval", 0), ("eval", 1), ("eval", 2)]
