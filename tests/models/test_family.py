"""Our Mamba-2 and Falcon-Mamba against stock transformers, and removed states and heads."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from sparsessm.layerwise.parity import check_parity
from sparsessm.layerwise.visit import visit
from sparsessm.models import checkpoint, saving
from sparsessm.models.architecture import Layout
from sparsessm.models.place import Place
from tests.family import logits_of, random_model_of

MODELS = {
    "mamba2": ("mamba2", {}),
    "mamba2, 4 groups, biases, untied": (
        "mamba2", {"n_groups": 4, "use_bias": True, "use_conv_bias": False, "tie_word_embeddings": False},
    ),
    "mamba2, 2 groups, finite limit": ("mamba2", {"n_groups": 2, "time_step_limit": (0.05, 0.3), "use_bias": True}),
    "mamba2, short convolution, bfloat16 stream": (
        "mamba2", {"conv_kernel": 2, "residual_in_fp32": False, "head_dim": 16, "num_heads": 2}
    ),
    "falcon_mamba": ("falcon_mamba", {}),
    "falcon_mamba, biases, untied": ("falcon_mamba", {"use_bias": True, "tie_word_embeddings": False, "mixer_rms_eps": 0.3}),
}  # fmt: skip
TWO_GROUPS = {"n_groups": 2, "use_bias": True}


@pytest.mark.parametrize("steps", [64, 7])
@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_stock_transformers(tiny_windows, name, steps):
    kind, sizes = MODELS[name]
    model, windows = random_model_of(kind, **sizes), tiny_windows(3, 37)
    stock = model(windows, use_cache=False).logits
    off = (logits_of(Layout(model), windows, steps) - stock).abs().max()
    assert float(off) < 1e-5 * max(1.0, float(stock.abs().max()))
    assert check_parity(Layout(model), name, torch.device("cpu")).difference < 2e-6


@pytest.mark.parametrize("name", ["mamba2, 2 groups, finite limit", "falcon_mamba"])
def test_bfloat16_stays_within_its_rounding(tiny_windows, name):
    kind, sizes = MODELS[name]
    model, windows = random_model_of(kind, dtype=torch.bfloat16, **sizes), tiny_windows(3, 37)
    stock = model(windows, use_cache=False).logits.float()
    difference = logits_of(Layout(model), windows, 64).float() - stock
    assert float(difference.norm() / stock.norm()) < 0.03


@pytest.mark.parametrize("kind", ["mamba2", "falcon_mamba"])
def test_what_another_version_might_compute_is_noticed(kind):
    """One percent more in the second layer: it is named."""
    model = random_model_of(kind)
    mixer = model.backbone.layers[1].mixer
    stock = mixer.forward
    mixer.forward = lambda *arguments, **named: stock(*arguments, **named) * 1.01
    with pytest.raises(Exception, match=r"layer 1 differs from stock transformers"):
        check_parity(Layout(model), "it", torch.device("cpu"))


def test_decoding_differs_from_prefill_in_stock_where_time_steps_are_limited(tiny_windows):
    """A bug of stock transformers, not ours: we compute its prefill."""
    model, windows = random_model_of("mamba2", time_step_limit=(0.05, 0.3)), tiny_windows(1, 20)
    whole = model(windows, use_cache=False).logits[0, -1]
    cache = model(windows[:, :-1], use_cache=True).cache_params
    step = model(windows[:, -1:], cache_params=cache, use_cache=True).logits[0, -1]
    ours = logits_of(Layout(model), windows, 64)[0, -1]
    assert float((ours - whole).abs().max()) < 1e-5 < float((step - whole).abs().max())


def test_hooks_show_the_inputs_of_the_modules(tiny_windows):
    model = random_model_of("mamba2", **TWO_GROUPS)
    layout, windows = Layout(model), tiny_windows(2, 19)
    module = model.backbone.layers[0]
    hidden, _ = layout.enter(windows)
    stock = {}
    for name in ("in_proj", "out_proj"):
        module.mixer.get_submodule(name).register_forward_hook(
            lambda m, args, out, name=name: stock.update({name: args[0], f"{name} out": out})
        )
    module(hidden)
    stock, mine = dict(stock), {}
    mixer = layout.mixer(module)
    visit(module, mixer, hidden, hooks={name: lambda x, name=name: mine.update({name: x}) for name in mixer.MODULES})
    assert list(mine) == ["in_proj", "conv1d", "out_proj"]
    torch.testing.assert_close(mine["in_proj"], stock["in_proj"])
    torch.testing.assert_close(mine["out_proj"], stock["out_proj"], atol=1e-5, rtol=1e-5)
    mixed = stock["in_proj out"][..., 32 : 32 + 32 + 2 * 2 * 6]  # after z, before dt
    torch.testing.assert_close(mine["conv1d"][:, 3:], mixed, atol=1e-6, rtol=1e-6)
    assert not mine["conv1d"][:, :3].any()


def silenced_states(model, columns):
    """The same model with these states read by nobody, in full size: C of them is zero."""
    H, P, G, N = Layout(model).mixer(model.backbone.layers[0]).sizes
    for layer in model.backbone.layers:
        rows = slice(H * P + G * N, None)
        for parameter in (layer.mixer.conv1d.weight, layer.mixer.conv1d.bias):
            if parameter is not None:
                parameter.data[rows][columns.repeat(G)] = 0
    return model


@pytest.mark.parametrize("sizes", [{}, TWO_GROUPS, {"n_groups": 2, "use_conv_bias": False}])
def test_removed_states_are_states_that_are_never_read(tiny_windows, tmp_path, sizes):
    model, windows = random_model_of("mamba2", **sizes), tiny_windows(2, 30)
    columns = torch.tensor([True, False, False, True, True, False])
    expected = silenced_states(random_model_of("mamba2", **sizes), columns)(windows, use_cache=False).logits
    layout = Layout(model)
    for module in layout.layers:
        removed = layout.mixer(module).remove("columns", columns)
        assert removed["in_proj.weight"].shape == (32 + 32 + 12 * model.config.n_groups + 8, 16)
        assert int(removed["conv1d.weight"].sum()) == 2 * 3 * model.config.n_groups * 4
    layout.shrink("columns")
    assert model.config.state_size == 3
    assert_saved_is(model, tmp_path, windows, expected)


def assert_saved_is(model, folder, windows, expected):
    """In memory by our forward, and opened by stock transformers alone."""
    torch.testing.assert_close(logits_of(Layout(model), windows, 64), expected, atol=1e-5, rtol=1e-5)
    with Place(str(folder / "out"), saving.size_needed(model)) as place:
        saving.write_model(model, {}, {}, place)
        place.publish()
    stock, found = AutoModelForCausalLM.from_pretrained(folder / "out", output_loading_info=True)
    assert not any(found.values())
    torch.testing.assert_close(stock(windows, use_cache=False).logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("sizes", [{"tie_word_embeddings": False}, TWO_GROUPS])
def test_removed_heads_leave_what_the_others_compute(tiny_windows, tmp_path, sizes):
    """Against the formulas: the norm is then taken of the channels that are left."""
    model, windows = random_model_of("mamba2", **sizes), tiny_windows(2, 30)
    keep = torch.tensor([True, False, False, True, False, True, True, False])
    layout = Layout(model)
    hidden, _ = layout.enter(windows)
    for module in layout.layers:
        expected = without_heads(module, hidden, keep)
        layout.mixer(module).remove("heads", ~keep)
        hidden = module(hidden)
        torch.testing.assert_close(hidden, expected, atol=1e-5, rtol=1e-5)
    layout.shrink("heads")
    assert (model.config.num_heads, model.config.expand) == (4, 1)
    logits = model.lm_head(model.backbone.norm_f(hidden))
    assert_saved_is(model, tmp_path, windows, logits)


def without_heads(module, hidden, keep):
    """A layer step by step in float64, of the heads in keep alone."""
    mixer, (H, P, G, N) = module.mixer, (8, 4, module.mixer.n_groups, 6)
    x = module.norm(hidden).double()
    projected = x @ mixer.in_proj.weight.double().T
    if mixer.in_proj.bias is not None:
        projected = projected + mixer.in_proj.bias.double()
    z, mixed, dt = projected.split([H * P, H * P + 2 * G * N, H], -1)
    weight, K = mixer.conv1d.weight.double()[:, 0], 4
    padded = torch.nn.functional.pad(mixed, (0, 0, K - 1, 0))
    mixed = sum(padded[:, k : k + mixed.shape[1]] * weight[:, k] for k in range(K)) + mixer.conv1d.bias.double()
    u, B, C = torch.nn.functional.silu(mixed).split([H * P, G * N, G * N], -1)
    dt = torch.nn.functional.softplus(dt + mixer.dt_bias.double())
    y = torch.zeros(*u.shape[:2], H, P, dtype=torch.float64)
    for h in range(H):
        g, S = h // (H // G), torch.zeros(len(u), P, N, dtype=torch.float64)
        for t in range(u.shape[1]):
            v = u[:, t, h * P : (h + 1) * P]
            S = torch.exp(-dt[:, t, h].view(-1, 1, 1) * mixer.A_log[h].double().exp()) * S
            S = S + dt[:, t, h].view(-1, 1, 1) * v[:, :, None] * B[:, t, None, g * N : (g + 1) * N]
            y[:, t, h] = (S * C[:, t, None, g * N : (g + 1) * N]).sum(-1) + mixer.D[h].double() * v
    channels = keep.repeat_interleave(P)
    q = (y.flatten(2) * torch.nn.functional.silu(z))[..., channels].unflatten(-1, (G, -1))
    q = (q * (q.square().mean(-1, keepdim=True) + mixer.norm.variance_epsilon).rsqrt()).flatten(2)
    out = (q * mixer.norm.weight.double()[channels]) @ mixer.out_proj.weight.double()[:, channels].T
    if mixer.out_proj.bias is not None:
        out = out + mixer.out_proj.bias.double()
    return (hidden.double() + out).float()


@pytest.mark.parametrize(("left", "can"), [(4, True), (6, False), (2, False)])
def test_a_config_of_mamba2_holds_half_of_the_heads_and_no_other_share(left, can):
    layout = Layout(random_model_of("mamba2"))
    shrink = layout.row.shrink["heads"]
    if can:
        assert shrink(layout.model.config, left) == {"num_heads": 4, "expand": 1}
    else:
        with pytest.raises(ValueError, match=r"of its 8 heads 4 can stay"):
            shrink(layout.model.config, left)


# ---- the layout of the state-spaces repositories

SSM_CFG = {"layer": "Mamba2", "d_state": 6, "headdim": 4, "ngroups": 2, "bias": True, "dt_limit": [0.05, 0.3]}
PUBLISHED = {  # names and shapes as published for mamba2-130m, at these sizes
    "backbone.embedding.weight": (64, 16),
    "backbone.layers.0.norm.weight": (16,),
    "backbone.layers.0.mixer.dt_bias": (8,),
    "backbone.layers.0.mixer.A_log": (8,),
    "backbone.layers.0.mixer.D": (8,),
    "backbone.layers.0.mixer.in_proj.weight": (32 + 32 + 24 + 8, 16),
    "backbone.layers.0.mixer.in_proj.bias": (32 + 32 + 24 + 8,),
    "backbone.layers.0.mixer.conv1d.weight": (32 + 24, 1, 4),
    "backbone.layers.0.mixer.conv1d.bias": (32 + 24,),
    "backbone.layers.0.mixer.norm.weight": (32,),
    "backbone.layers.0.mixer.out_proj.weight": (16, 32),
    "backbone.layers.0.mixer.out_proj.bias": (16,),
    "backbone.norm_f.weight": (16,),
    "lm_head.weight": (64, 16),
}


def published_checkpoint(folder, *, safetensors: bool, layers: int = 2, **changes):
    """A random checkpoint as the state-spaces repositories publish them, and the stock model with the same tensors."""
    model = random_model_of("mamba2", time_step_limit=(0.05, 0.3), num_hidden_layers=layers, **TWO_GROUPS)
    state = {name.replace("embeddings", "embedding"): tensor.clone() for name, tensor in model.state_dict().items()}
    assert {name: tuple(t.shape) for name, t in state.items() if "layers.1" not in name} == PUBLISHED
    folder.mkdir()
    config = {
        "d_model": 16, "d_intermediate": 0, "n_layer": layers, "vocab_size": 61, "ssm_cfg": SSM_CFG, "attn_layer_idx": [],
        "attn_cfg": {}, "rms_norm": True, "residual_in_fp32": True, "fused_add_norm": True, "pad_vocab_size_multiple": 16,
        "tie_embeddings": True, **changes,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    if safetensors:
        save_file({name: tensor for name, tensor in state.items() if name != "lm_head.weight"}, folder / "model.safetensors")
    else:
        torch.save(state, folder / "pytorch_model.bin")
    return model


@pytest.mark.parametrize("safetensors", [True, False])
def test_the_state_spaces_layout_is_read(tiny_windows, tmp_path, safetensors):
    model, windows = published_checkpoint(tmp_path / "it", safetensors=safetensors), tiny_windows(2, 30)
    source = checkpoint.find(str(tmp_path / "it"))
    loaded = checkpoint.load(source)
    assert source.layout == "state-spaces" and loaded.config.model_type == "mamba2"
    assert loaded.config.time_step_limit == (0.05, 0.3) and loaded.config.n_groups == 2
    assert all(torch.equal(loaded.state_dict()[name], tensor) for name, tensor in model.state_dict().items())
    torch.testing.assert_close(loaded(windows).logits, model(windows).logits, atol=1e-5, rtol=1e-5)


def test_the_state_spaces_layout_is_written_key_by_key(tmp_path):
    published_checkpoint(tmp_path / "it", safetensors=False)
    source = checkpoint.find(str(tmp_path / "it"))
    loaded = checkpoint.load(source)
    with Place(str(tmp_path / "out"), saving.size_needed(loaded)) as place:
        saving.write_model(loaded, {}, {}, place, layout="state-spaces", original_config=source.raw_config)
        place.publish()
    written = torch.load(tmp_path / "out" / "pytorch_model.bin", weights_only=True)
    before = torch.load(tmp_path / "it" / "pytorch_model.bin", weights_only=True)
    assert written.keys() == before.keys()
    for name, tensor in before.items():
        assert torch.equal(written[name], tensor), name
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["ssm_cfg"] == {**SSM_CFG, "d_conv": 4, "expand": 2, "conv_bias": True}
    assert (config["vocab_size"], config["pad_vocab_size_multiple"], config["d_model"]) == (61, 16, 16)
    again = checkpoint.load(checkpoint.find(str(tmp_path / "out")))
    assert again.config.to_dict() == loaded.config.to_dict()


def test_removed_states_shrink_d_state_in_the_state_spaces_layout(tiny_windows, tmp_path):
    published_checkpoint(tmp_path / "it", safetensors=False)
    source, windows = checkpoint.find(str(tmp_path / "it")), tiny_windows(2, 30)
    model = checkpoint.load(source)
    layout = Layout(model)
    for module in layout.layers:
        layout.mixer(module).remove("columns", torch.tensor([True, False, False, True, True, False]))
    layout.shrink("columns")
    expected = logits_of(layout, windows, 64)
    with Place(str(tmp_path / "out"), saving.size_needed(model)) as place:
        saving.write_model(model, {}, {}, place, layout="state-spaces", original_config=source.raw_config)
        place.publish()
    assert json.loads((tmp_path / "out" / "config.json").read_text())["ssm_cfg"]["d_state"] == 3
    again = checkpoint.load(checkpoint.find(str(tmp_path / "out")))
    torch.testing.assert_close(again(windows).logits, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"attn_layer_idx": [1]}, "hybrid"),
        ({"d_intermediate": 64}, "hybrid"),
        ({"ssm_cfg": {**SSM_CFG, "layer": "Mamba3"}}, "layers of the kind Mamba3"),
        ({"ssm_cfg": {**SSM_CFG, "norm_before_gate": True}}, "norm_before_gate"),
        ({"ssm_cfg": {**SSM_CFG, "surprise": 1}}, "surprise"),
        ({"rms_norm": False}, "LayerNorm"),
    ],
)
def test_what_the_state_spaces_layout_may_also_mean_is_refused(tmp_path, changes, said):
    published_checkpoint(tmp_path / "it", safetensors=False, **changes)
    with pytest.raises(Exception, match=said):
        checkpoint.find(str(tmp_path / "it"))


def test_defaults_of_the_state_spaces_layout(tmp_path):
    (tmp_path / "it").mkdir()
    sizes = {"d_model": 128, "n_layer": 2, "vocab_size": 50277, "pad_vocab_size_multiple": 16}
    (tmp_path / "it" / "config.json").write_text(json.dumps({**sizes, "ssm_cfg": {"layer": "Mamba2"}}))
    save_file({"x": torch.zeros(1)}, tmp_path / "it" / "model.safetensors")
    config = checkpoint.find(str(tmp_path / "it")).config
    assert (config.state_size, config.head_dim, config.num_heads, config.n_groups) == (128, 64, 4, 1)
    assert config.vocab_size == 50288
    assert tuple(config.time_step_limit) == (0.0, math.inf)


def test_saving_in_the_hugging_face_layout_keeps_an_infinite_limit(tmp_path):
    model = random_model_of("mamba2")
    with Place(str(tmp_path / "out"), saving.size_needed(model)) as place:
        saving.write_model(model, {}, {}, place)
        place.publish()
    config = checkpoint.find(str(tmp_path / "out")).config
    assert tuple(config.time_step_limit) == (0.0, math.inf)
    assert load_file(tmp_path / "out" / "model.safetensors").keys() >= {"backbone.layers.0.mixer.dt_bias"}
