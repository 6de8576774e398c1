"""Generation without the states that pruned heads do not need."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from sparsessm.errors import InputError
from sparsessm.models.architecture import Layout
from sparsessm.models.mamba2 import HeadInputs, Mamba2Mixer
from sparsessm.models.mixer import NO_HOOKS
from sparsessm.pruning.methods import PRUNED_A_LOG


def compact(model: PreTrainedModel) -> PreTrainedModel:
    """Has a stock model generate without the states of heads whose transition is pruned; in place, for inference alone.

    With no transition, y_t = (dt_t B_t.C_t + D) u_t: nothing of the past is needed (docs/METHOD.md). The mixers that have
    such heads compute by our kernels, and the cache holds (B,kept heads,P,N) for them. Outputs are those of the stock model,
    to rounding; steps of one token keep to a finite `time_step_limit`, which stock's own leave out. Weights, config and what
    `save_pretrained` writes stay.

    Raises:
        sparsessm.errors.InputError: the model has no heads, as those of Mamba-1.
    """
    layout = Layout(model)
    mixers = [layout.mixer(layer) for layer in layout.layers]
    with_heads = [mixer for mixer in mixers if isinstance(mixer, Mamba2Mixer)]
    if not with_heads:
        raise InputError(f"compact leaves out states of pruned heads, and {model.config.model_type} has no heads")
    for mixer in with_heads:
        kept = mixer.module.A_log.detach() < PRUNED_A_LOG["zero"]
        if not kept.all():
            mixer.module.forward = partial(_forward, mixer, kept.nonzero()[:, 0])
    return model


@torch.no_grad()
def _forward(
    mixer: Mamba2Mixer, kept: Tensor, hidden_states: Tensor, cache_params: Any = None, attention_mask: Tensor | None = None,
    **_: Any,
) -> Tensor:  # fmt: skip
    """The forward of a stock mixer; kept: numbers of the heads that have a state."""
    layer: int = mixer.module.layer_idx
    steps, K = hidden_states.shape[1], mixer.module.conv1d.weight.shape[-1]
    kept = kept.to(hidden_states.device)
    shown = None  # padding is zero before in_proj and after the convolution, as in stock
    if attention_mask is not None and steps > 1 and len(attention_mask) > 1:
        shown = attention_mask[:, -steps:, None].to(hidden_states.dtype)
        hidden_states = hidden_states * shown
    past = None if cache_params is None else cache_params.get_recurrent_state(layer)
    conv = None if past is None else cache_params.get_conv_state(layer)[..., 1 - K :].mT
    inputs, conv = mixer.prepare(hidden_states, conv, NO_HOOKS)
    if shown is not None:
        inputs = replace(inputs, mixed=inputs.mixed * shown)
    if past is not None and steps == 1:
        y = _step(mixer, kept, inputs, past)
    else:
        H, P, _G, N = mixer.sizes
        state = None
        if past is not None:
            state = torch.zeros(len(past), H, P, N, dtype=past.dtype, device=past.device).index_copy_(1, kept, past)
        y, state = mixer.scan(inputs, state)
        if cache_params is not None:
            cache_params.update_recurrent_state(state[:, kept], layer)
    if cache_params is not None:
        cache_params.update_conv_state(conv[:, -min(steps, K - 1) :].mT, layer, conv_kernel_size=K)
    return mixer.project(y, NO_HOOKS)


def _step(mixer: Mamba2Mixer, kept: Tensor, inputs: HeadInputs, state: Tensor) -> Tensor:
    """What the mixer's last module gets at one step, (B,1,DI); state (B,kept heads,P,N) becomes that after it."""
    module, (H, P, G, N) = mixer.module, mixer.sizes
    u, B, C = (x.float() for x in inputs.mixed[:, 0].split([H * P, G * N, G * N], dim=-1))
    u, B, C = u.unflatten(-1, (H, P)), B.unflatten(-1, (G, N)), C.unflatten(-1, (G, N))
    dt = F.softplus(inputs.dt[:, 0] + module.dt_bias.to(inputs.dt.dtype)).clamp(*module.time_step_limit).float()  # (B,H)
    own = dt * (B * C).sum(-1).repeat_interleave(H // G, 1)
    y = (own + module.D.float())[..., None] * u
    if len(kept):
        group, d = kept // (H // G), dt[:, kept]
        state *= torch.exp(d * -torch.exp(module.A_log.float()[kept]))[..., None, None]
        flat = state.flatten(0, 1)  # (B heads,P,N), a view
        C_of = C[:, group].flatten(0, 1)[..., None]
        y[:, kept] += (flat @ C_of).view(len(state), len(kept), P)
        flat.baddbmm_((d[..., None] * u[:, kept]).flatten(0, 1)[..., None], B[:, group].flatten(0, 1)[:, None])
    return mixer.gated(y.flatten(1)[:, None], inputs)
