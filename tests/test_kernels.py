"""The op equals int64 loops, its layout the tensor cores' fragments, and the kernels' own code, which an emulator runs, equals the op."""

import ctypes
import json
import os
import re
import shutil
import subprocess
import sys
import threading
import warnings
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import CPU
from torch import nn

import kernels
from bench import check, shapes, tune
from evaluation.perplexity import perplexity
from formats.checkpoint import Store, open_checkpoint
from kernels import build, cuda
from modelutils import load_tokenizer, open_decoder
from quant import fake_quant_act, find_grid, from_int, to_int
from recipe import Recipe
from run.quantize import quantize_blocks

ROOT = Path(__file__).parent.parent
# Of what the sanitizer sees, a load off its alignment, an index past an array and a sum past 2^31 matter here; it stops the process.
UNDEFINED = ("-fsanitize=undefined", "-fsanitize-undefined-trap-on-error")


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


def by_loops(x, q, grid, bias, groupsize, bits, per_token, lengths):
    """The op as one would write it down: int64 sums of (qx - zx) (qw - zw), token by token, group by group.  (B, T, R) float32."""
    x, q, bias = x.float().numpy(), q.numpy().astype(np.int64), bias.numpy()
    scale, zero = grid.scale.numpy(), grid.zero.numpy().astype(np.int64)
    groupsize = q.shape[1] if groupsize == -1 else groupsize
    y = np.zeros((*x.shape[:2], len(q)), np.float32)
    for b, t in np.ndindex(x.shape[:2]):
        counted = x[b, t] if per_token else x[b, : x.shape[1] if lengths is None else lengths[b]]
        lo, hi = min(counted.min(initial=0), 0), max(counted.max(initial=0), 0)
        step = (np.float32(hi) - np.float32(lo)) / np.float32(2**bits - 1) or np.float32(1)
        offset = np.rint(-np.float32(lo) / step)
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


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("groupsize", [-1, 64, 24, 7, 1])
@pytest.mark.parametrize(("bits", "dtype"), [(8, torch.float16), (8, torch.bfloat16), (8, torch.float32), (5, torch.float32)])
def test_op_equals_int64_loops(groupsize, per_token, bits, dtype):
    q, grid, bias = quantized(33, 100, groupsize)
    x, lengths = activations(3, 4, 100, dtype), torch.tensor([4, 2, 0])
    y = kernels.w4a8_linear(x, kernels.prepare(q, grid.scale, grid.zero, groupsize, bias), bits, per_token, lengths)
    assert y.dtype == dtype
    assert torch.equal(y, by_loops(x, q, grid, bias, groupsize, bits, per_token, lengths).to(dtype))


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
    assert torch.equal(kernels.act_codes(x, 8, True, lengths)[0], kernels.act_codes(x, 8, True)[0])


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


def test_op_is_one_that_pytorch_can_compile():
    weight, x = prepared(48, 100, 64), activations(2, 3, 100)
    for per_token, lengths in ((False, torch.tensor([3, 1])), (True, None)):
        torch.library.opcheck(torch.ops.awrq.w4a8_linear.default, (x, *weight, 8, per_token, lengths, None))
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
    kernels._check(activations(2, 3, 100), weight, Number(8), torch.tensor([1, 3]), None)
    with pytest.raises(AssertionError, match="formatted"):
        kernels._check(activations(2, 3, 99), weight, Number(8), None, None)


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


# ---------------------------------------------------------------------------
# The CUDA kernels' own code, on a CPU


