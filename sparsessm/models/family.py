"""What an architecture is: one row. Nothing else knows the name of an architecture, of its modules or its config fields.

A new architecture is a row of ARCHITECTURES, and a `Mixer` if its SSM computes something new.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sparsessm.errors import require_known
from sparsessm.models.mamba1 import FalconMambaMixer, JambaMixer, Mamba1Mixer
from sparsessm.models.mamba2 import FalconH1Mixer, Mamba2Mixer
from sparsessm.models.mixer import Mixer


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
        attention: names of the stock classes that mix time besides the mixer: a layer with one takes whole windows.
        tuples: whether a stock layer returns a tuple.
        gain: the attribute of a stock layer that its mixer's output is multiplied by, where there is one.
        wide_stream: whether the config's residual_in_fp32 decides the dtype of the residual stream.
        without_layer: the changes of the config when a layer is removed, (config, index) -> keys; None where the config
            cannot say it.
        prefixes: what names of parameters begin with in the model, and in checkpoints of stock where that differs.
    """

    layers: str
    mixers: Mapping[str, type[Mixer]]
    attention: Sequence[str] = ()
    tuples: bool = False
    gain: str | None = None
    wide_stream: bool = False
    without_layer: Callable[[Any, int], dict[str, Any]] | None = None
    shrink: Mapping[str, Callable[[Any, int], dict[str, Any]]] = field(default_factory=dict)
    neutral: Mapping[str, Any] = field(default_factory=dict)
    original: bool = False
    prefixes: tuple[str, str] = ("", "")

    def in_files(self, name: str, names: Collection[str]) -> str:
        """The name of a parameter in a checkpoint that holds these names."""
        here, there = self.prefixes
        return name if name in names or not name.startswith(here) else there + name.removeprefix(here)

    def here(self, name: str, names: Collection[str]) -> str:
        """The name in a model that has these names of a parameter of a checkpoint."""
        here, there = self.prefixes
        return name if name in names or not name.startswith(there) else here + name.removeprefix(there)


def _to(key: str) -> Callable[[Any, int], dict[str, Any]]:
    """A config that says how many are left under one key."""
    return lambda config, left: {key: left}


def _expanded(heads: str, width: str, expand: str) -> Callable[[Any, int], dict[str, Any]]:
    """A config that ties the heads to a whole number of times the width; names of its keys for heads, channels, times."""

    def shrink(config: Any, left: int) -> dict[str, Any]:
        channels, times = getattr(config, width), getattr(config, expand)
        new, rest = divmod(left * channels, config.hidden_size)
        if rest or not new:
            able = [config.hidden_size * fewer // channels for fewer in range(1, times)]
            raise ValueError(
                f"a config of {config.model_type} ties the heads to a whole number of times the width: of its "
                f"{getattr(config, heads)} heads {' or '.join(map(str, able)) or 'none but all'} can stay"
            )
        return {heads: left, expand: new}

    return shrink


def _falcon_h1_heads(config: Any, left: int) -> dict[str, Any]:
    return {"mamba_n_heads": left, "mamba_d_ssm": left * config.mamba_d_head}


def _one_fewer(config: Any, index: int) -> dict[str, Any]:
    return {"num_hidden_layers": config.num_hidden_layers - 1}


def _typed(key: str, counted: bool = True) -> Callable[[Any, int], dict[str, Any]]:
    """A config that lists the type of every layer under a key, and whether it counts them as well."""

    def without(config: Any, index: int) -> dict[str, Any]:
        types = list(getattr(config, key))
        del types[index]
        return {key: types} | (_one_fewer(config, index) if counted else {})

    return without


def _by_indices(config: Any, index: int) -> dict[str, Any]:
    """A config that lists which layers have attention."""
    left = [i - (i > index) for i in config.attn_layer_indices or () if i != index]
    return {"attn_layer_indices": left} | _one_fewer(config, index)


_PLAIN: dict[str, Any] = {
    "neutral": {"rescale_prenorm_residual": False}, "wide_stream": True, "without_layer": _one_fewer,
}  # fmt: skip
_D_STATE = _to("mamba_d_state")
_HALF_THE_HEADS = _expanded("mamba_n_heads", "mamba_d_head", "mamba_expand")

ARCHITECTURES: dict[str, Architecture] = {
    "mamba": Architecture(
        "backbone.layers", {"MambaMixer": Mamba1Mixer}, shrink={"columns": _to("state_size")}, original=True, **_PLAIN
    ),
    "falcon_mamba": Architecture(
        "backbone.layers", {"FalconMambaMixer": FalconMambaMixer}, shrink={"columns": _to("state_size")}, **_PLAIN
    ),
    "mamba2": Architecture(
        "backbone.layers", {"Mamba2Mixer": Mamba2Mixer}, original=True,
        shrink={"columns": _to("state_size"), "heads": _expanded("num_heads", "head_dim", "expand")}, **_PLAIN,
    ),
    "nemotron_h": Architecture(
        "model.layers", {"NemotronHMamba2Mixer": Mamba2Mixer}, attention=("NemotronHAttention",),
        shrink={"columns": _to("ssm_state_size"), "heads": _to("mamba_num_heads")},
        neutral={"rescale_prenorm_residual": False}, without_layer=_typed("layers_block_type", counted=False),
        prefixes=("model.", "backbone."),
    ),
    "bamba": Architecture(
        "model.layers", {"BambaMixer": Mamba2Mixer}, attention=("BambaAttention",), tuples=True,
        shrink={"columns": _D_STATE, "heads": _HALF_THE_HEADS}, without_layer=_by_indices,
    ),
    "granitemoehybrid": Architecture(
        "model.layers", {"GraniteMoeHybridMambaLayer": Mamba2Mixer}, attention=("GraniteMoeHybridAttention",),
        gain="residual_multiplier", shrink={"columns": _D_STATE, "heads": _HALF_THE_HEADS},
        without_layer=_typed("layer_types"),
    ),
    "falcon_h1": Architecture(
        "model.layers", {"FalconH1Mixer": FalconH1Mixer}, attention=("FalconH1Attention",), tuples=True,
        gain="ssm_out_multiplier", shrink={"columns": _D_STATE, "heads": _falcon_h1_heads}, without_layer=_one_fewer,
    ),
    "zamba2": Architecture(
        "model.layers", {"Zamba2MambaMixer": Mamba2Mixer}, attention=("Zamba2Attention",), shrink={"columns": _D_STATE}
    ),
    "jamba": Architecture(
        "model.layers", {"JambaMambaMixer": JambaMixer}, attention=("JambaAttention",), shrink={"columns": _D_STATE}
    ),
}  # fmt: skip


def architecture_of(config: Any) -> Architecture:
    """The row of a model's config.

    Raises:
        ValueError: there is none.
    """
    require_known("model_type", config.model_type, ARCHITECTURES)
    return ARCHITECTURES[config.model_type]
