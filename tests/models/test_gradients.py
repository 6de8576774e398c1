"""Gradients through our mixers, standing in in whole stock models, against stock transformers' own autograd in float64."""

import copy
from contextlib import ExitStack
from functools import partial

import pytest
import torch

from sparsessm.layerwise.visit import visit
from sparsessm.models.architecture import Layout, standing_in
from sparsessm.models.mixer import OUT, Cache
from tests.family import CONFIGS, OTHERS, random_model_of

IDS = torch.randint(64, (3, 20), generator=torch.Generator().manual_seed(4))
VARIANTS = [(kind, {}) for kind in CONFIGS] + list(OTHERS.items())
MIXERS = ["mamba", "falcon_mamba", "jamba", "mamba2", "falcon_h1"]


def loss_of(logits):
    return logits.log_softmax(-1)[..., ::3].square().mean()


def forward_of(mixer, hidden_states, *_, **__):
    inputs, _ = mixer.prepare(hidden_states, None, {})
    return mixer.project(mixer.scan(inputs, None)[0], {})


def gradients(model, ours):
    """The loss, and gradients of all parameters by name."""
    model = copy.deepcopy(model).requires_grad_(True)
    layout = Layout(model)
    with ExitStack() as stack:
        for mixer in filter(None, map(layout.mixer, layout.layers if ours else [])):
            stack.enter_context(standing_in(mixer.module, partial(forward_of, mixer)))
        loss = loss_of(model(IDS, use_cache=False).logits)
    loss.backward()
    return float(loss.detach()), {name: p.grad.double() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind, sizes", VARIANTS, ids=[f"{kind}-{bool(sizes)}" for kind, sizes in VARIANTS])
def test_whole_models_have_the_gradients_of_stock(kind, sizes):
    model = random_model_of(kind, **sizes)
    experts = any("expert" in name for name, _ in model.named_parameters())  # which know no float64 in stock
    value, exact = gradients(model if experts else model.double(), ours=False)
    ours, found = gradients(model.float(), ours=True)
    assert ours == pytest.approx(value, rel=1e-5) and found.keys() == exact.keys() and len(found) > 10
    largest = max(float(gradient.norm()) for gradient in exact.values())
    for name, gradient in exact.items():  # of a small gradient in which much cancels, the rounding of that is left
        assert float((found[name] - gradient).norm()) < 5e-5 * max(float(gradient.norm()), 1e-2 * largest), name


@pytest.mark.parametrize("kind", ["mamba", "falcon_mamba"])
def test_float64_gradients_are_those_of_stock_to_rounding(kind):
    """What stock computes in float32 whatever the model's dtype is, bounds the others."""
    model = random_model_of(kind).double()
    (value, exact), (ours, found) = gradients(model, ours=False), gradients(model, ours=True)
    assert ours == pytest.approx(value, rel=1e-6)
    for name, gradient in exact.items():
        assert float((found[name] - gradient).norm()) < 2e-6 * float(gradient.norm()), name


def watch(kind, **sizes):
    """A trained layer with a mixer, and by module the inputs and the gradients of outputs that hooks of it saw."""
    model = random_model_of(kind, **sizes).requires_grad_(True)
    layout = Layout(model)
    index = next(i for i, layer in enumerate(layout.layers) if layout.mixer(layer) is not None)
    hidden, calls = layout.enter(IDS)
    layer, mixer, inputs, made = layout.layers[index], layout.mixer(layout.layers[index]), {}, {}
    hooks = {name: lambda x, name=name: inputs.update({name: x.detach()}) for name in mixer.MODULES}
    for name in mixer.MODULES:
        hooks[name + OUT] = lambda out, name=name: out.register_hook(lambda g: made.update({name: g.clone()})) and None
    with torch.enable_grad():
        out = visit(layer, mixer, hidden.detach().requires_grad_(), call=calls[index], hooks=hooks).out
        out.square().sum().backward()
    return mixer, inputs, made


@pytest.mark.parametrize("sizes", [{}, {"use_conv_bias": True}], ids=["", "bias"])
@pytest.mark.parametrize("kind", MIXERS)
def test_hooks_see_gradients_of_outputs_that_make_those_of_weights(kind, sizes):
    mixer, inputs, made = watch(kind, **(sizes if kind in ("mamba", "falcon_mamba", "mamba2") else {}))
    assert list(inputs) == list(mixer.MODULES) and made.keys() == inputs.keys()
    for name in mixer.MODULES:
        module, x, of_out = mixer.module.get_submodule(name), inputs[name], made[name]
        if name == "conv1d":
            steps, K = of_out.shape[1], module.weight.shape[-1]
            found = torch.stack([(x[:, k : k + steps] * of_out).sum((0, 1)) for k in range(K)], -1)[:, None]
        else:
            found = torch.einsum("blr,blc->rc", of_out, x)
        assert float((found - module.weight.grad).norm()) < 1e-5 * float(module.weight.grad.norm()), name
        if module.bias is not None:
            torch.testing.assert_close(of_out.sum((0, 1)), module.bias.grad, rtol=1e-4, atol=1e-4 * float(found.abs().max()))


@pytest.mark.parametrize("kind", MIXERS)
def test_hooks_of_outputs_see_what_the_modules_make(kind):
    model = random_model_of(kind)
    layout = Layout(model)
    index = next(i for i, layer in enumerate(layout.layers) if layout.mixer(layer) is not None)
    layer, (hidden, calls), seen = layout.layers[index], layout.enter(IDS), {}
    mixer = layout.mixer(layer)
    keys = [name + end for name in mixer.MODULES for end in ("", OUT)]
    hooks = {key: lambda x, key=key: seen.update({key: x}) for key in keys}
    with torch.no_grad():
        out = visit(layer, mixer, hidden, call=calls[index], hooks=hooks).out
        plain = visit(layer, mixer, hidden, call=calls[index]).out
    torch.testing.assert_close(out, plain, rtol=1e-5, atol=1e-6)
    assert set(seen) == set(keys)
    for name in mixer.MODULES:
        module, x = mixer.module.get_submodule(name), seen[name]
        if name == "conv1d":
            steps = seen[name + OUT].shape[1]
            expected = module(x.transpose(1, 2))[..., module.kernel_size[0] - 1 :][..., :steps].transpose(1, 2)
        else:
            expected = x @ module.weight.T
            expected = expected if module.bias is None or name == "dt_proj" else expected + module.bias
        torch.testing.assert_close(seen[name + OUT], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["mamba", "mamba2"])
def test_gradients_go_through_what_a_window_passes_on(kind):
    """A window in two pieces has the gradients of the whole one: by the convolution's inputs and by the state."""
    def run(cut):
        model = random_model_of(kind).requires_grad_(True)
        layout = Layout(model)
        layer, hidden = layout.layers[0], layout.enter(IDS)[0].detach().requires_grad_()
        mixer, cache, parts = layout.mixer(layer), None, []
        for piece in hidden.split(cut, 1):
            seen = visit(layer, mixer, piece, cache=cache)
            cache = Cache(seen.conv, seen.state)
            parts.append(seen.out)
        torch.cat(parts, 1).square().sum().backward()
        return [hidden.grad] + [parameter.grad for parameter in layer.parameters()]

    for found, expected in zip(run(7), run(20), strict=True):
        assert float((found - expected).norm()) < 1e-5 * float(expected.norm())


@pytest.mark.parametrize("kind", ["mamba", "mamba2"])
def test_what_a_layer_keeps_does_not_grow_with_steps_times_states(kind):
    """Bytes that wait for the backward, for each more step: fewer than its states alone, and few more with more states."""
    def kept(steps, N):
        model = random_model_of(kind, state_size=N).requires_grad_(True)
        layout, storages = Layout(model), {}

        def note(tensor):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        hidden = torch.randn(1, steps, 16, generator=torch.Generator().manual_seed(0)).requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            out = visit(layout.layers[0], layout.mixer(layout.layers[0]), hidden).out
        out.sum().backward()
        return sum(storages.values())

    a_step = {N: (kept(1024, N) - kept(512, N)) / 512 for N in (16, 64)}
    assert a_step[16] < 32 * 16 * 4  # the states alone, of one step
    assert a_step[64] - a_step[16] < 0.25 * 32 * (64 - 16) * 4
