"""The mixer of Mamba-2 (Dao and Gu 2024), on the parameters of `transformers.models.mamba2` and its relatives.

H heads of P channels, DI = H P; N states; G groups, head h reads group h // (H/G); K = d_conv.

    in_proj(x)                                         -> z (DI), xBC (DI + 2GN), dt (H)
    silu(causal depthwise conv1d(xBC))                 -> u (H,P), B (G,N), C (G,N)
    dt = clamp(softplus(dt + dt_bias), *time_step_limit)
    y = chunked scan of u, dt, A, B, C, D              -> out_proj(norm(y silu(z)))

One number of A_log a head: scores of entries are (1,H), scores of states (H,N).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor

from sparsessm.kernels.chunked_scan import HeadStatistics, chunked_scan, compiled_kernels
from sparsessm.kernels.matmul import linear
from sparsessm.kernels.selective_scan import SUM_DTYPE
from sparsessm.models.mixer import NO_HOOKS, Hooks, Mixer, Removed, ScanInputs, convolved, keep_rows, show

# Of how many time steps one is looked at for what the output loses with each state.
SAMPLED = 32
# Numbers that exist at once of what the output loses with each head or state.
_LOSSES_AT_ONCE = 1 << 24


@dataclass(frozen=True)
class HeadInputs(ScanInputs):
    """mixed (B,L,DI+2GN): the output of the convolution; z (B,L,DI); dt (B,L,H) as projected."""

    mixed: Tensor
    z: Tensor
    dt: Tensor


class Mamba2Mixer(Mixer):
    """B batch, L steps, M = d_model; the rest as above."""

    MODULES = ("in_proj", "conv1d", "out_proj")
    STRUCTURES = ("columns", "heads")

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """H, P, G, N."""
        mixer = self.module
        H, G = mixer.A_log.shape[0], mixer.n_groups
        P = mixer.out_proj.weight.shape[1] // H
        return H, P, G, (mixer.conv1d.weight.shape[0] - H * P) // (2 * G)

    def prepare(self, x: Tensor, conv: Tensor | None, hooks: Hooks) -> tuple[HeadInputs, Tensor]:
        """See Mixer.prepare. conv: (B,K-1,DI+2GN)."""
        mixer, (H, P, G, N) = self.module, self.sizes
        projected = self._project_in(x, hooks)
        z, mixed, dt = projected.split([H * P, H * P + 2 * G * N, H], dim=-1)
        mixed, conv = convolved(mixer, mixed, conv, hooks, kernels=compiled_kernels(mixed, mixer.conv1d.weight))
        return HeadInputs(mixed, z, dt), conv

    def _project_in(self, x: Tensor, hooks: Hooks) -> Tensor:
        """(B,L,M) -> (B,L,2DI+2GN+H)."""
        show(hooks, "in_proj", x)
        return self._linear("in_proj", x, hooks)

    def scan(
        self, inputs: HeadInputs, state: Tensor | None, statistics: HeadStatistics | None = None, hooks: Hooks = NO_HOOKS
    ) -> tuple[Tensor, Tensor]:
        mixer, (H, P, G, N) = self.module, self.sizes
        u, B, C = inputs.mixed.split([H * P, G * N, G * N], dim=-1)
        u, B, C = u.unflatten(-1, (H, P)), B.unflatten(-1, (G, N)), C.unflatten(-1, (G, N))
        dt = F.softplus(inputs.dt + mixer.dt_bias.to(inputs.dt.dtype)).clamp(*mixer.time_step_limit).float()
        A, D = -torch.exp(mixer.A_log.float()), mixer.D.float()
        sampled: list[tuple[int, Tensor]] = []

        def sample(t: int, states: Tensor) -> None:
            if (t + 1) % SAMPLED == 0:
                sampled.append((t, states))

        gram = None if statistics is None else statistics.gram
        by_state = statistics is not None and statistics.by_state and gram is not None
        y, last = chunked_scan(u, dt, A, B, C, D, state, statistics, at_chunks=sample if by_state else None)
        if statistics is not None and gram is not None:
            loss = _OutputLoss(self, inputs.z, gram)
            if by_state:
                for t, states in sampled:
                    loss.add_states(y, t, states, C[:, t])
            else:
                loss.add_heads(y, self._lost(y, u, dt, A, B, C, D, state, statistics))
        return self.gated(y.flatten(2), inputs), last

    def gated(self, y: Tensor, inputs: HeadInputs) -> Tensor:
        """What out_proj gets of the output y (B,L,DI) of the scan."""
        return self._gated_norm(y, inputs.z).to(inputs.mixed.dtype)

    def _gated_norm(self, y: Tensor, z: Tensor) -> Tensor:
        """(B,L,DI) -> (B,L,DI)."""
        norm = self.module.norm
        kernels = compiled_kernels(y, z, norm.weight)
        if kernels is None:
            return norm(y, z)
        return kernels.gated_norm(y, z, norm.weight, norm.group_size, norm.variance_epsilon)

    def output_of(self, z: Tensor) -> Output:
        """How the output depends on y, for gates z (B,L,DI)."""
        norm = self.module.norm
        return Output(F.silu(z.float()), norm.weight.float(), norm.group_size, norm.variance_epsilon)

    @staticmethod
    def _lost(
        y: Tensor, u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, first: Tensor | None,
        statistics: HeadStatistics,
    ) -> Tensor:  # fmt: skip
        """(B,L,H,P): what y loses with each head alone."""
        if statistics.effect == "removed":
            return y
        if statistics.effect == "unit":
            before = None if first is None else statistics.counterfactual
            other, statistics.counterfactual = chunked_scan(u, dt, torch.full_like(A, -1.0), B, C, D, before)
            return y - other
        heads = u.shape[2] // B.shape[2]
        own = dt * (B.float() * C.float()).sum(-1).repeat_interleave(heads, 2) + D  # what needs no state
        return y - own[..., None] * u

    def scan_statistics(
        self, needs: tuple[str, ...], steps: int, device: torch.device | str, *, effect: str, structure: str
    ) -> HeadStatistics:
        H, _, _, N = self.sizes
        return HeadStatistics.zeros(needs, steps, H, N, device, effect=effect, by_state=structure == "columns")

    @property
    def A_log(self) -> Tensor:
        """(1,H)."""
        return self.module.A_log.data[None]

    def scored(self, structure: str) -> Tensor:
        """(H,N) for states, each with the A_log of its head; (1,H) for heads."""
        H, _, _, N = self.sizes
        return self.module.A_log.data[:, None].expand(H, N) if structure == "columns" else self.A_log

    def magnitudes(self, structure: str) -> Tensor:
        """For states the squared weights of the rows of in_proj that make B and C of them, (1,N)."""
        if structure != "columns":
            return self.scored(structure)
        H, P, G, N = self.sizes
        rows = self.module.in_proj.weight.data[2 * H * P : 2 * H * P + 2 * G * N]
        return rows.float().square().sum(1).view(2 * G, N).sum(0, keepdim=True)

    def competing(self, structure: str) -> int:
        """The same number of heads is removed from every group, because groups have equal shares of the heads."""
        return self.module.n_groups if structure == "heads" else 1

    def remove(self, structure: str, columns: Tensor) -> Removed:
        """States of all groups, or heads, with all that is made of them or makes them."""
        mixer, (H, P, G, N) = self.module, self.sizes
        keep = ~columns.to(mixer.A_log.device)
        all_heads, all_states = torch.ones_like(keep[:1]).expand(H), torch.ones_like(keep[:1]).expand(N)
        heads = keep if structure == "heads" else all_heads
        states = keep if structure == "columns" else all_states
        channels, of_groups = heads.repeat_interleave(P), states.repeat(G)
        mixed = torch.cat([channels, of_groups, of_groups])
        rows = torch.cat([channels, mixed, heads])
        kept = {"in_proj.weight": rows, "in_proj.bias": rows, "conv1d.weight": mixed, "conv1d.bias": mixed}
        if structure == "heads":
            kept |= {"A_log": heads, "D": heads, "dt_bias": heads, "norm.weight": channels}
        present = dict(mixer.named_parameters())
        removed = {name: keep_rows(mixer, name, mask) for name, mask in kept.items() if name in present}
        if structure == "heads":
            removed["out_proj.weight"] = keep_rows(mixer, "out_proj.weight", channels, dim=1)
            mixer.num_heads = int(heads.sum())
            mixer.intermediate_size = mixer.num_heads * P
        mixer.ssm_state_size = int(states.sum())
        mixer.conv_dim = int(mixed.sum())
        mixer.in_proj.out_features = mixer.in_proj.weight.shape[0]
        mixer.out_proj.in_features = mixer.out_proj.weight.shape[1]
        mixer.conv1d.in_channels = mixer.conv1d.out_channels = mixer.conv1d.groups = mixer.conv_dim
        self._resize(rows)
        return removed

    def _resize(self, rows: Tensor) -> None:
        """Adapts what besides parameters has the size of in_proj's output, of which rows (bool) are kept, or of the norm."""
        mixer = self.module
        mixer.norm.group_size = mixer.intermediate_size // mixer.n_groups

    def silenced(self) -> dict[str, slice]:
        """The channels of the convolution that make C: silu(0) is 0."""
        _, _, G, N = self.sizes
        last = slice(-G * N, None)
        return {"conv1d.weight": last} | ({} if self.module.conv1d.bias is None else {"conv1d.bias": last})


