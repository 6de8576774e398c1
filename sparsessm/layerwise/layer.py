"""One layer of the loop, together with the stream that enters it: how it is observed, and how it is changed.

The stock layer's own forward does residuals, norms and multipliers; only its SSM mixer is ours while the layer is visited.
A layer processes some time steps of the windows after the other, so that its activations never exist for all steps
at once: the mixer keeps a cache of its last inputs and its state.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import nullcontext, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from sparsessm.errors import DivergenceError
from sparsessm.kernels.matmul import linear
from sparsessm.kernels.selective_scan import SUM_DTYPE
from sparsessm.layerwise import distributed
from sparsessm.layerwise.memory import DiskTensor
from sparsessm.layerwise.statistics import Accumulator, CrossGram
from sparsessm.layerwise.stream import Stream
from sparsessm.models.architecture import Call, Layout, standing_in
from sparsessm.models.mixer import Cache, Hooks, Mixer

NO_CALL = Call()


class _Enough(Exception):
    """Ends the forward of a layer once its hooks have what they need."""


@dataclass
class Visit:
    """The results of one run of a layer over a piece of some windows.

    Attributes:
        inputs: of the scan. conv, state: for the next piece, see models.mixer.Cache. y: what the mixer's last module gets.
        out: (B,L,M), the residual stream after the layer. All are tensors, or None where the run ended before.
    """

    inputs: Any = None
    conv: Any = None
    state: Any = None
    y: Any = None
    out: Any = None

    @property
    def cache(self) -> Cache:
        return Cache(self.conv, self.state)


def visit(
    module: nn.Module,
    mixer: Mixer | None,
    hidden: Tensor,
    *,
    call: Call = NO_CALL,
    cache: Cache | None = None,
    hooks: Hooks | None = None,
    statistics: Any = None,
    kept: tuple[Any, Tensor] | None = None,
    until: str = "end",
) -> Visit:
    """Runs a stock layer with our mixer in it.

    Args:
        hidden: (B,L,M) residual stream. cache: after the piece before, None at the start of a window.
        hooks: called with the inputs of the mixer's modules they are named after. statistics: for the scan to add to.
        kept: inputs and conv of an earlier visit, which are then not computed again.
        until: "inputs" of the scan, "scan", or "end".
    """
    seen, hooks = Visit(), hooks or {}

    def forward(x: Tensor, *_: Any, **__: Any) -> Tensor:
        assert mixer is not None  # it stands in for one
        seen.inputs, seen.conv = kept or mixer.prepare(x, None if cache is None else cache.conv, hooks)
        if until == "inputs":
            raise _Enough
        seen.y, seen.state = mixer.scan(seen.inputs, None if cache is None else cache.state, statistics)
        if mixer.MODULES[-1] in hooks:
            hooks[mixer.MODULES[-1]](seen.y)
        if until == "scan":
            raise _Enough
        return mixer.project(seen.y)

    with suppress(_Enough), nullcontext() if mixer is None else standing_in(mixer.module, forward):
        out = module(hidden, *call.arguments, **call.keywords)
        seen.out = out[0] if isinstance(out, tuple) else out
    return seen


class _Caches:
    """The caches of all windows of a stream between two pieces, stored where the stream is."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._parts: list[Tensor | DiskTensor] = []  # none before the end of the first piece
        self._shapes: list[tuple[int, ...]] = []

    def take(self, rows: slice, steps: slice) -> list[Any]:
        """conv, state and counterfactual state of a batch after the piece before, see Cache and ScanStatistics.

        None each where there is none: at the start of a window all.
        """
        kept = zip(self._parts, self._shapes, strict=True) if steps.start else ()
        taken: list[Any] = [part[rows, :].to(self._stream.device).view(-1, *shape) for part, shape in kept]
        return taken + [None] * (3 - len(taken))

    def put(self, rows: slice, *values: Tensor | None) -> None:
        kept = [value for value in values if value is not None]
        flat = [value.reshape(len(value), -1, value.shape[-1]) for value in kept]
        if not self._parts:
            self._shapes = [tuple(value.shape[1:]) for value in kept]
            self._parts = [self._stream.beside(value.shape[1], value.shape[2], value.dtype) for value in flat]
        for part, value in zip(self._parts, flat, strict=True):
            part[rows, :] = value