@pytest.fixture(scope="session")
def emulated(tmp_path_factory):
    """The kernels' library, compiled by g++ with tests/emulator/ptx.cuh in the place of kernels/ptx.cuh."""
    if not shutil.which("g++"):
        pytest.skip("no g++, which compiles the kernels for the emulator")
    folder = tmp_path_factory.mktemp("emulated")
    for source in build.SOURCES:
        shutil.copy(source, folder)
    shutil.copy(ROOT / "tests" / "emulator" / "ptx.cuh", folder)
    flags = ("-std=c++17", "-O1", "-ffp-contract=off", "-shared", "-fPIC", "-Wall", "-Werror", "-Wno-unknown-pragmas", *UNDEFINED)
    done = subprocess.run(["g++", "-x", "c++", *flags, "-o", "libawrq.so", "w4a8.cu"], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    library = cuda.bind(folder / "libawrq.so")
    library.emulator_memory.restype, library.emulator_memory.argtypes = ctypes.c_void_p, [ctypes.c_size_t] * 2
    return library


def guarded(library, tensor, align=16):
    """A copy at whose end (but for `align`) begins memory that must not be touched."""
    size = tensor.numel() * tensor.element_size()
    memory = (ctypes.c_uint8 * (size + 1)).from_address(library.emulator_memory(size, align))  # one more, as PyTorch takes no empty buffer
    return torch.frombuffer(memory, dtype=torch.uint8)[:size].view(tensor.dtype).view(tensor.shape).copy_(tensor)


def emulate(library, x, weight, config, parts, bits=8, per_token=False, lengths=None, reverse=False, eager=False):
    """y of one configuration.  All it reads ends at a guard; the workspace and y start as garbage."""
    weight = kernels.Weight(*(guarded(library, v) if isinstance(v, torch.Tensor) else v for v in weight))
    y = guarded(library, torch.full((*x.shape[:2], weight.rows), float("nan"), dtype=x.dtype))
    lengths = None if lengths is None else guarded(library, lengths.int(), 4)
    library.emulator_settings(reverse, eager)

    def empty(size):
        return guarded(library, torch.full((size,), 255, dtype=torch.uint8), 256)

    return cuda.launch(library, guarded(library, x), y, weight, bits, per_token, lengths, config, parts, None, empty)


def assert_equal_to_op(y, x, weight, *settings):
    """Bit for bit for whole rows; for groups, whose float32 sums may be fused and split, within their rounding."""
    wanted = kernels.w4a8_linear(x, weight, *settings)
    if weight.groupsize == weight.columns:
        assert torch.equal(y, wanted)
    else:
        bound = 2 * torch.finfo(x.dtype).eps * wanted.float().abs() + 4 * 2**-24 * wanted.float().abs().amax()
        assert ((y.float() - wanted.float()).abs() <= bound).all()


def most_tokens(config):
    return 16 if config.startswith("decode") else 200


@pytest.mark.parametrize("reverse_eager", [(False, False), (True, True), (True, False)], ids=["", "reverse-eager", "reverse"])
@pytest.mark.parametrize(
    ("config", "groupsize"), [(config, g) for config in cuda.CONFIGS for g in (-1, 128, 64) if (config, g < 0) != ("256x128", False)]
)
def test_kernels_equal_op(emulated, config, groupsize, reverse_eager):
    """Every configuration: types, per sequence and token, padded columns, rows and sequences, split and not, whichever warp is first."""
    R = 250 if config == "256x128" else 104
    cases = [
        (activations(2, 5, 256, torch.float16), 8, False, None),
        (activations(1, 3, 200, torch.bfloat16), 8, True, None),
        (activations(3, 4, 328, torch.float32), 6, False, torch.tensor([4, 2, 0])),
        (activations(9, 1, 130, torch.float16), 8, False, torch.tensor([1] * 8 + [0])),
    ]
    for i, (x, *settings) in enumerate(cases):
        weight = prepared(R - (i == 1), x.shape[2], groupsize)
        parts = 1 if config == "decode_fused" or i % 2 else 2
        y = emulate(emulated, x, weight, config, parts, *settings, *reverse_eager)
        assert_equal_to_op(y, x, weight, *settings)


@pytest.mark.parametrize("config", cuda.CONFIGS)
def test_kernels_mask_every_number_of_tokens(emulated, config):
    n, m = cuda.CONFIGS[config]
    weight = prepared(256 if n == 256 else 40, 64)
    for tokens in sorted({t for edge in (1, 8, m) for t in (edge - 1, edge, edge + 1) if 0 < t <= most_tokens(config)}):
        x = activations(1, tokens, 64, torch.float16, seed=tokens)
        y = emulate(emulated, x, weight, config, 1)
        assert_equal_to_op(y, x, weight)


def test_kernels_find_every_tile(emulated):
    """More than eight tiles of tokens, so that the raster has a full group and a rest; rows that are no multiple of 128."""
    weight, x = prepared(300, 64), activations(1, 16 * 19 - 3, 64, torch.float16)
    assert_equal_to_op(emulate(emulated, x, weight, "128x16", 1), x, weight)


def test_kernels_split_into_uneven_parts(emulated):
    """More parts than divide the columns evenly, more stages than a part has blocks, long rows for the decoding warps."""
    for config, columns, parts, groupsize in (
        ("128x16", 448, 5, -1),
        ("decode", 4416, 3, -1),
        ("decode", 1600, 4, 128),
        ("128x32", 1600, 4, 192),
    ):
        weight, x = prepared(32, columns, groupsize), activations(1, 9, columns, torch.bfloat16)
        assert_equal_to_op(emulate(emulated, x, weight, config, parts), x, weight)


@pytest.mark.parametrize("config", ["decode_fused", "128x16"])
def test_kernels_keep_the_largest_sums(emulated, config):
    """K = 36,864, all codes at their largest: the sums of the high nibbles pass 2^31."""
    q = torch.full((32, 36864), 15, dtype=torch.uint8)
    weight = kernels.prepare(q, torch.ones(32, 1), torch.zeros(32, 1))
    y = emulate(emulated, torch.full((1, 1, 36864), 255.0), weight, config, 1)
    assert (y == np.float32(36864 * 15 * 255)).all()


@pytest.mark.parametrize("config", ["decode_fused", "decode"])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_kernels_pass_on_what_is_not_finite(emulated, config, value):
    x = activations(2, 3, 64)
    x[1, 1, 5] = value
    y = emulate(emulated, x, prepared(32, 64), config, 1)
    assert y[0].isfinite().all() and not y[1].isfinite().any()


def test_kernels_refuse_what_they_cannot_take(emulated):
    """Every check of the launcher, by a call that is right but for one field."""
    memory = guarded(emulated, torch.zeros(1 << 16, dtype=torch.uint8), 256).data_ptr()
    good = dict.fromkeys(("x", "weight", "scale", "zero", "colsum", "bias", "y", "workspace"), memory)
    good |= {"workspace_bytes": 1 << 16, "B": 1, "T": 4, "K": 128, "N": 32, "groupsize": 128, "levels": 255}
    good |= {"config": 1, "splits": 1, "steps": 3}
    assert emulated.awrq_linear(ctypes.byref(cuda.Call(**good))) == 0
    fused = cuda.CONFIG_NUMBERS["decode_fused"]
    wide = cuda.CONFIG_NUMBERS["256x128"]
    for changes, message in (
        ({"x": None}, "x is null"),
        ({"x": memory + 8}, "x is null or not aligned to 16"),
        *(({name: memory + 4}, f"{name} is null or not aligned to 16") for name in ("scale", "zero", "colsum", "bias")),
        ({"weight": memory + 8}, "packed is null or not aligned to 16"),
        ({"y": memory + 2}, "y is null or not aligned"),
        ({"lengths": memory + 2}, "lengths is not aligned to 4"),
        ({"type": 3}, "float16, bfloat16 or float32"),
        ({"B": 0}, "B and T"),
        ({"B": 1 << 19}, "B and T"),
        ({"K": 65537, "groupsize": 65537}, "K must be"),
        ({"N": 0}, "N 1 to 1048576"),
        ({"N": (1 << 20) + 1}, "N 1 to 1048576"),
        ({"groupsize": 32}, "multiple of 64"),
        ({"groupsize": 256}, "multiple of 64"),
        ({"K": 4096, "groupsize": 2048}, "at most 1024"),
        ({"levels": 254}, "act_bits"),
        ({"config": len(cuda.CONFIGS)}, "no such kernel"),
        ({"T": 17}, "at most 16 tokens"),
        ({"config": fused, "T": 16, "K": 8192, "groupsize": 8192}, "99 KiB"),
        ({"config": fused, "splits": 2}, "does not split"),
        ({"config": wide}, "multiple of 256"),
        ({"config": wide, "N": 256, "groupsize": 64}, "one scale"),
        ({"splits": 0}, "splits"),
        ({"splits": 3}, "splits"),
        ({"steps": 0}, "steps must be 1 to 3"),
        ({"steps": 4}, "steps must be 1 to 3"),
        ({"steps": 2, "config": fused}, "quantizes as it multiplies"),
        ({"workspace": None}, "workspace"),
        ({"workspace": memory + 8}, "workspace"),
        ({"workspace_bytes": 100}, "workspace"),
    ):
        code = emulated.awrq_linear(ctypes.byref(cuda.Call(**good | changes)))
        assert code < 0 and message in emulated.awrq_error(code).decode(), (changes, code)
    with pytest.raises(ValueError, match=r"x \(1, 17, 64\), weight \(32, 64\), groupsize 64, decode: this configuration takes at most 16"):
        emulate(emulated, activations(1, 17, 64), prepared(32, 64), "decode", 1)


@pytest.mark.parametrize("name", ["x", "packed", "scale", "zero", "colsum", "bias"])
def test_a_tensor_off_its_alignment_is_named(emulated, name):
    """As a slice of a larger tensor can be: right but for its address."""
    tensors = {"x": activations(1, 3, 64, torch.float16)} | prepared(32, 64)._asdict()
    size = tensors[name].element_size()
    shifted = guarded(emulated, torch.cat((tensors[name].flatten(), tensors[name].flatten()[:1])))[1:]
    assert shifted.data_ptr() % 16 == size
    tensors[name] = shifted.view(tensors[name].shape).copy_(tensors[name])
    x, y, weight = tensors.pop("x"), torch.empty(1, 3, 32, dtype=torch.float16), kernels.Weight(**tensors)
    with pytest.raises(ValueError, match=f"decode: {name} is null or not aligned to 16 bytes"):
        cuda.launch(
            emulated, x, y, weight, 8, False, None, "decode", 1, None, lambda n: guarded(emulated, torch.zeros(n, dtype=torch.uint8), 256)
        )


def test_the_largest_call_is_counted_right(emulated):
    """2^20 tokens and 2^20 rows, more bytes and tiles than 31 bits count, and the longest rows: the workspace is the sum of its parts."""
    tokens = rows = 1 << 20
    for config, (n, m) in list(cuda.CONFIGS.items())[2:]:
        for columns, parts in ((64, 1), (kernels.MAX_COLUMNS, 64)):
            call = cuda.Call(
                B=1, T=tokens, K=columns, N=rows, groupsize=columns, levels=255, config=cuda.CONFIG_NUMBERS[config], splits=parts, steps=3
            )
            codes, sums, scale, zero, ranges = tokens * columns, 4 * tokens, 4 * tokens, 4 * tokens, 8 * 1024
            tiles = (rows // n) * (tokens // m)
            split = tiles * parts * n * m * 4 + tiles * 4 if parts > 1 else 0
            assert emulated.awrq_workspace(ctypes.byref(call)) == codes + sums + scale + zero + ranges + split


@pytest.mark.parametrize(("config", "parts"), [("decode", 3), ("128x16", 3), ("128x64", 1)])
def test_the_steps_of_a_call_can_be_run_apart(emulated, config, parts):
    """What the benchmark does to time the product alone: quantize once, multiply again and again."""
    x, weight = activations(1, 5, 256, torch.float16), prepared(104, 256)
    memory = guarded(emulated, torch.full((1 << 20,), 255, dtype=torch.uint8), 256)
    x, weight = guarded(emulated, x), kernels.Weight(*(guarded(emulated, v) if isinstance(v, torch.Tensor) else v for v in weight))
    for steps in (cuda.QUANTIZE, cuda.MULTIPLY, cuda.MULTIPLY):
        y = guarded(emulated, torch.full((1, 5, 104), float("nan"), dtype=x.dtype))
        cuda.launch(emulated, x, y, weight, 8, False, None, config, parts, None, lambda n: memory, steps)
        assert y.isnan().all() if steps == cuda.QUANTIZE else torch.equal(y, kernels.w4a8_linear(x, weight))


def test_the_check_of_a_gpu_finds_what_is_wrong(emulated, monkeypatch, capsys):
    """bench.check, on the emulator instead of a GPU: all equal, and not where the kernels compute something else."""
    monkeypatch.setattr(check, "GROUPS", (-1,))

    def few(library, device):
        yield from check.every_configuration(library, device, ((2, 5, 256, 64),), check.TYPES[:1], (1,))

    (right,) = check.run_checks((few,), emulated, torch.device("cpu"))
    assert right == {"check": "few", "cases": 3 * len(cuda.CONFIGS), "wrong": [], "error": None}

    def broken(library, device):
        yield "one case", True
        raise RuntimeError("an illegal memory access was encountered")

    first, second = check.run_checks((broken, few), emulated, torch.device("cpu"))
    assert first["error"] == "after one case: RuntimeError: an illegal memory access was encountered" and first["cases"] == 1
    assert second == right and "broken                        1 cases  FAILED after one case" in capsys.readouterr().out
    monkeypatch.setattr(check, "poisoned", lambda *args, poisoned=check.poisoned: poisoned(*args).neg_())
    (wrong,) = check.run_checks((few,), emulated, torch.device("cpu"))
    assert len(wrong["wrong"]) == wrong["cases"] and "WRONG, as ['decode_fused / 1, 2x5" in capsys.readouterr().out


# ---------------------------------------------------------------------------
# A packed checkpoint


@pytest.fixture
def stand_in(emulated, monkeypatch):
    """The op's CUDA implementation, for tensors in host memory: the configurations that the emulator ran."""
    launched = []

    def launch(library, x, y, weight, bits, per_token, lengths, config, *how, launch=cuda.launch):
        launched.append(config)
        return launch(library, x, y, weight, bits, per_token, lengths, config, *how)

    monkeypatch.setattr(cuda, "launch", launch)
    monkeypatch.setattr(cuda, "library", lambda device: emulated)
    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: SimpleNamespace(cuda_stream=0))
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(name="emulator", multi_processor_count=4))
    emulated.emulator_settings(False, False)
    override = torch.library.Library("awrq", "IMPL")
    with warnings.catch_warnings(action="ignore"):  # PyTorch's, that this overrides
        override.impl("w4a8_linear", kernels._cuda_linear, "CPU", allow_override=True)
    yield launched
    override._destroy()
    cuda.dispatch.cache_clear()


