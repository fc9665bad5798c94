"""The solver equals the loop that rounds a column, or block of columns, and updates all others; and what it does with bad input."""

import warnings
from functools import partial

import pytest
import reference
import torch

import gptq
from quant import Grid, find_grid, from_int, rtn
from recipe import Recipe

BLOCKSIZES = [1, 3, 8, -1]  # -1: 2 of 250 columns
GROUPS = [(-1, 250), (50, 250), (64, 250), (1, 40), (300, 250)]  # groupsize, columns: a row, dividing, ragged, one, too wide


def problem(C=250, percdamp=0.01, **kwargs):
    """W (40, C), X (N, C) and U (C, C) in float64, in which the order of sums flips no code."""
    W, X = reference.layer(40, C, **kwargs)
    X = X.flatten(0, 1).double()
    return W.double(), X, reference.inverse_factor(X.T @ X, percdamp)


def quantize(W, X, name="layer", **settings):
    """The whole of GPTQ, in float32: (codes, Grid)."""
    recipe = Recipe(method="gptq", **({"wbits": 4} | settings))
    stats = gptq.Hessian(W.shape[1], recipe, "cpu")
    for x in X:
        stats.add(x[None])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        return gptq.quantize(W, stats, recipe, name)


def assert_same_codes(q, expected, share=0.995):
    """In float32, the order of sums may flip a tie."""
    same = (q == expected).double().mean().item()
    assert same >= share, f"{same:.4%} of the codes are equal"


# ---------------------------------------------------------------------------
# The loop


@pytest.mark.parametrize("C", [1, 255, 256, 257, 601])  # around two SPANs, where halving begins
def test_inverse_of_an_upper_triangle(C):
    V = problem(C, outliers=min(4, C))[2]
    inverse = gptq.invert_upper(V.clone())
    torch.testing.assert_close(inverse @ V, torch.eye(C, dtype=V.dtype), rtol=0, atol=1e-9)
    assert (inverse.tril(-1) == 0).all()


@pytest.mark.parametrize("sym", [False, True])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("C", [1, 2, 15, 16, 17, 127, 128, 129, 300])  # around LEAF and SPAN
def test_solve_is_the_column_loop(C, bits, sym):
    W, _, U = problem(C, outliers=min(4, C))
    grid = find_grid(W, bits, sym=sym)
    expected = reference.column_loop(W, U, grid.scale, grid.zero, bits)
    assert torch.equal(gptq.solve(W.clone(), U, grid), expected)
    assert torch.equal(reference.column_loop(W, U, grid.scale, grid.zero, bits, full_width=True), expected)
    assert C <= 2 or not torch.equal(rtn(W, None, Recipe(wbits=bits, sym=sym), "layer")[0], expected), "compensation changes codes"


@pytest.mark.parametrize("C", [96, 600])
def test_solve_is_the_column_loop_in_single_precision(C):
    W, _, U = (t.float() for t in problem(C, tokens=200))
    grid = find_grid(W, 4)
    assert_same_codes(gptq.solve(W, U, grid), reference.column_loop(W, U, grid.scale, grid.zero, 4))


@pytest.mark.slow
@pytest.mark.parametrize("published", [False, True])  # AWRQ as published: first block and first grid from another weight
@pytest.mark.parametrize(("groupsize", "C"), GROUPS)
@pytest.mark.parametrize("blocksize", BLOCKSIZES)
def test_blocks_and_groups(blocksize, groupsize, C, published):
    W, _, U = problem(C)
    first = W + 0.1 * W.roll(1, 0) if published else None
    find = partial(find_grid, bits=3, groupsize=groupsize)
    grid = find(W if first is None else first)
    q = gptq.solve(W.clone(), U, grid, first, blocksize, regrid=find)
    expected, scale, zero = reference.block_loop(W, U, 3, groupsize, False, blocksize, first, first)
    assert torch.equal(q.double(), expected)
    torch.testing.assert_close(grid.columns(grid.scale, C).expand_as(W), scale.float())
    torch.testing.assert_close(from_int(q, grid).double(), reference.weight(expected, scale, zero))


