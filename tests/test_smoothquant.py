"""Smoothing: its scale equals the formula channel by channel, and folding it changes neither a function nor a code."""

from copy import deepcopy

import pytest
import reference
import torch
from torch import nn

from quant import Batch, QuantLinear, rtn
from recipe import Recipe
from smoothquant import AbsMax, fold, smooth_scale


class RMSNorm(nn.Module):
    """As in LLaMA: a weight and no bias."""

    def __init__(self, columns):
        super().__init__()
        self.weight = nn.Parameter(torch.empty(columns))

    def forward(self, x):
        return self.weight * x * x.square().mean(-1, keepdim=True).add(1e-6).rsqrt()


C = 24
PRODUCERS = {
    "LayerNorm": lambda: nn.LayerNorm(C),
    "LayerNorm without bias": lambda: nn.LayerNorm(C, bias=False),
    "RMSNorm": lambda: RMSNorm(C),
    "Linear": lambda: QuantLinear(nn.Linear(C, C), Batch()),
    "Linear without bias": lambda: QuantLinear(nn.Linear(C, C, bias=False), Batch()),
}


def smoothable(name):
    """The producer, with random parameters, and two linears that read it."""
    producer = PRODUCERS[name]()
    for p in producer.parameters():
        nn.init.uniform_(p, 0.5, 2)
    return producer, [QuantLinear(nn.Linear(C, rows, bias=bias), Batch()) for rows, bias in ((8, True), (5, False))]


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
    with torch.no_grad():
        yield


def test_abs_max():
    _, X = reference.layer(1, C)
    absmax = AbsMax(C, "cpu")
    for x in X.split(3):
        absmax.add(x)
    assert absmax.max.tolist() == [max(abs(value) for value in column) for column in X.flatten(0, 1).T.tolist()]


def test_abs_max_of_half_precision_is_single():
    absmax = AbsMax(2, "cpu")
    absmax.add(torch.tensor([[[1.0, -7.0]]]).half())
    assert absmax.max.dtype == torch.float32 and absmax.max.tolist() == [1, 7]


@pytest.mark.parametrize("minimum", [1e-5, 0.1, 3])
@pytest.mark.parametrize("alpha", [0, 0.3, 0.5, 1])
def test_scale(alpha, minimum):
    weights, act_max = [torch.randn(8, C), torch.randn(5, C)], torch.rand(C) * 10
    s = smooth_scale(act_max, weights, alpha, minimum)
    for c in range(C):
        largest = max(W[r, c].abs().item() for W in weights for r in range(len(W)))
        assert s[c].item() == pytest.approx(max(minimum, act_max[c].item() ** alpha / largest ** (1 - alpha)), rel=1e-5)


@pytest.mark.parametrize("alpha", [0, 0.5, 1])
def test_a_zero_column_gives_no_nan(alpha):
    W, act_max = torch.randn(8, C), torch.rand(C)
    W[:, 0] = W[:, 1] = 0
    act_max[1] = act_max[2] = 0
    s = smooth_scale(act_max, [W], alpha, 0.1)
    assert s.isfinite().all() and (s >= 0.1).all()


@pytest.mark.parametrize("name", [*PRODUCERS, None])
def test_folding_changes_no_function(name):
    producer, linears = smoothable(name or "Linear")
    x, s = torch.randn(2, 5, C), torch.rand(C) * 4 + 0.1
    smoothed, smoothed_linears = deepcopy((producer, linears))
    fold(s, smoothed_linears, smoothed if name else None)
    for linear, twin in zip(linears, smoothed_linears, strict=True):
        torch.testing.assert_close(twin(smoothed(x)), linear(producer(x)), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(twin.weight, linear.weight * s)
        torch.testing.assert_close(twin.smoothed(smoothed(x)).view_as(x), producer(x) / s, rtol=1e-4, atol=1e-5)
        assert (twin.in_scale is None) == (name is not None)


@pytest.mark.parametrize("wbits", [3, 4, 8])
@pytest.mark.parametrize("groupsize", [-1, 7])
def test_folding_changes_no_code_of_the_producer(groupsize, wbits):
    producer, linears = smoothable("Linear")
    nn.init.normal_(producer.weight)
    recipe = Recipe(method="rtn", wbits=wbits, groupsize=groupsize)
    before, _ = rtn(producer.weight, None, recipe, "producer")
    weight = producer.weight.clone()
    fold(torch.rand(C) * 4 + 0.1, linears, producer)
    assert not torch.equal(producer.weight, weight)
    assert torch.equal(rtn(producer.weight, None, recipe, "producer")[0], before)