CHECKPOINTS = [
    ("opt", {}, "float16"),
    ("llama", {"groupsize": 64, "act_pertoken": True}, "bfloat16"),
]


def saved_demo(family, settings, folder):
    """A demo model, quantized and saved, and the first tokens of its held-out text (N,)."""
    decoder, tokenizer = open_decoder(ROOT / "demo" / family), load_tokenizer(ROOT / "demo" / family)
    text = tokenizer((ROOT / "demo" / "data" / "world" / "test.txt").read_text(), return_tensors="pt")["input_ids"][0, :194]
    recipe = Recipe(method="rtn", wbits=4, act_bits=8, nsamples=1, seqlen=8, **settings)
    store = Store(decoder, recipe)
    for _ in quantize_blocks(decoder, text[None, :8], recipe, store):
        pass
    store.save(folder, tokenizer)
    return text


def same_perplexity(folder, texts, dtype, device=CPU):
    """Whether a model reads texts (N,) and goes on alike by both kernels."""
    opened = {kernel: open_checkpoint(folder, dtype, device, kernel) for kernel in ("torch", "cuda")}
    for text in texts:
        wanted, found = (perplexity(decoder, text, len(text), device)["ppl"] for decoder in opened.values())
        assert 1 < found < 50 and found == pytest.approx(wanted, rel=1e-3)
    prompt = texts[0][None].to(device)
    tokens = [decoder.materialize(device).generate(prompt, max_new_tokens=2, do_sample=False) for decoder in opened.values()]
    assert tokens[0].equal(tokens[1])


