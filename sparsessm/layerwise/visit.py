"""One run of a stock layer with our mixer in it, over a piece of some windows."""

from __future__ import annotations

from contextlib import nullcontext, suppress
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from sparsessm.models.architecture import Call, standing_in
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
        hooks: see models.mixer.Hooks. statistics: for the scan to add to.
        kept: inputs and conv of an earlier visit, which are then not computed again.
        until: "inputs" of the scan, "scan", or "end".
    """
    seen, hooks = Visit(), hooks or {}

    def forward(hidden_states: Tensor, *_: Any, **__: Any) -> Tensor:
        assert mixer is not None  # the forward of one is replaced by this
        seen.inputs, seen.conv = kept or mixer.prepare(hidden_states, None if cache is None else cache.conv, hooks)
        if until == "inputs":
            raise _Enough
        state = None if cache is None else cache.state
        seen.y, seen.state = mixer.scan(seen.inputs, state, statistics, hooks)
        if mixer.MODULES[-1] in hooks:
            hooks[mixer.MODULES[-1]](seen.y)
        if until == "scan":
            raise _Enough
        return mixer.project(seen.y, hooks)

    with suppress(_Enough), nullcontext() if mixer is None else standing_in(mixer.module, forward):
        out = module(hidden, *call.arguments, **call.keywords)
        seen.out = out[0] if isinstance(out, tuple) else out
    return seen