class Layer:
    """A layer that is visited.

    Attributes:
        index: in the model. module: the stock layer. modules: what can be pruned, by name.
    """

    def __init__(self, layout: Layout, index: int, module: nn.Module, stream: Stream | None = None) -> None:
        self.layout, self.index, self.module, self._stream = layout, index, module, stream
        self._mixer, self.modules = layout.mixer(module), layout.modules(module)
        self.advanced = False
        self._prefix = f"{layout.layer_name(index)}.{layout.mixer_path(module)}."
        self._kept: dict[tuple[int, int], tuple[Any, Tensor]] = {}  # ScanInputs, conv; by first step and first window

    def copy(self, module: nn.Module, stream: Stream | None = None) -> Layer:
        """The same layer with another module, on this stream or another."""
        return Layer(self.layout, self.index, module, self._stream if stream is None else stream)

    @property
    def mixer(self) -> Mixer:
        """Ours over the SSM mixer, of a layer that has one."""
        assert self._mixer is not None
        return self._mixer

    @property
    def stream(self) -> Stream:
        """What enters the layer, of one that is visited."""
        assert self._stream is not None
        return self._stream

    # ---- parameters

    @property
    def A_log(self) -> Tensor:
        """A_log as a matrix (rows,cols) float32, a view of the parameter."""
        return self.mixer.A_log

    def full_name(self, name: str) -> str:
        """The name in the checkpoint of a parameter of the mixer."""
        return self._prefix + name

    def short_name(self, name: str) -> str:
        """The name within the mixer of a full name."""
        return name.removeprefix(self._prefix)

    def parameter(self, name: str) -> nn.Parameter:
        return self.mixer.module.get_parameter(name)

    def weight(self, module: str) -> Tensor:
        """The weight of a module that can be pruned; to be read, not written."""
        return self.module.get_parameter(f"{self.modules[module].path}.weight").data

    def gone(self, name: str) -> Tensor | None:
        """Which entries of a parameter were pruned before this run, in its shape; None for none."""
        mask = self.stream.gone.get(self.full_name(name))
        return None if mask is None else mask.to(self.stream.device)

    @torch.no_grad()
    def write(self, name: str, value: Tensor) -> None:
        """Gives a parameter new values, in its shape or as a matrix: the only way to change one.

        What `scan_statistics` kept is dropped if it depends on the parameter.
        """
        data = self.parameter(name).data
        data.copy_(value.reshape(data.shape))
        if name != "A_log":
            self._kept.clear()

    def remove(self, structure: str, columns: Tensor) -> dict[str, Tensor]:
        """Removes states or heads; masks by full name, in the shape from before, True = removed."""
        self._kept.clear()
        removed = self.mixer.remove(structure, columns)
        return {self.full_name(name): mask for name, mask in removed.items()}

    # ---- what can be seen

    @torch.no_grad()
    def observe(self, accumulators: Mapping[str, Accumulator], *, advance: bool = False) -> None:
        """Shows all windows' inputs of the named modules to their accumulators, those of all processes.

        With `advance` the outputs take the place of the inputs: for passes that look and change nothing.
        """
        self._kept.clear()  # the hooks want to see all of the layer
        hooks = {name: accumulator.update for name, accumulator in accumulators.items()}
        # what comes before the last module is all that its own input needs
        last = self.mixer.MODULES[-1]
        self._pass(hooks, keep_outputs=advance, until="end" if advance else "scan" if last in hooks else "inputs")
        for accumulator in accumulators.values():
            distributed.all_sum(*accumulator.tensors())

    @torch.no_grad()
    def scan_statistics(
        self, needs: tuple[str, ...], effect: str = "zero", structure: str = "entries"
    ) -> Iterator[tuple[int, Any]]:
        """Sums over all windows of what the scan sees, some time steps after the other.

        Yields (first step, statistics of the steps from there on). All windows of all processes finish a piece before
        the next begins, so the sums of a step are complete when it is yielded, and only STEPS_AT_ONCE steps are held.
        What the scan read is kept within the budget, for `advance` after a change of A_log alone. effect: what a pruned
        entry is (ScanStatistics).
        """
        stream, mixer, left = self.stream, self.mixer, self.stream.budget
        pieces, caches = stream.pieces(), _Caches(stream)
        for steps in pieces:
            statistics = mixer.scan_statistics(
                needs, steps.stop - steps.start, stream.device, effect=effect, structure=structure
            )
            for rows in stream.batches():
                conv, state, statistics.counterfactual = caches.take(rows, steps)
                cache = None if conv is None else Cache(conv, state)
                seen = self._visit(rows, steps, cache=cache, statistics=statistics, until="scan")
                if steps is not pieces[-1]:
                    caches.put(rows, seen.conv, seen.state, statistics.counterfactual)
                if seen.inputs.nbytes() <= left:
                    self._kept[steps.start, rows.start] = seen.inputs.compact(), seen.conv
                    left -= seen.inputs.nbytes()
            distributed.all_sum(*statistics.tensors())
            yield steps.start, statistics

    @torch.no_grad()
    def observe_target(self, dense: Layer, gram: CrossGram) -> None:
        """Shows the inputs of the mixer's last module together with what it should make of them, less its bias.

        That is what `dense`, the layer with the weights that it had, makes on the stream that it had, and what the stream
        before this layer lacks to that. All processes see the sums of all.
        """
        self._kept.clear()
        weight = dense.weight(self.mixer.MODULES[-1])
        for rows in self.stream.batches():
            caches: list[Cache | None] = [None, None]
            for steps in self.stream.pieces():
                hidden = [layer.stream.hidden[rows, steps].to(layer.stream.device) for layer in (self, dense)]
                last = []
                for i, layer in enumerate((self, dense)):
                    seen = layer._visit(rows, steps, hidden[i], cache=caches[i], until="scan")
                    last.append(seen.y)
                    caches[i] = seen.cache
                gram.update(last[0], linear(last[1], weight) + (hidden[1] - hidden[0]))
        distributed.all_sum(*gram.tensors())

    @torch.no_grad()
    def output_error(self, other: Layer) -> float:
        """Squared difference to the output of another layer, over the squares of the stream; first batch of each process."""
        self._kept.clear()
        stream = self.stream
        sums = torch.zeros(2, dtype=SUM_DTYPE, device=stream.device)  # of the difference, of the stream
        for rows in stream.batches()[:1]:
            caches: list[Cache | None] = [None, None]
            for steps in stream.pieces():
                hidden = stream.hidden[rows, steps].to(stream.device)
                out = []
                for i, layer in enumerate((self, other)):
                    seen = layer._visit(rows, steps, hidden, cache=caches[i])
                    out.append(seen.out.float())
                    caches[i] = seen.cache
                sums[0] += (out[0] - out[1]).square().sum(dtype=SUM_DTYPE)
                sums[1] += hidden.float().square().sum(dtype=SUM_DTYPE)
        distributed.all_sum(sums)
        return float(sums[0] / sums[1])

    # ---- moving on

    @torch.no_grad()
    def advance(self, *, check: bool = True) -> None:
        """Replaces the stream by what leaves the layer.

        Of what `scan_statistics` kept, only the scan and what follows are computed again: no more than A_log has changed.

        Raises:
            DivergenceError: with `check`, where that is not finite.
        """
        self._pass({}, keep_outputs=True, check=check)

    def _pass(self, hooks: Hooks, *, keep_outputs: bool, until: str = "end", check: bool = True) -> None:
        """All windows through the layer, batch after batch, each in pieces; check: whether outputs must be finite."""
        stream = self.stream
        finite = torch.ones((), dtype=torch.bool, device=stream.device)
        for rows in stream.batches():
            cache = None
            for steps in stream.pieces():
                kept = self._kept.pop((steps.start, rows.start), None)
                seen = self._visit(rows, steps, cache=cache, hooks=hooks, kept=kept, until=until)
                cache = seen.cache
                if keep_outputs:
                    finite &= torch.isfinite(torch.stack(torch.aminmax(seen.out))).all()
                    stream.hidden[rows, steps] = seen.out.to(stream.hidden.dtype)
        self.advanced = keep_outputs
        if check and not finite:
            raise DivergenceError(f"layer {self.index} outputs values that are not finite")

    def _visit(self, rows: slice, steps: slice, hidden: Tensor | None = None, **how: Any) -> Visit:
        if hidden is None:
            hidden = self.stream.hidden[rows, steps].to(self.stream.device)
        return visit(self.module, self._mixer, hidden, call=self._call(rows, steps), **how)

    def _call(self, rows: slice, steps: slice) -> Call:
        """How the model calls this layer, cut to some steps."""
        calls, L = self.stream.calls.get(rows.stop - rows.start), self.stream.hidden.shape[1]
        if calls is None:
            return NO_CALL
        call = calls[self.index]
        if steps.stop - steps.start == L:
            return call

        def cut(x: Any) -> Any:
            """Cuts the axis of time, first or second, of what has one."""
            if not isinstance(x, Tensor) or L not in x.shape[:2]:
                return x
            return x[:, steps] if x.dim() > 1 and x.shape[1] == L else x[steps]

        return Call(*tree_map(cut, (call.arguments, dict(call.keywords))))


@torch.no_grad()
def each_layer(
    layout: Layout, stream: Stream, first: int = 0, stop: int | None = None, *, start: int = 0
) -> Iterator[Layer]:
    """Yields the layers first <= i < stop in order; all layers of the model move the stream on. The only loop over layers.

    After the caller is done with a layer its outputs are computed from the layer as it then is.

    Args:
        start: the layer that the stream enters; those before it take no part.

    Raises:
        DivergenceError: naming the layer whose outputs are not finite.
    """
    layers = layout.layers
    stop = len(layers) if stop is None else stop
    for index in range(start, len(layers)):
        module = layers[index]
        home = next(module.parameters()).device
        module.to(stream.device)
        layer = Layer(layout, index, module, stream)
        try:
            if first <= index < stop:
                yield layer
            if not layer.advanced:
                layer.advance()
        finally:
            module.to(home)