@pytest.mark.parametrize(("family", "settings", "dtype"), CHECKPOINTS)
def test_a_checkpoint_has_the_perplexity_of_the_torch_path(stand_in, family, settings, dtype, tmp_path):
    """From the file to the perplexity through all that runs on a GPU, but that an emulator runs the kernels."""
    text = saved_demo(family, settings, tmp_path / "saved")
    same_perplexity(tmp_path / "saved", (text[:9], text[:33]), dtype)
    assert set(stand_in) == {"decode_fused", "128x64"}


def test_the_gpu_of_x_is_the_current_one_at_the_launch(stand_in, monkeypatch):
    """Its own stream, and its own memory, of whichever of several GPUs was current before."""
    current = []

    @contextmanager
    def device(which):
        current.append(which)
        yield
        current.pop()

    def stream():
        assert current == [x.device]
        return SimpleNamespace(cuda_stream=0)

    x, weight = activations(1, 3, 64, torch.float16), prepared(32, 64)
    monkeypatch.setattr(torch.cuda, "device", device)
    monkeypatch.setattr(torch.cuda, "current_stream", stream)
    assert torch.equal(kernels.w4a8_linear(x, weight), kernels.w4a8_linear(x, weight, kernel="torch"))
    assert stand_in == ["decode_fused"] and current == []


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize(("family", "settings", "dtype"), CHECKPOINTS)
def test_a_checkpoint_on_a_gpu_has_the_perplexity_of_the_torch_path(family, settings, dtype, tmp_path):
    text = saved_demo(family, settings, tmp_path / "saved")
    same_perplexity(tmp_path / "saved", (text[:9], text[:33], text), dtype, torch.device("cuda", 0))