class FalconH1Mixer(Mamba2Mixer):
    """Falcon-H1: multipliers before and after in_proj; the norm after the gate, before it, or none."""

    def _project_in(self, x: Tensor, hooks: Hooks) -> Tensor:
        mixer = self.module
        return super()._project_in(x * mixer.ssm_in_multiplier, hooks) * mixer.mup_vector

    def _gated_norm(self, y: Tensor, z: Tensor) -> Tensor:
        mixer = self.module
        return mixer.norm(y, z) if mixer.mamba_rms_norm else y * F.silu(z.float())

    def output_of(self, z: Tensor) -> Output:
        mixer, gate = self.module, F.silu(z.float())
        if not mixer.mamba_rms_norm:
            return Output(gate, gate.new_ones(()))
        norm = mixer.norm
        weight, width = norm.weight.float(), norm.weight.shape[0] // norm.n_groups
        if norm.norm_before_gate:
            return Output(gate.new_ones(()), weight * gate, width, norm.variance_epsilon)
        return Output(gate, weight, width, norm.variance_epsilon)

    def _resize(self, rows: Tensor) -> None:
        mixer = self.module
        mixer.mup_vector = mixer.mup_vector[..., rows.to(mixer.mup_vector.device)]
        mixer.groups_time_state_size = mixer.n_groups * mixer.ssm_state_size


