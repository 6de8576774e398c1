"""What the tests of both phases of pruning share: sizes, targets, layers one by one, and what a layer's modules see."""

import torch

from sparsessm.layerwise.visit import Visit, visit
from sparsessm.models.mamba1 import Mamba1Mixer
from sparsessm.pruning.methods import PRUNED_A_LOG

SIZES = {"state_size": 8, "time_step_rank": 4}
HALF, TWO_OF_FOUR = {"sparsity": 0.5}, {"prunen": 2, "prunem": 4}


def parameters(model) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_untouched(model, before, but_for=()):
    for name, value in model.state_dict().items():
        if name not in but_for:
            assert torch.equal(value, before[name]), name


def weight_of(model, layer: int, module: str) -> torch.Tensor:
    return model.backbone.layers[layer].mixer.get_submodule(module).weight


def visit_block(block, hidden, **how) -> Visit:
    """Our forward of a stock MambaBlock; `how` as in `visit`."""
    return visit(block, Mamba1Mixer(block.mixer), hidden, **how)


def prune_transitions(block, mask: torch.Tensor, transition: str) -> None:
    """Sets the entries of A_log of a stock block that mask (D,N) chooses to what a pruned one is."""
    block.mixer.A_log.data[mask] = PRUNED_A_LOG[transition]


def module_inputs(model, windows, layer: int) -> dict[str, torch.Tensor]:
    """Inputs of the modules of one layer of the stock model by hooks; those of conv1d and dt_proj from its neighbours."""
    seen, handles = {}, []
    mixer = model.backbone.layers[layer].mixer
    for name in ("in_proj", "x_proj", "out_proj"):
        def keep(module, args, output, name=name):
            seen[name], seen[f"{name} out"] = args[0], output
        handles.append(mixer.get_submodule(name).register_forward_hook(keep))
    model(windows)
    for handle in handles:
        handle.remove()
    D, R = mixer.A_log.shape[0], mixer.dt_proj.weight.shape[1]
    return {
        "in_proj": seen["in_proj"], "conv1d": seen["in_proj out"][..., :D], "x_proj": seen["x_proj"],
        "dt_proj": seen["x_proj out"][..., :R], "out_proj": seen["out_proj"],
    }  # fmt: skip


def hessian_of(inputs: torch.Tensor) -> torch.Tensor:
    x = inputs.double().flatten(0, 1)
    return (2 / len(inputs) * x.T @ x).float()
