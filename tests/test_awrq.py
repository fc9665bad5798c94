"""AWRQ: its moments, its reformulated weight and its codes equal float64 computations and the published code's results; and it pays."""

import json
from pathlib import Path

import numpy as np
import pytest
import reference
import torch

import awrq
import gptq
from quant import fake_quant_act, from_int, rtn
from recipe import Recipe

GOLDEN = Path(__file__).parent / "golden"
CASES = json.loads((GOLDEN / "layer.json").read_text())
METHODS = {"rtn": (rtn, None), "gptq": (gptq.quantize, gptq.Hessian), "awrq": (awrq.quantize, awrq.Moments)}


def quantize(W, X, method, **settings):
    """A whole method, its statistics fed one sequence at a time: (codes, Grid)."""
    weights, stats = METHODS[method]
    recipe = Recipe(method=method, **({"wbits": 4, "act_bits": 8} | settings))
    if stats:
        stats = stats(W.shape[1], recipe, "cpu")
        for x in X:
            stats.add(x[None])
    return weights(W, stats, recipe, method)


def relative(a, b):
    return ((a.double() - b).norm() / b.norm()).item()


@pytest.mark.parametrize("at_once", [False, True])
@pytest.mark.parametrize(("per_token", "sym"), [(False, False), (True, False), (False, True), (True, True)])
@pytest.mark.parametrize("act_bits", [4, 8])
def test_moments(act_bits, per_token, sym, at_once):
    _, X = reference.layer(1, 64, tokens=256)
    stats = awrq.Moments(64, Recipe(act_bits=act_bits, act_pertoken=per_token, act_sym=sym), "cpu")
    for x in X.split(len(X) if at_once else 1):
        stats.add(x)
    stats.finish()
    xq = fake_quant_act(X, act_bits, per_token, sym)  # test_quant.py holds it against a loop
    x, xq = X.flatten(0, 1).double(), xq.flatten(0, 1).double()
    assert stats.H.dtype == stats.M.dtype == torch.float32
    assert relative(stats.H, xq.T @ xq) < 1e-6
    assert relative(stats.M, (x - xq).T @ xq) < 1e-3


def test_moments_of_half_precision_see_what_runs():
    _, X = reference.layer(1, 64, tokens=64)
    X = X.half()
    stats = awrq.Moments(64, Recipe(act_bits=8), "cpu")
    stats.add(X)
    stats.finish()
    x, xq = X.flatten(0, 1).double(), fake_quant_act(X, 8).flatten(0, 1).double()
    assert relative(stats.H, xq.T @ xq) < 1e-6 and relative(stats.M, (x - xq).T @ xq) < 1e-3


@pytest.mark.parametrize("percdamp", [0.001, 0.01, 1])
def test_the_reformulated_weight_is_the_ridge_solution(percdamp):
    """argmin over V of |W X - V Xq|^2 + lam |V - W|^2, as a least-squares problem with lam's rows appended."""
    W, X = reference.layer(24, 48)
    stats = awrq.Moments(48, Recipe(act_bits=5), "cpu")
    stats.add(X)
    stats.finish()
    found = awrq.reformulate(W, stats.M, gptq.inverse_factor(stats.H, percdamp))
    x, xq = X.flatten(0, 1).double(), fake_quant_act(X, 5).flatten(0, 1).double()
    root = (percdamp * xq.square().sum(0).mean()).sqrt()
    inputs, outputs = torch.cat((xq, root * torch.eye(48))), torch.cat((x @ W.T.double(), root * W.T))
    expected = torch.linalg.lstsq(inputs, outputs).solution.T
    assert relative(found - W, expected - W) < 1e-3
    assert (expected - W).norm() > 1e-3 * W.norm(), "there is something to find"


@pytest.mark.parametrize(
    "settings", [{}, {"groupsize": 20}, {"blocksize": 8}, {"actorder": True}, {"actorder": True, "groupsize": 20}], ids=str
)
def test_with_unquantized_activations_it_is_gptq(settings):
    W, X = reference.layer(40, 96, dead=3)
    (q, grid), (expected, other) = (quantize(W, X, method, act_bits=16, **settings) for method in ("awrq", "gptq"))
    assert torch.equal(q, expected) and torch.equal(grid.scale, other.scale) and torch.equal(grid.zero, other.zero)


