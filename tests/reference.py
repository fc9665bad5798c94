"""The slow obvious computations that the tests and bench/ compare with.  They share no code with what they check."""

import torch


def grid(w, bits, sym=False):
    """Scale and zero of the weights w (n,) that share a grid: plain numbers."""
    lo, hi = min(0.0, w.min().item()), max(0.0, w.max().item())
    if sym:
        hi = max(hi, -lo)
        lo = -hi
    scale = (hi - lo) / (2**bits - 1)
    if scale == 0:
        return 1.0, 2 ** (bits - 1) if sym else 0
    return scale, 2 ** (bits - 1) if sym else round(-lo / scale)


def clipped(w, bits, sym, cost):
    """As grid, but with the share of its range, down to three tenths in steps of a fiftieth, at which cost(errors (n,)) is least."""
    scale, zero = grid(w, bits, sym)
    shares = [percent / 100 for percent in range(100, 29, -2)]
    best = min(shares, key=lambda share: cost((codes(w, share * scale, zero, bits) - zero) * share * scale - w))
    return best * scale, zero


def power(errors):
    return errors.abs().pow(2.4).sum().item()


def weighted(importance):
    """A cost of errors that count as much as importance (n,) says."""
    return lambda errors: (errors.square() * importance).sum().item()


def grids(W, bits, groupsize, sym=False):
    """Scale and zero of every entry of W (R, C), each (R, C) float64, group by group."""
    scale, zero = torch.empty_like(W, dtype=torch.float64), torch.empty_like(W, dtype=torch.float64)
    C = W.shape[1]
    for r, row in enumerate(W):
        for i in range(0, C, C if groupsize == -1 else groupsize):
            j = C if groupsize == -1 else min(i + groupsize, C)
            scale[r, i:j], zero[r, i:j] = grid(row[i:j], bits, sym)
    return scale, zero


def codes(w, scale, zero, bits):
    return (torch.round(w / scale) + zero).clamp(0, 2**bits - 1)


def fake_quant_act(x, bits, per_token=False, sym=False):
    """x (B, T, C) in float64, one sequence or token at a time."""
    out = x.to(torch.float64, copy=True)
    if bits >= 16:
        return out
    for share in (part for sequence in out for part in (sequence if per_token else [sequence])):
        scale, zero = grid(share, bits, sym)
        share.copy_((codes(share, scale, zero, bits) - zero) * scale)
    return out


def damped(H, percdamp):
    return H + percdamp * H.diagonal().mean() * torch.eye(len(H), dtype=H.dtype)


def inverse_factor(H, percdamp):
    """Upper U, U^T U = damped(H)^-1, by way of the inverse."""
    return torch.linalg.cholesky(torch.linalg.inv(damped(H, percdamp))).T


def column_loop(W, U, scale, zero, bits, full_width=False):
    """The exact loop, in W's own precision: one column, one rank-1 update of all columns after it.  scale, zero: (R, C) or (R, 1).

    A fair opponent for a stopwatch: a column is contiguous in memory, an update is a single in-place operation that touches nothing else.
    full_width: it runs over all columns, as U has zeros for those before; the same codes, without a slice.
    """
    R, C = W.shape
    w = W.T.clone(memory_format=torch.contiguous_format)  # (C, R)
    scale, zero = scale.expand(R, C).T, zero.expand(R, C).T
    q = torch.empty(C, R, dtype=torch.uint8, device=W.device)
    for i in range(C):
        q[i] = codes(w[i], scale[i], zero[i], bits)
        error = (w[i] - (q[i] - zero[i]) * scale[i]) / U[i, i]
        start = 0 if full_width else i + 1
        w[start:].addr_(U[i, start:], error, alpha=-1)
    return q.T


def beam_loop(W, U, scale, zero, bits, beam):
    """gptq.beam_search, row by row and candidate by candidate.  scale, zero: (R, C) or (R, 1)."""
    found, after = [], torch.ones_like(U).triu(1)
    for row, s, z in zip(W, scale.expand_as(W), zero.expand_as(W), strict=True):
        kept = [(0.0, row, [])]
        for i in range(len(row)):
            extended = []
            for cost, w, codes in kept:
                low = torch.floor(w[i] / s[i] + z[i]).clamp(0, 2**bits - 2)
                for code in (low, low + 1):
                    error = (w[i] - (code - z[i]) * s[i]) / U[i, i]
                    extended.append((cost + error.item() ** 2, w - error * U[i] * after[i], [*codes, code.item()]))
            kept = sorted(extended, key=lambda candidate: candidate[0])[:beam]
        found.append(kept[0][2])
    return torch.tensor(found, dtype=torch.uint8)


def block_loop(W, U, bits, groupsize=-1, sym=False, blocksize=1, first=None, grid_of=None, cost=None):
    """The loop over blocks of columns, which finds the grid of a group when it gets there, from W as it is then: q, scale, zero (R, C).

    grid_of (R, C): the first group's grid is found from it, if not from W.  first (R, C): the first block is rounded from it.
    cost(first column, end) -> cost of `clipped`: grids are clipped.
    """
    W, C = W.clone(), W.shape[1]
    q, scale, zero = (torch.empty_like(W) for _ in range(3))
    b = max(1, C // 100) if blocksize == -1 else blocksize
    for start in range(0, C, C if groupsize == -1 else groupsize):
        end = C if groupsize == -1 else min(start + groupsize, C)
        seen = W if start or grid_of is None else grid_of
        scale[:, start:end], zero[:, start:end] = grids(seen[:, start:end], bits, -1, sym)
        for row in range(len(W) if cost else 0):
            scale[row, start:end], zero[row, start:end] = clipped(seen[row, start:end], bits, sym, cost(start, end))
        for i in range(start, end, b):
            j = min(i + b, end)
            s, z = scale[:, i:j], zero[:, i:j]
            q[:, i:j] = codes((W if i or first is None else first)[:, i:j], s, z, bits)
            error = (W[:, i:j] - (q[:, i:j] - z) * s) @ torch.linalg.inv(U[i:j, i:j])
            W[:, j:] -= error @ U[i:j, j:]
    return q, scale, zero


def weight(q, scale, zero):
    return (q - zero) * scale


def output_error(W, X, Q, Xq):
    """sum |W x - Q xq|^2 over the rows x of X (N, C) and xq of Xq."""
    return (X.double() @ W.double().T - Xq.double() @ Q.double().T).square().sum().item()


def layer(R, C, sequences=8, tokens=48, outliers=4, dead=0, seed=0):
    """Correlated inputs with a few outlier channels; the first `dead` are zero.  W (R, C), X (sequences, tokens, C), float32."""
    g = torch.Generator().manual_seed(seed)
    W = torch.randn(R, C, generator=g) / C**0.5
    X = torch.randn(sequences * tokens, C, generator=g) @ (torch.eye(C) + torch.randn(C, C, generator=g) / C**0.5)
    X[:, torch.randperm(C, generator=g)[:outliers]] *= 12
    X[:, :dead] = 0
    return W, X.view(sequences, tokens, C)
