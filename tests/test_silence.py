"""Unknown names are errors, sums that a kernel does not provide are computed by the reference, stale values are dropped."""

import dataclasses

import pytest
import torch

from sparsessm.kernels import selective_scan as scan_module
from sparsessm.kernels.selective_scan import (
    ScanStatistics,
    provided,
    selective_scan,
    selective_scan_ref,
)
from sparsessm.layerwise.layer import each_layer
from sparsessm.layerwise.stream import Stream
from sparsessm.models.architecture import Layout
from sparsessm.options import Options
from sparsessm.procedure.driver import Job
from sparsessm.procedure.plan import WeightPlan, plan_of
from sparsessm.procedure.prune import prune
from sparsessm.procedure.rules import rule_of
from sparsessm.pruning.patterns import Unstructured
from sparsessm.pruning.search import select


@pytest.mark.parametrize("rule", ["Magnitude", ""])
def test_an_unknown_weight_rule_is_refused(rule):
    with pytest.raises(ValueError, match=r"unknown weight rule .*, known are magnitude, wanda, obs"):
        rule_of(WeightPlan(Unstructured(0.5), rule, ("in_proj",)))


def test_an_unknown_hessian_of_convolutions_is_refused():
    with pytest.raises(ValueError, match="unknown conv_hessian 'both', known are tap, channel"):
        WeightPlan(Unstructured(0.5), "obs", ("in_proj",), conv_hessian="both")


def test_an_unknown_search_is_refused():
    with pytest.raises(ValueError, match="unknown search 'best'"):
        select(torch.eye(4).expand(2, 4, 4), Unstructured(0.5), "best")


@dataclasses.dataclass
class Extended(ScanStatistics):
    """One more sum than any fast kernel knows of."""

    peak: torch.Tensor | None = None

    FIELDS = (*ScanStatistics.FIELDS, "peak")


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
        known = ScanStatistics(h2=torch.zeros(5, 4, 3, dtype=torch.float64))
        selective_scan(u, delta, A, B, C, delta_softplus=True, statistics=known)
        assert asked == []
        statistics = Extended(peak=torch.zeros(4, 3, dtype=torch.float64))
        scan_module._load_kernel.cache_clear()
        selective_scan(u, delta, A, B, C, delta_softplus=True, statistics=statistics)
    scan_module._load_kernel.cache_clear()
    assert asked == [statistics]


def test_what_was_kept_is_dropped_when_a_weight_changes_but_not_A_log(tiny_model, tiny_windows, embed):
    """The stream after a layer is that of the layer as it is when it is left, whatever was kept of it before."""
    windows = tiny_windows(4, 24)
    for name in ("A_log", "in_proj.weight", "conv1d.weight", "x_proj.weight", "dt_proj.weight", "out_proj.weight"):
        model = tiny_model()
        stream = embed(model, windows)
        layer = next(iter(each_layer(Layout(model), stream)))
        for _ in layer.scan_statistics(("h2",)):
            pass
        assert layer._kept
        layer.write(name, layer.parameter(name) * 0.5)
        assert bool(layer._kept) == (name == "A_log")
        expected = layer.module(model.backbone.embeddings(windows))
        layer.advance()
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

        layout = Layout(model)

        def embed(layout=layout, windows=windows, budget=budget):
            return Stream.embed(layout, windows, device="cpu", offload="cpu", batch=2, budget=budget)

        plan = plan_of(chosen, layout.targets(chosen.target_modules, chosen.parts, chosen.module))
        found.append((prune(Job(layout, embed, 0, 3), plan, windows).masks, model.state_dict()))
    for masks, state in found[1:]:
        assert masks.keys() == found[0][0].keys() and all(torch.equal(masks[name], found[0][0][name]) for name in masks)
        assert all(torch.equal(state[name], found[0][1][name]) for name in state)
