"""What nobody knows is refused, what a kernel does not provide is computed by the reference, what is stale is let go."""

import dataclasses

import pytest
import torch

from sparsessm.kernels import selective_scan as scan_module
from sparsessm.kernels.selective_scan import (
    ScanMoments,
    provided,
    selective_scan,
    selective_scan_ref,
)
from sparsessm.layerwise.walk import Stream, walk
from sparsessm.options import Options
from sparsessm.procedure.pipeline import WeightPlan
from sparsessm.procedure.schedule import prune as prune_by_plans
from sparsessm.pruning.patterns import Unstructured
from sparsessm.pruning.search import select


@pytest.mark.parametrize("changes", [{"rule": "Magnitude"}, {"rule": ""}, {"rule": "obs", "conv_hessian": "both"}], ids=str)
def test_a_weight_rule_that_nobody_knows_is_refused(changes):
    with pytest.raises(ValueError, match="unknown .*, known are"):
        WeightPlan(Unstructured(0.5), **{"rule": "obs", "modules": ("in_proj",), **changes})


def test_a_search_that_nobody_knows_is_refused():
    with pytest.raises(ValueError, match="unknown search 'best'"):
        select(torch.eye(4).expand(2, 4, 4), Unstructured(0.5), "best")


@dataclasses.dataclass
class Extended(ScanMoments):
    """One more sum than any fast kernel knows of."""

    peak: torch.Tensor | None = None

    FIELDS = (*ScanMoments.FIELDS, "peak")


@pytest.mark.parametrize("kernel", ["cpu", "cuda"])
def test_a_sum_that_a_kernel_does_not_provide_goes_to_the_reference(kernel, monkeypatch):
    generator = torch.Generator().manual_seed(0)
    u, delta, B, C = (torch.randn(2, 5, n, generator=generator) for n in (4, 4, 3, 3))
    A, asked = -torch.rand(4, 3, generator=generator), []

    def reference(*arguments):
        asked.append(arguments[-1])
        return selective_scan_ref(*arguments)

    monkeypatch.setattr(scan_module, "selective_scan_ref", reference)
    assert provided(kernel) == {"h2", "abar", "hh", "gram"}
    with scan_module.force_kernel(kernel):
        selective_scan(u, delta, A, B, C, delta_softplus=True, moments=ScanMoments(h2=torch.zeros(5, 4, 3, dtype=torch.float64)))
        assert asked == []
        moments = Extended(peak=torch.zeros(4, 3, dtype=torch.float64))
        scan_module._load_kernel.cache_clear()
        selective_scan(u, delta, A, B, C, delta_softplus=True, moments=moments)
    scan_module._load_kernel.cache_clear()
    assert asked == [moments]


def test_what_was_kept_is_let_go_when_a_weight_changes_and_not_for_A_log(tiny_model, tiny_windows, embed):
    """The stream after a block is that of the block as it is when it is left, whatever was kept of it before."""
    windows = tiny_windows(4, 24)
    for name in ("A_log", "in_proj.weight", "conv1d.weight", "x_proj.weight", "dt_proj.weight", "out_proj.weight"):
        model, stream = tiny_model(), None
        stream = embed(model, windows)
        view = next(iter(walk(model, stream)))
        for _ in view.observe_states(("h2",)):
            pass
        assert view._kept
        view.write(name, view.block.mixer.get_parameter(name) * 0.5)
        assert bool(view._kept) == (name == "A_log")
        expected = view.block(model.backbone.embeddings(windows))
        view.advance()
        torch.testing.assert_close(stream.hidden, expected, atol=1e-5, rtol=1e-5)


WAYS = [
    dict(method="magnitude", saliency="a_log", module_order="sequential"),
    dict(method="magnitude", saliency="a_log", allocation="output"),
    dict(method="magnitude", saliency="a_log", compensate="out_proj"),
    dict(method="wanda", saliency=None, module_order="sequential", prune_A=False),
    dict(method="sparsessm_obs"),
    dict(method="sparsessm", alpha=0.05),
]  # fmt: skip


@pytest.mark.parametrize("way", WAYS, ids=str)
def test_masks_and_weights_do_not_depend_on_what_memory_allowed_to_keep(tiny_model, tiny_windows, way):
    found = []
    for budget in (0, 1 << 14, 1 << 30):
        chosen = Options(model="-", dataset="-", **{"prune_A": True, "prune_layers": True, "sparsity": 0.5, **way})
        model, windows = tiny_model(num_hidden_layers=3), tiny_windows(6, 40)

        def embed(model=model, windows=windows, budget=budget):
            return Stream.embed(model, windows, device="cpu", offload="cpu", batch=2, budget=budget)

        masks = prune_by_plans(model, embed, *chosen.plans(), 0, 3, lambda *_, **__: None)
        found.append((masks, model.state_dict()))
    for masks, state in found[1:]:
        assert masks.keys() == found[0][0].keys() and all(torch.equal(masks[name], found[0][0][name]) for name in masks)
        assert all(torch.equal(state[name], found[0][1][name]) for name in state)
