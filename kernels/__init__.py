"""Integer matmul of 4-bit weights and 8-bit activations: the op `awrq::w4a8_linear`, its packer, its exact PyTorch implementation.

    weight = kernels.prepare(q, grid.scale, grid.zero, grid.groupsize, bias)   # once, at load
    y = kernels.w4a8_linear(x, weight, act_bits=8)                             # x (B, T, C) -> y (B, T, R)

With the codes qx of x (zero point zx, scale sx) and qw of the weight (zw, sw) a linear is

    y = sx * sum_g sw_g * (sum_k qx qw - zw_g * sum_k qx - zx * sum_k (qw - zw_g)) + bias        g: groups of columns, k: columns of g

where all sums over k are exact int32, whatever computes them; floating point begins with sw.  The codes of x are found on the fly, and what
makes x of something else, an RMSNorm or a gated SiLU, may be part of that pass: see Producer.
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from recipe import UsageError

LAYOUT = 1  # version of the packed layout, see pack_w4; a change of it makes old packed tensors unreadable
ROWS, COLUMNS = 128, 64  # to multiples of these the packer pads
MAX_COLUMNS = 65536  # the kernels sum 255 * (16 * 15) in uint32, which takes 70,178 columns; sums of codes stay exact in float32
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
GATED = 2**19  # numbers in front of a gate that are worked on together: what is made of them on the way stays in a CPU's cache


# ---------------------------------------------------------------------------
# Activations


def act_codes(x, bits, per_token=False, sym=False, lengths=None):
    """Codes of x (B, T, C) on a min-max grid of its own, per sequence (T, C) or per token (C,): x ~ scale * (codes - zero).

    Returns codes (B, T, C) float32, whole numbers of 0 to 2^bits - 1; scale, zero (B, 1, 1), or (B, T, 1) per token, float32.  Computed
    in float32 whatever the type of x.  The range includes 0, so 0 <= zero <= 2^bits - 1.  sym: the range is -max|x| to max|x|, and zero
    2^(bits - 1), as in compressed-tensors: a step is max|x| / 127.5 at 8 bits, where vLLM's own int8 quantizer has max|x| / 127.  lengths
    (B,): a sequence's range is that of its first `lengths[b]` tokens; those behind are clamped to it.  Method notes: the paper calls one
    scale per sequence "per tensor" and reduces over a batch of one; here a result never depends on the batch.
    """
    x = x.float()
    if lengths is not None and not per_token:
        padding = torch.arange(x.shape[1], device=x.device) >= lengths[:, None]
        seen = x.masked_fill(padding[:, :, None], 0)  # 0 moves no range that includes it
    else:
        seen = x
    dims = -1 if per_token else (-2, -1)
    lo, hi = seen.amin(dims, keepdim=True).clamp_(max=0), seen.amax(dims, keepdim=True).clamp_(min=0)
    if sym:
        hi = torch.maximum(hi, -lo)
        lo = -hi
    scale = (hi - lo) / torch.full_like(hi, 2**bits - 1)  # by a number, PyTorch on a GPU would multiply with the reciprocal
    scale.masked_fill_(scale == 0, 1)
    zero = torch.full_like(scale, 2 ** (bits - 1)) if sym else torch.round(-lo / scale)
    return (x / scale).round_().add_(zero).clamp_(0, 2**bits - 1), scale, zero


# ---------------------------------------------------------------------------
# Producers: what stands in front of a linear, computed in the pass that quantizes


def sum_of_squares(x):
    """Of each row of x (..., C): (..., 1) float32, the same bits on every device.

    In this order: the squares of eight columns, one after the other; then those sums in pairs, the pairs in pairs, and so on.
    """
    eights = 1 << ((x.shape[-1] + 7) // 8 - 1).bit_length()  # a power of 2: zeros change no sum
    squares = F.pad(x.float(), (0, 8 * eights - x.shape[-1])).square().unflatten(-1, (eights, 8))
    total = squares[..., 0]
    for i in range(1, 8):
        total = total + squares[..., i]
    while total.shape[-1] > 1:
        total = total[..., ::2] + total[..., 1::2]
    return total


def rms_norm(x, weight, eps):
    """RMSNorm of x (..., C) with a weight (C,) of its type, as in LLaMA: in float32, in the type of x from the product with the weight on.

    transformers' but for the last bits of a row's factor, whose mean PyTorch adds up in an order of its own.
    """
    squares = sum_of_squares(x)
    mean = squares / torch.full_like(squares, x.shape[-1])  # by a number, PyTorch on a GPU would multiply with the reciprocal
    root = (mean + eps).double().sqrt().float()  # rounded right, which PyTorch's of float32 on a CPU is not
    return weight * (x.float() * (torch.ones_like(root) / root)).to(x.dtype)


def exponential(t):
    """e^t of t float32, -32 to 88, within 3 units of its last place, by additions and products alone: the same bits on every device."""
    n = (t * 1.44269504).round()  # e^t = 2^n e^r
    r = t + n * -0.693359375 + n * 2.12194440e-4  # ln 2 in two parts, of which the first has so few bits that its product is exact
    p = torch.full_like(r, 1 / 720)  # Taylor's series, |r| <= ln 2 / 2
    for factor in (1 / 120, 1 / 24, 1 / 6, 1 / 2, 1, 1):
        p.mul_(r).add_(factor)
    return p.mul_(n.int().add_(127).bitwise_left_shift_(23).view(torch.float32))


def gated_silu(x):
    """silu(gate) * up of x (..., 2 C), gate and up side by side: (..., C), each step in float32 and rounded to the type of x."""
    x, shape = x.reshape(-1, x.shape[-1]), (*x.shape[:-1], x.shape[-1] // 2)
    y, rows = x.new_empty(len(x), shape[-1]), max(1, GATED // x.shape[1])
    for some in (slice(i, i + rows) for i in range(0, len(x), rows)):
        gate, up = x[some].chunk(2, -1)
        v = gate.float()
        silu = v / exponential((-v).clamp_(-32, 88)).add_(1)
        y[some] = silu.to(x.dtype).mul_(up)
    return y.view(shape)


class Producer(NamedTuple):
    """What makes the input of a linear from the op's x: nothing, an RMSNorm with a weight (C,), or a gated SiLU of x (B, T, 2 C)."""

    norm: torch.Tensor | None = None  # of the type of x
    eps: float = 0.0
    gated: bool = False

    def __call__(self, x):
        if self.norm is not None:
            x = rms_norm(x, self.norm, self.eps)
        return gated_silu(x) if self.gated else x


