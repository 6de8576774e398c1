"""The forward pass of one Mamba block, with taps where pruning has to look.

Stock `transformers` reads the weights of `conv1d` and `dt_proj` without calling them and keeps its states to itself, so
hooks see neither. `block_forward` computes the same function on the same modules (checked to 1e-5), shows each pruned
module's input to whoever asks, and can go through a window piece by piece: everything in a block is causal, so a
`Carry` of the last K-1 inputs of the convolution and of the state is all that the next piece needs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from sparsessm.kernels.convolution import causal_conv_silu
from sparsessm.kernels.matmul import linear
from sparsessm.kernels.selective_scan import ScanMoments, selective_scan

# The modules of a block whose weights can be pruned, in the order in which data meets them.
MODULES = ("in_proj", "conv1d", "x_proj", "dt_proj", "out_proj")
MODULE_TYPES = {"nn.Linear": ("in_proj", "x_proj", "dt_proj", "out_proj"), "nn.Conv1d": ("conv1d",)}

# What a pruned entry of A_log is set to. zero: exp(-dt exp(30)) is 0 for every time step above 1e-11, in every runtime,
# so the state has no transition. unit: A = -1.
PRUNED_A_LOG = {"zero": 30.0, "unit": 0.0}

Taps = Mapping[str, Callable[[Tensor], None]]


@dataclass(frozen=True)
class Carry:
    """What a block remembers between two pieces of a window: conv (B,K-1,D) inputs, state (B,D,N)."""

    conv: Tensor
    state: Tensor


@dataclass(frozen=True)
class ScanInputs:
    """What the scan of a block reads and A_log has no part in: u, z (B,L,D), and what x_proj put out, (B,L,R+2N)."""

    u: Tensor
    z: Tensor
    projected: Tensor

    def compact(self) -> ScanInputs:
        """The same without the memory that z shares with u as it was before the convolution."""
        return ScanInputs(self.u, self.z.contiguous(), self.projected)

    def nbytes(self) -> int:
        """Memory of `compact()`."""
        return sum(tensor.numel() * tensor.element_size() for tensor in (self.u, self.z, self.projected))


def block_forward(
    block: nn.Module,
    hidden: Tensor,
    taps: Taps | None = None,
    moments: ScanMoments | None = None,
    carry: Carry | None = None,
) -> tuple[Tensor, Carry]:
    """The block of `transformers.models.mamba` on a window or a piece of one.

    Args:
        block: a stock MambaBlock (norm, mixer).
        hidden: (B,L,M) residual stream.
        taps: called with the input of the module they are named after, (B,L,columns); the one of conv1d gets the K-1
            inputs before the piece as well, (B,K-1+L,D), zeros at the start of a window.
        moments: sums for the scan to add to.
        carry: what the previous piece returned, None at the start of a window.

    Returns:
        The residual stream after the block, (B,L,M), and the carry for the next piece.
    """
    conv, state = (None, None) if carry is None else (carry.conv, carry.state)
    inputs, conv = scan_inputs(block, hidden, conv, taps)
    y, state = scan(block, inputs, state, moments)
    return output(block, hidden, y, taps), Carry(conv, state)


def scan_inputs(
    block: nn.Module, hidden: Tensor, conv: Tensor | None = None, taps: Taps | None = None
) -> tuple[ScanInputs, Tensor]:
    """The block up to its scan, which is all of it that A_log has no part in.

    conv: (B,K-1,D), the last inputs of the convolution in the piece before; returned for the next piece.
    """
    mixer, taps = block.mixer, taps or {}
    D, K = mixer.conv1d.weight.shape[0], mixer.conv1d.weight.shape[-1]
    x = block.norm(hidden.to(block.norm.weight.dtype))  # (B,L,M)
    _show(taps, "in_proj", x)
    u, z = _apply(mixer.in_proj, x).chunk(2, dim=-1)  # (B,L,2D) -> (B,L,D), (B,L,D)
    before = u.new_zeros(u.shape[0], K - 1, D) if conv is None else conv
    padded = torch.cat([before, u], dim=1)  # (B,K-1+L,D)
    _show(taps, "conv1d", padded)
    u = _convolve(mixer, padded)
    _show(taps, "x_proj", u)
    projected = _apply(mixer.x_proj, u)  # (B,L,R+2N)
    _show(taps, "dt_proj", projected[..., : mixer.dt_proj.weight.shape[1]])
    # a copy: a view would keep the whole piece alive
    return ScanInputs(u, z, projected), padded[:, padded.shape[1] - (K - 1) :].clone()


def scan(
    block: nn.Module, inputs: ScanInputs, state: Tensor | None = None, moments: ScanMoments | None = None
) -> tuple[Tensor, Tensor]:
    """The selective scan of the block: gated outputs (B,L,D) and the state after the last step (B,D,N)."""
    mixer = block.mixer
    R, N = mixer.dt_proj.weight.shape[1], mixer.A_log.shape[1]
    delta, B, C = inputs.projected.split([R, N, N], dim=-1)
    return selective_scan(
        inputs.u,
        linear(delta, mixer.dt_proj.weight),  # (B,L,R) -> (B,L,D)
        -torch.exp(mixer.A_log.float()),
        B,
        C,
        D=mixer.D.float(),
        z=inputs.z,
        delta_bias=None if mixer.dt_proj.bias is None else mixer.dt_proj.bias.float(),
        delta_softplus=True,
        h0=state,
        moments=moments,
    )


def output(block: nn.Module, hidden: Tensor, y: Tensor, taps: Taps | None = None) -> Tensor:
    """The block after its scan: hidden (B,L,M) plus what out_proj makes of the gated outputs y (B,L,D)."""
    _show(taps or {}, "out_proj", y)
    residual = hidden.float() if block.residual_in_fp32 else hidden
    return residual + _apply(block.mixer.out_proj, y)


def _apply(module: nn.Linear, x: Tensor) -> Tensor:
    return linear(x, module.weight, module.bias)


def _convolve(mixer: nn.Module, padded: Tensor) -> Tensor:
    """The convolution and its activation: (B,K-1+L,D) -> (B,L,D)."""
    weight, bias = mixer.conv1d.weight, mixer.conv1d.bias
    if padded.is_cuda and mixer.activation == "silu":
        out = causal_conv_silu(padded, weight, bias)
        if out is not None:
            return out
    return mixer.act(causal_conv(padded, weight, bias))


def causal_conv(padded: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Depthwise causal convolution: (B,K-1+L,D) with weight (D,1,K) -> (B,L,D).

    A sum over the K taps instead of `conv1d`, which wants channels before time: two transposes saved.
    """
    K = weight.shape[-1]
    steps = padded.shape[1] - (K - 1)
    out = padded[:, :steps] * weight[:, 0, 0]
    for k in range(1, K):
        out.addcmul_(padded[:, k : k + steps], weight[:, 0, k])
    return out if bias is None else out.add_(bias)


