"""What an architecture is: one row. Nothing else knows the name of an architecture, of its modules or its config fields.

A new architecture is a row of ARCHITECTURES, and a `Mixer` if its SSM computes something new. `Layout` answers for a
loaded model: which layers there are, which of them hold a mixer, which modules can be pruned, how a layer is called, what
enters the first and what is made of what leaves the last.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from sparsessm.errors import require_known
from sparsessm.models.mamba1 import FalconMambaMixer, Mamba1Mixer
from sparsessm.models.mamba2 import Mamba2Mixer
from sparsessm.models.mixer import Mixer, apply_linear

# What --target_modules calls the types of modules.
MODULE_KINDS: dict[str, type[nn.Module]] = {"nn.Linear": nn.Linear, "nn.Conv1d": nn.Conv1d}

# What a parameter counts as besides a part of the whole model: a mixer's A_log, or the weight of a module to prune.
PARTS = ("ssm", "layers", "model")


@dataclass(frozen=True)
class Architecture:
    """One row: what distinguishes a family of models.

    Attributes:
        layers: path of the list of layers in the causal model.
        mixers: ours by the name of the stock class that it replaces.
        shrink: by structure, the changes of the config that a removal takes: (config, left) -> keys, where left is how
            many states or heads stay. It raises ValueError with the reason where the config cannot say so.
        neutral: keys of the config by which stock transformers changes weights when it loads them, and the values by
            which it does not: what is saved has been through that.
        original: whether the state-spaces layout knows the architecture.
    """

    layers: str
    mixers: Mapping[str, type[Mixer]]
    shrink: Mapping[str, Callable[[Any, int], dict[str, Any]]] = field(default_factory=dict)
    neutral: Mapping[str, Any] = field(default_factory=dict)
    original: bool = False


def _states(config: Any, left: int) -> dict[str, Any]:
    return {"state_size": left}


def _half_the_heads(config: Any, left: int) -> dict[str, Any]:
    """A config that ties the heads to a whole number of times the width."""
    expand, rest = divmod(left * config.head_dim, config.hidden_size)
    if rest or not expand:
        able = [config.hidden_size * times // config.head_dim for times in range(1, config.expand)]
        raise ValueError(
            f"a config of {config.model_type} ties the heads to a whole number of times the width: of its "
            f"{config.num_heads} heads {' or '.join(map(str, able)) or 'none but all'} can stay"
        )
    return {"num_heads": left, "expand": expand}


ARCHITECTURES: dict[str, Architecture] = {
    "mamba": Architecture(
        "backbone.layers", {"MambaMixer": Mamba1Mixer}, shrink={"columns": _states},
        neutral={"rescale_prenorm_residual": False}, original=True,
    ),
    "falcon_mamba": Architecture(
        "backbone.layers", {"FalconMambaMixer": FalconMambaMixer}, shrink={"columns": _states},
        neutral={"rescale_prenorm_residual": False},
    ),
    "mamba2": Architecture(
        "backbone.layers", {"Mamba2Mixer": Mamba2Mixer}, shrink={"columns": _states, "heads": _half_the_heads},
        neutral={"rescale_prenorm_residual": False}, original=True,
    ),
}  # fmt: skip


def architecture_of(config: Any) -> Architecture:
    """The row of a model's config.

    Raises:
        ValueError: there is none.
    """
    require_known("model_type", config.model_type, ARCHITECTURES)
    return ARCHITECTURES[config.model_type]


@dataclass(frozen=True)
class Module:
    """A linear or convolution module that can be pruned.

    Attributes:
        path: within its layer. kind: of MODULE_KINDS.
    """

    path: str
    kind: str


@dataclass(frozen=True)
class Call:
    """How the model calls a layer besides the hidden states: captured from its own forward."""

    arguments: tuple[Any, ...] = ()
    keywords: Mapping[str, Any] = field(default_factory=dict)

    def to(self, device: torch.device) -> Call:
        def move(x: Any) -> Any:
            return x.to(device) if isinstance(x, Tensor) else x

        return Call(*tree_map(move, (self.arguments, dict(self.keywords))))


class _Enough(Exception):
    """Ends a forward pass once its hooks have what they need."""


class Layout:
    """A stock causal language model, seen as a row of layers with something before and behind."""

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = model  # transformers' own class, of which nothing but the row is known
        self.row = architecture_of(model.config)

    @property
    def layers(self) -> nn.ModuleList:
        return self.model.get_submodule(self.row.layers)

    @property
    def home(self) -> torch.device:
        """The device of the model while no layer is visited."""
        return self.model.get_input_embeddings().weight.device

    @property
    def stream_dtype(self) -> torch.dtype:
        """What the residual stream is kept in between two layers."""
        weight = self.model.get_input_embeddings().weight
        return torch.float32 if getattr(self.model.config, "residual_in_fp32", False) else weight.dtype

    def layer_name(self, index: int) -> str:
        return f"{self.row.layers}.{index}"

    def mixer_path(self, layer: nn.Module) -> str | None:
        """Where the SSM mixer is in a layer, None for a layer without."""
        return next((path for path, part in layer.named_modules() if type(part).__name__ in self.row.mixers), None)

    def mixer(self, layer: nn.Module) -> Mixer | None:
        """Our mixer over the stock one of a layer."""
        path = self.mixer_path(layer)
        if path is None:
            return None
        stock = layer.get_submodule(path)
        return self.row.mixers[type(stock).__name__](stock)

    def modules(self, layer: nn.Module) -> dict[str, Module]:
        """What can be pruned in a layer, by name, in the order in which data meets it."""
        path, mixer = self.mixer_path(layer), self.mixer(layer)
        if mixer is None:
            return {}
        kinds = {kind: name for name, kind in MODULE_KINDS.items()}
        return {name: Module(f"{path}.{name}", kinds[type(mixer.module.get_submodule(name))]) for name in mixer.MODULES}

    def targets(self, kinds: Sequence[str], only: str | None) -> tuple[str, ...]:
        """Names of the modules of all layers that --target_modules and --module choose, in their order."""
        return targets({name: module for layer in self.layers for name, module in self.modules(layer).items()}, kinds, only)

    def parts(self) -> dict[str, str]:
        """"ssm" or "layers" for every parameter that can be pruned, by full name; all others count in "model" alone."""
        found = {}
        for index, layer in enumerate(self.layers):
            path = self.mixer_path(layer)
            if path is not None:
                found[f"{self.layer_name(index)}.{path}.A_log"] = "ssm"
            for module in self.modules(layer).values():
                found[f"{self.layer_name(index)}.{module.path}.weight"] = "layers"
        return found

    def shrink(self, structure: str) -> None:
        """Writes to the config how many states or heads are left in the mixers."""
        mixer = next(mixer for layer in self.layers if (mixer := self.mixer(layer)) is not None)
        left = mixer.scored(structure).shape[1]
        for key, value in self.row.shrink[structure](self.model.config, left).items():
            setattr(self.model.config, key, value)

    def remove_layer(self, index: int) -> None:
        """Removes a layer of the model; the index of each later layer falls by one, in its cache as well."""
        del self.layers[index]
        self.model.config.num_hidden_layers -= 1
        part: Any
        for place, layer in enumerate(self.layers):
            for part in layer.modules():
                if hasattr(part, "layer_idx"):
                    part.layer_idx = place

    @torch.no_grad()
    def enter(self, ids: Tensor) -> tuple[Tensor, list[Call]]:
        """What enters the first layer for token ids (B,L), (B,L,M), and how each layer is called."""
        calls: list[Call] = []
        seen: list[Tensor] = []

        def note(*arguments: Any, hidden_states: Tensor | None = None, **keywords: Any) -> Tensor:
            hidden, *rest = arguments if hidden_states is None else (hidden_states, *arguments)
            seen.append(hidden)
            calls.append(Call(tuple(rest), keywords))
            if len(calls) == len(self.layers):
                raise _Enough
            return hidden

        with _forwards(dict.fromkeys(self.layers, note)), suppress(_Enough):
            self.model(ids, use_cache=False)
        return seen[0], calls

    @torch.no_grad()
    def leave(self, hidden: Tensor) -> Tensor:
        """Logits (rows,V) for hidden states (rows,M) that left the last layer."""
        *others, last = self.layers
        head = self.model.get_output_embeddings()
        stubs: dict[nn.Module, Callable[..., Any]]
        stubs = {layer: lambda *x, **named: (*x, *named.values())[0] for layer in others}
        stubs |= {last: lambda *_, **__: hidden[None], head: lambda x: apply_linear(head, x)}
        ids = torch.zeros(1, len(hidden), dtype=torch.int64, device=self.home)
        with _forwards(stubs):
            return self.model(ids, use_cache=False).logits[0]

    @contextmanager
    def outside_on(self, device: torch.device) -> Iterator[None]:
        """Keeps all but the layers on a device for a while."""
        inside = {id(tensor) for tensor in [*self.layers.parameters(), *self.layers.buffers()]}
        outside = {id(t): t for t in [*self.model.parameters(), *self.model.buffers()] if id(t) not in inside}
        home = self.home
        try:
            for tensor in outside.values():
                tensor.data = tensor.data.to(device)
            yield
        finally:
            for tensor in outside.values():
                tensor.data = tensor.data.to(home)


@contextmanager
def _forwards(stubs: Mapping[nn.Module, Callable[..., Any]]) -> Iterator[None]:
    """Gives modules other forwards for a while."""
    with ExitStack() as stack:
        for module, forward in stubs.items():
            stack.enter_context(standing_in(module, forward))
        yield


@contextmanager
def standing_in(module: nn.Module, forward: Callable[..., Any]) -> Iterator[None]:
    """Has a function stand in for the forward of a module for a while; its hooks stay."""
    before = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before


def targets(modules: Mapping[str, Module], kinds: Sequence[str], only: str | None) -> tuple[str, ...]:
    """Names of the modules that --target_modules and --module choose, in their order."""
    if only is not None:
        return (only,) if only in modules else ()
    return tuple(name for name, module in modules.items() if module.kind in kinds)