def _rows(x: Tensor, some: slice) -> Tensor:
    return x.flatten(0, 1)[some]


@dataclass(frozen=True)
class Output:
    """What out_proj gets of y: w q rsqrt(mean(q^2) + epsilon) for q = y gate; w q where there is no norm.

    Attributes:
        gate, weight: (B,L,DI), (DI,) or (). width: channels of a group that share a mean, None for no norm.
    """

    gate: Tensor
    weight: Tensor
    width: int | None = None
    epsilon: float = 0.0

    def at(self, which: Callable[[Tensor], Tensor]) -> Output:
        """The same for some of the steps: which maps (B,L,DI) to them."""
        gate, weight = (which(x) if x.dim() == 3 else x for x in (self.gate, self.weight))
        return Output(gate, weight, self.width, self.epsilon)


class _OutputLoss:
    """Sums products of what the mixer's output loses with each head or state, through gate, norm and out_proj.

    A loss v of what the norm is taken of, q, becomes r (v - q mean(v q) r^2) with r = rsqrt(mean(q^2) + eps).
    """

    def __init__(self, mixer: Mamba2Mixer, z: Tensor, gram: Tensor) -> None:
        self.sizes, self.gram, self.output = mixer.sizes, gram, mixer.output_of(z)
        self.W = mixer.weighed_out()  # (M,DI)

    def add_heads(self, y: Tensor, lost: Tensor) -> None:
        """y and lost (B,L,H,P): a loss of each head."""
        H, P, _, _ = self.sizes
        rows = max(1, _LOSSES_AT_ONCE // (H * self.W.shape[0]))
        of_heads, of_norms = (
            self.W.unflatten(1, (-1, width)).permute(1, 2, 0).contiguous() for width in (P, self.output.width or P)
        )
        flat_v, flat_q = lost.reshape(-1, H * P), y.reshape(-1, H * P)
        for start in range(0, len(flat_v), rows):
            some = slice(start, start + rows)
            at = self.output.at(partial(_rows, some=some))
            v, q = flat_v[some] * at.gate, flat_q[some] * at.gate  # (rows,DI) each
            losses = self._projected(v * at.weight, of_heads)  # (H,rows,M)
            if at.width is not None:
                r = (q.unflatten(-1, (-1, at.width)).square().mean(-1) + at.epsilon).rsqrt()  # (rows,norms)
                r = r.T.repeat_interleave(at.width // P, 0)[..., None]  # (H,rows,1)
                inner = (v * q).unflatten(-1, (H, P)).sum(-1).T[..., None] / at.width
                along = self._projected(q * at.weight, of_norms).repeat_interleave(at.width // P, 0)  # (H,rows,M)
                losses = r * (losses - inner * r.square() * along)
            self._add(losses)

    @staticmethod
    def _projected(x: Tensor, W: Tensor) -> Tensor:
        """What out_proj makes of parts of x (rows,DI) alone: by W (parts,DI/parts,M), (parts,rows,M)."""
        return x.unflatten(1, W.shape[:2]).transpose(0, 1) @ W

    def add_states(self, y: Tensor, t: int, states: Tensor, C: Tensor) -> None:
        """A loss of each state at one step: states (B,H,P,N), C (B,G,N)."""
        H, _, G, _ = self.sizes
        at = self.output.at(lambda x: x[:, t : t + 1])
        lost = states * C.float().repeat_interleave(H // G, 1)[:, :, None]  # (B,H,P,N)
        v, q = lost.flatten(1, 2).mT * at.gate, y[:, t : t + 1].flatten(2) * at.gate  # (B,N,DI), (B,1,DI)
        if at.width is not None:
            v, q = (x.unflatten(-1, (-1, at.width)) for x in (v, q))
            r = (q.square().mean(-1, keepdim=True) + at.epsilon).rsqrt()
            inner = (v * q).mean(-1, keepdim=True)  # (B,N,norms,1)
            v = (r * (v - q * inner * r.square())).flatten(2)
        self._add(linear(v * at.weight, self.W).transpose(0, 1))

    def _add(self, losses: Tensor) -> None:
        """losses (n,rows,M)."""
        flat = losses.flatten(1)
        self.gram += (flat @ flat.T).to(SUM_DTYPE)
