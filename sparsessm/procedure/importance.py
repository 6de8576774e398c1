"""How much errors at the outputs of a module matter: the Fisher information, by one pass back through the dense model.

With L the negative log likelihood of labels that are drawn from the model's own predictions, an error e at the outputs of
a module costs about (1/2) E[(dL/d out . e)^2]. Its diagonal F_r = E[(dL/d out_r)^2] says what the squared error of each row
of a weight costs, in units of the loss and so comparable between rows, modules and layers; the sum over the rows at one
token says what that token counts for in the Hessian of the inputs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor

from sparsessm.kernels.selective_scan import SUM_DTYPE
from sparsessm.layerwise import distributed
from sparsessm.layerwise.backward import backward, wanting_gradients
from sparsessm.layerwise.layer import Layer
from sparsessm.layerwise.stream import Importance, Stream
from sparsessm.models.mixer import OUT, Hooks
from sparsessm.procedure.driver import Job
from sparsessm.procedure.plan import Plan

NAME = "importance"


class _Sums:
    """Squared derivatives at the outputs of modules, by the full name of their weight."""

    def __init__(self) -> None:
        self.rows: dict[str, Tensor] = {}  # (rows,), summed over tokens
        self.tokens: dict[str, list[Tensor]] = {}  # (B,L) of each batch, summed over rows

    def hooks(self, plan: Plan, size: tuple[int, int], layer: Layer) -> Hooks:
        """For the outputs of a layer's modules, at windows of `size` (B,L)."""
        modules = set(() if plan.weights is None else plan.weights.modules)
        if plan.transitions is not None and layer.has_mixer:
            modules.add(layer.mixer.MODULES[-1])

        def listen(name: str, output: Tensor) -> None:
            output.register_hook(partial(self._add, layer.full_name(f"{name}.weight"), size))

        return {f"{name}{OUT}": partial(listen, name) for name in layer.those(modules)}

    def _add(self, name: str, size: tuple[int, int], gradient: Tensor) -> None:
        squares = gradient.flatten(0, -2).float().square()  # (B*L,rows)
        rows = squares.sum(0, dtype=SUM_DTYPE)
        self.rows[name] = self.rows[name] + rows if name in self.rows else rows
        self.tokens.setdefault(name, []).append(squares.sum(-1).view(size).cpu())


def measured_importance(job: Job, plan: Plan) -> Job:
    """The job with the importance of what the plan prunes in its streams, measured on the model as it is.

    That is of the modules whose weights it prunes, and of the last ones of mixers whose A_log it prunes.
    """
    stream, sums = job.embed(), _Sums()
    with wanting_gradients(job.layout.model, lambda name: False):
        layers, batches = len(job.layout.layers), stream.batches()
        for number, rows in enumerate(batches):
            labels = _own_labels(plan.seed, distributed.batch_number(number), stream.device)
            size = rows.stop - rows.start, stream.hidden.shape[1]
            backward(job.layout, stream, rows, labels, partial(sums.hooks, plan, size))
            for layer in range(number * layers // len(batches), (number + 1) * layers // len(batches)):
                job.report(NAME, layer)  # one for each layer in all, as of other passes
    found = {}
    for name in sorted(sums.rows):
        rows_of, tokens = sums.rows[name], torch.cat(sums.tokens[name])
        total = tokens.sum(dtype=SUM_DTYPE)
        distributed.all_sum(rows_of, total)
        count = stream.total * stream.hidden.shape[1]
        by_token = tokens * float(count / total) if plan.importance == "tokens" and total > 0 else None
        found[name] = Importance((rows_of / count).float(), by_token)

    def embed() -> Stream:
        return replace(job.embed(), importance=found)

    return replace(job, embed=embed)


def _own_labels(seed: int, batch: int, device: torch.device) -> Callable[[Tensor, slice], Tensor]:
    """The negative log likelihood of labels drawn from the predictions; a batch gets the same in any number of processes."""
    generator = torch.Generator(device).manual_seed(1_000_003 * seed + batch)

    def loss(logits: Tensor, _: slice) -> Tensor:
        logs = logits.float().log_softmax(-1)
        labels = torch.multinomial(logs.detach().exp(), 1, generator=generator)
        return -logs.gather(-1, labels).sum()

    return loss