# ---------------------------------------------------------------------------
# Which kernel


@pytest.mark.parametrize("processors", [46, 108, 132])
@pytest.mark.parametrize("groupsize", [0, 128])
def test_default_rules_know_every_layer(emulated, processors, groupsize):
    """A configuration that takes the shape for every layer and number of tokens; the workspace of decoding stays small."""
    for rows, columns in shapes.LAYERS + shapes.FUSED:
        for tokens in (1, 2, 8, 9, 16, 17, 32, 33, 64, 65, 128, 129, 1024, 1025, 4096, 65536):
            config, parts = cuda.choose(emulated, "some GPU", processors, tokens, rows, columns, groupsize or columns)
            assert cuda.takes(emulated, config, parts, tokens, rows, columns, groupsize or columns)
            assert (tokens <= 16) == config.startswith("decode")


def test_measured_cells_come_first(emulated, monkeypatch):
    table = {"default": cuda.tables()["default"], "GPU": {"cells": {"256x512": [[4, "128x16", 2], [64, "128x64", 1]]}}}
    monkeypatch.setattr(cuda, "tables", lambda: table)
    assert cuda.choose(emulated, "GPU", 108, 4, 256, 512, 512) == ("128x16", 2)
    assert cuda.choose(emulated, "GPU", 108, 5, 256, 512, 512) == ("128x64", 1)
    for other in (("GPU", 108, 65, 256, 512, 512), ("GPU", 108, 4, 256, 512, 128), ("other", 108, 4, 256, 512, 512)):
        assert cuda.choose(emulated, *other) == cuda.choose(emulated, "unknown", *other[1:])


def test_tuning_table_says_what_was_measured():
    tables = cuda.tables()
    assert tables["default"]["measured"] is False and "Not measured" in tables["default"]["note"]
    for name, table in tables.items():
        for most, config, parts in (entry for entries in table.get("cells", {}).values() for entry in entries):
            assert most > 0 and config in cuda.CONFIGS and 1 <= parts <= cuda.MAX_SPLITS, name


def test_tuning_takes_what_is_best_at_both_ends_of_a_bucket(emulated):
    a, b, c = ("128x16", 1), ("128x32", 1), ("128x64", 1)
    assert tune.best([{a: 10, b: 12}, {a: 30, b: 12}]) == b  # a is best at 17 tokens, and a cliff at 32
    assert (
        tune.best(
            [
                {a: 10, b: 10.1},
                {a: 11, b: 10},
            ]
        )
        == b
    )
    assert tune.best([{a: 1, b: 2}, {b: 2, c: 1}]) == b  # the one that takes both
    for below, edge in zip((0, *tune.EDGES), tune.EDGES, strict=False):
        found = [set(tune.candidates(emulated, tokens, 5120, 5120, 5120)) for tokens in (below + 1, edge)]
        assert found[0] & found[1]


