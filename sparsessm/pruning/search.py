"""Which entries of A_log to prune when entries interact: sets chosen by their joint error at a channel's output.

G (D,N,N) is, per channel, the sum of e e^T over samples and steps, where e (N,) is what the gated output loses with each
state pruned alone (`ScanStatistics.gram`). A set S of a channel costs 1^T G_SS 1: the squared error that the channel makes
at the block's output. The diagonal alone is a saliency; the rest tells which errors cancel.
"""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor

from sparsessm.errors import require_known
from sparsessm.pruning.methods import SEARCHES
from sparsessm.pruning.patterns import Columns, Pattern

# Sets that are tried one by one where whole columns are chosen: those of 8 among 16 states are 12,870.
_MOST_SETS = 200_000
_ROUNDS = 50
# All 2^N sets of a channel are tried up to this N; numbers held at once for that.
_MOST_STATES = 16
_SETS_AT_ONCE = 1 << 24


def set_cost(G: Tensor, mask: Tensor) -> Tensor:
    """(D,): 1^T G_SS 1 of each channel for the sets in mask (D,N)."""
    chosen = mask.to(G.dtype)
    return torch.einsum("dn,dnm,dm->d", chosen, G, chosen)


def select(G: Tensor, pattern: Pattern, search: str = "greedy", gone: Tensor | None = None) -> Tensor:
    """The mask (D,N) that the pattern asks for, by one of SEARCHES; exact in count.

    gone: (D,N), entries that were pruned before; they cost nothing, are chosen first and stay chosen.

    independent: the lowest of the diagonal. greedy: one entry after the other by its marginal cost G_nn + 2 sum_S G_nm,
    over all channels. exchange: greedy, then swaps of a chosen entry for another for as long as they lower the cost.
    exact: of all sets of a channel the best of each size, and sizes by the convex hulls of what they cost (up to 16
    states; exchange above). Whole columns are chosen by the summed cost, with every set tried where there are few enough.
    """
    require_known("search", search, SEARCHES)
    G = G.double()
    if gone is not None and not pattern.removes:
        return _select_rest(G, pattern, search, gone)
    if search == "independent":
        return pattern(G.diagonal(dim1=-2, dim2=-1))
    if pattern.removes:
        return _columns(G.sum(0), round(pattern.sparsity * G.shape[-1]), search).expand(G.shape[:2])
    if search == "exact" and G.shape[-1] <= _MOST_STATES:
        return _exact(G, pattern)
    mask = _greedy_groups(G, pattern) if pattern.group else _greedy(G, pattern)
    return mask if search == "greedy" else _exchanged(G, mask, pattern)


def _select_rest(G: Tensor, pattern: Pattern, search: str, gone: Tensor) -> Tensor:
    """`select` where entries were pruned before: they get a negative cost, lower than that of any other entry."""
    G = without(G, gone)
    # far below any sum of what is left, and small enough for that sum to keep its digits
    bonus = 1e3 * (1 + G.diagonal(dim1=-2, dim2=-1).sum())
    chosen = select(G - torch.diag_embed(gone * bonus), pattern, search)
    return chosen | gone


def without(G: Tensor, gone: Tensor) -> Tensor:
    """G (D,N,N) where the entries in gone (D,N) cost nothing, nor what they share with others."""
    alive = ~gone
    return G * (alive[:, :, None] & alive[:, None, :])


def marginal_costs(G: Tensor) -> tuple[Tensor, Tensor]:
    """Each channel's own greedy order, (D,N) indices, and what each step adds to the cost, (D,N)."""
    D, N = G.shape[:2]
    cost = G.diagonal(dim1=-2, dim2=-1).clone()
    order, steps = torch.empty(D, N, dtype=torch.int64, device=G.device), torch.empty_like(cost)
    rows = torch.arange(D, device=G.device)
    for i in range(N):
        steps[:, i], order[:, i] = cost.min(-1)
        cost += 2 * G[rows, order[:, i]]
        cost[rows, order[:, i]] = math.inf
    return order, steps