def prune_transitions(block: nn.Module, mask: Tensor, transition: str) -> None:
    """Sets the entries of A_log that mask (D,N) chooses to what `transition` says a pruned one is (PRUNED_A_LOG)."""
    block.mixer.A_log.data[mask] = PRUNED_A_LOG[transition]


def remove_states(block: nn.Module, columns: Tensor) -> None:
    """Takes the state columns that columns (N,) chooses out of the block.

    A_log loses the columns, x_proj the rows that make B and C for them; y is a sum over states, so nothing else changes.
    """
    mixer = block.mixer
    R = mixer.dt_proj.weight.shape[1]
    keep = ~columns.to(mixer.A_log.device)
    rows = torch.cat([torch.ones(R, dtype=torch.bool, device=keep.device), keep, keep])  # dt, B and C rows of x_proj
    mixer.A_log = nn.Parameter(mixer.A_log.data[:, keep].contiguous(), requires_grad=False)
    mixer.x_proj.weight = nn.Parameter(mixer.x_proj.weight.data[rows].contiguous(), requires_grad=False)
    mixer.x_proj.out_features = int(rows.sum())
    mixer.ssm_state_size = int(keep.sum())


def _show(taps: Taps, name: str, value: Tensor) -> None:
    if name in taps:
        taps[name](value)