@pytest.mark.parametrize("groupsize", [-1, 24, 50])
def test_columns_in_another_order_keep_their_grid(groupsize):
    W, X, _ = problem()
    order = X.square().sum(0).argsort(descending=True)
    H = X.T @ X
    U = reference.inverse_factor(H[order][:, order], 0.01)
    grid = find_grid(W, 4, groupsize)
    scale, zero = (grid.columns(p, 250).expand_as(W)[:, order] for p in (grid.scale, grid.zero))
    q = gptq.solve(W[:, order], U, grid, order=order)
    assert torch.equal(q, reference.column_loop(W[:, order], U, scale, zero, 4))


def lost(W, q, grid, U):
    """What rounding costs, E H E^T, row by row (R,)."""
    return torch.linalg.solve_triangular(U, W - from_int(q, grid), upper=True, left=False).square().sum(1)


@pytest.mark.parametrize("beam", [1, 2, 3, 8])
@pytest.mark.parametrize("C", [1, 2, 31, 32, 33, 70])  # around STRIDE
@pytest.mark.parametrize("bits", [2, 4])
def test_beam_search_is_the_search_of_each_row(bits, C, beam, monkeypatch):
    W, _, U = problem(C, outliers=min(4, C))
    grid = find_grid(W, bits)
    monkeypatch.setitem(gptq.BEAMS, "cpu", 3 * beam * C)  # three rows at a time
    w, scale, zero = W.T.clone(), *(p.T.expand(C, -1) for p in (grid.scale, grid.zero))
    q = gptq.beam_search(w, U.T, scale, zero, bits, beam).T
    assert torch.equal(q, reference.beam_loop(W, U, grid.scale, grid.zero, bits, beam))
    assert torch.equal(q, gptq.solve_by_beam(W, U, grid, beam))


@pytest.mark.parametrize("sym", [False, True])
@pytest.mark.parametrize("groupsize", [-1, 24])
def test_a_beam_goes_on_through_groups_whose_grids_are_known(groupsize, sym):
    W, X, _ = problem(70)
    order = X.square().sum(0).argsort(descending=True)
    H = X.T @ X
    U = reference.inverse_factor(H[order][:, order], 0.01)
    grid = find_grid(W, 3, groupsize, sym)
    scale, zero = (grid.columns(p, 70).expand_as(W)[:, order] for p in (grid.scale, grid.zero))
    q = gptq.solve_by_beam(W[:, order], U, grid, 4, order)
    assert torch.equal(q, reference.beam_loop(W[:, order], U, scale, zero, 3, 4))


@pytest.mark.parametrize("bits", [2, 3, 4])
def test_a_wider_beam_finds_better_codes(bits):
    W, _, U = problem(250)
    grid = find_grid(W, bits)
    costs = [lost(W, gptq.solve_by_beam(W, U, grid, beam), grid, U).sum().item() for beam in (1, 2, 8, 32)]
    assert costs == sorted(costs, reverse=True) and costs[-1] < 0.95 * costs[0], costs


def test_a_wide_beam_finds_the_best_codes():
    W, _, U = problem(6, outliers=1)
    grid = find_grid(W, 2)
    every = torch.cartesian_prod(*[torch.arange(4)] * 6)  # all there are
    rows = zip(W.split(1), grid.scale.split(1), grid.zero.split(1), strict=True)
    best = torch.stack([lost(row, every, Grid(*place, 2, -1), U).min() for row, *place in rows])
    wide, narrow = (lost(W, gptq.solve_by_beam(W, U, grid, beam), grid, U) for beam in (64, 1))
    torch.testing.assert_close(wide, best)
    assert (narrow > 1.01 * best).any()


@pytest.mark.parametrize("groupsize", [50, 64])
def test_a_beam_ends_where_the_next_grid_is_not_known(groupsize):
    W, _, U = problem(250)
    find = partial(find_grid, bits=3, groupsize=groupsize)
    grid, alone = find(W), find(W)
    q = gptq.solve_by_beam(W, U, grid, 4, regrid=find)
    first = gptq.solve_by_beam(W[:, :groupsize], U[:groupsize, :groupsize], find_grid(W[:, :groupsize], 3), 4)
    assert torch.equal(q[:, :groupsize], first)
    assert not torch.equal(grid.scale[:, 1:], alone.scale[:, 1:]), "later grids see what the columns before have left"
    error = W[:, :groupsize] - from_int(first, find_grid(W[:, :groupsize], 3))
    left = torch.linalg.solve_triangular(U[:groupsize, :groupsize], error, upper=True, left=False)
    rest = W[:, groupsize:] - left @ U[:groupsize, groupsize:]
    torch.testing.assert_close(grid.scale[:, 1], find_grid(rest[:, :groupsize], 3).scale[:, 0])


