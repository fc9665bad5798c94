"""GPTQ: error-compensated rounding.  Frantar et al., "GPTQ" (ICLR 2023), algorithm 1.

The column loop is written as a recursion: round the left half of the columns, pass its error on to the right half with one matrix product,
round the right half.  It computes what the loop over columns computes, in matrix products of all sizes instead of rank-1 updates.
"""

import warnings
from contextlib import contextmanager
from functools import cache, partial
from importlib.util import find_spec
from itertools import repeat

import torch

from quant import find_grid, rtn

SPAN = 128  # columns rounded on one CPU thread before the others are woken for a large matrix product
LEAF = 16  # columns that are compensated one after the other, each for all before it: smaller products cost more to start than to compute
HALVES = (torch.float16, torch.bfloat16)
STRIDE = 32  # columns of a beam search after which their errors are passed on to all others
BEAMS = {"cpu": 2**22, "cuda": 2**28}  # numbers that a beam search works on together, 13 bytes each at the peak; more rows wait
ROWS = {"cpu": 256, "cuda": 2048}  # of a product that are made at a time: those of a CPU stay in its cache, those of a GPU keep it busy


def add_product(total, a, b, factor=None):
    """total (C, C) float64 += factor * a^T b for a sequence a, b (T, C) of one type; factor (): a tensor, None is 1.

    Products are summed over the sequence in float32, and added up in float64, so that the order of sequences changes no digit that float32
    has.  Of a symmetric one, where b is a, each span of rows begins at its diagonal: see whole_symmetric.  Products of half types are exact
    in float32; a GPU sums them up on its tensor cores, at ten times the speed of float32.
    """
    symmetric, halves = b is a, a.is_cuda and a.dtype in HALVES
    if not halves:
        a, b = a.float(), b.float()
    for i, j in row_spans(total):
        first = i if symmetric else 0
        rows, columns = a[:, i:j].T, b[:, first:]
        product = torch.mm(rows, columns, out_dtype=torch.float32) if halves else rows @ columns
        total[i:j, first:].add_(product if factor is None else product.mul_(factor))


def whole_symmetric(total):
    """Fill in, in place, what add_product has left out below the diagonal of a symmetric total (C, C)."""
    for i, j in row_spans(total):
        total[j:, i:j] = total[i:j, j:].T
    return total


def row_spans(total):
    """The rows of a matrix (C, C) that are worked on together: (first, end) of each span."""
    size = ROWS[total.device.type]
    return [(i, min(i + size, len(total))) for i in range(0, len(total), size)]


class Hessian:
    """H = sum of x^T x over all tokens seen, times their weights, (C, C).  Published: the mean over sequences, which differs for dead
    columns only.

    It is float64 while sequences are added, not filled in below the diagonal; `finish` makes it the float32 matrix that the solver takes.
    """

    def __init__(self, columns, recipe, device):
        self.H, self.sequences = torch.zeros(columns, columns, dtype=torch.float64, device=device), 0
        self.weights = None  # (n, T) of all tokens that will be added; None: all count alike

    def add(self, x):
        """x (B, T, C)"""
        for sequence in self.weighted(x):
            add_product(self.H, sequence, sequence)
        self.sequences += len(x)

    def weighted(self, x):
        """Yields the next sequences, of x (B, T, C), each token times the root of its weight: then its products have the weight."""
        weight = None if self.weights is None else self.weights[self.sequences : self.sequences + len(x)].to(x.device)
        for k, sequence in enumerate(x):
            yield sequence if weight is None else sequence.float() * weight[k, :, None].sqrt()

    def reduce(self, world, owner):
        """Add up what the processes of a processes.World have seen, at the owner."""
        self.sequences = world.total(self.sequences)
        world.add(self.H, owner)

    def finish(self):
        """No more is added: what is twice the memory goes."""
        self.H = whole_symmetric(self.H.float())

    def finite(self):
        """Whether H can be used.  The mean of its diagonal must be finite too, because damping is a share of it."""
        return bool(self.H.diagonal().sum().isfinite())

    def permute(self, order):
        """Put the columns in another order, (C,)."""
        self.H = self.H[order]  # in two steps, which hold two (C, C) at once, not three
        self.H = self.H[:, order]


