"""The CUDA kernels' own code, which an emulator runs on a CPU, equals the op; what checks them on a GPU finds what is wrong."""

import ctypes

import numpy as np
import pytest
import torch
from emulation import all_guarded, emulate, guarded
from test_kernels import activations, draw, prepared

import kernels
from bench import check
from kernels import NOTHING, cuda

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("emulator")]  # one process: what they share takes seconds to make


def quantized(library, x, columns, groupsize=-1, acts=(8, False, False), producer=NOTHING):
    """What the quantizer of a tile leaves in memory: codes (M, Kp), sums (G, M), scale (M,), zero (M,)."""
    memory = guarded(library, torch.full((1 << 21,), 255, dtype=torch.uint8), 256)
    weight, producer = all_guarded(library, prepared(128, columns, groupsize)), all_guarded(library, producer)
    how = (weight, acts, None, "128x16", 1, None, lambda n: memory, producer, cuda.QUANTIZE)
    library.emulator_settings(False, False)
    cuda.launch(library, guarded(library, x), torch.empty(*x.shape[:2], 128, dtype=x.dtype), *how)
    rows, groups = x.shape[0] * x.shape[1], len(weight.scale)
    padded_rows, padded = -(-rows // 128) * 128, -(-columns // 64) * 64
    sums = memory[-(-rows * padded // 256) * 256 :].view(torch.int32)[: (groups + 2) * padded_rows].view(groups + 2, padded_rows)[:, :rows]
    return memory[: rows * padded].view(rows, padded), sums[:groups], sums[groups].contiguous().view(torch.float32), sums[groups + 1]


def assert_quantized(found, x, groupsize, acts):
    """Whether that is what act_codes makes of x, to the last bit."""
    wanted, scale, zero = (t.expand(*x.shape[:2], -1).flatten(0, 1) for t in kernels.act_codes(x, *acts))
    codes, sums, found_scale, found_zero = found
    assert torch.equal(codes[:, : x.shape[2]].float(), wanted) and not codes[:, x.shape[2] :].any()
    assert torch.equal(found_scale, scale[:, 0]) and torch.equal(found_zero, zero[:, 0].int())
    parts = wanted.split(x.shape[2] if groupsize == -1 else groupsize, 1)
    assert torch.equal(sums, torch.stack([part.sum(1).int() for part in parts]))


def assert_equal_to_op(y, x, weight, *settings, **more):
    """Bit for bit for whole rows; for groups, whose float32 sums may be fused and split, within their rounding."""
    wanted = kernels.w4a8_linear(x, weight, *settings, **more)
    if weight.groupsize == weight.columns:
        assert torch.equal(y, wanted)
    else:
        bound = 2 * torch.finfo(x.dtype).eps * wanted.float().abs() + 4 * 2**-24 * wanted.float().abs().amax()
        assert ((y.float() - wanted.float()).abs() <= bound).all()


def most_tokens(config):
    return 16 if config.startswith("decode") else 200


WIDE = ("256x128", "wgmma256x128")  # they take whole rows only, padded to 256
ORDERS = {"": (False, False), "reverse-eager": (True, True), "reverse": (True, False)}  # of warps, and of the copies of cp.async


@pytest.mark.parametrize(
    ("config", "groupsize", "order"),
    [
        (config, groupsize, order)
        for config in cuda.CONFIGS
        for groupsize, orders in ((-1, tuple(ORDERS)), (128, ("", "reverse")), (64, ("reverse-eager",)))
        for order in orders
        if groupsize < 0 or config not in WIDE
    ],
)
def test_kernels_equal_op(emulated, config, groupsize, order):
    """Every configuration: types, per sequence and token, padded columns, rows and sequences, split and not, whichever warp is first."""
    R = 250 if config in WIDE else 104
    cases = [
        (activations(2, 5, 256, torch.float16), 8, False, False, None),
        (activations(1, 3, 200, torch.bfloat16), 8, True, False, None),
        (activations(2, 4, 200, torch.float16), 8, True, True, None),
        (activations(3, 4, 328, torch.float32), 6, False, True, torch.tensor([4, 2, 0])),
        (activations(9, 1, 130, torch.float16), 8, False, False, torch.tensor([1] * 8 + [0])),
    ]
    for i, (x, *settings) in enumerate(cases):
        weight = prepared(R - (i == 1), x.shape[2], groupsize)
        parts = 1 if config == "decode_fused" or i % 2 else 2
        y = emulate(emulated, x, weight, config, parts, *settings, *ORDERS[order])
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


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(("columns", "parts"), [(1856, 1), (1600, 3), (192, 3)])
def test_wgmma_goes_round_its_stages(emulated, columns, parts, order):
    """More stages of 128 columns than shared memory holds, half a stage at the end, a part without any; two tiles each way."""
    weight, x = prepared(400, columns), activations(1, 131, columns, torch.float16)
    reverse, eager = ORDERS[order]
    assert_equal_to_op(emulate(emulated, x, weight, "wgmma256x128", parts, reverse=reverse, eager=eager), x, weight)


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


def between_codes(scale, levels):
    """All numbers next to a boundary between two codes: (8, levels) float32, k + 1/2 steps and the floats around it."""
    middle = ((torch.arange(levels) + 0.5).double() * scale).float()
    return torch.cat([middle.view(torch.int32) + i for i in range(-4, 4)]).view(torch.float32).view(8, levels)


@pytest.mark.parametrize("per_token", [False, True])
@pytest.mark.parametrize("size", [1e-38, 1e-30, 1e-3, 1.0, 3e4, 1e30, 3e38])
def test_codes_are_those_of_a_division(emulated, size, per_token):
    """By a reciprocal where nothing overflows, by the division elsewhere; rows that a block goes over once, and several times."""
    columns, generator = 4160 if size == 1 else 300, torch.Generator().manual_seed(3)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        rows = 260 if size == 1 and dtype == torch.float32 else 5
        x = (torch.rand(1, rows, columns, generator=generator) - 0.3) * size
        if dtype == torch.float32:
            x[0, 1, :2040] = 0
            x[0, 1, 0] = scale = size * 0.7
            found = between_codes(scale / 255, 255).flatten()[: columns - 1]
            x[0, 1, 1 : 1 + len(found)] = found.clamp(max=scale)
        x = x.to(dtype)
        if not x.isfinite().all() or not x.any():
            continue
        acts = 8, per_token, False
        assert_quantized(quantized(emulated, x, columns, acts=acts), x, -1, acts)


# ---------------------------------------------------------------------------
# Producers


def produced(kind, columns, dtype, B=1, T=4):
    """An x (B, T, C), or (B, T, 2 C), whose third token is zero, and the Producer that it is for."""
    x = activations(B, T, 2 * columns if kind == "gate" else columns, dtype, seed=columns)
    x[:, 2] = 0
    if kind == "gate":
        return 4 * x, kernels.Producer(gated=True)
    return x, kernels.Producer((draw(columns, seed=5) + 1).to(dtype), 1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("kind", ["norm", "gate"])
def test_what_a_producer_makes_is_quantized(emulated, kind, dtype):
    """Codes, scale, zero and sums to the last bit: columns that fill no eight, no warp, a batch or two; zeros; few rows and many."""
    for columns, T, groupsize, acts in (
        (8, 3, -1, (8, True, False)),
        (33, 5, -1, (8, True, False)),
        (260, 4, -1, (6, True, True)),
        (640, 4, 128, (8, True, False)),
        (520, 261, 64, (8, True, True)),
        (2304, 3, -1, (8, False, False)),
        (10500, 40, -1, (8, True, False)),
        (10500, 5, -1, (8, False, True)),
        (33000, 3, -1, (8, True, False)),
        (4160, 260, -1, (8, True, False)) if dtype == torch.float16 else (33, 260, -1, (8, False, True)),
    ):
        x, producer = produced(kind, columns, dtype, T=T)
        assert_quantized(quantized(emulated, x, columns, groupsize, acts, producer), producer(x), groupsize, acts)


@pytest.mark.parametrize("kind", ["norm", "gate"])
@pytest.mark.parametrize("config", [name for name in cuda.CONFIGS if name != "decode_fused"])
def test_kernels_multiply_what_a_producer_makes(emulated, config, kind):
    """Every configuration behind each producer, per token and per sequence, with padding, whichever warp is first."""
    for dtype, settings, order in (
        (torch.float16, (8, True, False), (False, False)),
        (torch.bfloat16, (8, False, False, torch.tensor([4, 2])), (True, False)),
        (torch.float32, (8, True, True), (True, True)),
    ):
        x, producer = produced(kind, 168, dtype, B=2)
        weight = prepared(250 if config in WIDE else 104, 168)
        y = emulate(emulated, x, weight, config, 2, *settings, *(None,) * (4 - len(settings)), *order, producer=producer)
        assert_equal_to_op(y, x, weight, *settings, producer=producer)


def test_products_of_a_producer_are_the_unfused(emulated):
    """What a norm or a gate makes, quantized with it or after it: the same bits, also of rows that are not finite."""
    for kind in ("norm", "gate"):
        x, producer = produced(kind, 192, torch.float16)
        x[0, 1, 7] = float("inf")
        weight = prepared(104, 192)
        y = emulate(emulated, x, weight, "128x16", 1, 8, True, producer=producer)
        wanted = kernels.w4a8_linear(producer(x), weight, 8, True)
        assert torch.equal(y[0, [0, 2, 3]], wanted[0, [0, 2, 3]]) and not y[0, 1].isfinite().any()


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
        ({"producer": 3}, "no such producer"),
        ({"producer": 1}, "norm is null or not aligned to 16"),
        ({"producer": 1, "norm": memory + 8}, "norm is null or not aligned to 16"),
        ({"producer": 2, "config": fused}, "without a norm or a gate"),
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
            emulated,
            x,
            y,
            weight,
            (8, False, False),
            None,
            "decode",
            1,
            None,
            lambda n: guarded(emulated, torch.zeros(n, dtype=torch.uint8), 256),
            NOTHING,
        )


def test_the_largest_call_is_counted_right(emulated):
    """2^20 tokens and 2^20 rows, more bytes and tiles than 31 bits count, and the longest rows: the workspace is the sum of its parts."""
    tokens = rows = 1 << 20
    for config, (n, m) in list(cuda.CONFIGS.items())[2:]:
        for columns, parts in ((64, 1), (kernels.MAX_COLUMNS, 64)):
            call = cuda.Call(
                B=1, T=tokens, K=columns, N=rows, groupsize=columns, levels=255, config=cuda.CONFIG_NUMBERS[config], splits=parts, steps=3
            )
            of_codes = max(columns, 128) if config.startswith("wgmma") else columns
            codes, sums, scale, zero, ranges = tokens * of_codes, 4 * tokens, 4 * tokens, 4 * tokens, 8 * 1024
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
        cuda.launch(emulated, x, y, weight, (8, False, False), None, config, parts, None, lambda n: memory, NOTHING, steps)
        assert y.isnan().all() if steps == cuda.QUANTIZE else torch.equal(y, kernels.w4a8_linear(x, weight))


def test_the_check_of_a_gpu_finds_what_is_wrong(emulated, monkeypatch, capsys):
    """bench.check, on the emulator instead of a GPU: all equal, and not where the kernels compute something else."""

    def few(library, device):
        yield from check.every_configuration(library, device, ((2, 5, 256, 64),), check.TYPES[:1], (1,), grids=((-1,), check.SETTINGS))

    (right,) = check.run_checks((few,), emulated, torch.device("cpu"))
    assert right == {"check": "few", "cases": 4 * len(check.CONFIGS), "wrong": [], "error": None}

    def broken(library, device):
        yield "one case", True
        raise RuntimeError("an illegal memory access was encountered")

    def producers(library, device):
        yield from check.every_producer(library, device, ((2, 5, 256, 64),), check.TYPES)

    (made,) = check.run_checks((producers,), emulated, torch.device("cpu"))
    assert made == {"check": "producers", "cases": 2 * 2 * 3 * len(check.CONFIGS), "wrong": [], "error": None}
    first, second = check.run_checks((broken, few), emulated, torch.device("cpu"))
    assert first["error"] == "after one case: RuntimeError: an illegal memory access was encountered" and first["cases"] == 1
    assert second == right and "broken                        1 cases  FAILED after one case" in capsys.readouterr().out
    monkeypatch.setattr(check, "poisoned", lambda *args, poisoned=check.poisoned: poisoned(*args).neg_())
    (wrong,) = check.run_checks((few,), emulated, torch.device("cpu"))
    assert len(wrong["wrong"]) == wrong["cases"] and "WRONG, as ['decode_fused / 1, 2x5" in capsys.readouterr().out


def test_the_check_of_the_kernel_by_wgmma(emulated, monkeypatch):
    """It is the only one that runs this kernel, and runs no other; nothing where there is none."""
    monkeypatch.setattr(check, "SHAPES", ())
    monkeypatch.setattr(check, "LAYERS", ((256, 128),))
    for name in ("every_configuration", "every_producer", "largest_sums", "twice_the_same"):  # long; their cases are in other tests
        monkeypatch.setattr(check, name, lambda *args, configs, name=name: [(name, configs == check.WGMMA)])
    found = dict(check.by_wgmma(emulated, torch.device("cpu")))
    assert all(found.values()) and len(found) == 4 + 3 and "256x128, 1030 tokens / 1" in found
    assert sorted(check.CONFIGS + check.WGMMA) == sorted(cuda.CONFIGS)
    monkeypatch.setattr(cuda, "takes", lambda *args: False)
    assert not list(check.by_wgmma(emulated, torch.device("cpu")))


def test_what_the_sanitizer_sees_of_the_kernel_by_wgmma(emulated, monkeypatch):
    """This kernel alone, with and without splits; its cases are in other tests."""
    seen = []
    monkeypatch.setattr(check, "every_configuration", lambda *args: seen.append(args) or ())
    assert not list(check.a_few_by_wgmma(emulated, torch.device("cpu")))
    ((*_, shapes, _, splits, configs, _),) = seen
    taken = {parts for B, T, *shape in shapes for parts in splits if cuda.takes(emulated, "wgmma256x128", parts, B * T, *shape, shape[-1])}
    assert configs == check.WGMMA and taken == {1, 3}
