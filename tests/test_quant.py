"""What a quantized number is: grids, rounding and fake-quantized activations equal the obvious loops, whatever the batch."""

from copy import deepcopy

import pytest
import reference
import torch
import torch.nn.functional as F
from torch import nn

from quant import Batch, QuantLinear, fake_quant_act, find_grid, from_int, put_together, replace_linears, rtn, to_int
from recipe import Recipe

SHAPES = [(-1, 24), (8, 24), (7, 24), (1, 5), (24, 24), (64, 24)]  # groupsize, columns: whole rows, dividing, ragged, single, one, too wide


def weights(C=24):
    """Rows (6, C): two ordinary ones, an all-positive, an all-negative, one of zeros, one with a zero half."""
    W = torch.randn(6, C, generator=torch.Generator().manual_seed(1))
    W[2], W[3], W[4], W[5, : C // 2] = W[2].abs() + 1, -W[3].abs() - 1, 0, 0
    return W


def activations(*shape, dtype=torch.float32):
    """Correlated with the position, so that every sequence and every token has a range of its own."""
    x = torch.randn(shape, generator=torch.Generator().manual_seed(2))
    return (x * torch.linspace(0.1, 5, shape[0]).view(-1, 1, 1) * torch.linspace(1, 3, shape[1]).view(-1, 1) + 0.3).to(dtype)


def quant_linear(linear, batch_size, act_bits=8, per_token=False):
    batch = Batch()
    batch.size = batch_size
    layer = QuantLinear(linear, batch)
    layer.freeze((act_bits, per_token, False))
    return layer


# ---------------------------------------------------------------------------
# Recipe


@pytest.mark.parametrize(
    ("flag", "value"),
    [("wbits", 1), ("wbits", 9), ("wbits", 0), ("act_bits", 3), ("act_bits", 9), ("groupsize", 0), ("groupsize", -2), ("blocksize", 0)]
    + [("blocksize", -2), ("alpha", -0.1), ("alpha", 1.1), ("alpha", float("nan")), ("min", 0.0), ("min", -1.0), ("min", float("inf"))]
    + [("min", float("nan")), ("percdamp", -0.01), ("percdamp", float("inf")), ("percdamp", float("nan")), ("nsamples", 0)]
    + [("seqlen", 1), ("seed", -1)],
)
def test_a_recipe_refuses(flag, value):
    with pytest.raises(ValueError, match=f"^--{flag} {value}: must be "):
        Recipe(**{flag: value})


@pytest.mark.parametrize(
    ("flag", "values"),
    [("wbits", (*range(2, 9), 16)), ("act_bits", (*range(4, 9), 16)), ("groupsize", (-1, 1, 128)), ("blocksize", (-1, 1, 128))]
    + [("alpha", (0, 0.5, 1)), ("min", (1e-5, 2.0)), ("percdamp", (0, 0.01, 2)), ("nsamples", (1,)), ("seqlen", (2,)), ("seed", (0,))],
)
def test_a_recipe_takes(flag, values):
    for value in values:
        assert getattr(Recipe(**{flag: value}), flag) == value


# ---------------------------------------------------------------------------
# Weights


@pytest.mark.parametrize("sym", [False, True])
@pytest.mark.parametrize(("groupsize", "C"), SHAPES)
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_grid(bits, groupsize, C, sym):
    W = weights(C)
    grid = find_grid(W, bits, groupsize, sym)
    scale, zero = reference.grids(W, bits, groupsize, sym)
    assert grid.scale.shape == grid.zero.shape == (6, 1 if groupsize == -1 else -(-C // groupsize))
    torch.testing.assert_close(grid.columns(grid.scale, C).expand(6, C), scale.float())
    assert torch.equal(grid.columns(grid.zero, C).expand(6, C), zero.float())
    assert (grid.zero >= 0).all() and (grid.zero <= 2**bits - 1).all()


@pytest.mark.parametrize("sym", [False, True])
@pytest.mark.parametrize(("groupsize", "C"), SHAPES)
@pytest.mark.parametrize("bits", [2, 3, 4, 8])
def test_rounding(bits, groupsize, C, sym):
    W = weights(C)
    q, grid = rtn(W, None, Recipe(method="rtn", wbits=bits, groupsize=groupsize, sym=sym), "layer")
    scale, zero = reference.grids(W, bits, groupsize, sym)
    assert q.dtype == torch.uint8
    assert torch.equal(q.double(), reference.codes(W, scale.float(), zero, bits))
    error = (from_int(q, grid) - W).abs()
    assert (error <= scale * (0.5 + 1e-5)).all(), f"{(error / scale).max()} steps"
    assert torch.equal(from_int(q, grid)[W == 0], W[W == 0]), "0 lies on every grid"


@pytest.mark.parametrize("sym", [False, True])
@pytest.mark.parametrize("groupsize", [-1, 7])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_points_of_a_grid_are_where_they_were(bits, groupsize, sym):
    grid = find_grid(weights(), bits, groupsize, sym)
    q = (torch.arange(6 * 24).view(6, 24) % 2**bits).to(torch.uint8)
    assert torch.equal(to_int(from_int(q, grid), grid), q)


def test_what_lies_beyond_the_grid_is_clamped():
    W = weights()[:2]
    grid = find_grid(W, 4)
    assert (to_int(W + 100, grid) == 15).all() and (to_int(W - 100, grid) == 0).all()


# ---------------------------------------------------------------------------
# Activations


@pytest.mark.parametrize("sym", [False, True])
@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("shift", [0, 20, -20])  # of both signs, all positive, all negative
@pytest.mark.parametrize("bits", [4, 6, 8])
def test_activations_against_the_loop(bits, shift, per_token, sym):
    x = activations(3, 5, 32) + shift
    xq, expected = fake_quant_act(x, bits, per_token, sym), reference.fake_quant_act(x, bits, per_token, sym).float()
    size = x.abs()
    tie = sym & (size == size.amax(-1 if per_token else (1, 2), keepdim=True))  # the largest lies half a step from two points of its grid
    torch.testing.assert_close(xq.masked_fill(tie, 0), expected.masked_fill(tie, 0), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(size[tie] / (xq - x)[tie].abs(), torch.full_like(x[tie], 2**bits - 1), rtol=1e-2, atol=0)
    assert not torch.equal(xq, x)


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_activations_do_not_depend_on_the_batch(dtype, per_token):
    x = activations(4, 6, 16, dtype=dtype)
    together = fake_quant_act(x, 8, per_token)
    assert together.dtype == dtype
    assert torch.equal(together, torch.cat([fake_quant_act(sequence[None], 8, per_token) for sequence in x]))


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("value", [0.0, 3.7, -3.7, 1e-30])
def test_constant_activations(value, bits, per_token):
    x = torch.full((2, 3, 8), value)
    torch.testing.assert_close(fake_quant_act(x, bits, per_token), x, rtol=1e-6, atol=0)


def test_zero_stays_zero():
    x = activations(2, 5, 16)
    x[:, :, ::3] = 0
    assert (fake_quant_act(x, 4)[:, :, ::3] == 0).all()


@pytest.mark.parametrize("largest", [300.0, 60000.0])  # 60000 - -30000 is more than float16 holds
def test_half_precision_does_not_overflow(largest):
    x = activations(2, 4, 64, dtype=torch.float16)
    x[:, 1, :2] = torch.tensor([largest, -largest / 2])
    xq = fake_quant_act(x, 8)
    assert xq.isfinite().all()
    torch.testing.assert_close(xq.double(), reference.fake_quant_act(x, 8), rtol=1e-3, atol=0)


def test_16_bits_are_the_identity():
    x = activations(2, 3, 4)
    assert fake_quant_act(x, 16) is x


# ---------------------------------------------------------------------------
# The linear layer


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_a_new_quant_linear_is_the_linear(dtype, bias):
    linear, x = nn.Linear(16, 12, bias=bias).to(dtype), activations(3, 5, 16, dtype=dtype)
    with torch.no_grad():
        torch.testing.assert_close(QuantLinear(linear, Batch())(x), linear(x))


@pytest.mark.parametrize("flat", [False, True])  # OPT reads (B * T, C) in fc1
@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("in_scale", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@torch.no_grad()
def test_a_settled_quant_linear_by_hand(bias, in_scale, per_token, flat):
    linear, x = nn.Linear(16, 12, bias=bias), activations(3, 5, 16)
    layer = quant_linear(linear, 3, 6, per_token)
    s = torch.linspace(0.2, 4, 16)
    if in_scale:
        layer.in_scale = s
    xq = reference.fake_quant_act(x / s if in_scale else x, 6, per_token).float()
    expected = F.linear(xq, linear.weight, linear.bias)
    y = layer(x.flatten(0, 1)) if flat else layer(x)
    assert y.shape == ((15, 12) if flat else (3, 5, 12))
    torch.testing.assert_close(y.view(3, 5, 12), expected, rtol=1e-4, atol=1e-4)


@torch.no_grad()
def test_settling_gives_back_the_type_of_the_model():
    layer = QuantLinear(nn.Linear(8, 4).half(), Batch())
    assert layer.weight.dtype == layer.bias.dtype == torch.float32
    layer.freeze((8, False, False))
    assert layer.weight.dtype == layer.bias.dtype == torch.float16


class Flattening(nn.Module):
    """A block that hides the batch from its linears, as OPT's does."""

    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(16, 24), nn.Linear(24, 16)

    def forward(self, hidden_states):
        return self.fc2(self.fc1(hidden_states.flatten(0, 1)).relu()).view(hidden_states.shape)


@pytest.mark.parametrize("by_keyword", [False, True])
@torch.no_grad()
def test_a_copied_block_keeps_its_own_batch(by_keyword):
    original, x = Flattening(), activations(4, 6, 16)
    batch = Batch()
    for layer in replace_linears(original, ("fc1", "fc2"), batch).values():
        layer.freeze((4, False, False))

    def run(block, x):
        return block(hidden_states=x) if by_keyword else block(x)

    one_by_one = torch.cat([run(original, sequence[None]) for sequence in x])
    copied = deepcopy(original)
    assert copied.fc1.batch is copied.fc2.batch is not batch
    torch.testing.assert_close(run(copied, x), one_by_one)
    assert (copied.fc1.batch.size, batch.size) == (4, 1)
    torch.testing.assert_close(run(original, x), one_by_one)


def test_linears_put_together_read_an_input_once():
    """In any order, a part of them twice, and another input after a pass that did not end."""
    block = nn.ModuleDict({name: nn.Linear(3, rows) for name, rows in (("q", 2), ("k", 4), ("o", 5))})
    q, k, o = block["q"], block["k"], block["o"]
    whole = nn.Linear(3, 6)
    whole.weight.data, whole.bias.data = torch.cat([q.weight, k.weight]).detach(), torch.cat([q.bias, k.bias]).detach()
    seen = []
    whole.register_forward_hook(lambda module, args, y: seen.append(args[0]))
    put_together(block, ("q", "k"), whole, [2, 4])
    put_together(block, ("o",), o, [5])
    x, other = torch.randn(2, 7, 3)
    for name, linear in (("q", q), ("k", k), ("k", k), ("q", q), ("o", o)):
        torch.testing.assert_close(block[name](x), linear(x))
    assert len(seen) == 2 and block["o"] is o
    for name, linear in (("k", k), ("k", k)):  # nobody asked for q
        torch.testing.assert_close(block[name](x), linear(x))
    for name, linear in (("q", q), ("k", k)):
        torch.testing.assert_close(block[name](other), linear(other))
    assert len(seen) == 5 and block["q"].together.x is None
