"""The op equals int64 loops and fake quantization; its packed layout is that of the tensor cores' fragments."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import kernels
from quant import fake_quant_act, find_grid, from_int, to_int


def draw(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def activations(B, T, C, dtype=torch.float32, seed=0):
    """Every sequence and every token with a range of its own."""
    return (draw(B, T, C, seed=seed) * torch.linspace(0.3, 4, B)[:, None, None] * torch.linspace(1, 2, T)[:, None] + 0.2).to(dtype)


def quantized(R, C, groupsize=-1, bits=4, sym=False):
    """Codes (R, C), their grid and a bias."""
    W = draw(R, C, seed=R + C)
    grid = find_grid(W, bits, groupsize, sym)
    return to_int(W, grid), grid, draw(R, seed=3)


def prepared(R, C, groupsize=-1, **how):
    q, grid, bias = quantized(R, C, groupsize, **how)
    return kernels.prepare(q, grid.scale, grid.zero, groupsize, bias)


def by_loops(x, q, grid, bias, groupsize, bits, per_token, sym, lengths):
    """The op as one would write it down: int64 sums of (qx - zx) (qw - zw), token by token, group by group.  (B, T, R) float32."""
    x, q, bias = x.float().numpy(), q.numpy().astype(np.int64), bias.numpy()
    scale, zero = grid.scale.numpy(), grid.zero.numpy().astype(np.int64)
    groupsize = q.shape[1] if groupsize == -1 else groupsize
    y = np.zeros((*x.shape[:2], len(q)), np.float32)
    for b, t in np.ndindex(x.shape[:2]):
        counted = x[b, t] if per_token else x[b, : x.shape[1] if lengths is None else lengths[b]]
        lo, hi = min(counted.min(initial=0), 0), max(counted.max(initial=0), 0)
        if sym:
            lo, hi = -max(-lo, hi), max(-lo, hi)
        step = (np.float32(hi) - np.float32(lo)) / np.float32(2**bits - 1) or np.float32(1)
        offset = 2 ** (bits - 1) if sym else np.rint(-np.float32(lo) / step)
        codes = np.clip(np.rint(x[b, t] / step) + offset, 0, 2**bits - 1).astype(np.int64) - int(offset)
        for g, k in enumerate(range(0, q.shape[1], groupsize)):
            part = slice(k, k + groupsize)
            y[b, t] += ((q[:, part] - zero[:, g : g + 1]) @ codes[part]).astype(np.float32) * scale[:, g]
        y[b, t] = y[b, t] * step + bias
    return torch.from_numpy(y)


# ---------------------------------------------------------------------------
# Layout


def fragment(word, byte, lane):
    """Row and column, in a block of 32 x 32, of the low nibble of one byte: the A operand of mma.m16n8k32, as NVIDIA documents it."""
    g, t = divmod(lane, 4)
    return g + 8 * (word % 2), 16 * (word // 2) + 4 * t + byte


def mma_u8(a, b, c):
    """mma.m16n8k32 of registers a (32, 4), b (32, 2), c (32, 4) of 32 lanes, in exact integers."""
    A, B = np.zeros((16, 32), np.int64), np.zeros((32, 8), np.int64)
    for lane, byte in np.ndindex(32, 4):
        g, t = divmod(lane, 4)
        for r in range(4):
            A[fragment(r, byte, lane)] = a[lane, r] >> 8 * byte & 255
        for r in range(2):
            B[16 * r + 4 * t + byte, g] = b[lane, r] >> 8 * byte & 255
    D = A @ B
    return np.array([[c[lane, i] + D[lane // 4 + 8 * (i // 2), 2 * (lane % 4) + i % 2] for i in range(4)] for lane in range(32)])


def words(rows, columns):
    """4 bytes of each of `rows`, at the columns of lane t = 0..3, as little-endian words (len(rows), 4)."""
    return rows[:, columns : columns + 16].reshape(len(rows), 4, 4).astype(np.int64) @ (256 ** np.arange(4))


def test_packing_follows_the_fragments():
    q = quantized(256, 128)[0]
    packed = kernels.pack_w4(q)
    assert packed.shape == (8, 4, 32, 16) and packed.numel() == q.numel() // 2
    for nb, kb, lane, word, byte in np.ndindex(8, 4, 32, 4, 4):
        row, column = fragment(word, byte, lane)
        low, high = q[32 * nb + row, 32 * kb + column].item(), q[32 * nb + row + 16, 32 * kb + column].item()
        assert packed[nb, kb, lane, 4 * word + byte].item() == low + 16 * high, (nb, kb, lane, word, byte)


@pytest.mark.parametrize("shape", [(1, 1), (40, 100), (128, 64), (129, 65)])
def test_packing_pads_and_comes_back(shape):
    q = quantized(*shape)[0]
    back = kernels.unpack_w4(kernels.pack_w4(q))
    assert back.shape[0] % 128 == 0 and back.shape[1] % 64 == 0
    assert torch.equal(back, F.pad(q, (0, back.shape[1] - shape[1], 0, back.shape[0] - shape[0])))


def test_fragments_multiply_exactly_in_both_roles():
    """One packing, the weight as A operand of the MMA (rows 16-31 times 16) and as B operand, lane by lane."""
    q = quantized(128, 64)[0]
    packed = kernels.pack_w4(q).numpy().view(np.uint32).astype(np.int64)  # (4, 2, 32, 4)
    x = np.random.default_rng(0).integers(0, 256, (16, 64))
    wanted = q[:32].numpy().astype(np.int64) @ x.T  # (32, 16)
    low, high = packed & 0x0F0F0F0F, packed & 0xF0F0F0F0
    g, t = np.divmod(np.arange(32), 4)

    as_a = np.zeros((2, 32, 4), np.int64)
    for kb in range(2):
        b = np.stack([words(x[:8], 32 * kb + 16 * r)[g, t] for r in range(2)], 1)
        as_a = np.stack([mma_u8(a[0, kb], b, c) for a, c in zip((low, high), as_a, strict=True)])
    for i in range(4):
        assert (as_a[0][:, i] == wanted[g + 8 * (i // 2), 2 * t + i % 2]).all()
        assert (as_a[1][:, i] >> 4 == wanted[16 + g + 8 * (i // 2), 2 * t + i % 2]).all()

    for n, (half, r) in enumerate(((low, 0), (low, 1), (high, 0), (high, 1))):  # rows 8 n to 8 n + 7
        c = np.zeros((32, 4), np.int64)
        for kb in range(2):
            a = np.stack([words(x, 32 * kb + 16 * (i // 2))[g + 8 * (i % 2), t] for i in range(4)], 1)
            c = mma_u8(a, half[0, kb][:, [r, r + 2]], c)
        for i in range(4):
            assert (c[:, i] >> (4 if half is high else 0) == wanted[8 * n + 2 * t + i % 2, g + 8 * (i // 2)]).all()


# ---------------------------------------------------------------------------
# The op in PyTorch


@pytest.mark.parametrize("sym", [False, True])
@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("groupsize", [-1, 64, 24, 7, 1])
@pytest.mark.parametrize(("bits", "dtype"), [(8, torch.float16), (8, torch.bfloat16), (8, torch.float32), (5, torch.float32)])
def test_op_equals_int64_loops(groupsize, per_token, sym, bits, dtype):
    q, grid, bias = quantized(33, 100, groupsize)
    x, lengths = activations(3, 4, 100, dtype), torch.tensor([4, 2, 0])
    y = kernels.w4a8_linear(x, kernels.prepare(q, grid.scale, grid.zero, groupsize, bias), bits, per_token, sym, lengths)
    assert y.dtype == dtype
    assert torch.equal(y, by_loops(x, q, grid, bias, groupsize, bits, per_token, sym, lengths).to(dtype))


@pytest.mark.parametrize("columns", [4095, 4096, 4097, 36864, kernels.MAX_COLUMNS])
def test_largest_sums_are_exact(columns):
    """All codes at their largest: every float32 sum is at its limit."""
    q = torch.full((1, columns), 15, dtype=torch.uint8)
    one, nothing = torch.ones(1, 1), torch.zeros(1, 1)
    y = kernels.w4a8_linear(torch.full((1, 1, columns), 255.0), kernels.prepare(q, one, nothing))
    assert y.item() == np.float32(columns * 15 * 255)


@pytest.mark.parametrize("setting", ["autocast", "medium"])
def test_exact_whatever_precision_is_allowed(setting):
    q, grid, bias = quantized(16, 5000)
    x, weight = activations(1, 2, 5000), kernels.prepare(q, grid.scale, grid.zero, -1, bias)
    wanted, before = kernels.w4a8_linear(x, weight), torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium" if setting == "medium" else before)
        with torch.autocast("cpu", torch.bfloat16, enabled=setting == "autocast"):
            assert torch.equal(kernels.w4a8_linear(x, weight), wanted)
    finally:
        torch.set_float32_matmul_precision(before)


@pytest.mark.parametrize(("bits", "groupsize", "sym"), [(4, -1, False), (3, 64, False), (2, 24, True), (4, 64, True)])
def test_op_equals_fake_quantization(bits, groupsize, sym):
    q, grid, bias = quantized(48, 200, groupsize, bits, sym)
    x = activations(2, 5, 200)
    y = kernels.w4a8_linear(x, kernels.prepare(q, grid.scale, grid.zero, groupsize, bias))
    torch.testing.assert_close(y, F.linear(fake_quant_act(x, 8), from_int(q, grid), bias), rtol=1e-5, atol=1e-4)


def test_lengths_leave_padding_out():
    x, lengths = activations(3, 6, 40), torch.tensor([6, 4, 1])
    codes, scale, zero = kernels.act_codes(x, 8, lengths=lengths)
    for b, n in enumerate(lengths):
        alone = kernels.act_codes(x[b : b + 1, :n], 8)
        assert torch.equal(codes[b, :n], alone[0][0]) and torch.equal(scale[b], alone[1][0]) and torch.equal(zero[b], alone[2][0])
    assert codes.min() >= 0 and codes.max() <= 255
    assert torch.equal(kernels.act_codes(x, 8, True, lengths=lengths)[0], kernels.act_codes(x, 8, True)[0])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_not_finite_in_not_finite_out(value):
    x = activations(2, 3, 64)
    x[1, 1, 5] = value
    y = kernels.w4a8_linear(x, prepared(32, 64))
    assert y[0].isfinite().all() and not y[1].isfinite().any()


class Layer(nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.weight = weight

    def forward(self, x):
        return kernels.w4a8_linear(x * 2, self.weight, per_token=True) + 1


@pytest.mark.slow
def test_op_is_one_that_pytorch_can_compile():
    weight, x = prepared(48, 100, 64), activations(2, 3, 100)
    for per_token, lengths, norm in ((False, torch.tensor([3, 1]), None), (True, None, torch.ones(100))):
        torch.library.opcheck(torch.ops.awrq.w4a8_linear.default, (x, *weight, 8, per_token, False, lengths, None, norm, 1e-5, False))
    compiled = torch.compile(Layer(weight), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x), Layer(weight)(x))
    assert torch.equal(compiled(x[:, :2]), Layer(weight)(x[:, :2]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x": activations(2, 3, 99)}, r"x \(2, 3, 99\): must be \(B, T, 100\)"),
        ({"x": activations(2, 3, 100)[0]}, r"x \(3, 100\): must be \(B, T, 100\)"),
        ({"x": activations(2, 0, 100)}, r"x \(2, 0, 100\): is empty"),
        ({"x": activations(2, 3, 100).double()}, "x is torch.float64"),
        ({"x": activations(2, 100, 3).mT}, r"x has strides \(300, 1, 3\): must be contiguous"),
        ({"layout": 2}, "packed layout 2, this version reads 1"),
        ({"packed": prepared(128, 164, 64).packed}, r"packed \(4, 6, 32, 16\): must be \(4, 4, 32, 16\)"),
        ({"packed": prepared(48, 100).packed.to(torch.int8)}, "packed is torch.int8"),
        ({"scale": prepared(48, 100).scale}, r"scale \(1, 128\): must be \(2, 128\)"),
        ({"scale": prepared(48, 100, 64).scale.half()}, "scale is torch.float16"),
        ({"zero": prepared(48, 100, 64).zero.float()}, "zero is torch.float32"),
        ({"bias": torch.zeros(48)}, r"bias \(48,\): must be \(128,\)"),
        ({"colsum": prepared(48, 100, 64).colsum.to("meta")}, "colsum is on meta, x on cpu"),
        ({"groupsize": 0}, "groupsize 0"),
        ({"act_bits": 9}, "act_bits 9"),
        ({"lengths": torch.tensor([1])}, r"lengths \(1,\): must be \(2,\)"),
        ({"lengths": torch.ones(2)}, "lengths is torch.float32"),
        ({"kernel": "triton"}, "kernel triton"),
        ({"kernel": "cuda"}, "kernel cuda, but x is on cpu"),
        ({"producer": kernels.Producer(gated=True)}, r"x \(2, 3, 100\): must be \(B, T, 200\)"),
        ({"producer": kernels.Producer(torch.ones(99))}, r"norm \(99,\): must be \(100,\)"),
        ({"producer": kernels.Producer(torch.ones(100).half())}, "norm is torch.float16, must be torch.float32"),
        ({"producer": kernels.Producer(torch.ones(100).to("meta"))}, "norm is on meta, x on cpu"),
        ({"producer": kernels.Producer(torch.ones(100), gated=True), "x": activations(2, 3, 200)}, "norm and gated: must be one of both"),
    ],
)
def test_wrong_arguments_are_named(changes, message):
    weight = prepared(48, 100, 64)
    weight = weight._replace(**{name: changes.pop(name) for name in list(changes) if name in weight._fields})
    with pytest.raises(ValueError, match=message):
        kernels.w4a8_linear(changes.pop("x", activations(2, 3, 100)), weight, **changes)


def test_right_arguments_cost_no_message():
    """Messages that nobody reads once took most of the time from a call to the launch of its kernel."""

    class Number(int):
        def __format__(self, how):
            raise AssertionError("formatted")

    weight = prepared(48, 100, 64)
    weight = weight._replace(**{name: Number(getattr(weight, name)) for name in ("rows", "columns", "groupsize", "layout")})
    kernels._check(activations(2, 3, 100), weight, Number(8), torch.tensor([1, 3]), None, kernels.NOTHING)
    with pytest.raises(AssertionError, match="formatted"):
        kernels._check(activations(2, 3, 99), weight, Number(8), None, None, kernels.NOTHING)


# ---------------------------------------------------------------------------
# Producers


@pytest.mark.parametrize("dtype", kernels.DTYPES)
def test_a_norm_is_that_of_transformers(dtype):
    """In float32 to the last bits; in a narrower type but for an element here and there, a tie, that is rounded to the other side."""
    for columns in (1, 7, 64, 333, 5120):
        norm = LlamaRMSNorm(columns, 1e-5).to(dtype)
        norm.weight.data = (draw(columns) + 1).to(dtype)
        x = activations(2, 20, columns, dtype, seed=columns)
        x[:, 3] = 0
        y, wanted = kernels.rms_norm(x, norm.weight, norm.variance_epsilon), norm(x)
        assert y.dtype == dtype and not y[:, 3].any()
        torch.testing.assert_close(y, wanted, rtol=4 * torch.finfo(dtype).eps, atol=0)
        assert dtype == torch.float32 or (y != wanted).float().mean() < 0.01


def test_a_sum_of_squares_has_its_order():
    """As the definition has it, in numpy, column by column."""
    x = draw(5, 1000).numpy()
    sums = [np.float32(0) for _ in range(0, 1000, 8)]
    for i, eight in enumerate(range(0, 1000, 8)):
        for column in range(eight, eight + 8):
            sums[i] = sums[i] + x[:, column] * x[:, column]
    while len(sums) > 1:
        sums = [sum(sums[i : i + 2]) for i in range(0, len(sums), 2)]
    assert np.array_equal(kernels.sum_of_squares(torch.from_numpy(x))[:, 0].numpy(), sums[0])


@pytest.mark.parametrize("dtype", kernels.DTYPES)
def test_a_gate_is_that_of_transformers(dtype):
    """In float32 to the last bits, in a narrower type equal; far out too, where it is nearly 0, and where one side is 0 or not finite."""
    x = 20 * activations(2, 50, 400, dtype)
    x[0, 0, :6] = torch.tensor([float("inf"), float("nan"), -200, 200, 0, -0.0])
    gate, up = x.chunk(2, -1)
    y, wanted = kernels.gated_silu(x), F.silu(gate) * up
    assert y.dtype == dtype
    torch.testing.assert_close(y, wanted, rtol=6 * torch.finfo(dtype).eps, atol=1e-30, equal_nan=True)
    assert dtype == torch.float32 or torch.equal(y[wanted.abs() > 1e-30], wanted[wanted.abs() > 1e-30])


def test_a_gate_makes_nothing_else_of_full_size(monkeypatch):
    """What is made on the way would go through memory again and again; how many rows go together changes no bit."""
    x, made = activations(3, 7, 2 * 96, torch.float16), set()

    class Memory(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            y = func(*args, **kwargs or {})
            if isinstance(y, torch.Tensor) and y.untyped_storage().nbytes() >= x.nbytes // 2:
                made.add(y.untyped_storage().data_ptr())
            return y

    wanted = kernels.gated_silu(x)
    monkeypatch.setattr(kernels, "GATED", 5 * x.shape[2])
    with Memory():
        y = kernels.gated_silu(x)
    assert torch.equal(y, wanted) and made == {x.data_ptr(), y.data_ptr()}


def test_an_exponential_is_right():
    t = torch.linspace(-32, 88, 200_001)
    wanted = t.double().exp()
    assert ((kernels.exponential(t).double() - wanted).abs() < 3 * torch.from_numpy(np.spacing(wanted.float().numpy()))).all()


def test_the_op_quantizes_what_a_producer_makes():
    x = activations(2, 5, 100, torch.float16)
    for producer in (kernels.Producer(draw(100).half(), 1e-6), kernels.Producer(gated=True)):
        made = producer(x)
        weight = prepared(48, made.shape[2], 24)
        for settings in ((8, True), (6, False, True, torch.tensor([2, 5]))):
            assert torch.equal(kernels.w4a8_linear(x, weight, *settings, producer=producer), kernels.w4a8_linear(made, weight, *settings))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"q": torch.full((4, 8), 16, dtype=torch.uint8)}, "code 16 has more than 4 bits"),
        ({"q": torch.zeros(4, 8)}, "not torch.float32"),
        ({"q": torch.zeros(1, 65537, dtype=torch.uint8)}, "65537 columns"),
        ({"scale": torch.ones(4, 2)}, r"scale \(4, 2\), zero \(4, 1\): must be \(4, 1\)"),
        ({"zero": torch.full((4, 1), 0.5)}, "zero: must be whole numbers"),
        ({"zero": torch.full((4, 1), 16.0)}, "zero: must be whole numbers"),
        ({"bias": torch.zeros(5)}, r"bias \(5,\): must be \(4,\)"),
    ],
)
def test_wrong_weights_are_named(changes, message):
    good = {"q": torch.zeros(4, 8, dtype=torch.uint8), "scale": torch.ones(4, 1), "zero": torch.zeros(4, 1)}
    with pytest.raises(ValueError, match=message):
        kernels.prepare(**good | changes)
