"""The derivative of the whole model, layer by layer, against stock transformers and autograd."""

import copy
import math
from functools import partial

import pytest
import torch

from sparsessm.layerwise.backward import backward, wanting_gradients
from sparsessm.layerwise.stream import Stream
from sparsessm.models.architecture import Layout
from sparsessm.models.mixer import OUT
from tests.family import CONFIGS, OTHERS, random_model_of

IDS = torch.randint(64, (3, 20), generator=torch.Generator().manual_seed(4))
VARIANTS = [(kind, {}) for kind in CONFIGS] + list(OTHERS.items())


def target(logits):
    """A loss that every logit matters to, differently."""
    return (logits.float().log_softmax(-1)[..., ::3].square().sum(-1) * 1e-2).sum()


def keep(found, name, gradient):
    found[name] = gradient.flatten(0, -2)


def ours(model, ids, hooks_of=lambda layer: {}, batch=2):
    layout = Layout(model)
    stream = Stream.embed(layout, ids, device="cpu", offload="cpu", batch=batch)
    with wanting_gradients(model, lambda name: name not in layout.embeddings()) as wanted:
        losses = [backward(layout, stream, rows, lambda logits, _: target(logits), hooks_of) for rows in stream.batches()]
        gradients = {name: parameter.grad for name, parameter in wanted.items()}
        return float(sum(losses)), {name: value.clone() for name, value in gradients.items() if value is not None}


def stock(model, ids, dtype):
    model = copy.deepcopy(model).to(dtype)
    for parameter in model.parameters():
        parameter.requires_grad_()
    loss = target(model(ids, use_cache=False).logits)
    loss.backward()
    return float(loss.detach()), {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind, sizes", VARIANTS, ids=[f"{kind}-{bool(sizes)}" for kind, sizes in VARIANTS])
def test_gradients_of_all_parameters_are_those_of_stock(kind, sizes):
    model = random_model_of(kind, **sizes)
    value, found = ours(model, IDS)
    _, theirs = stock(model, IDS, torch.float32)
    experts = any("expert" in name for name in theirs)  # which know no float64 in stock
    exact, expected = stock(model, IDS, torch.float32 if experts else torch.float64)
    assert value == pytest.approx(exact, rel=1e-5)
    assert len(found) > 10

    def off(gradients):
        return {name: float((gradients[name].double() - expected[name].double()).norm()) for name in found}

    size = {name: float(expected[name].norm()) for name in found}
    whole = math.hypot(*size.values())
    assert math.hypot(*off(found).values()) < max(1e-5 * whole, 1.5 * math.hypot(*off(theirs).values()))
    for name, value in off(found).items():  # of a small gradient in which much cancels, the rounding of that is left
        assert value < 1e-4 * max(size[name], 1e-2 * max(size.values())), name


def test_batches_add_up_and_nothing_is_left_behind():
    model = random_model_of("mamba")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    whole, of_whole = ours(model, IDS, batch=3)
    parts, of_parts = ours(model, IDS, batch=1)
    assert parts == pytest.approx(whole, rel=1e-6)
    for name, gradient in of_whole.items():
        assert float((of_parts[name] - gradient).norm()) < 1e-5 * float(gradient.norm()), name
    assert all(parameter.grad is None and not parameter.requires_grad for parameter in model.parameters())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize("kind", ["mamba", "mamba2", "nemotron_h", "falcon_h1", "jamba"])
def test_hooks_see_outputs_whose_gradients_make_those_of_the_weights(kind):
    """dL/dW of a linear module is the sum over tokens of dL/d out times its input: both as hooks see them."""
    model, seen, made = random_model_of(kind), {}, {}

    def hooks_of(layer):
        found = {}
        for name, module in layer.modules.items():
            if module.kind == "nn.Linear":
                full = layer.full_name(f"{name}.weight")
                found[name] = lambda x, full=full: seen.setdefault(full, x.detach().flatten(0, -2))
                found[name + OUT] = lambda out, full=full: out.register_hook(partial(keep, made, full)) and None
        return found

    _, gradients = ours(model, IDS, hooks_of, batch=3)
    assert len(made) >= 4 and made.keys() == seen.keys()
    for name, of_out in made.items():
        torch.testing.assert_close(of_out.T @ seen[name], gradients[name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["mamba", "mamba2"])
def test_hooks_see_what_the_convolution_makes_before_its_activation(kind):
    model, made = random_model_of(kind), {}

    def hooks_of(layer):
        return {"conv1d" + OUT: lambda out: out.register_hook(partial(keep, made, layer.full_name("conv1d.bias"))) and None}

    _, gradients = ours(model, IDS, hooks_of, batch=3)
    assert len(made) == 2
    for name, of_bias in made.items():
        torch.testing.assert_close(of_bias.sum(0), gradients[name], rtol=1e-4, atol=1e-5)
