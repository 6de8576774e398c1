"""The layer-by-layer walk: the only loop over blocks in the project.

    stream = Stream.embed(model, windows, ...)
    for block in walk(model, stream):
        ...                                   # look at the inputs of the block, change its weights
    # stream.hidden is now what leaves the last layer that was walked

Every layer passes its activations on, whether it is of interest or not. A block is on the compute device while it is
walked and goes back afterwards; the residual stream of all windows waits elsewhere in between. Windows go through a
block some time steps after the other, so that what a block makes of them never exists for all steps at once.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor, nn

from sparsessm.errors import DivergenceError
from sparsessm.kernels.matmul import linear
from sparsessm.kernels.selective_scan import SUM_DTYPE, ScanMoments
from sparsessm.layerwise import distributed as ranks
from sparsessm.layerwise.memory import DiskTensor, default_budget, room
from sparsessm.layerwise.statistics import Accumulator, PairGram
from sparsessm.models.mamba1 import (
    Carry,
    ScanInputs,
    Taps,
    block_forward,
    output,
    remove_states,
    scan,
    scan_inputs,
)

# Time steps that go through a block together: what bounds memory instead of the length of a window.
STEPS_AT_ONCE = 128


@dataclass
class Stream:
    """The residual stream of this process's windows between two blocks.

    Attributes:
        hidden: (n,L,M), in main memory, on the device, or in a file; float32 where the model keeps its residuals so,
            else in its dtype.
        device: where blocks compute.
        batch: windows that go through a block together.
        total: windows in all processes together.
        budget: bytes that a block may keep of what it has computed for its second pass.
        gone: by parameter name, True where an entry was pruned before this run (sparsessm.models.history).
    """

    hidden: Tensor | DiskTensor
    device: torch.device
    batch: int
    total: int
    budget: int
    gone: Mapping[str, Tensor] = field(default_factory=dict)

    @classmethod
    @torch.no_grad()
    def embed(
        cls,
        model: nn.Module,
        windows: Tensor,
        *,
        device: torch.device | str,
        offload: torch.device | str,
        batch: int,
        budget: int | None = None,
        scratch: str | Path | None = None,
        gone: Mapping[str, Tensor] | None = None,
    ) -> Stream:
        """Looks up windows (n,L) of token ids in the embedding of the model; of several processes each takes its share.

        offload: where the stream waits, a device, or "disk" for a file in `scratch`. budget: bytes, by default a share of
                what is free.
        """
        embeddings, device = model.backbone.embeddings, torch.device(device)
        dtype = torch.float32 if model.config.residual_in_fp32 else embeddings.weight.dtype
        mine = ranks.share(windows, batch)
        shape = (*mine.shape, embeddings.weight.shape[1])
        hidden = room(shape, dtype, offload, scratch)
        budget = default_budget(device) if budget is None else budget
        stream = cls(hidden, device, batch, len(windows), budget, gone or {})
        for rows in stream.batches():
            hidden[rows, :] = embeddings(mine[rows].to(embeddings.weight.device)).to(dtype)
        return stream

    def __len__(self) -> int:
        return self.hidden.shape[0]

    def batches(self) -> list[slice]:
        return [slice(start, min(start + self.batch, len(self))) for start in range(0, len(self), self.batch)]

    def beside(self, rows: int, columns: int, dtype: torch.dtype) -> Tensor | DiskTensor:
        """(n,rows,columns) of any content, where the stream waits."""
        disk = isinstance(self.hidden, DiskTensor)
        place, folder = ("disk", self.hidden.folder) if disk else (self.hidden.device, None)
        return room((len(self), rows, columns), dtype, place, folder)

    def pieces(self) -> list[slice]:
        L = self.hidden.shape[1]
        return [slice(start, min(start + STEPS_AT_ONCE, L)) for start in range(0, L, STEPS_AT_ONCE)]


class _Carries:
    """What the windows of a stream carry from one piece to the next, where the stream itself waits."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._parts: list[Tensor | DiskTensor] = []  # none before the end of the first piece

    def take(self, rows: slice) -> list[Tensor | None]:
        """conv, state and twin of a batch after the piece before, see Carry and ScanMoments."""
        taken = [part[rows, :].to(self._stream.device) for part in self._parts]
        return taken + [None] * (3 - len(taken))

    def put(self, rows: slice, *values: Tensor | None) -> None:
        values = [value for value in values if value is not None]
        self._parts = self._parts or [self._stream.beside(*value.shape[1:], value.dtype) for value in values]
        for part, value in zip(self._parts, values, strict=True):
            part[rows, :] = value


