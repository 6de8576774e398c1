"""Where block inputs wait and how many windows a block processes together, where the options leave it open."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from sparsessm.errors import InputError
from sparsessm.layerwise import distributed
from sparsessm.layerwise.memory import default_budget
from sparsessm.layerwise.stream import STEPS_AT_ONCE
from sparsessm.models.architecture import Layout
from sparsessm.options import Options
from sparsessm.procedure.plan import Plan
from sparsessm.pruning.methods import MEASURED

# Windows that a block processes together, and how many at most where a GPU has room for more.
_BATCH, _MOST = 8, 64
# Numbers of four bytes that a block holds at once, at most, for each token and each channel of the stream.
_NUMBERS = 64
# The share of a GPU that they may take.
_SHARE = 1 / 16
_WHERE = {"device": "on the compute device", "cpu": "in main memory", "disk": "in a file of the run folder"}


@dataclass(frozen=True)
class Fit:
    """Where block inputs wait (device, cpu or disk), and how many windows a block processes together.

    Attributes:
        told: what of this was chosen here, in a line; "" where the options left nothing open.
    """

    offload: str
    calib_batch: int
    eval_batch: int
    told: str


def fitted(
    chosen: Options, plan: Plan, layout: Layout, device: torch.device, calibration: int = 0, evaluation: int = 0
) -> Fit:
    """What the options say, and a place and numbers where they say auto; masks and perplexities do not depend on them.

    calibration, evaluation: how many windows there are, of the text with most.

    Raises:
        InputError: recovery would leave a process without windows.
    """
    L, width = chosen.seqlen, layout.model.get_input_embeddings().weight.shape[1]
    streams = 2 if plan.compensation or plan.recovery.kinds else 1
    size = max(calibration * streams, evaluation) * L * width * layout.stream_dtype.itemsize
    # what is drawn, measured or learned batch after batch would be another with batches of another size
    bound = plan.importance != "none" or plan.allocation in MEASURED or bool(plan.recovery.kinds or plan.removal)
    pieces = not any(layout.whole_windows(layer) for layer in layout.layers)
    window = (STEPS_AT_ONCE if pieces else L) * width * _NUMBERS * 4
    offload, calib, evaluate = chosen.offload, chosen.calib_batch, chosen.eval_batch
    notes = []
    if offload == "auto":
        offload = place_for(device, size)
        on_cpu = device.type == "cpu" and offload == "device"
        notes.append(f"block inputs wait {_WHERE['cpu' if on_cpu else offload]}")
    if calib is None:
        calib = _BATCH if bound else batch_for(device, calibration, window)
        notes += [f"{calib} windows at once to calibrate"] if calibration else []
    if plan.recovery.kinds and -(-calibration // calib) < distributed.count():
        raise InputError(
            f"--recover needs a batch of windows for each of the {distributed.count()} processes, and there are "
            f"{calibration} windows in batches of {calib}: give a smaller --calib_batch, or start fewer processes"
        )
    if evaluate is None:
        evaluate = batch_for(device, evaluation, window)
        notes += [f"{evaluate} windows at once to evaluate"] if evaluation else []
    return Fit(offload, calib, evaluate, "; ".join(notes))


def place_for(device: torch.device, size: int) -> str:
    """The fastest of device, cpu and disk that has room for this many bytes, with a margin."""
    if size <= default_budget(device):
        return "device"
    return "cpu" if device.type != "cpu" and size <= default_budget(torch.device("cpu")) else "disk"


def batch_for(device: torch.device, windows: int, size: int) -> int:
    """How many windows a block processes together, each of which takes `size` bytes meanwhile.

    On a GPU a power of two that no process is left without; by all of its memory, not by what is free, so that all processes
    say the same.
    """
    if device.type != "cuda":
        return _BATCH
    each = -(-windows // distributed.count())
    room = int(_SHARE * torch.cuda.get_device_properties(device).total_memory) // size
    return 1 << (max(1, min(_MOST, each, room)).bit_length() - 1)