def inverse_factor(H, percdamp, name="layer"):
    """Upper U (C, C) with U^T U = (H + lam I)^-1, lam = percdamp * mean(diag H).

    If the damped H is not positive definite, percdamp grows tenfold, up to 1, with a warning that names the layer; then FloatingPointError.
    """
    mean = H.diagonal().mean()
    while True:
        # The lower factor of the reversed matrix, reversed, is an upper V with V V^T = H + lam I; so U = V^-1.
        V = H.flip(0, 1)
        V.diagonal().add_(percdamp * mean)
        V, failed = torch.linalg.cholesky_ex(V)
        if not failed:
            break
        if percdamp >= 1:
            raise FloatingPointError(f"{name}: the Hessian of its inputs is not positive definite, even with --percdamp {percdamp:g}")
        damped, percdamp = percdamp, min(max(10 * percdamp, 0.01), 1.0)
        warnings.warn(f"{name}: Hessian not positive definite with --percdamp {damped:g}; going on with {percdamp:g}", stacklevel=2)
    return invert_upper(V.flip(0, 1))


def invert_upper(V):
    """Upper triangular V (C, C) to its inverse, in place: by halves, a third of the work that solving for the identity takes."""
    m = len(V) // 2
    A, B, D = V[:m, :m], V[:m, m:], V[m:, m:]
    if m < SPAN:
        return V.copy_(torch.linalg.solve_triangular(V, torch.eye(len(V), dtype=V.dtype, device=V.device), upper=True))
    invert_upper(A), invert_upper(D)
    B.copy_((A @ B).neg_() @ D)
    return V


