"""A model whose pruned heads keep no state says what the stock model says, with a smaller cache."""

import copy

import pytest
import torch

import sparsessm
from sparsessm.errors import InputError
from sparsessm.models.architecture import Layout
from sparsessm.models.mamba2 import Mamba2Mixer
from tests.family import random_model_of

MODELS = [
    ("mamba2", {}), ("mamba2", {"n_groups": 2, "use_bias": True, "time_step_limit": (0.05, 0.4)}), ("nemotron_h", {}),
    ("bamba", {}), ("falcon_h1", {}), ("granitemoehybrid", {}), ("zamba2", {}),
]  # fmt: skip


def with_pruned_heads(kind, heads=(0, 3, 4, 5), **sizes):
    """A stock model, some heads of it pruned, and those of the last mixer all of them."""
    model = random_model_of(kind, **sizes).eval()
    mixers = [mixer for layer in Layout(model).layers if isinstance(mixer := Layout(model).mixer(layer), Mamba2Mixer)]
    for mixer in mixers:
        mixer.module.A_log.data[list(heads)] = 30.0
    mixers[-1].module.A_log.data[:] = 30.0
    return model, len(mixers)


def recurrent(out):
    cache = out["cache_params" if "cache_params" in out else "past_key_values"]
    return [layer.recurrent_states[0] for layer in cache.layers if hasattr(layer, "recurrent_states")]


@torch.no_grad()
def told(model, pieces, mask=None):
    """Logits of pieces of text one after the other, and the cache after the last."""
    found, given, seen = [], {}, 0
    for piece in pieces:
        seen += piece.shape[1]
        some = {} if mask is None else {"attention_mask": mask[:, :seen]}
        out = model(piece, use_cache=True, **given, **some)
        name = "cache_params" if "cache_params" in out else "past_key_values"
        given = {name: out[name]}
        found.append(out.logits)
    return torch.cat(found, 1), out


@pytest.mark.parametrize("kind, sizes", MODELS)
def test_logits_are_those_of_stock_and_states_of_the_kept_heads_alone(kind, sizes):
    stock, mixers = with_pruned_heads(kind, **sizes)
    ours = sparsessm.compact(copy.deepcopy(stock))
    ids = torch.randint(1, 64, (3, 12), generator=torch.Generator().manual_seed(0))
    # a prompt, single tokens, and tokens that follow a state two and five at once, less and more than the convolution sees
    pieces = ids.split([2, 1, 1, 1, 5, 1, 1], 1) if kind == "mamba2" else ids.split([9, 1, 1, 1], 1)
    limited = "time_step_limit" in sizes  # stock's own step of one token leaves the limits out
    (expected, theirs), (found, out) = told(stock, [ids] if limited else pieces), told(ours, pieces)
    assert (found - expected).abs().max() <= 2e-5 * expected.abs().max()
    states, full = recurrent(out), recurrent(theirs)
    kept = [state.shape[1] for state in states if state is not None]
    assert kept == [4] * (mixers - 1) + [0] and {state.shape[1] for state in full if state is not None} == {8}
    for mine, other in zip(states, full, strict=True):
        if mine is not None and mine.shape[1]:
            assert (mine - other[:, [1, 2, 6, 7]]).abs().max() <= 1e-5 * other.abs().max()


def test_what_is_generated_is_the_same_with_padding_beams_and_in_bfloat16():
    stock, _ = with_pruned_heads("mamba2", num_hidden_layers=3)
    ours = sparsessm.compact(copy.deepcopy(stock))
    ids = torch.randint(1, 64, (2, 7), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    for how in ({}, {"num_beams": 3}):
        texts = [
            model.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False, **how) for model in (stock, ours)
        ]
        assert texts[0].equal(texts[1])
    padded = [told(model, ids.split([5, 1, 1], 1), mask)[0] for model in (stock, ours)]
    assert (padded[0] - padded[1])[mask.bool()].abs().max() <= 2e-5 * padded[0].abs().max()
    half = [told(model.to(torch.bfloat16), ids.split([5, 1, 1], 1))[0] for model in (stock, ours)]
    assert (half[0] - half[1]).abs().max() <= 0.05 * half[0].abs().max()


def test_mixers_without_a_pruned_head_and_the_saved_model_stay_as_they_were(tmp_path):
    model = random_model_of("mamba2").eval()
    assert sparsessm.compact(model) is model and not any("forward" in vars(layer.mixer) for layer in Layout(model).layers)
    pruned, _ = with_pruned_heads("mamba2")
    before = {name: value.clone() for name, value in pruned.state_dict().items()}
    sparsessm.compact(pruned).save_pretrained(tmp_path)
    again = type(pruned).from_pretrained(tmp_path).state_dict()
    assert all(again[name].equal(value) for name, value in before.items())


def test_a_model_without_heads_is_refused():
    with pytest.raises(InputError, match="falcon_mamba has no heads"):
        sparsessm.compact(random_model_of("falcon_mamba"))
