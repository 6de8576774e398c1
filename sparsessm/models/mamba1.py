"""The mixer of Mamba-1 (Gu and Dao 2023), on the parameters of `transformers.models.mamba` and its relatives.

Stock `transformers` reads the weights of `conv1d` and `dt_proj` without calling them and keeps its states to itself, so
hooks see neither; this forward computes the same function (checked to 1e-5) and shows both.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from sparsessm.kernels.matmul import linear
from sparsessm.kernels.selective_scan import ScanStatistics, selective_scan
from sparsessm.models.mixer import NO_HOOKS, OUT, Hooks, Mixer, Removed, ScanInputs, convolved, keep_rows, show


@dataclass(frozen=True)
class ChannelInputs(ScanInputs):
    """u, z (B,L,D), and the output of x_proj, (B,L,R+2N)."""

    u: Tensor
    z: Tensor
    projected: Tensor


class Mamba1Mixer(Mixer):
    """B batch, L steps, D = d_inner, N = d_state, M = d_model, R = dt_rank, K = d_conv."""

    MODULES = ("in_proj", "conv1d", "x_proj", "dt_proj", "out_proj")
    STRUCTURES = ("columns",)

    def prepare(self, x: Tensor, conv: Tensor | None, hooks: Hooks) -> tuple[ChannelInputs, Tensor]:
        """See Mixer.prepare. conv: (B,K-1,D)."""
        mixer = self.module
        show(hooks, "in_proj", x)
        u, z = self._linear("in_proj", x, hooks).chunk(2, dim=-1)  # (B,L,2D) -> (B,L,D), (B,L,D)
        u, conv = convolved(mixer, u, conv, hooks)
        show(hooks, "x_proj", u)
        projected = self._normed(self._linear("x_proj", u, hooks))  # (B,L,R+2N)
        show(hooks, "dt_proj", projected[..., : mixer.dt_proj.weight.shape[1]])
        return ChannelInputs(u, z, projected), conv

    def _normed(self, projected: Tensor) -> Tensor:
        """The output of x_proj, (B,L,R+2N): dt, B and C as the scan reads them."""
        return projected

    def scan(
        self, inputs: ChannelInputs, state: Tensor | None, statistics: ScanStatistics | None = None, hooks: Hooks = NO_HOOKS
    ) -> tuple[Tensor, Tensor]:
        mixer = self.module
        R, N = mixer.dt_proj.weight.shape[1], mixer.A_log.shape[1]
        delta, B, C = inputs.projected.split([R, N, N], dim=-1)
        dt = linear(delta, mixer.dt_proj.weight)  # (B,L,R) -> (B,L,D), its bias is the scan's
        show(hooks, "dt_proj" + OUT, dt)
        return selective_scan(
            inputs.u,
            dt,
            -torch.exp(mixer.A_log.float()),
            B,
            C,
            D=mixer.D.float(),
            z=inputs.z,
            delta_bias=None if mixer.dt_proj.bias is None else mixer.dt_proj.bias.float(),
            delta_softplus=True,
            h0=state,
            statistics=statistics,
        )

    def scan_statistics(
        self, needs: tuple[str, ...], steps: int, device: torch.device | str, *, effect: str, structure: str
    ) -> ScanStatistics:
        D, N = self.A_log.shape
        return ScanStatistics.zeros(needs, steps, D, N, device, effect)

    @property
    def A_log(self) -> Tensor:
        """(D,N): a channel is a row."""
        return self.module.A_log.data

    def output_gram(self, gram: Tensor) -> Tensor:
        """(D,N,N): a channel's loss at the block's output is that of its gated scan times |W_out_d|^2."""
        return gram * self.weighed_out().double().square().sum(0)[:, None, None]

    def remove(self, structure: str, columns: Tensor) -> Removed:
        """A_log loses the columns, x_proj the rows that make B and C for them; y is a sum over states."""
        mixer = self.module
        keep = ~columns.to(mixer.A_log.device)
        head = torch.ones(mixer.dt_proj.weight.shape[1], dtype=torch.bool, device=keep.device)
        removed = {"A_log": keep_rows(mixer, "A_log", keep, dim=1)}
        keep_rows(mixer, "x_proj.weight", torch.cat([head, keep, keep]))  # dt, B and C
        mixer.x_proj.out_features = mixer.x_proj.weight.shape[0]
        mixer.ssm_state_size = int(keep.sum())
        return removed

    def silenced(self) -> dict[str, slice]:
        """The rows of x_proj that make C."""
        return {"x_proj.weight": slice(-self.module.A_log.shape[1], None)}


class _NormedMixer(Mamba1Mixer):
    """dt, B and C each go through a norm between x_proj and what follows."""

    def _norms(self) -> tuple[Callable[[Tensor], Tensor], ...]:
        raise NotImplementedError

    def _normed(self, projected: Tensor) -> Tensor:
        R, N = self.module.dt_proj.weight.shape[1], self.module.A_log.shape[1]
        parts = projected.split([R, N, N], dim=-1)
        return torch.cat([norm(part) for norm, part in zip(self._norms(), parts, strict=True)], dim=-1)


class JambaMixer(_NormedMixer):
    """Jamba: RMS norms with weights."""

    def _norms(self) -> tuple[Callable[[Tensor], Tensor], ...]:
        return self.module.dt_layernorm, self.module.b_layernorm, self.module.c_layernorm

    def remove(self, structure: str, columns: Tensor) -> Removed:
        """The norms of B and C lose their weights for these states; the means that they divide by are over what stays."""
        keep = ~columns.to(self.module.A_log.device)
        norms = {f"{norm}.weight": keep_rows(self.module, f"{norm}.weight", keep) for norm in ("b_layernorm", "c_layernorm")}
        return {**super().remove(structure, columns), **norms}


class FalconMambaMixer(_NormedMixer):
    """Falcon-Mamba: RMS norms without weights."""

    def _norms(self) -> tuple[Callable[[Tensor], Tensor], ...]:
        return (partial(_rms, epsilon=self.module.rms_eps),) * 3


def _rms(x: Tensor, epsilon: float) -> Tensor:
    wide = x.float()
    return (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)).to(x.dtype)
