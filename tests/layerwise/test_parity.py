"""Our forward is compared with the stock one of every model; the first layer that differs is named."""

import pytest
import torch

from sparsessm.errors import DivergenceError, InputError
from sparsessm.layerwise.parity import TOLERANCES, check_parity
from sparsessm.models import checkpoint
from sparsessm.models.architecture import Layout
from sparsessm.models.stock import stock_torch_path

CPU = torch.device("cpu")


@pytest.mark.parametrize("dtype", TOLERANCES, ids=str)
@pytest.mark.parametrize(
    "sizes",
    [{}, {"use_bias": True, "use_conv_bias": False}, {"residual_in_fp32": False, "tie_word_embeddings": False},
     {"hidden_act": "gelu", "conv_kernel": 2, "layer_norm_epsilon": 1e-3}],
    ids=str,
)  # fmt: skip
def test_our_forward_is_the_stock_one_to_rounding(tiny_model, dtype, sizes):
    parity = check_parity(Layout(tiny_model(dtype=dtype, **sizes)), "tiny", CPU)
    assert 0 < parity.difference < TOLERANCES[dtype] / 3 and parity.where


def test_the_demo_agrees_to_a_millionth_and_is_left_as_it_was():
    model = checkpoint.load(checkpoint.find("demo"))
    before = checkpoint.fingerprint(model)
    parity = check_parity(Layout(model), "demo", CPU)
    assert parity.difference < 2e-6
    assert checkpoint.fingerprint(model) == before
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.modules())
    assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("layer", [0, 1])
def test_the_first_layer_that_differs_is_named(tiny_model, layer):
    """The stock mixer computes something else than ours, which replaces it."""
    model = tiny_model()
    for block in model.backbone.layers[layer:]:
        block.mixer.forward = lambda *args, stock=block.mixer.forward, **named: stock(*args, **named) * 1.001
    with pytest.raises(InputError, match=f"mine: layer {layer} differs from stock transformers .* by 1.0e-03 of its size"):
        check_parity(Layout(model), "mine", CPU)


def test_what_enters_the_first_layer_and_the_head_are_compared_too(tiny_model):
    model = tiny_model()
    model.backbone.embeddings.register_forward_hook(lambda module, inputs, output: output * torch.rand(()))
    with pytest.raises(InputError, match="what enters layer 0 differs"):
        check_parity(Layout(model), "mine", CPU)
    model = tiny_model()
    model.lm_head.forward = lambda x, stock=model.lm_head.forward: stock(x) + 1
    with pytest.raises(InputError, match="the head differs"):
        check_parity(Layout(model), "mine", CPU)


def test_a_stock_model_that_diverges_is_named_as_such(tiny_model):
    model = tiny_model()
    model.backbone.layers[1].mixer.out_proj.weight.fill_(torch.finfo(torch.float32).max)
    with pytest.raises(DivergenceError, match="layer 1 of mine outputs values that are not finite"):
        check_parity(Layout(model), "mine", CPU)


def test_the_stock_model_computes_by_torch_alone_while_it_is_asked_to(tiny_model, monkeypatch):
    """As where mamba-ssm is installed: its kernel stands in the module's place, and fails on the CPU."""
    from transformers.models.mamba import modeling_mamba

    model, stock = tiny_model(), modeling_mamba.mamba_selective_scan

    def kernel(*_, **__):
        raise RuntimeError("Expected u.is_cuda() to be true")

    kernel.__wrapped__, kernel.__module__ = stock.__wrapped__, stock.__module__
    monkeypatch.setattr(modeling_mamba, "mamba_selective_scan", kernel)
    ids = torch.arange(5)[None]
    with pytest.raises(RuntimeError, match="is_cuda"):
        model(ids)
    with stock_torch_path(model):
        assert torch.isfinite(model(ids).logits).all()
    assert modeling_mamba.mamba_selective_scan is kernel
    assert check_parity(Layout(model), "tiny", CPU).difference < 1e-5
