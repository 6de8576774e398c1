"""Optimal brain compressor (Frantar and Alistarh 2022): each row loses its weights one by one, always the cheapest.

For a row w of a matrix W (rows,cols) and the Hessian H of prune_obs, removing weight i costs w_i^2 / [H^-1]_ii, after
which the others have moved by -w_i [H^-1]_:i / [H^-1]_ii and H^-1 is that of the weights that are left. The order in which
a row loses its weights, and what each step costs, is its trace; a mask takes the cheapest steps of all traces.

A row takes cols^3 / 6 products and sums. Wide matrices are cut into blocks of columns: a trace is that of a block while
all other columns are there, and tells how many weights each row gives in the block; then block after block is pruned,
while the columns to the right compensate, as in prune_obs.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from sparsessm.errors import NumericalError
from sparsessm.pruning.obs import inverse_factor, prepared
from sparsessm.pruning.patterns import Pattern
from sparsessm.threads import for_each

# Columns up to which a matrix is one block.
WHOLE = 640
# Rows of which a thread takes some at a time.
_ROWS = 16


def remove_in_turn_ref(
    W: Tensor, inverse: Tensor, limits: Tensor, group: int = 0, most: int = 0, gone: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Removes weights of all rows step by step, in each row the one that costs least.

    Args:
        W: (rows,n). inverse: (n,n) or (rows,n,n), of the damped Hessian. limits: (rows,), how many weights go.
        group, most: of each `group` weights at most `most` go; 0 for no groups.
        gone: bool (rows,n), weights that go first, in the order of their columns.

    Returns:
        The new W, zero where a weight went; order (rows,n) int64, the columns as they went and then the others in any order;
        cost (rows,n) of each step, infinity beyond the last.
    """
    rows, n = W.shape
    W, C = W.clone(), inverse.expand(rows, n, n).clone()
    each, columns = torch.arange(rows, device=W.device), torch.arange(n, device=W.device)
    alive = torch.ones_like(W, dtype=torch.bool)
    cost, when = torch.full_like(W, torch.inf), n + columns.repeat(rows, 1)
    for step in range(n):
        loss = W.square() / C.diagonal(dim1=-2, dim2=-1)
        offered = alive
        if group:
            full = (~alive).unflatten(-1, (-1, group)).sum(-1) >= most
            offered = alive & ~full.repeat_interleave(group, -1)
        where = loss.masked_fill(~offered, torch.inf).argmin(-1)
        goes = offered.any(-1)
        if gone is not None:
            first = gone & alive
            where, goes = torch.where(first.any(-1), first.int().argmax(-1), where), goes | first.any(-1)
        goes &= step < limits
        if not goes.any():
            break
        cost[goes, step] = loss[each, where][goes]
        when[each[goes], where[goes]] = step
        column = C[each, :, where] * goes[:, None]  # (rows,n)
        pivot = C[each, where, where][:, None]
        W -= W[each, where][:, None] / pivot * column
        C -= (column / pivot)[:, :, None] * column[:, None, :]
        alive[each[goes], where[goes]] = False
        W.masked_fill_(~alive, 0)
        C.diagonal(dim1=-2, dim2=-1).masked_fill_(~alive, 1)  # what is left of it by rounding is no pivot
    return W, when.argsort(dim=-1, stable=True), cost