@pytest.mark.parametrize("settings", [{"wbits": 3}, {}, {"groupsize": 32}, {"act_pertoken": True}, {"actorder": True}], ids=str)
@pytest.mark.parametrize("seed", [0, 1])
def test_it_beats_gptq_and_rounding_to_nearest(seed, settings):
    W, X = reference.layer(64, 96, seed=seed)
    xq = fake_quant_act(X, 5, settings.get("act_pertoken", False)).flatten(0, 1)
    ours, theirs, nearest = (
        reference.output_error(W, X.flatten(0, 1), from_int(*quantize(W, X, method, act_bits=5, **settings)), xq)
        for method in ("awrq", "gptq", "rtn")
    )
    assert ours < 0.95 * theirs and ours < 0.95 * nearest, f"{ours=:.4g} {theirs=:.4g} {nearest=:.4g}"


@pytest.mark.parametrize("case", CASES)
def test_the_published_code_agrees(case):
    settings, arrays = CASES[case], np.load(GOLDEN / "layer.npz")
    W, X, published = (torch.tensor(arrays[key]) for key in ("W", "X", f"Q_{case}"))
    q, grid = quantize(W, X, **settings)
    Q = from_int(q, grid)
    step = grid.columns(grid.scale, W.shape[1])
    same = ((Q - published).abs() < 0.01 * step).double().mean().item()
    assert same >= 0.995, f"{same:.4%} of the codes are equal"
    xq = fake_quant_act(X, settings.get("act_bits", 8)) if settings["method"] == "awrq" else X
    x, xq = X.flatten(0, 1), xq.flatten(0, 1)
    assert reference.output_error(W, x, Q, xq) == pytest.approx(reference.output_error(W, x, published, xq), rel=1e-3)


@pytest.mark.parametrize("bits", [8, 4])
def test_codes_in_half_precision_give_the_moments(bits):
    """What a GPU multiplies on its tensor cores, against float64: H as good as exact, M to the rounding of the difference."""
    _, X = reference.layer(1, 96, sequences=3, tokens=200, outliers=3)
    X *= torch.tensor([0.01, 1, 300])[:, None, None]  # each sequence has a scale of its own
    recipe = Recipe("awrq", wbits=4, act_bits=bits)
    ours, plain = awrq.Moments(96, recipe, "cpu"), awrq.Moments(96, recipe, "cpu")
    ours.add_codes(X)
    plain.add(X)
    ours.finish(), plain.finish()
    xq = reference.fake_quant_act(X, bits).flatten(0, 1)
    x = X.double().flatten(0, 1)
    for name, wanted, within in (("H", xq.T @ xq, 1e-6), ("M", (x - xq).T @ xq, 1e-3)):
        for stats, bound in ((ours, within), (plain, 1e-6 if name == "H" else 1e-3)):
            off = (getattr(stats, name) - wanted).norm() / wanted.norm()
            assert off <= bound, (name, off)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_moments_that_are_not_finite_are_named(value):
    W, X = reference.layer(4, 8)
    recipe = Recipe("awrq", wbits=4, act_bits=8)
    stats = awrq.Moments(8, recipe, "cpu")
    stats.add(X)
    stats.M[3, 4] = value
    with pytest.raises(FloatingPointError, match="block 1 fc2: NaN or Inf"):
        awrq.quantize(W, stats, recipe, "block 1 fc2")


def test_what_is_given_back_follows_the_order_of_columns():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(4, 32, 24, generator=generator) * torch.linspace(0.5, 3, 24)
    target, lost = x + 0.1 * torch.randn(x.shape, generator=generator), torch.randn(4, 32, 7, generator=generator)
    W, shuffled = torch.randn(7, 24, generator=generator), torch.randperm(24, generator=generator)
    recipe = Recipe(method="awrq", wbits=4, target="residual", true_sequential=True, actorder=True)

    def codes(order):
        stats = awrq.Moments(24, recipe, "cpu")
        stats.give_back(7)
        stats.add(x[..., order], target[..., order], lost)
        return awrq.quantize(W[:, order], stats, recipe, "")[0]

    assert torch.equal(codes(shuffled), codes(torch.arange(24))[:, shuffled])
