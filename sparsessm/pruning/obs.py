"""Optimal brain surgeon in blocks of columns (Frantar and Alistarh 2023, SparseGPT, algorithm 1), and two baselines.

A matrix W (rows,cols) whose module saw inputs X (cols,tokens) has the layer-wise loss |W X - W' X|^2 and the Hessian
H = (2/n) X X^T for each of its rows. Leading dimensions are independent problems solved as one batch: the K weights of
each channel of a depthwise convolution are one.
"""

from __future__ import annotations

import logging

import torch
from torch import Tensor

from sparsessm.errors import SolverError
from sparsessm.pruning.patterns import (
    Pattern,
)

logger = logging.getLogger(__name__)

_TRIES = 4


def inverse_factor(H: Tensor, percdamp: float, name: str) -> Tensor:
    """U (G,cols,cols), upper triangular with U^T U = (H + damping)^-1.

    The damping is percdamp * mean(diag H), ten times as much at each further try for the matrices that need it.

    Raises:
        SolverError: after four tries, naming the module.
    """
    damping = percdamp * H.diagonal(dim1=-2, dim2=-1).mean(-1)[:, None, None]  # (G,1,1)
    eye = torch.eye(H.shape[-1], dtype=H.dtype, device=H.device)
    for attempt in range(_TRIES):
        # With F the flip of both axes, F (H) F = L L^T gives H = R R^T with R = F L F upper; so U = R^-1. One
        # factorisation and one triangular solve where inverting H first would take three, and lose digits.
        factor, info = torch.linalg.cholesky_ex((H + damping * eye).flip(-2, -1))
        failed = (info != 0) | ~torch.isfinite(factor).all(-1).all(-1)
        if not failed.any():
            return torch.linalg.solve_triangular(factor.flip(-2, -1), eye.expand_as(H), upper=True)
        if attempt < _TRIES - 1:
            logger.warning(
                "%s: the Hessian is not positive definite (%d of %d matrices); trying again with ten times the damping",
                name, int(failed.sum()), len(H),
            )  # fmt: skip
            damping = torch.where(failed[:, None, None], damping * 10, damping)
    raise SolverError(
        f"{name}: the Hessian is not positive definite after {_TRIES} tries; raise --percdamp or --nsamples"
    )