def _greedy(G: Tensor, pattern: Pattern) -> Tensor:
    """Greedy over all channels at once.

    Choosing in one channel changes nothing in another, so the channels' own orders are merged: an entry is on offer once
    those before it are taken, which is when the running maximum of its channel's steps is reached.
    """
    order, steps = marginal_costs(G)
    taken = pattern(steps.cummax(-1).values)  # of equals the earlier in its channel comes first
    return torch.zeros_like(taken).scatter_(-1, order, taken)


def _greedy_groups(G: Tensor, pattern: Pattern) -> Tensor:
    """Greedy in each channel; a group that has its share is closed."""
    D, N = G.shape[:2]
    cost, mask = G.diagonal(dim1=-2, dim2=-1).clone(), torch.zeros(D, N, dtype=torch.bool, device=G.device)
    rows = torch.arange(D, device=G.device)
    m = pattern.group or N
    n = round(pattern.sparsity * m)
    for _ in range(N // m * n):
        full = mask.unflatten(-1, (-1, m)).sum(-1) >= n
        closed = full.repeat_interleave(m, dim=-1) | mask
        best = cost.masked_fill(closed, math.inf).argmin(-1)
        mask[rows, best] = True
        cost += 2 * G[rows, best]
    return mask


def _columns(G: Tensor, k: int, search: str) -> Tensor:
    """(1,N): the k columns whose removal costs least by G (N,N); all sets are tried where there are few."""
    N = G.shape[-1]
    if math.comb(N, k) <= _MOST_SETS and 0 < k < N:
        sets = torch.tensor(list(itertools.combinations(range(N), k)), device=G.device)
        masks = torch.zeros(len(sets), N, dtype=torch.bool, device=G.device).scatter_(-1, sets, True)
        chosen = masks.to(G.dtype)
        return masks[((chosen @ G) * chosen).sum(-1).argmin()][None]
    order, _ = marginal_costs(G[None])
    mask = torch.zeros(1, N, dtype=torch.bool, device=G.device)
    mask[0, order[0, :k]] = True
    return mask if search == "greedy" else _exchanged(G[None], mask, Columns(k / N))


def _exact(G: Tensor, pattern: Pattern) -> Tensor:
    """The best set of each size in every channel, and the sizes that cost least together."""
    D, N = G.shape[:2]
    bits = torch.arange(1 << N, device=G.device)[:, None] >> torch.arange(N, device=G.device) & 1  # (2^N,N)
    if pattern.group:
        allowed = (bits.unflatten(-1, (-1, pattern.group)).sum(-1) == round(pattern.sparsity * pattern.group)).all(-1)
        classes = [allowed.nonzero().flatten()]
    else:
        sizes = bits.sum(-1)
        classes = [(sizes == k).nonzero().flatten() for k in range(N + 1)]
    best, where = [], []
    for part in G.split(max(1, _SETS_AT_ONCE >> N)):
        costs = _all_costs(part)  # (d,2^N)
        found = [costs[:, some].min(-1) for some in classes]
        best.append(torch.stack([value for value, _ in found], -1))
        where.append(torch.stack([some[at] for some, (_, at) in zip(classes, found, strict=True)], -1))
    cost, chosen = torch.cat(best), torch.cat(where)  # (D,classes)
    size = torch.zeros(D, dtype=torch.int64, device=G.device)
    if not pattern.group:
        size = _sizes(cost, round(pattern.sparsity * D * N))
    return bits[chosen.gather(-1, size[:, None]).squeeze(-1)].bool()


def _all_costs(G: Tensor) -> Tensor:
    """(D,2^N): the cost of every set of every channel, bit n of its number for state n."""
    D, N = G.shape[:2]
    costs = G.new_zeros(D, 1)
    for n in range(N):
        shared = G.new_zeros(D, 1)  # sum over the set of G_nm, for all sets of the states below n
        for m in range(n):
            shared = torch.cat([shared, shared + G[:, n, m, None]], -1)
        costs = torch.cat([costs, costs + G[:, n, n, None] + 2 * shared], -1)
    return costs


def _sizes(cost: Tensor, total: int) -> Tensor:
    """How many entries each channel gives, (D,) with sum `total`: cost (D,N+1) of its best set of each size.

    Steps along the lower convex hulls are taken from the cheapest on; the rest follows one by one.
    """
    size = [0] * len(cost)
    steps = []
    for d, row in enumerate(cost.tolist()):
        hull = [0]
        for k in range(1, len(row)):
            while len(hull) > 1 and (row[hull[-1]] - row[hull[-2]]) * (k - hull[-1]) >= (row[k] - row[hull[-1]]) * (
                hull[-1] - hull[-2]
            ):
                hull.pop()
            hull.append(k)
        steps += [((row[b] - row[a]) / (b - a), d, b) for a, b in itertools.pairwise(hull)]
    left = total
    for _, d, k in sorted(steps):
        if k - size[d] > left:
            break
        left -= k - size[d]
        size[d] = k
    sizes = torch.tensor(size, device=cost.device)
    rows = torch.arange(len(cost), device=cost.device)
    padded = torch.cat([cost, cost.new_full((len(cost), 1), math.inf)], -1)
    for _ in range(left):
        sizes[(padded[rows, sizes + 1] - padded[rows, sizes]).argmin()] += 1
    return sizes


def _exchanged(G: Tensor, mask: Tensor, pattern: Pattern) -> Tensor:
    """Swaps inside channels, and between them unless entries compete in groups, while the cost falls; changes the mask."""
    D, N = mask.shape
    rows = torch.arange(D, device=G.device)
    same_group = torch.ones(N, N, dtype=torch.bool, device=G.device)
    if pattern.group:
        group = torch.arange(N, device=G.device) // pattern.group
        same_group = group[:, None] == group
    for _ in range(_ROUNDS):
        before = mask.clone()
        leave, join = _leave_join(G, mask)
        change = join[:, None, :] - leave[:, :, None] - 2 * G  # [leaving i, joining j]
        change.masked_fill_(~(mask[:, :, None] & ~mask[:, None, :] & same_group), math.inf)
        best, where = change.flatten(1).min(-1)
        gains = best < -1e-12 * leave.masked_fill(~mask, 0).abs().amax(-1).clamp_min(1e-300)
        mask[rows[gains], where[gains] // N] = False
        mask[rows[gains], where[gains] % N] = True
        if not pattern.group and not pattern.removes:
            _swap_between(G, mask)
        if torch.equal(mask, before):
            break
    return mask


def _leave_join(G: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """(D,N) each: what the cost falls by when a chosen entry leaves, and rises by when another joins."""
    shared = 2 * torch.einsum("dnm,dm->dn", G, mask.to(G.dtype))
    diagonal = G.diagonal(dim1=-2, dim2=-1)
    return shared - diagonal, shared + diagonal


def _swap_between(G: Tensor, mask: Tensor) -> None:
    """One entry leaves a channel where its cost is high and one joins another where it is low, for many pairs at once."""
    leave, join = _leave_join(G, mask)
    saved, out = leave.masked_fill(~mask, -math.inf).max(-1)
    spent, into = join.masked_fill(mask, math.inf).min(-1)
    dear, cheap = saved.argsort(descending=True, stable=True), spent.argsort(stable=True)
    used = torch.zeros(len(mask), dtype=torch.bool)
    for d, c in zip(dear.tolist(), cheap.tolist(), strict=True):
        if not saved[d] > spent[c]:
            break
        if d != c and not used[d] and not used[c]:  # a channel's costs hold for one change of it
            mask[d, out[d]], mask[c, into[c]] = False, True
            used[d] = used[c] = True
