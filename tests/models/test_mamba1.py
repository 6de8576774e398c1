"""Our forward of a block against the stock block of transformers, and what pruning does to a block."""

import pytest
import torch
import torch.nn.functional as F

from sparsessm.kernels.convolution import causal_conv
from sparsessm.kernels.selective_scan import ScanStatistics, selective_scan_ref
from sparsessm.layerwise.layer import each_layer
from sparsessm.models.architecture import Layout
from sparsessm.models.mamba1 import Mamba1Mixer
from sparsessm.models.mixer import Cache
from tests.pruning_checks import prune_transitions, visit_block

SIZES = [
    {"state_size": state, "conv_kernel": K, "use_bias": bias, "use_conv_bias": conv_bias, "residual_in_fp32": fp32}
    for state, K, bias, conv_bias, fp32 in [
        (1, 2, False, True, True), (1, 4, True, False, False), (5, 2, True, True, True), (5, 4, False, False, True),
        (12, 4, True, True, False), (12, 2, False, True, False), (16, 4, False, True, True), (16, 2, True, False, True),
    ]
]  # fmt: skip


def label(sizes: dict) -> str:
    return "-".join(f"{key}={value}" for key, value in sizes.items())


def stream_input(B: int = 3, L: int = 21, M: int = 16, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(B, L, M, generator=torch.Generator().manual_seed(5)).to(dtype)


@pytest.mark.parametrize("sizes", SIZES, ids=label)
def test_block_is_the_stock_block(tiny_model, sizes):
    block = tiny_model(**sizes).backbone.layers[0]
    hidden = stream_input()
    seen = visit_block(block, hidden)
    torch.testing.assert_close(seen.out, block(hidden), atol=1e-5, rtol=1e-5)
    assert seen.cache.conv.shape == (3, sizes["conv_kernel"] - 1, 32)
    assert seen.cache.state.shape == (3, 32, sizes["state_size"])


@pytest.mark.parametrize("length", [1, 2, 3])
def test_windows_shorter_than_the_convolution(tiny_model, length):
    block = tiny_model(conv_kernel=4).backbone.layers[0]
    hidden = stream_input(L=length)
    torch.testing.assert_close(visit_block(block, hidden).out, block(hidden), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("sizes", SIZES, ids=label)
def test_all_layers_are_the_stock_model(tiny_model, tiny_windows, embed, sizes):
    model, windows = tiny_model(num_hidden_layers=3, **sizes), tiny_windows(5, 21)
    stream = embed(model, windows)
    for _ in each_layer(Layout(model), stream):
        pass
    logits = model.lm_head(model.backbone.norm_f(stream.hidden))
    torch.testing.assert_close(logits, model(windows).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("fp32", [True, False])
def test_bfloat16_block_within_its_rounding(tiny_model, fp32):
    """Two runs that round at other places differ by some units of 2^-8; bounded at 2 % of the largest output."""
    block = tiny_model(dtype=torch.bfloat16, residual_in_fp32=fp32).backbone.layers[0]
    hidden = stream_input(dtype=torch.bfloat16)
    ours, stock = visit_block(block, hidden).out, block(hidden)
    assert ours.dtype == stock.dtype == (torch.float32 if fp32 else torch.bfloat16)
    assert float((ours - stock).abs().max()) < 0.02 * float(stock.abs().max())


def test_bfloat16_layers_within_their_rounding(tiny_model, tiny_windows, embed):
    model, windows = tiny_model(dtype=torch.bfloat16), tiny_windows(5, 21)
    stream = embed(model, windows)
    for _ in each_layer(Layout(model), stream):
        pass
    ours = model.lm_head(model.backbone.norm_f(stream.hidden.bfloat16())).float()
    stock = model(windows).logits.float()
    assert float((ours - stock).abs().max()) < 0.03 * float(stock.abs().max())


@pytest.mark.parametrize("size", [1, 2, 3, 8, 20])
@pytest.mark.parametrize("K", [2, 4])
def test_pieces_with_a_cache_make_the_whole(tiny_model, K, size):
    block, hidden = tiny_model(conv_kernel=K, use_bias=True).backbone.layers[0], stream_input()
    whole = visit_block(block, hidden)
    pieces, cache = [], None
    for piece in hidden.split(size, dim=1):
        seen = visit_block(block, piece, cache=cache)
        pieces.append(seen.out)
        cache = seen.cache
    torch.testing.assert_close(torch.cat(pieces, 1), whole.out, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(cache.conv, whole.cache.conv)
    torch.testing.assert_close(cache.state, whole.cache.state, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("sizes", [SIZES[2], SIZES[6]], ids=label)
def test_hooks_show_the_true_inputs(tiny_model, sizes):
    block, hidden = tiny_model(**sizes).backbone.layers[0], stream_input()
    mixer, K = block.mixer, sizes["conv_kernel"]

    stock = {}
    for name in ("in_proj", "x_proj", "out_proj"):
        mixer.get_submodule(name).register_forward_hook(
            lambda module, args, output, name=name: stock.update({name: args[0], f"{name} out": output})
        )
    block(hidden)
    shown = {}
    modules = Mamba1Mixer.MODULES
    visit_block(block, hidden, hooks={name: lambda x, name=name: shown.update({name: x}) for name in modules})
    assert set(shown) == set(modules)

    for name in ("in_proj", "x_proj", "out_proj"):
        torch.testing.assert_close(shown[name], stock[name], atol=1e-5, rtol=1e-5)
    u = stock["in_proj out"][..., :32]
    expected = torch.cat([torch.zeros(3, K - 1, 32), u], dim=1)
    torch.testing.assert_close(shown["conv1d"], expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(shown["dt_proj"], stock["x_proj out"][..., :3], atol=1e-5, rtol=1e-5)
    by_conv1d = F.silu(mixer.conv1d(u.transpose(1, 2))[..., : u.shape[1]]).transpose(1, 2)
    torch.testing.assert_close(shown["x_proj"], by_conv1d, atol=1e-5, rtol=1e-5)


def test_the_convolution_of_a_later_piece_sees_the_inputs_before_it(tiny_model):
    block, hidden = tiny_model(conv_kernel=4).backbone.layers[0], stream_input()
    shown = []
    cache = visit_block(block, hidden[:, :10], hooks={"conv1d": shown.append}).cache
    visit_block(block, hidden[:, 10:], hooks={"conv1d": shown.append}, cache=cache)
    assert shown[0].shape[1] == 3 + 10 and shown[1].shape[1] == 3 + 11
    torch.testing.assert_close(shown[1][:, :3], shown[0][:, -3:])


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("K", [1, 2, 4])
def test_causal_conv_is_a_depthwise_conv1d(K, bias):
    generator = torch.Generator().manual_seed(0)
    padded, weight = torch.randn(2, K - 1 + 9, 5, generator=generator), torch.randn(5, 1, K, generator=generator)
    offset = torch.randn(5, generator=generator) if bias else None
    expected = F.conv1d(padded.transpose(1, 2), weight, offset, groups=5).transpose(1, 2)
    torch.testing.assert_close(causal_conv(padded, weight, offset), expected, atol=1e-6, rtol=1e-5)


def without_transitions(block, hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The block computed by hand, Abar multiplied by 0 where the mask says so."""
    mixer, N = block.mixer, block.mixer.A_log.shape[1]
    u, z = mixer.in_proj(block.norm(hidden)).chunk(2, dim=-1)
    u = F.silu(mixer.conv1d(u.transpose(1, 2))[..., : u.shape[1]]).transpose(1, 2)
    delta, B, C = mixer.x_proj(u).split([mixer.x_proj.out_features - 2 * N, N, N], dim=-1)
    dt = F.softplus(mixer.dt_proj(delta))
    h, outputs = torch.zeros(len(hidden), u.shape[-1], N), []
    for t in range(hidden.shape[1]):
        abar = torch.exp(dt[:, t, :, None] * -torch.exp(mixer.A_log)) * ~mask
        h = abar * h + dt[:, t, :, None] * B[:, t, None, :] * u[:, t, :, None]
        outputs.append((h * C[:, t, None, :]).sum(-1) + mixer.D * u[:, t])
    return hidden + mixer.out_proj(torch.stack(outputs, 1) * F.silu(z))


@pytest.fixture
def mask():
    return torch.rand(32, 6, generator=torch.Generator().manual_seed(3)) < 0.4


def test_transition_zero_multiplies_abar_by_zero(tiny_model, mask):
    block, hidden = tiny_model().backbone.layers[0], stream_input()
    expected = without_transitions(block, hidden, mask)
    kept = block.mixer.A_log.clone()
    prune_transitions(block, mask, "zero")
    torch.testing.assert_close(visit_block(block, hidden).out, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(block(hidden), expected, atol=1e-5, rtol=1e-5)  # the stock runtime agrees
    assert torch.equal(block.mixer.A_log[~mask], kept[~mask])
    assert torch.isfinite(block.mixer.A_log).all()


def test_transition_zero_holds_for_the_smallest_time_steps():
    """exp(-dt exp(30)) is 0 in float32 for every dt that a softplus of trained weights gives."""
    block_input = torch.full((1, 4, 1), -20.0)  # softplus(-20) = 2e-9
    statistics = ScanStatistics.zeros(("abar",), 4, 1, 1, "cpu")
    ones = torch.ones(1, 4, 1)
    A = -torch.exp(torch.full((1, 1), 30.0))
    selective_scan_ref(ones, block_input, A, ones, ones, delta_softplus=True, statistics=statistics)
    assert not statistics.abar.any()


def test_transition_unit_sets_A_to_minus_one(tiny_model, mask):
    block, hidden = tiny_model().backbone.layers[0], stream_input()
    prune_transitions(block, mask, "unit")
    assert not block.mixer.A_log[mask].any()
    torch.testing.assert_close(visit_block(block, hidden).out, block(hidden), atol=1e-5, rtol=1e-5)


def test_unit_and_zero_are_different_functions(tiny_model, mask):
    hidden, outs = stream_input(), []
    for transition in ("zero", "unit"):
        block = tiny_model().backbone.layers[0]
        prune_transitions(block, mask, transition)
        outs.append(visit_block(block, hidden).out)
    assert float((outs[0] - outs[1]).abs().max()) > 1e-2


def test_removed_states_are_those_whose_C_is_zero(tiny_model):
    block, hidden = tiny_model().backbone.layers[0], stream_input()
    columns = torch.tensor([True, False, False, True, False, True])
    silenced = tiny_model().backbone.layers[0]
    rows_of_C = 3 + 6 + columns.nonzero().flatten()  # after dt (R = 3) and B (N = 6)
    silenced.mixer.x_proj.weight[rows_of_C] = 0
    expected = silenced(hidden)
    assert float((expected - block(hidden)).abs().max()) > 1e-2

    kept = block.mixer.A_log[:, ~columns].clone()
    Mamba1Mixer(block.mixer).remove("columns", columns)
    assert torch.equal(block.mixer.A_log, kept)
    assert block.mixer.x_proj.weight.shape == (3 + 2 * 3, 32)
    torch.testing.assert_close(visit_block(block, hidden).out, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(block(hidden), expected, atol=1e-5, rtol=1e-5)


def test_statistics_are_those_of_the_scan_and_do_not_change_the_output(tiny_model):
    block, hidden = tiny_model().backbone.layers[0], stream_input()
    statistics = ScanStatistics.zeros(("h2", "abar", "hh"), 21, 32, 6, "cpu")
    out = visit_block(block, hidden, statistics=statistics).out
    torch.testing.assert_close(out, visit_block(block, hidden).out, atol=1e-6, rtol=1e-6)

    h2, abar, hh, cache = torch.zeros(21, 32, 6), torch.zeros(21, 32, 6), torch.zeros(6, 6), None
    for t in range(21):
        state = torch.zeros(3, 32, 6) if cache is None else cache.state
        h2[t], hh = state.square().sum(0), hh + torch.einsum("bdn,bdm->nm", state, state)
        shown = []
        cache = visit_block(block, hidden[:, t : t + 1], hooks={"dt_proj": shown.append}, cache=cache).cache
        dt = F.softplus(block.mixer.dt_proj(shown[0][:, 0]))
        abar[t] = torch.exp(dt[..., None] * -torch.exp(block.mixer.A_log)).sum(0)
    torch.testing.assert_close(statistics.h2.float(), h2, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(statistics.abar.float(), abar, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(statistics.hh.float(), hh, atol=1e-4, rtol=1e-4)


def test_a_cache_is_not_changed(tiny_model):
    block, hidden = tiny_model().backbone.layers[0], stream_input()
    cache = visit_block(block, hidden).cache
    copy = Cache(cache.conv.clone(), cache.state.clone())
    visit_block(block, hidden, cache=cache)
    assert torch.equal(cache.conv, copy.conv) and torch.equal(cache.state, copy.state)