def prepared(
    W: Tensor, H: Tensor, gone: Tensor | None, pattern: Pattern, blocksize: int, name: str
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Copies with a leading dimension for problems; inputs that were never seen have a Hessian of 1, and weights of 0.

    Args: as in prune_obs.

    Raises:
        ValueError: groups do not fit the columns or the blocks.
    """
    W = W.reshape(-1, *W.shape[-2:]).to(H.dtype).clone()
    if gone is not None:
        gone = gone.reshape(W.shape)
        W.masked_fill_(gone, 0)
    H = H.reshape(-1, *H.shape[-2:]).clone()
    cols, m = W.shape[-1], pattern.group
    if m and (cols % m or blocksize % m):
        raise ValueError(f"{name}: {m} must divide {cols} columns and the block size {blocksize}")
    diagonal = H.diagonal(dim1=-2, dim2=-1)
    dead = diagonal == 0
    diagonal[dead] = 1
    return W.masked_fill_(dead[:, None, :], 0), H, gone


def prune_obs(
    W: Tensor,
    H: Tensor,
    pattern: Pattern,
    blocksize: int = 128,
    percdamp: float = 0.01,
    name: str = "weight",
    gone: Tensor | None = None,
    importance: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Prunes W column by column; the columns to the right compensate.

    Args:
        W: (rows,cols) or (G,rows,cols). H: (cols,cols) or (G,cols,cols), in the dtype to compute in.
        pattern: chooses in each block of columns, over all rows and all G, by w^2 / U_ii^2; one with groups at the
            first column of each group, from the weights as updated by then.
        blocksize: columns per block, a multiple of the pattern's group. percdamp: see inverse_factor. name: for messages.
        gone: bool in the shape of W, entries that were pruned before: they are zero and stay zero.
        importance: (rows,) or (G*rows,), what the squared error of each row counts for; None for all the same.

    Returns:
        The new weights and the mask (True = pruned), in the shape of W; pruned weights are exactly zero.
    """
    shape, cols, m = W.shape, W.shape[-1], pattern.group
    W, H, gone = prepared(W, H, gone, pattern, blocksize, name)
    U = inverse_factor(H, percdamp, name)

    mask = torch.zeros(W.shape, dtype=torch.bool, device=W.device)
    for start in range(0, cols, blocksize):
        stop = min(start + blocksize, cols)
        block, errors = W[..., start:stop].clone(), torch.zeros_like(W[..., start:stop])
        factor = U[:, start:stop, start:stop]
        pivots = factor.diagonal(dim1=-2, dim2=-1)[:, None, :]  # (G,1,columns of the block)
        before = None if gone is None else gone[..., start:stop]
        if not m:
            scores = (block / pivots).square().flatten(0, 1)  # (G,rows,cols) -> (G*rows,cols)
            scores = scores if importance is None else scores * importance[:, None]
            before = None if before is None else before.flatten(0, 1)
            mask[..., start:stop] = pattern.spread_rest(gone, before).choose(scores, before).view(block.shape)
        for i in range(stop - start):
            if m and i % m == 0:
                group = slice(i, i + m)
                scores = (block[..., group] / pivots[..., group]).square()
                mask[..., start + i : start + i + m] = pattern.choose(
                    scores, None if before is None else before[..., group]
                )
            column = block[..., i]
            error = torch.where(mask[..., start + i], column, 0) / pivots[..., i]  # (w - q) / U_ii
            block[..., i].masked_fill_(mask[..., start + i], 0)
            block[..., i + 1 :] -= error[..., None] * factor[:, i, None, i + 1 :]
            errors[..., i] = error
        W[..., start:stop] = block
        W[..., stop:] -= errors @ U[:, start:stop, stop:]
    return W.reshape(shape), mask.reshape(shape)


def refine(
    new: Tensor, mask: Tensor, W: Tensor, H: Tensor, percdamp: float = 0.01, iterations: int = 20
) -> Tensor:
    """The remaining weights, moved toward the optimum for the mask: argmin |(W - V) X|^2 over V that is zero in the mask.

    OBS decides and compensates column by column, so its weights are not the best for the mask that it ends with. This
    is the conjugate gradient method with a diagonal preconditioner on all rows at once (as in ALPS, Meng et al. 2024).

    Args:
        new: where to start, (rows,cols) or (G,rows,cols), zero in the mask. W: the weights to approximate.
        H, percdamp: as in prune_obs, (cols,cols) or (G,cols,cols).
    """
    H = H + percdamp * H.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None] * torch.eye(H.shape[-1], device=H.device)
    keep = (~mask).to(H.dtype)
    scale = H.diagonal(dim1=-2, dim2=-1)[..., None, :].clamp_min(torch.finfo(H.dtype).tiny)
    V = new.to(H.dtype)
    residual = ((W.to(H.dtype) - V) @ H) * keep
    direction = residual / scale
    rest = (residual * direction).sum(-1, keepdim=True)  # of each row
    enough = rest * torch.finfo(H.dtype).eps ** 2  # below that only rounding is left, and no direction to continue in
    for _ in range(iterations):
        image = (direction @ H) * keep
        step = rest / (direction * image).sum(-1, keepdim=True).clamp_min(torch.finfo(H.dtype).tiny)
        step = torch.where(rest > enough, step, 0)
        V = V + step * direction
        residual = residual - step * image
        ahead = residual / scale
        before, rest = rest, (residual * ahead).sum(-1, keepdim=True)
        direction = ahead + rest / before.clamp_min(torch.finfo(H.dtype).tiny) * direction
    return V


def prune_magnitude(W: Tensor, pattern: Pattern, gone: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Sets the entries of W (rows,cols) with the smallest absolute values to zero (Han et al. 2015)."""
    mask = pattern.choose(W.abs(), gone)
    return W.masked_fill(mask, 0), mask


def prune_wanda(
    W: Tensor, squared_norms: Tensor, pattern: Pattern, gone: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Wanda (Sun et al. 2023): scores abs(W) |X_j|, compared within each output row.

    W: (rows,cols). squared_norms: (cols,) or (rows,cols), sum of squares of each input, on any scale.
    """
    mask = pattern.per_row().choose(W.abs() * squared_norms.to(W.dtype).sqrt(), gone)
    return W.masked_fill(mask, 0), mask