def remove_in_turn(
    W: Tensor, inverse: Tensor, limits: Tensor, group: int = 0, most: int = 0, gone: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """`remove_in_turn_ref`, compiled on the CPU."""
    if W.device.type != "cpu":
        return remove_in_turn_ref(W, inverse, limits, group, most, gone)
    from sparsessm.pruning import obc_piece  # numba takes a while to load

    rows, n = W.shape
    W, cost = W.clone(), torch.empty_like(W)
    before = torch.zeros_like(W, dtype=torch.bool) if gone is None else gone
    # those that go first stand first, the first of them last: the piece takes them from there
    order = torch.where(before, -torch.arange(n), 1).argsort(dim=-1, stable=True)
    arrays = W.numpy(), inverse.expand(rows, n, n).numpy(), order.numpy(), cost.numpy()
    first, limit = before.sum(-1).tolist(), limits.tolist()

    def work(part: range) -> None:
        C, left = obc_piece.work_space(n, arrays[0].dtype), np.empty(n // group if group else 0, np.int64)
        for row in part:
            left[:] = most
            w, matrix, columns, costs = (array[row] for array in arrays)
            obc_piece.remove_in_turn(w, matrix, C, first[row], limit[row], group, left, columns, costs)

    for_each(work, [range(start, min(start + _ROWS, rows)) for start in range(0, rows, _ROWS)], torch.get_num_threads())
    return W, order, cost


def traces(
    W: Tensor, U: Tensor, pattern: Pattern, blocksize: int, gone: Tensor | None = None, importance: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """What it costs to remove the weights of each row in turn, in blocks of columns of which each is alone.

    Args:
        W, gone: as `prepared`, (G,rows,cols). U: (G,cols,cols), see inverse_factor. The others are as in prune_obc.

    Returns:
        order (G,rows,cols) int64, the columns of each block as they go; cost (G,rows,cols) of each step, the running maximum
        in its block: a step is on offer once those before it are taken. Infinity for what a group may not give.

    Raises:
        NumericalError: a weight is not finite.
    """
    if not torch.isfinite(W).all():
        raise NumericalError("the weights hold values that are not finite")
    G, rows, cols = W.shape
    order, cost = torch.empty(W.shape, dtype=torch.int64, device=W.device), torch.empty_like(W)
    limits = torch.full((G * rows,), cols, device=W.device)
    for part in _parts(cols, blocksize):
        inverse = U[:, :, part].mT @ U[:, :, part]
        _, columns, costs = _batched(W[..., part], inverse, limits, pattern, None if gone is None else gone[..., part])
        order[..., part], cost[..., part] = columns + part.start, costs.cummax(-1).values
    return order, cost if importance is None else cost * importance.to(cost.dtype).view(G, rows, 1)


def _parts(cols: int, blocksize: int) -> list[slice]:
    """Blocks of columns; a matrix that is not much wider than one stays whole."""
    if cols <= WHOLE:
        return [slice(0, cols)]
    return [slice(start, min(start + blocksize, cols)) for start in range(0, cols, blocksize)]


def _batched(
    W: Tensor, inverse: Tensor, limits: Tensor, pattern: Pattern, gone: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """`remove_in_turn` for W (G,rows,n), inverse (G,n,n), limits (G*rows,)."""
    G, rows, n = W.shape
    matrix = inverse[0] if G == 1 else inverse[:, None].expand(G, rows, n, n).reshape(G * rows, n, n)
    group = pattern.group or 0
    before = None if gone is None else gone.reshape(-1, n)
    found = remove_in_turn(W.reshape(-1, n), matrix, limits, group, round(pattern.sparsity * group), before)
    W, order, cost = (x.view(G, rows, n) for x in found)
    return W, order, cost


def prune_obc(
    W: Tensor, H: Tensor, pattern: Pattern, blocksize: int = 128, percdamp: float = 0.01, name: str = "weight",
    gone: Tensor | None = None, importance: Tensor | None = None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Prunes W by the cheapest steps of the traces of its rows; the remaining weights compensate.

    Args:
        W, H, percdamp, name, gone, importance: as in prune_obs.
        pattern: how many of all weights go; of groups, how many of each. blocksize: columns of a block, of wide matrices.

    Returns:
        The new weights and the mask (True = pruned), in the shape of W; pruned weights are exactly zero.
    """
    shape = W.shape
    W, H, gone = prepared(W, H, gone, pattern, blocksize, name)
    U = inverse_factor(H, percdamp, name)
    order, cost = traces(W, U, pattern, blocksize, gone, importance)
    if pattern.group:
        taken = torch.isfinite(cost)
    else:
        before = None if gone is None else gone.gather(-1, order).flatten(0, 1)
        taken = pattern.choose(cost.flatten(0, 1), before).view(cost.shape)
    mask = torch.zeros_like(taken)
    for part in _parts(W.shape[-1], blocksize):
        factor, limits = U[:, part, part], taken[..., part].sum(-1)
        before = None if gone is None else gone[..., part]
        new, columns, _ = _batched(W[..., part], factor.mT @ factor, limits.flatten(), pattern, before)
        went = torch.arange(new.shape[-1], device=W.device) < limits[..., None]
        mask[..., part] = mask[..., part].scatter(-1, columns, went)
        change = torch.linalg.solve_triangular(factor, new - W[..., part], upper=True, left=False)
        W[..., part.stop :] += change @ U[:, part, part.stop :]
        W[..., part] = new
    return W.reshape(shape), mask.reshape(shape)
