"""The solver's column loop on a GPU: a span of columns of all rows as one kernel, in Triton, which PyTorch for NVIDIA GPUs brings along.

A program holds a span of some rows in registers: for each column it rounds, divides the error by U's diagonal and takes it off the columns
to come.  What gptq.solve does with the same columns, in thousands of operations less.
"""

import torch
import triton
import triton.language as tl

SPAN = 128  # most columns of a call
ROWS, WARPS = 32, 4  # of a program


@triton.jit(do_not_specialize=["R", "n", "levels"])  # or each width would be compiled anew
def span_kernel(
    w, codes, U, scale, zero, first, levels, R, n,
    w_stride, code_stride, u_stride, scale_stride, zero_stride, first_stride,
    FIRST: tl.constexpr, SPAN: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    # w[n,R]: columns of the weight, then their errors; codes[n,R]; U[n,n] upper; scale, zero[n,R]; first[R]: column 0, where FIRST
    rows, columns = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, SPAN)
    there = rows < R
    at = w + columns[:, None] * w_stride + rows[None, :]
    inside = (columns[:, None] < n) & there[None, :]
    W = tl.load(at, mask=inside, other=0.0)
    for c in range(n):
        here = columns[:, None] == c
        column = tl.sum(tl.where(here, W, 0.0), 0)
        source = column
        if FIRST:
            source = tl.where(c == 0, tl.load(first + rows * first_stride, mask=there, other=0.0), column)
        s = tl.load(scale + c * scale_stride + rows, mask=there, other=1.0)
        z = tl.load(zero + c * zero_stride + rows, mask=there, other=0.0)
        steps = tl.minimum(tl.maximum(tl.div_rn(source, s), -1048576.0), 1048576.0)
        code = (steps + 12582912.0) - 12582912.0 + z  # to the nearest, to even where there are two, for less than 2^22
        code = tl.minimum(tl.maximum(code, 0.0), levels)
        tl.store(codes + c * code_stride + rows, code, mask=there)
        error = tl.div_rn(column - (code - z) * s, tl.load(U + c * u_stride + c))
        u = tl.load(U + c * u_stride + columns, mask=(columns > c) & (columns < n), other=0.0)
        W = tl.where(here, error[None, :], W - u[:, None] * error[None, :])
    tl.store(at, W, mask=inside)


def round_span(w, codes, U, scale, zero, bits, first=None):
    """Round the columns w (n, R), n <= SPAN, one after the other: codes (n, R) gets their codes, w their errors, as in gptq.solve.

    U (n, n): upper, the span's part of it.  scale, zero (n, R); rows may repeat by stride 0.  first (R,): what column 0 is rounded from, if
    not w.  All float32; R contiguous, but in `first`.
    """
    n, R = w.shape
    assert n <= SPAN and all(t.stride(1) == 1 for t in (w, codes, scale, zero)), f"{n=}, {[t.stride() for t in (w, codes, scale, zero)]}"
    U = U.contiguous()
    with torch.cuda.device_of(w):  # Triton launches on the current one
        span_kernel[(triton.cdiv(R, ROWS),)](
            w, codes, U, scale, zero, w if first is None else first, 2.0**bits - 1, R, n,
            w.stride(0), codes.stride(0), U.stride(0), scale.stride(0), zero.stride(0), 0 if first is None else first.stride(0),
            FIRST=first is not None, SPAN=SPAN, ROWS=ROWS, num_warps=WARPS,
        )  # fmt: skip
