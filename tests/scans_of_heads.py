"""Scans of heads to compare: random inputs, loops in plain Python, and how far float32 may be from float64."""

import itertools
import math

import torch

from sparsessm.kernels.chunked_scan import HeadStatistics, chunked_scan, chunked_scan_ref

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
TOLERANCE = 2e-6
SUMS = ("h2", "abar", "hh", "ch2")  # all that the scan fills
P, N = 5, 7


def inputs(steps, *, batch=2, groups=2, heads=2, p=P, n=N, seed=0, h0=False, D=True):
    """Arguments of a scan of groups * heads heads, float32 on the CPU."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator)

    H = groups * heads
    return {
        "u": draw(batch, steps, H, p),
        "dt": torch.nn.functional.softplus(draw(batch, steps, H) - 1),
        "A": -torch.exp(draw(H)),
        "B": draw(batch, steps, groups, n),
        "C": draw(batch, steps, groups, n),
        "D": draw(H) if D else None,
        "h0": draw(batch, H, p, n) if h0 else None,
    }


def wide(values):
    return {name: None if value is None else value.double() for name, value in values.items()}


def empty(values, by_state=False, needs=SUMS):
    """Sums for a scan of some values."""
    H, n = len(values["A"]), values["B"].shape[-1]
    return HeadStatistics.zeros(needs, values["u"].shape[1], H, n, values["u"].device, by_state=by_state)


def run(values, sums=None, **more):
    """`chunked_scan` where it computes; results, and what it adds to the sums, come back to the CPU."""
    there = {name: None if value is None else value.to(DEVICE) for name, value in values.items()}
    if sums is None:
        y, state = chunked_scan(**there, **more)
        return y.cpu(), state.cpu()
    device = {name: value.to(DEVICE) if isinstance(value, torch.Tensor) else value for name, value in vars(sums).items()}
    moved = HeadStatistics(**device)
    y, state = chunked_scan(**there, statistics=moved, **more)
    for ours, theirs in zip(sums.tensors(), moved.tensors(), strict=True):
        ours.copy_(theirs)
    return y.cpu(), state.cpu()


def sizes(values, by_state=False):
    """Bounds of the terms of every result, as if no term took anything away from another; float64.

    The norm of a column of a state is at most m_t[n] = a_t m_{t-1}[n] + dt_t |u_t| |B_t[n]|.
    """
    v = wide(values)
    (batch, steps, H), (groups, n) = v["dt"].shape, v["B"].shape[2:]
    B, C = (v[name].repeat_interleave(H // groups, 2).abs() for name in ("B", "C"))
    abar = torch.exp(v["dt"] * v["A"])
    inflow = (v["dt"] * v["u"].norm(dim=-1))[..., None] * B
    m = torch.zeros(batch, steps + 1, H, n, dtype=torch.float64)
    if v["h0"] is not None:
        m[:, 0] = v["h0"].norm(dim=2)
    for t in range(steps):
        m[:, t + 1] = abar[:, t, :, None] * m[:, t] + inflow[:, t]
    entered, left = m[:, :-1], m[:, 1:]
    y = (left * C).sum(-1)  # (B,L,H)
    if v["D"] is not None:
        y = y + v["D"].abs() * v["u"].norm(dim=-1)
    heads, h2, ch2 = entered.norm(dim=-1), entered.square().sum(0), (left * C).square().sum(0)
    sums = {"h2": h2, "abar": abar.sum(0)[..., None], "ch2": ch2}
    if not by_state:
        sums = {name: value.sum(-1)[:, None] for name, value in sums.items()}
    hh = torch.einsum("blh,blk->hk", heads, heads)
    return {"y": y[..., None], "state": left[:, -1][:, :, None], "hh": hh, **sums}


def close(found, expected, size, what):
    """Whether all is finite and no entry is farther off than a share of its size."""
    assert found.shape == expected.shape, what
    assert torch.isfinite(found).all(), f"{what} is not finite"
    share = (found.double() - expected.double()).abs() / size.clamp_min(1e-300)
    assert float(share.max()) <= TOLERANCE, f"{what}: off by {float(share.max()):.2g} of what its terms come to"


def compare(values):
    """The scan in chunks with and without sums, of heads and of states, against the reference in float64."""
    for by_state in (False, True):
        size, sums, expected = sizes(values, by_state), empty(values, by_state), empty(values, by_state)
        y, state = run(values, sums)
        expected_y, expected_state = chunked_scan_ref(**wide(values), statistics=expected)
        assert y.dtype == state.dtype == torch.float32 and expected_y.dtype == torch.float64
        close(y, expected_y, size["y"], "y")
        close(state, expected_state, size["state"], "the last state")
        for name in SUMS:
            close(getattr(sums, name), getattr(expected, name), size[name], f"{name}, by_state {by_state}")
    plain_y, plain_state = run(values)
    assert torch.equal(plain_y, y) and torch.equal(plain_state, state)  # sums change no result


# --- the reference


def by_loops(v, by_state):
    """S_t[h] = exp(dt A) S + dt u B^T and y = S C + D u, number by number, and what is summed of S."""
    (batch, steps, H, p), (groups, n) = v["u"].shape, v["B"].shape[2:]
    R = range(H)
    u, dt, A, B, C = (v[name].tolist() for name in ("u", "dt", "A", "B", "C"))
    D = [0.0] * H if v["D"] is None else v["D"].tolist()
    y = torch.zeros(batch, steps, H, p, dtype=torch.float64)
    end = torch.zeros(batch, H, p, n, dtype=torch.float64)
    h2, ch2 = (torch.zeros(steps, H, n, dtype=torch.float64) for _ in range(2))
    abar, hh = torch.zeros(steps, H, 1, dtype=torch.float64), torch.zeros(H, H, dtype=torch.float64)
    for b in range(batch):
        S = [[[0.0] * n for _ in range(p)] for _ in R] if v["h0"] is None else v["h0"][b].tolist()
        for t in range(steps):
            for h, k in itertools.product(R, R):
                hh[h, k] += sum(S[h][i][j] * S[k][i][j] for i in range(p) for j in range(n))
            for h in R:
                g = h // (H // groups)
                a = math.exp(dt[b][t][h] * A[h])
                abar[t, h, 0] += a
                for j in range(n):
                    h2[t, h, j] += sum(S[h][i][j] ** 2 for i in range(p))
                for i, j in itertools.product(range(p), range(n)):
                    S[h][i][j] = a * S[h][i][j] + dt[b][t][h] * u[b][t][h][i] * B[b][t][g][j]
                for j in range(n):
                    ch2[t, h, j] += sum((S[h][i][j] * C[b][t][g][j]) ** 2 for i in range(p))
                for i in range(p):
                    y[b, t, h, i] = sum(S[h][i][j] * C[b][t][g][j] for j in range(n)) + D[h] * u[b][t][h][i]
        end[b] = torch.tensor(S, dtype=torch.float64)
    sums = {"h2": h2, "abar": abar, "ch2": ch2}
    return y, end, {"hh": hh} | (sums if by_state else {name: value.sum(-1)[:, None] for name, value in sums.items()})