def test_solve_restores_the_threads():
    W, _, U = problem(20)
    threads = torch.get_num_threads()
    torch.set_num_threads(threads + 1)
    try:
        gptq.solve(W, U, find_grid(W, 4))
        assert torch.get_num_threads() == threads + 1
    finally:
        torch.set_num_threads(threads)


# ---------------------------------------------------------------------------
# Statistics and their factor


def test_hessian_adds_up():
    _, X = reference.layer(4, 32)
    one_by_one, at_once = (gptq.Hessian(32, Recipe(), "cpu") for _ in range(2))
    for x in X:
        one_by_one.add(x[None])
    at_once.add(X)
    flat = X.flatten(0, 1).double()
    for stats in (one_by_one, at_once):
        stats.finish()
        assert stats.H.dtype == torch.float32
        torch.testing.assert_close(stats.H.double(), flat.T @ flat, rtol=1e-5, atol=1e-6 * (flat.T @ flat).max().item())


def test_hessian_of_half_precision_is_summed_in_single():
    x = torch.full((4, 1000, 8), 10.0, dtype=torch.float16)  # sums to 400000
    stats = gptq.Hessian(8, Recipe(), "cpu")
    stats.add(x)
    stats.finish()
    assert (stats.H == 400000).all()


@pytest.mark.parametrize("columns", [32, 300])  # one span of rows, two
def test_a_hessian_does_not_depend_on_the_order_of_sequences(columns):
    _, X = reference.layer(1, columns, sequences=7)
    found = []
    for shards in ([X], [X.flip(0)], [X[1::2], X[0::2]]):
        parts = [gptq.Hessian(columns, Recipe(), "cpu") for _ in shards]
        for stats, shard in zip(parts, shards, strict=True):
            stats.add(shard)
        stats = parts[0]
        stats.H = sum(part.H for part in parts)
        stats.finish()
        found.append(stats.H)
    assert torch.equal(found[0], found[1]) and torch.equal(found[0], found[2])
    x = X.flatten(0, 1).double()
    torch.testing.assert_close(found[0].double(), x.T @ x, rtol=1e-5, atol=1e-6 * (x.T @ x).max().item())


