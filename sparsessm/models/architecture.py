"""A loaded model as its row says it is: `Layout` answers which layers there are, which of them hold a mixer, which modules
can be pruned, how a layer is called, what enters the first and what is made of what leaves the last.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from sparsessm.models.family import architecture_of
from sparsessm.models.mixer import Mixer, apply_linear

# What --target_modules calls the types of modules.
MODULE_KINDS: dict[str, type[nn.Module]] = {"nn.Linear": nn.Linear, "nn.Conv1d": nn.Conv1d}

# What a module of a layer belongs to, see --parts.
MODULE_PARTS = ("mixer", "attention", "mlp")
# What a parameter counts as: a mixer's A_log, the weight of a module to prune (and its part), or only the whole model.
PARTS = ("ssm", "layers", *MODULE_PARTS, "model")


@dataclass(frozen=True)
class Module:
    """A linear or convolution module that can be pruned.

    Attributes:
        path: within its layer. kind: of MODULE_KINDS. part: of MODULE_PARTS.
    """

    path: str
    kind: str
    part: str = "mixer"


@dataclass(frozen=True)
class Call:
    """How the model calls a layer besides the hidden states: captured from its own forward."""

    arguments: tuple[Any, ...] = ()
    keywords: Mapping[str, Any] = field(default_factory=dict)

    def to(self, device: torch.device) -> Call:
        def move(x: Any) -> Any:
            return x.to(device) if isinstance(x, Tensor) else x

        return Call(*tree_map(move, (self.arguments, dict(self.keywords))))

    def reads_entered(self) -> bool:
        return any(x is ENTERED for x in tree_leaves((self.arguments, dict(self.keywords))))

    def equals(self, other: Call) -> bool:
        """Whether all tensors are the same."""
        pairs = zip(*(tree_leaves((call.arguments, dict(call.keywords))) for call in (self, other)), strict=True)
        return all(torch.equal(a, b) for a, b in pairs if isinstance(a, Tensor))


ENTERED = object()  # in a Call: the hidden states that enter the first layer, which differ from batch to batch


class _Enough(Exception):
    """Ends a forward pass once its hooks have what they need."""


class Layout:
    """A stock causal language model, seen as a row of layers with something before and behind."""

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = model  # transformers' own class, of which nothing but the row is known
        self.row = architecture_of(model.config)
        counts = Counter(id(weight) for layer in self.layers for weight in layer.parameters())
        # weights that several layers share: what one of them would lose, all would
        self._shared = {weight for weight, count in counts.items() if count > 1}

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
        return torch.float32 if self.row.wide_stream and self.model.config.residual_in_fp32 else weight.dtype

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
        """What can be pruned in a layer, by name, in the order in which data meets it; weights that layers share cannot.

        A name is the last part of the path, or the whole path where that is not enough.
        """
        path, mixer = self.mixer_path(layer), self.mixer(layer)
        kinds = {kind: name for name, kind in MODULE_KINDS.items()}
        found: dict[str, list[Module]] = {part: [] for part in ("attention", "mixer", "mlp")}
        if mixer is not None:
            for name in mixer.MODULES:
                kind = kinds[type(mixer.module.get_submodule(name))]
                found["mixer"].append(Module(f"{path}.{name}", kind, "mixer"))
        attention = tuple(self._time_mixers(layer))
        for place, part in layer.named_modules():
            outside = path is None or not place.startswith(f"{path}.")
            if outside and type(part) is nn.Linear and id(part.weight) not in self._shared:
                kind = "attention" if place.startswith(attention) else "mlp"
                found[kind].append(Module(place, kinds[nn.Linear], kind))
        modules = [module for part in found.values() for module in part]
        ends = Counter(module.path.rpartition(".")[2] for module in modules)
        ours = () if mixer is None else mixer.MODULES
        return {self._name(module, ends, ours): module for module in modules}

    @staticmethod
    def _name(module: Module, ends: Mapping[str, int], ours: Sequence[str]) -> str:
        last = module.path.rpartition(".")[2]
        plain = module.part == "mixer" or (ends[last] == 1 and not last.isdigit() and last not in ours)
        return last if plain else module.path

    def _time_mixers(self, layer: nn.Module) -> list[str]:
        return [f"{path}." for path, part in layer.named_modules() if type(part).__name__ in self.row.attention]

    def whole_windows(self, layer: nn.Module) -> bool:
        """Whether a layer has to see whole windows, because more than our mixer mixes time in it."""
        return bool(self._time_mixers(layer))

    def gain(self, layer: nn.Module) -> float:
        """What a layer multiplies the output of its mixer by before it adds it to the stream."""
        return 1.0 if self.row.gain is None else float(getattr(layer, self.row.gain))

    def targets(self, kinds: Sequence[str], parts: Sequence[str], only: str | None) -> tuple[str, ...]:
        """Names of the modules of all layers that --target_modules, --parts and --module choose, in their order."""
        modules = {name: module for layer in self.layers for name, module in self.modules(layer).items()}
        return targets(modules, kinds, parts, only)

    def parts(self) -> dict[str, tuple[str, ...]]:
        """What every parameter that can be pruned counts as, by full name; all others count in "model" alone.

        Parts of modules count only in models that have others than the mixer's.
        """
        modules = [self.modules(layer) for layer in self.layers]
        apart = any(module.part != "mixer" for some in modules for module in some.values())
        found: dict[str, tuple[str, ...]] = {}
        for index, layer in enumerate(self.layers):
            path = self.mixer_path(layer)
            if path is not None:
                found[f"{self.layer_name(index)}.{path}.A_log"] = ("ssm",)
            for module in modules[index].values():
                counts = ("layers", module.part) if apart else ("layers",)
                found[f"{self.layer_name(index)}.{module.path}.weight"] = counts
        return found

    def dense(self) -> dict[str, int]:
        """Entries of the matrices of layers that are not pruned whatever is asked for, by name without the layer."""
        parts, found = self.parts(), Counter[str]()
        seen: set[int] = set()
        for index, layer in enumerate(self.layers):
            for name, weight in layer.named_parameters():
                if weight.dim() > 1 and f"{self.layer_name(index)}.{name}" not in parts and id(weight) not in seen:
                    found[name] += weight.numel()
                    seen.add(id(weight))
        return dict(found)

    def is_shared(self, weight: nn.Parameter) -> bool:
        """Whether several layers have it."""
        return id(weight) in self._shared

    def embeddings(self) -> frozenset[str]:
        """Full names of the weights that make vectors of tokens, and logits of vectors."""
        ends = {id(part.weight) for part in (self.model.get_input_embeddings(), self.model.get_output_embeddings())}
        return frozenset(name for name, weight in self.model.named_parameters() if id(weight) in ends)

    def shrink(self, structure: str) -> None:
        """Writes to the config how many states or heads are left in the mixers."""
        mixer = next(mixer for layer in self.layers if (mixer := self.mixer(layer)) is not None)
        left = mixer.scored(structure).shape[1]
        for key, value in self.row.shrink[structure](self.model.config, left).items():
            setattr(self.model.config, key, value)

    def remove_layer(self, index: int) -> None:
        """Removes a layer of the model; the index of each later layer falls by one, in its cache as well."""
        assert self.row.without_layer is not None  # others are refused
        changes = self.row.without_layer(self.model.config, index)
        del self.layers[index]
        for key, value in changes.items():
            setattr(self.model.config, key, value)
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

        def note(*arguments: Any, hidden_states: Tensor | None = None, **keywords: Any) -> Any:
            hidden, *rest = arguments if hidden_states is None else (hidden_states, *arguments)
            seen.append(hidden)
            calls.append(Call(tuple(rest), keywords))
            if len(calls) == len(self.layers):
                raise _Enough
            return self._returned(hidden)

        with _forwards(dict.fromkeys(self.layers, note)), suppress(_Enough):
            self.model(ids, use_cache=False)
        entered = seen[0]

        def mark(x: Any) -> Any:
            same = isinstance(x, Tensor) and x.shape == entered.shape and torch.equal(x, entered)
            return ENTERED if same else x

        marked = [tree_map(mark, (call.arguments, dict(call.keywords))) for call in calls]
        return entered, [Call(*call) for call in marked]

    def parts_of(self, tokens: int, logits: int) -> list[slice]:
        """Parts of a row of tokens, of whose logits no more than so many numbers exist at once."""
        at_once = max(1, logits // self.model.get_output_embeddings().weight.shape[0])
        return [slice(start, min(start + at_once, tokens)) for start in range(0, tokens, at_once)]

    def leave(self, hidden: Tensor) -> Tensor:
        """Logits (rows,V) for hidden states (rows,M) that left the last layer."""
        *others, last = self.layers
        head = self.model.get_output_embeddings()
        stubs: dict[nn.Module, Callable[..., Any]]
        stubs = {layer: lambda *x, **named: self._returned((*x, *named.values())[0]) for layer in others}
        stubs |= {last: lambda *_, **__: self._returned(hidden[None]), head: lambda x: apply_linear(head, x)}
        ids = torch.zeros(1, len(hidden), dtype=torch.int64, device=self.home)
        with _forwards(stubs):
            return self.model(ids, use_cache=False).logits[0]

    def _returned(self, hidden: Tensor) -> Any:
        """Hidden states as a stock layer returns them."""
        return (hidden, None) if self.row.tuples else hidden

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
    """Replaces the forward of a module by a function for a while; its hooks stay."""
    before = module.__dict__.get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before


def targets(
    modules: Mapping[str, Module], kinds: Sequence[str], parts: Sequence[str], only: str | None
) -> tuple[str, ...]:
    """Names of the modules that --target_modules, --parts and --module choose, in their order."""
    if only is not None:
        return (only,) if only in modules else ()
    return tuple(name for name, module in modules.items() if module.kind in kinds and module.part in parts)
