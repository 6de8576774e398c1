"""Where block inputs wait and how many windows are computed together, where the options leave it open."""

import pytest
import torch

import sparsessm
from sparsessm.errors import InputError
from sparsessm.layerwise.memory import default_budget, placement
from sparsessm.models.architecture import Layout
from sparsessm.options import Options
from sparsessm.procedure.fitting import fitted, place_for
from sparsessm.procedure.plan import CompensationPlan, Plan

CPU = torch.device("cpu")
PRUNED = {"model": "-", "dataset": "-", "method": "sparsessm", "prune_A": True, "sparsity": 0.5, "seqlen": 1024}


def fit(model, calibration=4, evaluation=2, plan=None, **options):
    return fitted(Options(**PRUNED | options), plan or Plan(), Layout(model), CPU, calibration, evaluation)


def test_what_has_room_stays_where_it_is_computed_and_what_has_not_goes_to_disk():
    room = default_budget(CPU)
    assert place_for(CPU, room // 2) == "device" and place_for(CPU, room * 2) == "disk"


def test_the_options_win_and_the_line_says_only_what_was_left_open(tiny_model):
    asked = fit(tiny_model(), offload="disk", calib_batch=3, eval_batch=5)
    assert (asked.offload, asked.calib_batch, asked.eval_batch, asked.told) == ("disk", 3, 5, "")
    chosen = fit(tiny_model(), eval_batch=5)
    assert (chosen.offload, chosen.calib_batch, chosen.eval_batch) == ("device", 8, 5)
    assert chosen.told == "block inputs wait in main memory; 8 windows at once to calibrate"
    assert fit(tiny_model(), calibration=0).told == "block inputs wait in main memory; 8 windows at once to evaluate"


def test_streams_that_do_not_fit_in_memory_wait_on_disk(tiny_model):
    model = tiny_model()
    window = 1024 * model.config.hidden_size * 4
    many = int(default_budget(CPU) / window * 1.1)
    assert fit(model, calibration=many).offload == fit(model, evaluation=many).offload == "disk"
    twice = Plan(compensation=CompensationPlan(refit=True))  # a second stream beside it
    assert (fit(model, many // 2).offload, fit(model, many // 2, plan=twice).offload) == ("device", "disk")


def test_the_interface_takes_the_places_of_the_command_line_alone(tiny_model, tiny_windows):
    model, windows = tiny_model(), tiny_windows()
    figures = {offload: sparsessm.perplexity(model, windows, offload=offload) for offload in ("auto", "device", "disk")}
    assert len(set(figures.values())) == 1
    with pytest.raises(InputError, match="--offload must be one of auto, device, cpu, disk, not cuda:1"):
        sparsessm.perplexity(model, windows, offload="cuda:1")
    with pytest.raises(ValueError, match="unknown offload 'auto'"):
        placement(CPU, "auto", None)
