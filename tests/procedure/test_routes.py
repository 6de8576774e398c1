"""The fast scan changes no result: the same masks as by the reference for every method, and the same perplexity."""

from dataclasses import replace

import pytest
import torch

from sparsessm.corpora import text
from sparsessm.kernels.selective_scan import force_kernel
from sparsessm.layerwise.stream import Stream
from sparsessm.metrics.perplexity import perplexity
from sparsessm.models import checkpoint
from sparsessm.models.architecture import Layout
from sparsessm.models.mamba1 import Mamba1Mixer
from sparsessm.models.tokenizing import load_tokenizer
from sparsessm.options import Options
from sparsessm.procedure.driver import Job
from sparsessm.procedure.plan import CompensationPlan, plan_of
from sparsessm.procedure.prune import prune
from sparsessm.pruning.methods import METHODS

# Methods that choose by the sums of one pass. Where weights are refined or refitted, rounding affects the next choice.
SCORED = [
    name for name, method in METHODS.items()
    if (method.prunes_A_log or method.weights) and method.compensate == "none"
]  # fmt: skip
PLACE = {"device": "cpu", "offload": "cpu", "batch": 4}


SOLVED_IN_BLOCKS = {"weights": "obs", "importance": "none", "allocation": "output"}


@pytest.fixture(scope="module")
def demo():
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # two would spin beside the other tests
    yield from _demo()
    torch.set_num_threads(before)


def _demo():
    source = checkpoint.find("demo")
    tokenizer = load_tokenizer(source)
    calibration = text.calibration_windows("demo", tokenizer, 8, 128, seed=0).ids
    yield source, calibration, text.cut_windows(text.evaluation_stream("demo", tokenizer, 128).ids, 128, 8)


def pruned(demo, kernel, name, compensated=False, layers=6, **flags):
    source, calibration, evaluation = demo
    method = METHODS[name]
    share = {"prunen": 2, "prunem": 4} if method.needs_n_of_m else {"sparsity": 0.5}
    options = Options(
        model="demo", dataset="demo", method=name, prune_A=method.prunes_A_log, prune_layers=method.weights is not None,
        alpha=0.04 if method.allocation == "sensitivity" else 0.0, **share, **flags,
    )  # fmt: skip
    layout, plan = Layout(checkpoint.load(source)), plan_of(options, Mamba1Mixer.MODULES)
    if not compensated:
        plan = replace(plan, compensation=CompensationPlan(), allocation="uniform", importance="none")
    with force_kernel(kernel):
        masks = prune(Job(layout, lambda: Stream.embed(layout, calibration, **PLACE), 0, layers), plan, calibration).masks
        return masks, perplexity(layout, evaluation, **PLACE).value


@pytest.mark.slow
@pytest.mark.parametrize("name", SCORED)
def test_every_method_gives_the_same_masks_by_both_routes(demo, name):
    """OBS may choose otherwise between near ties: with this seed sparsessm_dev does, for 6 weights of layer 1.

    All before them is the same to the bit. What follows goes by other weights: it differs in ten times as many entries a
    layer later, of 1.5 million in all.
    """
    (masks, value), (expected, by_reference) = pruned(demo, None, name), pruned(demo, "ref", name)
    assert masks.keys() == expected.keys() and masks
    shares = [float((masks[key] != expected[key]).float().mean()) for key in masks]
    if METHODS[name].weights != "obs":
        assert not any(shares)
    assert next(filter(None, shares), 0.0) < 2e-4 and max(shares) < 0.01
    assert value == pytest.approx(by_reference, rel=5e-3 if any(shares) else 1e-5)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("compensated", "share", "near", "flags"),
    [
        (False, 1e-3, 5e-3, SOLVED_IN_BLOCKS), (True, 0.02, 5e-3, SOLVED_IN_BLOCKS), (False, 0.02, 5e-3, {}),
        (True, 0.1, 0.05, {}),
    ],
)
def test_compensation_agrees_by_both_routes_but_for_what_rounding_moves(demo, compensated, share, near, flags):
    """The two phases of sparsessm_obs alone, and the whole of it, where rounding propagates from layer to layer.

    Weights that go one by one go other ways after each near tie; what a thousand tokens say of the masks that they end
    at is the same, what other text says is not quite.
    """
    masks, value = pruned(demo, None, "sparsessm_obs", compensated, layers=3, **flags)
    expected, by_reference = pruned(demo, "ref", "sparsessm_obs", compensated, layers=3, **flags)
    entries = sum(mask.numel() for mask in masks.values())
    assert sum(int((masks[key] != expected[key]).sum()) for key in masks) < share * entries
    assert value == pytest.approx(by_reference, rel=near)


def test_pruning_leaves_the_config_of_the_source_alone(demo):
    pruned(demo, None, "structure_ts")
    assert demo[0].config.state_size == 16
