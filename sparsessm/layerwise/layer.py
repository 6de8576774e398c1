"""One layer of the loop, together with the stream that enters it: how it is observed, and how it is changed.

The stock layer's own forward does residuals, norms and multipliers; only its SSM mixer is ours while the layer is visited.
A layer processes some time steps of the windows after the other, so that its activations never exist for all steps
at once: the mixer keeps a cache of its last inputs and its state.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from sparsessm.errors import DivergenceError
from sparsessm.kernels.matmul import linear
from sparsessm.kernels.selective_scan import SUM_DTYPE
from sparsessm.layerwise import distributed
from sparsessm.layerwise.memory import Stored
from sparsessm.layerwise.statistics import Accumulator, CrossGram, Readers
from sparsessm.layerwise.stream import Importance, Stream
from sparsessm.layerwise.visit import NO_CALL, Visit, visit
from sparsessm.models.architecture import ENTERED, Call, Layout, Module
from sparsessm.models.mixer import OUT, Cache, Hooks, Mixer


class _Caches:
    """The caches of all windows of a stream between two pieces, stored where the stream is."""

    def __init__(self, stream: Stream) -> None:
        self._stream = stream
        self._parts: list[Stored] = []  # none before the end of the first piece
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

    def __init__(
        self, layout: Layout, index: int, module: nn.Module, stream: Stream | None = None,
        modules: Mapping[str, Module] | None = None,
    ) -> None:  # fmt: skip
        self.layout, self.index, self.module, self._stream = layout, index, module, stream
        self._mixer = layout.mixer(module)
        self.modules = layout.modules(module) if modules is None else modules
        self.advanced, self._whole = False, layout.whole_windows(module)
        self._prefix, self._in_mixer = f"{layout.layer_name(index)}.", f"{layout.mixer_path(module)}."
        if self._mixer is not None and stream is not None:
            known = self.importance(self._mixer.MODULES[-1])
            self._mixer.importance = None if known is None else known.rows
        self._kept: dict[tuple[int, int], tuple[Any, Tensor]] = {}  # ScanInputs, conv; by first step and first window

    def copy(self, module: nn.Module, stream: Stream | None = None) -> Layer:
        """The same layer with another module, on this stream or another."""
        return Layer(self.layout, self.index, module, self._stream if stream is None else stream, self.modules)

    @property
    def has_mixer(self) -> bool:
        return self._mixer is not None

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

    def _path(self, name: str) -> str:
        """Where a parameter is in the layer: a weight by the name of its module, others by their name in the mixer."""
        module = self.modules.get(name.removesuffix(".weight"))
        return self._in_mixer + name if module is None else f"{module.path}.weight"

    def full_name(self, name: str) -> str:
        """The name in the checkpoint of a parameter, see `_path`."""
        return self._prefix + self._path(name)

    def short_name(self, name: str) -> str:
        """The name of a parameter here by its full name."""
        path = name.removeprefix(self._prefix)
        ours = (f"{own}.weight" for own, module in self.modules.items() if path == f"{module.path}.weight")
        return next(ours, path.removeprefix(self._in_mixer))

    def parameter(self, name: str) -> nn.Parameter:
        return self.module.get_parameter(self._path(name))

    def those(self, modules: Iterable[str]) -> list[str]:
        """The modules among these that this layer has, in the order in which data meets them."""
        wanted = set(modules)
        return [name for name in self.modules if name in wanted]

    def weight(self, module: str) -> Tensor:
        """The weight of a module that can be pruned; to be read, not written."""
        return self.parameter(f"{module}.weight").data

    def gone(self, name: str) -> Tensor | None:
        """Which entries of a parameter were pruned before this run, in its shape; None for none."""
        mask = self.stream.gone.get(self.full_name(name))
        return None if mask is None else mask.to(self.stream.device)

    def importance(self, module: str) -> Importance | None:
        """How much the outputs of a module matter; None where that was not measured."""
        return self.stream.importance.get(self.full_name(f"{module}.weight"))

    def _tokens(self, module: str, rows: slice, steps: slice) -> Tensor | None:
        """What the tokens of a piece of some windows count for at a module, (B,L); None for all the same."""
        known = self.importance(module)
        if known is None or known.tokens is None:
            return None
        return known.tokens[rows, steps].to(self.stream.device)

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
        until = "end"
        if not advance and self._mixer is not None and accumulators.keys() <= set(self._mixer.MODULES):
            until = "scan" if self._mixer.MODULES[-1] in accumulators else "inputs"  # all that their own inputs need

        readers = Readers(accumulators)

        def hooks(rows: slice, steps: slice) -> Hooks:
            return {name: partial(readers.update, name, self._tokens(name, rows, steps)) for name in accumulators}

        self._pass(hooks, keep_outputs=advance, until=until)
        leaders = [json.loads(text) for text in distributed.gather_text(json.dumps(readers.leaders))]
        for accumulator in readers.finish({module: leader for one in leaders for module, leader in one.items()}):
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
        pieces, caches = self._pieces(), _Caches(stream)
        for steps in pieces:
            statistics = mixer.scan_statistics(
                needs, steps.stop - steps.start, stream.device, effect=effect, structure=structure
            )
            for rows, _ in stream.turns([(rows, steps) for rows in stream.batches()]):
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
        weight, gain = dense.weight(self.mixer.MODULES[-1]), self.layout.gain(self.module)
        for rows in self.stream.batches():
            caches: list[Cache | None] = [None, None]
            for steps in self._pieces():
                hidden = [layer.stream.hidden[rows, steps].to(layer.stream.device) for layer in (self, dense)]
                last = []
                for i, layer in enumerate((self, dense)):
                    seen = layer._visit(rows, steps, hidden[i], cache=caches[i], until="scan")
                    last.append(seen.y)
                    caches[i] = seen.cache
                gram.update(last[0], linear(last[1], weight) + (hidden[1] - hidden[0]) / gain)
        distributed.all_sum(*gram.tensors())

    @torch.no_grad()
    def output_error(self, other: Layer) -> float:
        """Squared difference to the output of another layer, over the squares of the stream; first batch of each process."""
        self._kept.clear()
        stream = self.stream
        sums = torch.zeros(2, dtype=SUM_DTYPE, device=stream.device)  # of the difference, of the stream
        for rows in stream.batches()[:1]:
            caches: list[Cache | None] = [None, None]
            for steps in self._pieces():
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
        self._pass(lambda rows, steps: {}, keep_outputs=True, check=check)

    def _pass(
        self, hooks_of: Callable[[slice, slice], Hooks], *, keep_outputs: bool, until: str = "end", check: bool = True
    ) -> None:
        """All windows through the layer, batch after batch, each in pieces; check: whether outputs must be finite."""
        stream = self.stream
        finite = torch.ones((), dtype=torch.bool, device=stream.device)
        cache = None
        for rows, steps in stream.turns([(rows, steps) for rows in stream.batches() for steps in self._pieces()]):
            kept, hooks = self._kept.pop((steps.start, rows.start), None), hooks_of(rows, steps)
            cache = cache if steps.start else None
            with self._listening(hooks):
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

    def forward(self, rows: slice, hidden: Tensor, hooks: Hooks | None = None) -> Tensor:
        """What the layer makes of hidden states (B,L,M) of some windows, whole, with gradients where grad mode is on.

        hooks: by the name of a module for its inputs, and by NAME.out for its outputs.
        """
        hooks = hooks or {}
        with self._listening(hooks):
            return self._visit(rows, slice(0, hidden.shape[1]), hidden, hooks=hooks).out

    @contextmanager
    def _listening(self, hooks: Hooks) -> Iterator[None]:
        """Has modules outside the mixer show what they get and make to hooks for a while, (B,L,cols) or (1,tokens,cols)."""
        with ExitStack() as stack:
            for key, hook in hooks.items():
                name = key.removesuffix(OUT)
                if self.modules[name].part != "mixer":
                    module, show = self.module.get_submodule(self.modules[name].path), partial(_show, hook)
                    if key == name:
                        stack.callback(module.register_forward_pre_hook(lambda _, inputs, show=show: show(inputs[0])).remove)
                    else:
                        stack.callback(module.register_forward_hook(lambda _, __, output, show=show: show(output)).remove)
            yield

    def _pieces(self) -> list[slice]:
        """The pieces of a window: one where the layer has to see it whole."""
        return [slice(0, self.stream.hidden.shape[1])] if self._whole else self.stream.pieces()

    def _call(self, rows: slice, steps: slice) -> Call:
        """How the model calls this layer, cut to some steps."""
        calls, L = self.stream.calls.get(rows.stop - rows.start), self.stream.hidden.shape[1]
        if calls is None:
            return NO_CALL
        call = calls[self.index]

        def cut(x: Any) -> Any:
            """Cuts the axis of time, first or second, of what has one."""
            if x is ENTERED:
                return self.stream.entered[rows, steps].to(self.stream.device)
            if not isinstance(x, Tensor) or steps.stop - steps.start == L or L not in x.shape[:2]:
                return x
            return x[:, steps] if x.dim() > 1 and x.shape[1] == L else x[steps]

        return Call(*tree_map(cut, (call.arguments, dict(call.keywords))))


def _show(hook: Callable[[Tensor], None], value: Tensor) -> None:
    hook(value if value.dim() == 3 else value.flatten(0, -2)[None])


@contextmanager
def at_work(module: nn.Module, device: torch.device) -> Iterator[None]:
    """Keeps a layer on a device for a while."""
    home = next(module.parameters()).device
    module.to(device)
    try:
        yield
    finally:
        module.to(home)


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
        with at_work(layers[index], stream.device):
            layer = Layer(layout, index, layers[index], stream)
            if first <= index < stop:
                yield layer
            if not layer.advanced:
                layer.advance()
