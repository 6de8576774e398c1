"""The scan of heads by mamba-ssm: who serves when, and how a scan that is not ours is found out."""

import warnings

import pytest
import torch

from sparsessm.kernels import chunked_scan as module
from sparsessm.kernels.chunked_scan import chunked_scan, chunked_scan_ref
from tests.scans_of_heads import DEVICE, inputs


def like_mamba_ssm(x, dt, A, B, C, chunk_size, D, initial_states, return_final_states):
    """mamba_chunk_scan_combined of mamba-ssm by our reference."""
    assert return_final_states and chunk_size & (chunk_size - 1) == 0 and B.dtype == C.dtype == x.dtype
    assert all(tensor is None or tensor.dtype == torch.float32 for tensor in (dt, A, D, initial_states))
    y, state = chunked_scan_ref(x, dt, A, B, C, D, initial_states)
    return y.to(x.dtype), state


def spoiled(change):
    """like_mamba_ssm with its arguments changed, or its results."""
    return lambda *arguments, **options: change(arguments, options)


def without_start(arguments, options):
    return like_mamba_ssm(*arguments, **options | {"initial_states": None})


def without_skip(arguments, options):
    return like_mamba_ssm(*arguments, **options | {"D": None})


def groups_the_other_way(arguments, options):
    x, dt, A, B, C, chunk = arguments
    return like_mamba_ssm(x, dt, A, B.flip(2), C.flip(2), chunk, **options)


def pruned_heads_decay(arguments, options):
    x, dt, A, *rest = arguments
    return like_mamba_ssm(x, dt, A.clamp(-1, -0.01), *rest, **options)


def only_the_first_chunk(arguments, options):
    y, state = like_mamba_ssm(*arguments, **options)
    y[:, arguments[5] :] = 0
    return y, state


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_a_scan_that_agrees_proves_right(dtype):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert module.agrees_with_ours(like_mamba_ssm, DEVICE, dtype)


@pytest.mark.parametrize(
    "change", [without_start, without_skip, groups_the_other_way, pruned_heads_decay, only_the_first_chunk]
)
def test_a_scan_of_something_else_is_not_used(change):
    for dtype in (torch.float32, torch.bfloat16):
        with pytest.warns(UserWarning, match="mamba-ssm is installed but is not used for the scan of heads: .* not ours"):
            assert not module.agrees_with_ours(spoiled(change), DEVICE, dtype)


def test_a_broken_mamba_ssm_is_named_once(broken_package):
    broken_package("mamba_ssm", module.mamba_ssm_scan)
    with pytest.warns(UserWarning, match="undefined symbol") as caught:
        assert [module.mamba_ssm_scan(DEVICE, torch.float32) for _ in range(2)] == [None, None]
    assert len(caught) == 1


@pytest.mark.parametrize("h0", [True, False])
def test_results_come_in_float32(h0):
    values = inputs(9, h0=h0, D=h0)
    values = {name: value.bfloat16() if name in "uBC" else value for name, value in values.items()}
    y, state = module.scan_by_mamba_ssm(like_mamba_ssm, *(values[name] for name in ("u", "dt", "A", "B", "C", "D", "h0")))
    expected_y, expected_state = chunked_scan_ref(**values)
    assert y.dtype == state.dtype == torch.float32
    torch.testing.assert_close(y, expected_y.bfloat16().float(), rtol=0, atol=0)
    torch.testing.assert_close(state, expected_state, rtol=0, atol=0)


def test_on_a_cpu_it_is_not_asked(monkeypatch):
    monkeypatch.setattr(module, "mamba_ssm_scan", lambda *_: pytest.fail("asked"))
    chunked_scan(**inputs(9))


@pytest.mark.skipif(DEVICE != "cuda", reason="needs a GPU")
def test_on_a_gpu_it_serves_scans_without_sums(monkeypatch):
    served = []
    monkeypatch.setattr(module, "mamba_ssm_scan", lambda *_: lambda *a, **o: served.append(1) or like_mamba_ssm(*a, **o))
    values = {name: None if value is None else value.to(DEVICE) for name, value in inputs(70).items()}
    y, state = chunked_scan(**values)
    expected_y, expected_state = chunked_scan_ref(**values)
    assert len(served) == 1 and torch.equal(y, expected_y) and torch.equal(state, expected_state)
    chunked_scan(**values, statistics=module.HeadStatistics.zeros(("h2",), 70, 4, 7, DEVICE))
    chunked_scan(**values, at_chunks=lambda t, states: None)
    assert len(served) == 1