@pytest.mark.parametrize("percdamp", [0.001, 0.01, 0.5, 3])
@pytest.mark.parametrize("C", [1, 2, 65])
def test_inverse_factor(C, percdamp):
    _, X = reference.layer(4, C, outliers=1)
    H = X.flatten(0, 1).T @ X.flatten(0, 1)
    U = gptq.inverse_factor(H.clone(), percdamp)
    assert torch.equal(U, U.triu()) and (U.diagonal() > 0).all()
    torch.testing.assert_close(U.double(), reference.inverse_factor(H.double(), percdamp), rtol=1e-3, atol=1e-4 * U.max().item())
    product = U.double().T @ U.double() @ reference.damped(H.double(), percdamp)
    torch.testing.assert_close(product, torch.eye(C).double(), rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    ("off", "percdamp", "warned", "used"),  # H = [[1, off], [off, 1]] is positive definite from percdamp > off - 1 on
    [(0.5, 0, [], 0), (1.005, 0, [0.01], 0.01), (1.5, 0.01, [0.1, 1], 1), (1.05, 0.003, [0.03, 0.3], 0.3), (1.9, 0.2, [1], 1)],
)
def test_damping_grows_with_a_warning(off, percdamp, warned, used):
    H = torch.tensor([[1, off], [off, 1]])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        U = gptq.inverse_factor(H, percdamp, "block 3 fc1")
    steps = [percdamp, *warned]
    assert [str(w.message) for w in caught] == [
        f"block 3 fc1: Hessian not positive definite with --percdamp {before:g}; going on with {after:g}"
        for before, after in zip(steps, warned, strict=False)
    ]
    torch.testing.assert_close(U, reference.inverse_factor(H, used), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("percdamp", [0.01, 1, 1.5])
@pytest.mark.filterwarnings("ignore:block 3 fc1")
def test_damping_ends_in_an_error(percdamp):
    with pytest.raises(FloatingPointError, match="block 3 fc1: .*positive definite.*--percdamp 1"):
        gptq.inverse_factor(torch.tensor([[1.0, 3.0], [3.0, 1.0]]), percdamp, "block 3 fc1")


# ---------------------------------------------------------------------------
# The method


@pytest.mark.parametrize("blocksize", [1, 8])
@pytest.mark.parametrize("groupsize", [-1, 20])
@pytest.mark.parametrize("dead", [0, 7])
@pytest.mark.parametrize("actorder", [False, True])
def test_quantize_step_by_step(actorder, dead, groupsize, blocksize):
    W, X = reference.layer(40, 96, dead=dead)
    X /= 100  # so small that the 1 on the diagonal of dead columns weighs in the damping
    q, grid = quantize(W, X, wbits=3, groupsize=groupsize, actorder=actorder, blocksize=1 if actorder else blocksize)

    x = X.flatten(0, 1).double()
    H, alive = x.T @ x / len(X), W.double()  # the mean over sequences
    alive[:, :dead] = 0
    H.diagonal()[:dead] = 1
    seen = alive if groupsize > 0 else W.double()  # the grid of a whole row sees its dead columns
    if actorder:
        order = H.diagonal().argsort(descending=True)
        scale, zero = reference.grids(seen, 3, groupsize)
        U = reference.inverse_factor(H[order][:, order], 0.01)
        expected = torch.empty_like(q)
        expected[:, order] = reference.column_loop(alive[:, order], U, scale[:, order], zero[:, order], 3)
    else:
        U = reference.inverse_factor(H, 0.01)
        expected, scale, zero = reference.block_loop(alive, U, 3, groupsize, False, blocksize, grid_of=seen)
    assert_same_codes(q, expected)
    torch.testing.assert_close(grid.columns(grid.scale, 96).expand_as(W), scale.float(), rtol=0.01, atol=0)
    assert (from_int(q, grid)[:, :dead] == 0).all()


def test_compensation_pays():
    W, X = reference.layer(40, 96)
    x = X.flatten(0, 1)
    plain, compensated, ordered = (
        reference.output_error(W, x, from_int(*result), x)
        for result in (rtn(W, None, Recipe(wbits=3), "layer"), quantize(W, X, wbits=3), quantize(W, X, wbits=3, actorder=True))
    )
    assert ordered < compensated < 0.9 * plain


@pytest.mark.parametrize("groupsize", [-1, 32])
@pytest.mark.parametrize("actorder", [False, True])
def test_stacked_rows_are_independent(actorder, groupsize):
    W, X = reference.layer(60, 96)
    together, grid = quantize(W, X, groupsize=groupsize, actorder=actorder)
    apart = [quantize(part, X, groupsize=groupsize, actorder=actorder) for part in W.split((10, 20, 30))]
    assert_same_codes(together, torch.cat([q for q, _ in apart]))
    torch.testing.assert_close(grid.scale, torch.cat([g.scale for _, g in apart]), rtol=0.01, atol=0)


def test_quantize_leaves_the_weight_alone():
    W, X = reference.layer(8, 32, dead=2)
    for settings in ({}, {"actorder": True}, {"groupsize": 8}):
        before = W.clone()
        quantize(W, X, **settings)
        assert torch.equal(W, before)


@pytest.mark.parametrize("groupsize", [-1, 8])
def test_without_any_input_weights_are_rounded_to_nearest(groupsize):
    W, X = reference.layer(8, 32)
    recipe = Recipe(method="gptq", wbits=4, groupsize=groupsize)
    stats = gptq.Hessian(32, recipe, "cpu")
    stats.add(torch.zeros_like(X))
    with pytest.warns(UserWarning, match="^block 3 fc1: .*zero.*rounded to nearest$"):
        q, grid = gptq.quantize(W, stats, recipe, "block 3 fc1")
    expected, nearest = rtn(W, None, recipe, "block 3 fc1")
    assert torch.equal(q, expected) and torch.equal(grid.scale, nearest.scale) and torch.equal(grid.zero, nearest.zero)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 3e30])  # the last one's square is Inf
def test_statistics_that_are_not_finite_name_the_layer(value):
    W, X = reference.layer(8, 32)
    X[2, 3, 5] = value
    with pytest.raises(FloatingPointError, match="^block 3 fc1: NaN or Inf"):
        quantize(W, X, "block 3 fc1")