def test_tuning_table_is_written_whole(tmp_path, monkeypatch):
    tables = cuda.tables() | {"GPU": {"measured": True, "cells": {"256x512g128": [[16, "decode", 2], [64, "128x64", 1]]}}}
    monkeypatch.setattr(cuda, "TUNING", tmp_path / "tuning.json")
    tune.write(tables)
    assert json.loads(cuda.TUNING.read_text()) == tables and list(tmp_path.iterdir()) == [cuda.TUNING]


def test_select_says_what_runs(monkeypatch):
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    for kind in ("auto", "torch"):
        assert kernels.select(kind, cpu) == ("torch", "kernel: torch, exact integers computed in PyTorch")
    assert kernels.select("torch", gpu)[0] == "torch"
    with pytest.raises(ValueError, match="--kernel cuda: needs an NVIDIA GPU, not --device cpu"):
        kernels.select("cuda", cpu)

    def unable(device):
        raise build.BuildError("no nvcc")

    monkeypatch.setattr(cuda, "library", unable)
    kernel, line = kernels.select("auto", gpu)
    assert kernel == "torch" and line.endswith("slowly, as the CUDA kernels are not there: no nvcc")
    with pytest.raises(ValueError, match="--kernel cuda: no nvcc"):
        kernels.select("cuda", gpu)
    monkeypatch.setattr(cuda, "library", lambda device: None)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A GPU")
    assert kernels.select("auto", gpu) == kernels.select("cuda", gpu) == ("cuda", "kernel: cuda, on A GPU")


def test_groups_that_the_kernels_lack_are_named():
    with pytest.raises(ValueError, match="groupsize 24: the CUDA kernels take multiples of 64 up to 1024"):
        cuda.linear(activations(1, 1, 100), prepared(32, 100, 24), 8, False, None)


# ---------------------------------------------------------------------------
# Building


