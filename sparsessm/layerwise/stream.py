"""The residual stream of all windows between two layers, and the loop over the layers that moves it on.

    stream = Stream.embed(layout, windows, ...)
    for layer in each_layer(layout, stream):
        ...                                   # look at the inputs of the layer, change its weights
    # stream.hidden is now what leaves the last layer

Every layer passes its activations on, whether it is of interest or not. A layer is on the compute device while it is
visited and goes back afterwards; the stream waits elsewhere in between.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from sparsessm.errors import InputError
from sparsessm.layerwise import distributed
from sparsessm.layerwise.memory import DiskTensor, Stored, allocate, default_budget
from sparsessm.layerwise.pinned import PinnedTensor
from sparsessm.models.architecture import Call, Layout

# Time steps that a layer processes together: they bound memory instead of the length of a window.
STEPS_AT_ONCE = 128


@dataclass(frozen=True)
class Importance:
    """How much errors at the outputs of a module matter to the loss of the model.

    Attributes:
        rows: (rows,), mean over tokens of the squared derivative by each output.
        tokens: (n,L), its sum over the outputs at the tokens of this process's windows, over the mean of all; None where all
            tokens count the same.
    """

    rows: Tensor
    tokens: Tensor | None = None


@dataclass
class Stream:
    """The residual stream of this process's windows.

    Attributes:
        hidden: (n,L,M), on the device, in main memory, or in a file.
        device: where layers compute.
        batch: windows that a layer processes together.
        total: windows in all processes together.
        budget: bytes that a layer may keep of what it has computed for its second pass.
        calls: how each layer is called, by the number of windows in a batch.
        entered: what entered the first layer, of models whose later layers read it again; (0,) of others.
        gone: by parameter name, True where an entry was pruned before this run (models.history).
        importance: by the full name of a weight.
        steps: time steps that a layer processes together.
    """

    hidden: Stored
    device: torch.device
    batch: int
    total: int
    budget: int
    calls: dict[int, list[Call]] = field(default_factory=dict)
    entered: Stored = field(default_factory=lambda: torch.empty(0))
    gone: Mapping[str, Tensor] = field(default_factory=dict)
    importance: Mapping[str, Importance] = field(default_factory=dict)
    steps: int = STEPS_AT_ONCE

    @classmethod
    @torch.no_grad()
    def embed(
        cls,
        layout: Layout,
        windows: Tensor,
        *,
        device: torch.device | str,
        offload: torch.device | str,
        batch: int,
        budget: int | None = None,
        scratch: str | Path | None = None,
        gone: Mapping[str, Tensor] | None = None,
        steps: int | None = None,
        share: bool = True,
    ) -> Stream:
        """What enters the first layer for windows (n,L) of token ids; of several processes each takes its share, or all.

        offload: where the stream waits, a device, or "disk" for a file in `scratch`. budget: bytes, by default a share of
                what is free.
        """
        device, dtype = torch.device(device), layout.stream_dtype
        mine = distributed.share(windows, batch) if share else windows
        width = layout.model.get_input_embeddings().weight.shape[1]
        hidden = allocate((*mine.shape, width), dtype, offload, scratch, device)
        budget = default_budget(device) if budget is None else budget
        stream = cls(hidden, device, batch, len(windows), budget, gone=gone or {}, steps=steps or STEPS_AT_ONCE)
        for rows in stream.batches():
            entered, calls = layout.enter(mine[rows].to(layout.home))
            hidden[rows, :] = entered.to(dtype)
            if any(call.reads_entered() for call in calls):
                if not rows.start:
                    stream.entered = stream.beside(entered.shape[1], width, dtype)
                stream.entered[rows, :] = entered.to(dtype)
            size, calls = rows.stop - rows.start, [call.to(device) for call in calls]
            known = stream.calls.setdefault(size, calls)
            if known is not calls and any(not old.equals(new) for old, new in zip(known, calls, strict=True)):
                raise InputError(
                    f"the layers of this {layout.model.config.model_type} model get arguments that depend on the text in a "
                    "way that is not known here: pruning it would measure another model"
                )
        return stream

    def __len__(self) -> int:
        return self.hidden.shape[0]

    @property
    def on_device(self) -> bool:
        """Whether the stream waits where layers compute."""
        return isinstance(self.hidden, Tensor) and self.hidden.device == self.device

    def batches(self) -> list[slice]:
        return [slice(start, min(start + self.batch, len(self))) for start in range(0, len(self), self.batch)]

    def beside(self, rows: int, columns: int, dtype: torch.dtype) -> Stored:
        """(n,rows,columns) of any content, where the stream waits."""
        shape = len(self), rows, columns
        if isinstance(self.hidden, DiskTensor):
            return allocate(shape, dtype, "disk", self.hidden.folder)
        place = self.hidden.device if isinstance(self.hidden, Tensor) else "cpu"
        return allocate(shape, dtype, place, device=self.device)

    def turns(self, visits: Sequence[tuple[slice, slice]]) -> Iterator[tuple[slice, slice]]:
        """The visits of (windows, steps) in their order; what the next one reads is on its way meanwhile."""
        hidden = self.hidden
        if isinstance(hidden, PinnedTensor):
            hidden.forget()
        for number, visit in enumerate(visits):
            if isinstance(hidden, PinnedTensor) and number + 1 < len(visits):
                hidden.ahead(visits[number + 1])
            yield visit

    def pieces(self) -> list[slice]:
        L = self.hidden.shape[1]
        return [slice(start, min(start + self.steps, L)) for start in range(0, L, self.steps)]