@contextmanager
def one_thread():
    """Use one thread: for thousands of tiny operations, waking others costs more than they save, and far more on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def sweep(w, L, i, j, unit, work):
    """Call work(a, b) on every `unit` rows of w[i:j] in turn, after compensating them for the error E that it left in the rows before."""
    if j - i <= unit:
        work(i, j)
        return
    m = i - (i - j) // (2 * unit) * unit  # the middle, rounded up to whole units
    sweep(w, L, i, m, unit, work)
    w[m:j].addmm_(L[m:j, i:m], w[i:m], alpha=-1)
    sweep(w, L, m, j, unit, work)


@cache
def triton_kernel(device):
    """kernels.span.round_span if Triton, which PyTorch for NVIDIA GPUs brings along, can compile it; or None, with a warning."""
    if find_spec("triton") is None:
        return None
    from kernels.span import round_span

    try:
        round_span(*torch.ones(5, 1, 1, device=device), 4)
    except Exception as e:  # mostly a missing C compiler; in any case PyTorch can do it
        reason = str(e).strip().split("\n")[0]
        warnings.warn(
            f"Triton compiles nothing here ({reason}): columns are rounded by PyTorch, which takes many times longer", stacklevel=2
        )
        return None
    return round_span


def span_kernel(device, blocksize):
    """What rounds a span of columns as one kernel: triton_kernel on a GPU, for the exact loop; else None."""
    return triton_kernel(device) if device.type == "cuda" and blocksize == 1 else None


def spread(grid, C, order=None):
    """The scale and zero of each of C columns, in this order: (C, R) each."""
    both = (grid.columns(p, C).T.contiguous().expand(C, -1) for p in (grid.scale, grid.zero))
    return both if order is None else (p[order] for p in both)


def take_grid(grid, group, fresh, scale, zero):
    """Put `fresh`, the Grid of one group, in its place in the whole grid, and into the scale and zero (g, R) of its columns."""
    grid.scale[:, group], grid.zero[:, group] = fresh.scale[:, 0], fresh.zero[:, 0]
    scale[:], zero[:] = fresh.scale.T, fresh.zero.T


def solve(W, U, grid, first=None, blocksize=1, order=None, regrid=None):
    """Round W (R, C) a block of columns after the other, passing each block's error on to the columns right of it: q (R, C) uint8.

    U (C, C): upper, U^T U = H^-1.  grid: where the codes lie.  first (R, C): what the first block is rounded from, if not W (as AWRQ was
    published).  order (C,): the places in the grid that the columns of W have, if they were permuted.  regrid(W (R, g)) -> Grid: finds the
    grid of each group but the first, from W as it stands when the loop gets there, and updates `grid` in place.
    """
    C = W.shape[1]
    g = C if grid.groupsize == -1 else grid.groupsize
    blocksize = min(g, max(1, C // 100) if blocksize == -1 else blocksize)
    w = W.T.clone(memory_format=torch.contiguous_format)  # (C, R): a column of W is contiguous, and holds its error E once it is rounded
    first = w if first is None else first.T
    scale, zero = spread(grid, C, order)
    L = U.T
    q = torch.empty(W.shape, dtype=torch.uint8, device=W.device)
    leaf, span = (max(1, columns // blocksize) * blocksize for columns in (LEAF, SPAN))
    codes, kernel = torch.empty_like(w[:span]), span_kernel(W.device, blocksize)

    def round_group(i, j):
        if regrid is not None and i:
            take_grid(grid, i // g, regrid(w[i:j].T), scale[i:j], zero[i:j])
        sweep(w, L, i, j, span, round_span)

    def round_span(i, j):
        if kernel:
            kernel(w[i:j], codes[: j - i], L[i:j, i:j].T, scale[i:j], zero[i:j], grid.bits, None if i else first[0])
        else:
            with one_thread():
                sweep(w, L, i, j, leaf, lambda a, b: round_leaf(a, b, codes[a - i : b - i]))
        q[:, i:j] = codes[: j - i].T

    def round_leaf(i, j, codes):
        for a in range(i, j, blocksize):
            b = min(a + blocksize, j)
            x, s, z, c = w[a:b], scale[a:b], zero[a:b], codes[a - i : b - i]
            if a > i:
                x.addmm_(L[a:b, i:a], w[i:a], alpha=-1)
            torch.div(x if a else first[:b], s, out=c).round_().add_(z).clamp_(0, 2**grid.bits - 1)
            x.addcmul_(c - z, s, value=-1)
            if b - a == 1:
                x.div_(L[a, a])  # computes the same as the loop below, many times faster
            else:
                x.copy_(torch.linalg.solve_triangular(L[a:b, a:b], x, upper=False))

    sweep(w, L, 0, C, g, round_group)
    return q


def solve_by_beam(W, U, grid, beam, order=None, regrid=None):
    """`solve` by beam_search: of all columns at once, or where there is a regrid, of a group at a time."""
    C = W.shape[1]
    g = C if grid.groupsize == -1 or regrid is None else grid.groupsize
    w, L, q = W.T.clone(memory_format=torch.contiguous_format), U.T, torch.empty(W.shape, dtype=torch.uint8, device=W.device)
    scale, zero = spread(grid, C, order)
    for i in range(0, C, g):
        j = min(i + g, C)
        if i:
            take_grid(grid, i // g, regrid(w[i:j].T), scale[i:j], zero[i:j])
        codes = beam_search(w[i:j], L[i:j, i:j], scale[i:j], zero[i:j], grid.bits, beam)
        q[:, i:j] = codes.T
        if j < C:
            E = torch.linalg.solve_triangular(L[i:j, i:j], w[i:j] - (codes - zero[i:j]) * scale[i:j], upper=False)
            w[j:].addmm_(L[j:, i:j], E, alpha=-1)
    return q


def beam_search(w, L, scale, zero, bits, beam):
    """Round the columns w (C, R) one after the other, as `solve` does, but with several candidates for each row: codes (C, R) uint8.

    Each column extends every candidate by its two nearest codes, and the `beam` candidates with the least sum of squared errors E are kept.
    Over all columns that sum is e H e^T, H damped: what the rounding of the row costs.  A beam of 1 is GPTQ, which is Babai's nearest plane
    (Chen et al., "The Geometry of LLM Quantization", 2025); a wider one is the K-best search of Guo and Nilsson (2006).

    L (C, C): lower, the factor of the columns.  scale, zero (C, R).  beam: at most recipe.MOST_BEAM.
    """
    parts = -(-w.numel() * beam // BEAMS[w.device.type])
    parts = zip(*(t.chunk(parts, 1) for t in (w, scale, zero)), strict=True)
    return torch.cat([search_rows(*part, L, 2**bits - 1, beam) for part in parts], 1)


def search_rows(w, scale, zero, L, top, beam):
    """beam_search on some of the rows, codes 0 to top: the codes (C, R) uint8."""
    C, R = w.shape
    rest, cost = w[:, :, None], w.new_zeros(R, 1)  # the columns as each candidate leaves them (columns left, R, beam); what it has cost
    history = []  # for each column the code of each candidate, and which candidate that extended (R, beam)
    for i in range(0, C, STRIDE):
        j = min(i + STRIDE, C)
        E = w.new_empty(0, *cost.shape)
        origin = torch.arange(cost.shape[1], device=w.device).expand(R, -1)  # the candidate of `rest` that each goes back to
        for c in range(i, j):
            x = rest[c - i].gather(1, origin) - torch.tensordot(L[c, i:c], E, 1)
            s, z = scale[c, :, None, None], zero[c, :, None, None]
            low = (x[..., None] / s).add_(z).floor_().clamp_(0, top - 1)
            both = torch.cat((low, low + 1), 2)  # (R, beam, 2)
            error = (x[..., None] - (both - z) * s) / L[c, c]
            cost, kept = (cost[..., None] + error.square()).flatten(1).topk(min(beam, 2 * cost.shape[1]), 1, largest=False, sorted=False)
            parent = kept // 2
            E = torch.cat((E.gather(2, parent.expand(len(E), -1, -1)), error.flatten(1).gather(1, kept)[None]))
            origin = origin.gather(1, parent)
            history.append((both.flatten(1).gather(1, kept).to(torch.uint8), parent.to(torch.uint8)))
        rest = rest[j - i :].gather(2, origin.expand(C - j, -1, -1))
        rest.flatten(1).addmm_(L[j:, i:j], E.flatten(1), alpha=-1)
    codes, best = [], cost.argmin(1, keepdim=True)
    for code, parent in reversed(history):
        codes.append(code.gather(1, best)[:, 0])
        best = parent.gather(1, best).long()
    return torch.stack(codes[::-1])


def quantize(W, stats, recipe, name, target=None):
    """GPTQ on W (R, C) with stats, a Hessian to be finished, which it uses up: q (R, C) uint8 and its Grid.

    target(W, U) -> (R, C): the weight to round in place of W, in the column order of U.  Columns whose input is always zero get weight
    zero; if all are, W is rounded to nearest, with a warning.  Raises FloatingPointError if the statistics have NaN or Inf.
    """
    stats.finish()
    if not stats.finite():
        raise FloatingPointError(f"{name}: NaN or Inf in the statistics of its inputs")
    diagonal = stats.H.diagonal()
    dead = diagonal == 0
    if dead.all():
        warnings.warn(f"{name}: all its calibration inputs are zero; its weights are rounded to nearest", stacklevel=2)
        return rtn(W, stats, recipe, name)
    find = partial(find_grid, bits=recipe.wbits, groupsize=recipe.groupsize, sym=recipe.sym, clip=recipe.clip)
    alive = W.masked_fill(dead, 0)
    seen = W if recipe.groupsize == -1 else alive  # as published: the grid of a row sees its dead columns, that of a group does not
    W, order, back = alive, None, slice(None)
    diagonal[dead] = stats.sequences  # 1 in the mean
    if recipe.actorder:
        order = diagonal.argsort(descending=True, stable=True)
        back = order.argsort()
        W = W[:, order]
        stats.permute(order)
    U = inverse_factor(stats.H, recipe.percdamp, name)
    star = W if target is None else target(W, U)
    if recipe.grid == "reformulated":
        W, seen = star, star[:, back]
    importance, later = None, repeat(None)
    if recipe.clip == "hessian":
        importance = (U.norm(dim=0) ** -2)[back]  # 1 / diag(H^-1)
        later = iter(importance.split(recipe.groupsize if recipe.groupsize > 0 else len(importance))[1:])
    grid = find(seen, importance=importance)
    regrid = None if recipe.actorder else lambda W: find(W, importance=next(later))
    if recipe.beam > 1:
        q = solve_by_beam(star, U, grid, recipe.beam, order, regrid)
    else:
        q = solve(star, U, grid, W, recipe.blocksize, order, regrid)
    return q[:, back], grid
