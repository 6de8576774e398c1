"""Least squares for the remaining weights: from a module's present inputs to the output that it should have."""

from __future__ import annotations

import torch
from torch import Tensor


def refit(W: Tensor, H: Tensor, cross: Tensor, percdamp: float = 0.01) -> Tensor:
    """argmin over W' of |W' X - T|^2 + damping |W' - W|^2, the ridge toward the weights as they are.

    Where T = W X nothing changes, however large the damping.

    Args:
        W: (rows,cols) or (G,rows,cols). H: X X^T, (cols,cols) or (G,cols,cols). cross: T X^T, in the shape of W.
        percdamp: damping as a share of the mean of H's diagonal.

    Returns:
        W' in float64. Directions that X never showed stay as they are.
    """
    W, H, cross = W.double(), H.double(), cross.double()
    mean = H.diagonal(dim1=-2, dim2=-1).mean(-1)[..., None, None]
    damped = H + (percdamp * mean + (mean == 0)) * torch.eye(H.shape[-1], dtype=H.dtype, device=H.device)
    change = torch.linalg.solve(damped, (cross - W @ H).mT).mT
    return W + change