NOTHING = Producer()

# ---------------------------------------------------------------------------
# Weights


class Weight(NamedTuple):
    """A weight (R, C) as the op reads it, Rp and Cp being R and C padded to multiples of 128 and 64, G its groups of columns."""

    packed: torch.Tensor  # (Rp / 32, Cp / 32, 32, 16) uint8, see pack_w4
    scale: torch.Tensor  # (G, Rp) float32
    zero: torch.Tensor  # (G, Rp) int32
    colsum: torch.Tensor  # (G, Rp) int32: sum over the group's columns of code - zero
    bias: torch.Tensor  # (Rp,) float32
    rows: int  # R
    columns: int  # C
    groupsize: int  # C where one scale goes for a whole row
    layout: int = LAYOUT

    def to(self, device):
        return self._replace(**{f: v.to(device) for f, v in self._asdict().items() if isinstance(v, torch.Tensor)})


def _padded(n, multiple):
    return -(-n // multiple) * multiple


def pack_w4(q):
    """Codes (R, C) uint8, 0 to 15, in the order in which the tensor cores' fragments need them: (Rp / 32, Cp / 32, 32, 16) uint8.

    A block of 32 rows x 32 columns is 512 bytes, 16 for each lane of a warp: with g, t = divmod(lane, 4), byte 4 r + j has in its low
    nibble row g + 8 (r & 1), column 16 (r >> 1) + 4 t + j, and in its high nibble the same of row + 16.  So `& 0x0f0f0f0f` and
    `& 0xf0f0f0f0` of the four words make the A operand of mma.m16n8k32 for rows 0-15, and, times 16, for rows 16-31.  Padding is code 0.
    """
    R, C = q.shape
    q = F.pad(q, (0, -C % COLUMNS, 0, -R % ROWS))
    b = q.view(q.shape[0] // 32, 2, 2, 8, q.shape[1] // 32, 2, 4, 4)  # block of rows, nibble, r & 1, g, block of columns, r >> 1, t, j
    b = b.permute(0, 4, 3, 6, 5, 2, 7, 1)
    return (b[..., 0] | b[..., 1] << 4).reshape(q.shape[0] // 32, q.shape[1] // 32, 32, 16)


def unpack_w4(packed):
    """The padded codes (Rp, Cp) uint8 that pack_w4 packed."""
    rows, columns = packed.shape[:2]
    b = packed.view(rows, columns, 8, 4, 2, 2, 4)  # block of rows, block of columns, g, t, r >> 1, r & 1, j
    b = torch.stack((b & 15, b >> 4), -1)
    return b.permute(0, 7, 5, 2, 1, 4, 3, 6).reshape(32 * rows, 32 * columns)


def prepare(q, scale, zero, groupsize=-1, bias=None):
    """A Weight from codes q (R, C) uint8, 0 to 15, scale and zero (R, G), as `quant.Grid` has them, and a bias (R,) or None.

    Raises ValueError for what the integer arithmetic cannot represent.
    """
    R, C = q.shape
    groupsize = C if groupsize == -1 else min(groupsize, C)
    groups = -(-C // groupsize)
    for ok, message in (
        (q.dtype == torch.uint8, f"q: uint8 codes are packed, not {q.dtype}"),
        (C <= MAX_COLUMNS, f"q: {C} columns, int32 sums take at most {MAX_COLUMNS}"),
        (scale.shape == zero.shape == (R, groups), f"scale {tuple(scale.shape)}, zero {tuple(zero.shape)}: must be {(R, groups)}"),
        (bias is None or bias.shape == (R,), f"bias {bias is not None and tuple(bias.shape)}: must be {(R,)}"),
    ):
        if not ok:
            raise ValueError(message)
    if q.max() > 15:
        raise ValueError(f"q: code {q.max().item()} has more than 4 bits")
    if not ((zero == zero.round()) & (zero >= 0) & (zero <= 15)).all():
        raise ValueError("zero: must be whole numbers of 0 to 15")

    def rows_last(p):
        return F.pad(p.T, (0, -R % ROWS)).contiguous()

    sums = F.pad(q.int(), (0, -C % groupsize)).unflatten(1, (groups, groupsize)).sum(2, dtype=torch.int32)
    width = torch.full((groups,), groupsize, dtype=torch.int32, device=q.device)
    width[-1] = C - groupsize * (groups - 1)
    zero = zero.int()
    bias = torch.zeros(R, device=q.device) if bias is None else bias.float()
    return Weight(
        pack_w4(q), rows_last(scale.float()), rows_last(zero), rows_last(sums - zero * width), F.pad(bias, (0, -R % ROWS)), R, C, groupsize
    )


# ---------------------------------------------------------------------------
# The op


def w4a8_linear(x, weight, act_bits=8, per_token=False, sym=False, lengths=None, kernel=None, producer=NOTHING):
    """y (B, T, R) = quant(producer(x)) @ W.T + bias in exact integer arithmetic, in the type of x.

    x (B, T, C) contiguous, float16, bfloat16 or float32; (B, T, 2 C) for a gate.  weight: of `prepare`, on the device of x.  act_bits 2
    to 8; per_token, sym and lengths (B,) int32 or int64 as in `act_codes`, of what is quantized.  kernel "cuda" or "torch"; None: "cuda" on
    a GPU, "torch" elsewhere.  Never waits for a GPU.  Raises ValueError that names what is wrong: shape, type, stride, device, alignment or
    layout.
    """
    return torch.ops.awrq.w4a8_linear(x, *weight, act_bits, per_token, sym, lengths, kernel, *producer)


def _wrong(x, weight, act_bits, lengths, kernel, producer):
    """Yields, in words, what the arithmetic cannot take.  Looks at no data, so a GPU need not be waited for."""
    rows, columns, groupsize = weight.rows, weight.columns, weight.groupsize
    width = 2 * columns if producer.gated else columns
    if weight.layout != LAYOUT:
        yield f"packed layout {weight.layout}, this version reads {LAYOUT}: pack the codes again"
    if x.dtype not in DTYPES:
        yield f"x is {x.dtype}, must be float16, bfloat16 or float32"
    if x.dim() != 3 or x.shape[2] != width:
        yield f"x {tuple(x.shape)}: must be (B, T, {width})"
    if x.numel() == 0:
        yield f"x {tuple(x.shape)}: is empty"
    if not 2 <= act_bits <= 8:
        yield f"act_bits {act_bits}: must be 2 to 8"
    if not (0 < columns <= MAX_COLUMNS and rows > 0):
        yield f"weight of {rows} rows and {columns} columns: at least 1, at most {MAX_COLUMNS} columns"
    if not 0 < groupsize <= columns:
        yield f"groupsize {groupsize}: must be 1 to {columns}"
    if kernel not in (None, "cuda", "torch"):
        yield f"kernel {kernel}: must be cuda or torch"
    if producer.gated and producer.norm is not None:
        yield "norm and gated: must be one of both"
    padded, groups = _padded(rows, ROWS), -(-columns // groupsize)
    for name, tensor, shape, types in (
        ("x", x, x.shape, DTYPES),
        ("packed", weight.packed, (padded // 32, _padded(columns, COLUMNS) // 32, 32, 16), (torch.uint8,)),
        ("scale", weight.scale, (groups, padded), (torch.float32,)),
        ("zero", weight.zero, (groups, padded), (torch.int32,)),
        ("colsum", weight.colsum, (groups, padded), (torch.int32,)),
        ("bias", weight.bias, (padded,), (torch.float32,)),
        ("lengths", lengths, x.shape[:1], (torch.int32, torch.int64)),
        ("norm", producer.norm, (columns,), (x.dtype,)),
    ):
        if tensor is None:
            continue
        if tensor.shape != shape:
            yield f"{name} {tuple(tensor.shape)}: must be {tuple(shape)}"
        if tensor.dtype not in types:
            yield f"{name} is {tensor.dtype}, must be {' or '.join(map(str, types))}"
        if not tensor.is_contiguous():
            yield f"{name} has strides {tensor.stride()}: must be contiguous"
        if tensor.device != x.device:
            yield f"{name} is on {tensor.device}, x on {x.device}"


def _check(*args):
    """ValueError for the first thing that _wrong finds; what is right costs no message, as this runs before every product."""
    for message in _wrong(*args):
        raise ValueError(f"w4a8_linear: {message}")


def _exact_matmul(q, w):
    """q (..., K) @ w (N, K).T of whole numbers: int32.  q float32 of 0 to 255, w uint8 of 0 to 15.

    In float32, which is much faster than integers and as exact up to 2^24 in any order of summation: 4096 columns * 255 * 15 is less.
    """
    with torch.autocast(q.device.type, enabled=False):
        return sum((part @ columns.float().T).int() for part, columns in zip(q.split(4096, -1), w.split(4096, 1), strict=True))


def _named(weight_and_more):
    """(Weight, act_bits, per_token, sym, lengths, kernel, Producer) of the op's arguments after x."""
    return Weight(*weight_and_more[:-8]), *weight_and_more[-8:-3], Producer(*weight_and_more[-3:])


def _torch_linear(x, *args):
    """The op in PyTorch, on any device: the definition that the kernels are held to."""
    weight, act_bits, per_token, sym, lengths, kernel, producer = _named(args)
    _check(x, weight, act_bits, lengths, kernel, producer)
    if kernel == "cuda" and x.device.type != "cuda":
        raise ValueError(f"w4a8_linear: kernel cuda, but x is on {x.device}")
    rows = weight.rows
    q, x_scale, x_zero = act_codes(producer(x), act_bits, per_token, sym, lengths)
    w, x_zero = unpack_w4(weight.packed)[:rows, : weight.columns], x_zero.int()
    y = torch.zeros(*x.shape[:2], rows, device=x.device)
    groups = (p[:, :rows] for p in (weight.scale, weight.zero, weight.colsum))
    for q_g, w_g, scale, zero, colsum in zip(q.split(weight.groupsize, 2), w.split(weight.groupsize, 1), *groups, strict=True):
        exact = _exact_matmul(q_g, w_g) - zero * q_g.sum(-1, keepdim=True).int() - x_zero * colsum
        y += exact.float() * scale
    return (y * x_scale + weight.bias[:rows]).to(x.dtype)


def _cuda_linear(x, *args):
    weight, act_bits, per_token, sym, lengths, kernel, producer = _named(args)
    if kernel == "torch":
        return _torch_linear(x, *args)
    _check(x, weight, act_bits, lengths, kernel, producer)
    from kernels import cuda

    return cuda.linear(x, weight, act_bits, per_token, sym, lengths, producer)


def _fake_linear(x, *args):
    weight, act_bits, _, _, lengths, kernel, producer = _named(args)
    _check(x, weight, act_bits, lengths, kernel, producer)
    return x.new_empty(*x.shape[:2], weight.rows)


def select(kind, device, groupsize=-1):
    """What runs for --kernel auto, cuda or torch on a device: `kernel` of w4a8_linear, and the line to print about it.

    groupsize: of the recipe.  Builds the CUDA kernels on their first use.  Raises UsageError where "cuda" is asked for and cannot run;
    "auto" then says why.
    """
    torch_line = "kernel: torch, exact integers computed in PyTorch"
    if kind == "torch" or (kind == "auto" and device.type != "cuda"):
        return "torch", torch_line
    if device.type != "cuda":
        raise UsageError(f"--kernel cuda: needs an NVIDIA GPU, not --device {device}; choose torch or auto")
    from kernels import build, cuda  # not at the top, where `python -m kernels.build` would import itself first

    if fault := cuda.groups_fault(groupsize):
        if kind == "cuda":
            raise UsageError(f"--kernel cuda: {fault}; choose torch or auto")
        return "torch", f"{torch_line}, slowly: {fault}"

    try:
        cuda.library(device)
    except build.BuildError as e:
        if kind == "cuda":
            raise UsageError(f"--kernel cuda: {e}") from e
        return "torch", f"{torch_line}, slowly, as the CUDA kernels are not there: {e}"
    return "cuda", f"kernel: cuda, on {torch.cuda.get_device_name(device)}"


# Library.define and impl, which cost a decoding step a quarter of what torch.library.custom_op does.
_library = torch.library.Library("awrq", "DEF")
_library.define(
    "w4a8_linear(Tensor x, Tensor packed, Tensor scale, Tensor zero, Tensor colsum, Tensor bias, int rows, int columns, int groupsize, "
    "int layout, int act_bits, bool per_token, bool sym, Tensor? lengths, str? kernel, Tensor? norm, float eps, bool gated) -> Tensor"
)
_library.impl("w4a8_linear", _torch_linear, "CPU")
_library.impl("w4a8_linear", _cuda_linear, "CUDA")
torch.library.register_fake("awrq::w4a8_linear", _fake_linear, lib=_library)