@pytest.fixture
def fake_nvcc(tmp_path, monkeypatch):
    """An nvcc that takes a moment, notes its calls and writes a file; $XDG_CACHE_HOME is empty."""
    nvcc = tmp_path / "cuda" / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    nvcc.write_text(
        '#!/bin/sh\n[ "$1" = --version ] && echo "release $RELEASE" && exit\necho called >> "$CALLS"\nsleep 0.2\n'
        '[ -n "$FAIL" ] && echo "w4a8.cu(1): error: $FAIL" >&2 && exit 1\n'
        'while [ "$1" != -o ]; do shift; done\necho library > "$2"\n'
    )
    nvcc.chmod(0o755)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    monkeypatch.setenv("CALLS", str(tmp_path / "calls"))
    monkeypatch.setenv("RELEASE", "1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "calls").touch()
    return lambda: len((tmp_path / "calls").read_text().splitlines())


def test_library_is_built_once(fake_nvcc, monkeypatch):
    """Once for all threads that want it at the same time; again for another architecture, compiler or source."""
    threads = [threading.Thread(target=build.build, args=("80",)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    first = build.build("80")
    assert fake_nvcc() == 1 and first.read_text() == "library\n" and first.parent.parent == build.cache_folder()
    assert build.build("90") != first and fake_nvcc() == 2
    monkeypatch.setenv("RELEASE", "2")
    assert build.build("80") != first and fake_nvcc() == 3
    monkeypatch.setattr(build, "SOURCES", build.SOURCES[1:])
    build.build("80")
    assert fake_nvcc() == 4
    monkeypatch.setattr(build.platform, "machine", lambda: "another")
    build.build("80")
    assert fake_nvcc() == 5


def test_failed_build_says_why_and_leaves_nothing(fake_nvcc, monkeypatch):
    monkeypatch.setenv("FAIL", "identifier is undefined")
    with pytest.raises(build.BuildError, match=r"/nvcc failed for -arch=sm_80: w4a8.cu\(1\): error: identifier is undefined"):
        build.build("80")
    assert not list(build.cache_folder().glob("*/*.so"))
    assert [log.read_text() for log in build.cache_folder().glob("*/build.log")] == ["w4a8.cu(1): error: identifier is undefined\n"]
    for arch in ("75", "8.0", "sm_80", ""):
        with pytest.raises(build.BuildError, match=f"compute capability {arch}: must be 80 or more"):
            build.build(arch)
    monkeypatch.setattr(build.os, "access", lambda *_: False)
    with pytest.raises(build.BuildError, match="no nvcc in .*: install the CUDA toolkit, or choose --kernel torch"):
        build.build("80")


def test_a_cache_that_cannot_be_written_is_named(fake_nvcc, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    with pytest.raises(build.BuildError, match=r"file/awrq/\w+: cannot be written \(.*\); set XDG_CACHE_HOME"):
        build.build("80")


def test_library_of_something_else_is_not_loaded(tmp_path):
    (tmp_path / "libawrq.so").write_text("not a library")
    with pytest.raises(build.BuildError, match="cannot be loaded .*: delete it"):
        cuda.bind(tmp_path / "libawrq.so")


def python(*args, **env):
    return subprocess.run([sys.executable, *args], cwd=ROOT, capture_output=True, text=True, env=os.environ | env)


def test_import_builds_nothing(tmp_path):
    done = python("-c", "import sys, kernels; sys.exit('kernels.build' in sys.modules)", XDG_CACHE_HOME=str(tmp_path))
    assert done.returncode == 0, done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_what_needs_a_gpu_says_that_there_is_none():
    for main in (check.main, tune.main):
        with pytest.raises(ValueError, match="no GPU: PyTorch finds none here"):
            main(None)
    for args, message in (((), "PyTorch finds no GPU here"), (("--fast",), "--fast: the only option is --tune")):
        env = os.environ | {"PYTHON": sys.executable}
        done = subprocess.run(["bash", "scripts/gpu_check.sh", *args], cwd=ROOT, capture_output=True, text=True, env=env)
        assert (done.returncode, done.stderr) == (2, f"gpu_check.sh: {message}\n")


PROGRAMS = {  # of a machine with a GPU, where what $FAIL says goes wrong
    "python": """#!/bin/sh
[ "$1" = - ] && cat > /dev/null && echo "80 NVIDIA A100" && exit
echo "$*" >> "$CALLS"
case "$*" in
  *$FAIL*) exit 3 ;;
  *--output_path*) while [ "$1" != --output_path ]; do shift; done; echo {} > "$2" ;;
esac
""",
    "compute-sanitizer": """#!/bin/sh
while [ "$1" != "$PYTHON" ]; do shift; done
"$@"
""",
}


def gpu_check(folder, programs, path, fail, *options):
    """scripts/gpu_check.sh on some programs of a folder, which only note that they were called: how it ended, {step: result}, the calls."""
    for name in programs:
        (folder / name).write_text(PROGRAMS[name])
        (folder / name).chmod(0o755)
    env = {"PATH": f"{folder}:{path}", "PYTHON": f"{folder}/python", "CUDA_HOME": f"{folder}", "OUT": f"{folder}/results"}
    env |= {"CALLS": f"{folder}/calls", "FAIL": fail}
    done = subprocess.run(["bash", "scripts/gpu_check.sh", *options], cwd=ROOT, capture_output=True, text=True, env=os.environ | env)
    steps = json.loads((folder / "results" / "NVIDIA_A100_steps.json").read_text())
    assert (steps["gpu"], steps["arch"]) == ("NVIDIA A100", "80") and done.stderr == ""
    return done, {step["step"]: step["result"] for step in steps["steps"]}, (folder / "calls").read_text()


@pytest.mark.parametrize(
    ("fail", "options", "wrong"),
    [
        ("nothing at all", ["--tune"], []),
        ("kernels.build", [], ["build"]),
        ("bench.check --output_path", [], ["check"]),
        ("-k on_a_gpu", [], ["checkpoint", "solver"]),
        ("-m bench.", ["--tune"], ["tune", "check", "memcheck", "racecheck", "bench"]),
    ],
)
def test_gpu_check_goes_on_and_notes_what_failed(tmp_path, fail, options, wrong):
    done, steps, calls = gpu_check(tmp_path, PROGRAMS, os.environ["PATH"], fail, *options)
    names = ["build", *(["tune"] if options else []), "check", "memcheck", "racecheck", "checkpoint", "solver", "bench"]
    assert list(steps.items()) == [(name, "FAILED (3)" if name in wrong else "ok") for name in names]
    assert done.returncode == bool(wrong)
    assert [line.split()[0] for line in done.stdout.splitlines()[-len(names) :]] == names
    assert f"-m bench.check --output_path {tmp_path}/results/NVIDIA_A100.json" in calls and calls.count("-m bench.check --small") == 2
    assert (tmp_path / "results" / "NVIDIA_A100.json").exists() == ("check" not in wrong)


def test_gpu_check_skips_what_is_not_there(tmp_path):
    for tool in ("bash", "sh", "cat", "dirname", "mkdir"):  # all that is on the PATH
        (tmp_path / tool).symlink_to(shutil.which(tool))
    done, steps, calls = gpu_check(tmp_path, ["python"], tmp_path, "--collect-only")
    none, skipped = "skipped: no compute-sanitizer", "skipped: needs what requirements.txt lists"
    wanted = {"build": "ok", "check": "ok", "memcheck": none, "racecheck": none, "checkpoint": skipped, "solver": skipped, "bench": "ok"}
    assert done.returncode == 0 and steps == wanted and "on_a_gpu" not in calls


def test_build_command(fake_nvcc):
    done = python("-m", "kernels.build", "--arch", "80,90,70")
    assert fake_nvcc() == 2
    assert re.fullmatch(r"sm_80: \S+/libawrq_sm80.so \(.* s\)\nsm_90: \S+/libawrq_sm90.so \(.* s\)\n", done.stdout)
    *compiling, error = done.stderr.splitlines()
    assert compiling == ["kernels: compiling libawrq_sm80.so, once", "kernels: compiling libawrq_sm90.so, once"]
    assert done.returncode == 2 and error.startswith("python -m kernels.build: error: compute capability 70: must be 80 or more")


@pytest.fixture(scope="session")
def compiled(tmp_path_factory):
    """{architecture: its library} of nvcc, both compiled at the same time."""
    try:
        build.find_nvcc()
    except build.BuildError as e:
        pytest.skip(str(e))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        started = [subprocess.Popen([sys.executable, "-m", "kernels.build", "--arch", arch], cwd=ROOT) for arch in ("80", "90")]
        assert [process.wait() for process in started] == [0, 0]
        return {arch: build.build(arch) for arch in ("80", "90")}


@pytest.mark.parametrize("arch", ["80", "90"])
def test_no_kernel_spills_registers(compiled, arch):
    log = (compiled[arch].parent / "build.log").read_text()
    report = re.findall(
        r"Compiling entry function '(\S+)'.*\n.*\n\s*(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", log
    )
    assert len(report) == 23  # 9 tile kernels, 8 decoding kernels, 2 of quantization for 3 types
    assert {name: numbers for name, *numbers in report if numbers != ["0", "0", "0"]} == {}
    assert "warning" not in log


@pytest.mark.parametrize("arch", ["80", "90"])
def test_machine_code_is_what_was_meant(compiled, arch):
    """Integer tensor cores on unsigned bytes, fed by loads of 16 bytes, nothing in local memory."""
    tools = [str(folder) for folder in Path(sys.prefix).glob("lib/python*/site-packages/nvidia/*/bin")]
    path = os.pathsep.join((*tools, os.environ["PATH"], "/usr/local/cuda/bin"))
    if not (shutil.which("cuobjdump", path=path) and shutil.which("nvdisasm", path=path)):
        pytest.skip("no cuobjdump and nvdisasm: pip install nvidia-cuda-cuobjdump nvidia-cuda-nvdisasm")
    done = subprocess.run(
        ["cuobjdump", "--dump-sass", compiled[arch]], capture_output=True, text=True, env=os.environ | {"PATH": path}, check=True
    )
    functions = done.stdout.split("Function : ")[1:]
    assert len(functions) == 23
    for function in functions:
        name = function.split()[0]
        assert not re.search(r"\b(LDL|STL)\b", function), name
        if "tile_kernel" in name or "decode_kernel" in name:
            assert "IMMA.16832.U8.U8" in function, name
        if "tile_kernel" in name:
            assert re.search(r"LDGSTS\.E\.BYPASS\S*\.128", function) and "LDSM.16.M88.4" in function, name
        if "decode_kernel" in name:
            assert re.search(r"LDG\.E\S*\.128", function), name


@pytest.mark.parametrize("arch", ["80", "90"])
def test_library_without_a_gpu_says_so(compiled, arch):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    library, x, weight = cuda.bind(compiled[arch]), activations(1, 2, 64), prepared(32, 64)

    def empty(size):
        memory = torch.empty(size + 256, dtype=torch.uint8)
        return memory[-memory.data_ptr() % 256 :]

    for config in ("decode_fused", "decode", "128x64"):
        with pytest.raises(RuntimeError, match=f"{config}: CUDA: .*(driver|device)"):
            cuda.launch(library, x, x.new_empty(1, 2, 32), weight, 8, False, None, config, 1, None, empty)


def test_library_that_does_not_run_is_found_out_before_its_first_call(compiled, monkeypatch):
    """As with a driver older than nvcc: on a machine without any driver CUDA says the same."""
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "device", nullcontext)
    monkeypatch.setattr(cuda, "build", compiled.get)
    gpu = torch.device("cuda", 0)
    wrong = r"libawrq_sm80.so does not run on this GPU \(CUDA driver version is insufficient .*\): update its driver"
    with pytest.raises(ValueError, match=f"--kernel cuda: .*{wrong}"):
        kernels.select("cuda", gpu)
    kernel, line = kernels.select("auto", gpu)
    assert kernel == "torch" and re.search(wrong, line)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU: scripts/gpu_check.sh is the whole test on one")
def test_op_on_a_gpu_equals_op_on_a_cpu():
    weight, x = prepared(104, 200), activations(2, 3, 200, torch.float16)
    assert torch.equal(kernels.w4a8_linear(x.cuda(), weight.to("cuda")).cpu(), kernels.w4a8_linear(x, weight))