class BlockView:
    """One block of the walk, together with the stream that enters it."""

    def __init__(self, index: int, block: nn.Module, stream: Stream) -> None:
        self.index, self.block, self.stream = index, block, stream
        self.advanced = False
        self._kept: dict[tuple[int, int], tuple[ScanInputs, Tensor]] = {}  # by first step and first window

    @property
    def A_log(self) -> Tensor:
        """(D,N) float32, the parameter itself."""
        return self.block.mixer.A_log.data

    def parameter_name(self, name: str) -> str:
        """The name of a parameter of the mixer in the checkpoint."""
        return f"backbone.layers.{self.index}.mixer.{name}"

    def gone(self, name: str) -> Tensor | None:
        """Which entries of a parameter of the mixer were pruned before this run, in its shape; None for none."""
        mask = self.stream.gone.get(self.parameter_name(name))
        return None if mask is None else mask.to(self.stream.device)

    @torch.no_grad()
    def write(self, name: str, value: Tensor) -> None:
        """Gives a parameter of the mixer new values: the only way to change one while its block is visited.

        What `observe_states` kept is let go where it depends on the parameter.
        """
        self.block.mixer.get_parameter(name).data.copy_(value)
        if name != "A_log":
            self._kept.clear()

    def remove_states(self, columns: Tensor) -> None:
        """Takes the state columns that columns (N,) chooses out of the block."""
        remove_states(self.block, columns)
        self._kept.clear()

    @torch.no_grad()
    def observe(self, accumulators: Mapping[str, Accumulator], *, advance: bool = False) -> None:
        """Shows all windows' inputs of the named modules to their accumulators, those of all processes.

        With `advance` the outputs take the place of the inputs: for walks that look and change nothing.
        """
        self._kept.clear()  # the taps want to see all of the block
        taps = {name: accumulator.update for name, accumulator in accumulators.items()}
        # what comes before out_proj is all that its own input needs
        self._run(taps, keep_outputs=advance, to_output=advance or "out_proj" in taps)
        for accumulator in accumulators.values():
            ranks.all_sum(accumulator.total)

    @torch.no_grad()
    def observe_states(self, needs: tuple[str, ...], effect: str = "zero") -> Iterator[tuple[int, ScanMoments]]:
        """Sums over all windows of what the scan sees, some time steps after the other.

        Yields (first step, moments of the steps from there on). All windows of all processes go through a piece before
        the next begins, so the sums of a step are complete when it is yielded, and only STEPS_AT_ONCE steps are held.
        What the scan read is kept within the budget, for `advance` after a change of A_log alone. effect: see ScanMoments.
        """
        stream, (D, N), left = self.stream, self.A_log.shape, self.stream.budget
        pieces, carries = stream.pieces(), _Carries(stream)
        for steps in pieces:
            moments = ScanMoments.zeros(needs, steps.stop - steps.start, D, N, stream.device, effect)
            for rows in stream.batches():
                conv, state, moments.twin = carries.take(rows) if steps.start else (None, None, None)
                hidden = stream.hidden[rows, steps].to(stream.device)
                inputs, conv = scan_inputs(self.block, hidden, conv)
                _, state = scan(self.block, inputs, state, moments)
                if steps is not pieces[-1]:
                    carries.put(rows, conv, state, moments.twin)
                if inputs.nbytes() <= left:
                    self._kept[steps.start, rows.start] = inputs.compact(), conv
                    left -= inputs.nbytes()
            ranks.all_sum(*moments.tensors())
            yield steps.start, moments

    @torch.no_grad()
    def observe_aim(self, teacher: BlockView, pair: PairGram) -> None:
        """Shows the inputs of out_proj together with what out_proj should make of them, less its bias.

        That is the stream after `teacher`, the block with the weights that it had, on the stream that it had, less the
        stream before this block. All processes see the sums of all.
        """
        self._kept.clear()
        views = (self, teacher)
        for rows in self.stream.batches():
            conv, state = [None, None], [None, None]
            for steps in self.stream.pieces():
                hidden = [view.stream.hidden[rows, steps].to(view.stream.device) for view in views]
                gated = []
                for i, view in enumerate(views):
                    inputs, conv[i] = scan_inputs(view.block, hidden[i], conv[i])
                    y, state[i] = scan(view.block, inputs, state[i])
                    gated.append(y)
                aim = linear(gated[1], teacher.block.mixer.out_proj.weight) + (hidden[1] - hidden[0])
                pair.update(gated[0], aim)
        ranks.all_sum(pair.total, pair.cross)

    @torch.no_grad()
    def output_error(self, other: BlockView) -> float:
        """Energy of the difference to what another block puts out, over that of the stream; first batch of each process."""
        self._kept.clear()
        stream = self.stream
        sums = torch.zeros(2, dtype=SUM_DTYPE, device=stream.device)  # of the difference, of the stream
        for rows in stream.batches()[:1]:
            carries: list[Carry | None] = [None, None]
            for steps in stream.pieces():
                hidden = stream.hidden[rows, steps].to(stream.device)
                out = []
                for i, view in enumerate((self, other)):
                    after, carries[i] = block_forward(view.block, hidden, carry=carries[i])
                    out.append(after.float())
                sums[0] += (out[0] - out[1]).square().sum(dtype=SUM_DTYPE)
                sums[1] += hidden.float().square().sum(dtype=SUM_DTYPE)
        ranks.all_sum(sums)
        return float(sums[0] / sums[1])

    @torch.no_grad()
    def advance(self) -> None:
        """Replaces the stream by what leaves the block.

        Of what `observe_states` kept, only the scan and out_proj are computed again: no more than A_log has changed since.
        """
        self._run({}, keep_outputs=True, to_output=True)

    def _run(self, taps: Taps, *, keep_outputs: bool, to_output: bool) -> None:
        """All windows through the block, batch after batch, each in pieces."""
        stream = self.stream
        finite = torch.ones((), dtype=torch.bool, device=stream.device)
        for rows in stream.batches():
            conv = state = None
            for steps in stream.pieces():
                hidden = stream.hidden[rows, steps].to(stream.device)
                kept = self._kept.pop((steps.start, rows.start), None)
                inputs, conv = kept or scan_inputs(self.block, hidden, conv, taps)
                if not to_output:
                    continue
                y, state = scan(self.block, inputs, state)
                out = output(self.block, hidden, y, taps)
                if keep_outputs:
                    finite &= torch.isfinite(out).all()
                    stream.hidden[rows, steps] = out.to(stream.hidden.dtype)
        self.advanced = keep_outputs
        if not finite:
            raise DivergenceError(f"layer {self.index} puts out values that are not finite")


@torch.no_grad()
def walk(
    model: nn.Module, stream: Stream, first: int = 0, stop: int | None = None, *, start: int = 0
) -> Iterator[BlockView]:
    """Yields the blocks first <= i < stop in order; all layers of the model move the stream on.

    After the caller is done with a block its outputs are computed from the block as it then is.

    Args:
        start: the layer that the stream enters; those before it take no part.

    Raises:
        DivergenceError: naming the layer whose outputs are not finite.
    """
    layers = model.backbone.layers
    stop = len(layers) if stop is None else stop
    for index in range(start, len(layers)):
        block = layers[index]
        home = block.norm.weight.device
        block.to(stream.device)
        view = BlockView(index, block, stream)
        try:
            if first <= index < stop:
                yield view
            if not view.advanced:
                view.advance()
        finally:
            block.to(home)
