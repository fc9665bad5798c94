// codes = quant(x[M,K]): u8, min-max, the range includes 0 or is symmetric about it; per row (token) or per T rows (sequence).  Any K; Kp % 64 == 0.
// The same arithmetic as act_codes in __init__.py, operation by operation.
#pragma once
#include "produce.cuh"

enum Layout { kRows, kFragments, kSwizzled };

struct Codes {
  uint8_t* codes;  // [M,Kp]; or, for the decoding kernels, [Kp/32,M,32], see fragment; or, for wgmma, [Kp/128,pitch,128], see swizzled
  float* scale;    // [M]
  int* zero;       // [M]
  int* sums;       // [G,pitch]: sum of the codes of each group of columns
  int pitch, groupsize;
  Layout layout;  // which of them
};

// Where columns k to k + 3 of row m are in [Kp/32,M,32]: of 32 columns, 4 t to 4 t + 3 and 16 + 4 t to 16 + 4 t + 3 stand together, which is the
// B operand of lane (m % 8, t).  A warp reads those of eight rows as 256 bytes in a row.  k % 4 == 0.
DEVICE uint32_t* fragment(uint8_t* codes, int M, int m, int k) {
  return reinterpret_cast<uint32_t*>(codes + (static_cast<size_t>(k / 32) * M + m) * 32 + k % 16 * 2 + k % 32 / 16 * 4);
}

// Where columns k to k + 7 of row m are in [Kp/128,pitch,128]: the 16-byte chunks of a row are exchanged by its number, as the tensor cores of compute
// capability 9.0 find them in shared memory ("128-byte swizzle"), so that eight rows at one chunk lie in different banks.  k % 8 == 0.
constexpr int kSwizzledColumns = 128;
DEVICE uint2* swizzled(uint8_t* codes, int pitch, int m, int k) {
  int chunk = k % kSwizzledColumns / 16 ^ m % 8;
  return reinterpret_cast<uint2*>(codes + (static_cast<size_t>(k / kSwizzledColumns) * pitch + m) * kSwizzledColumns + 16 * chunk + k % 16);
}

constexpr int kQuantizeThreads = 256, kWideThreads = 1024;  // of a block; the latter where there are few rows

struct Range { float lo = 0, hi = 0; };  // 0 is always in

// Order of floats as order of ints, -0 below +0; NaN of positive sign above all.
DEVICE int ordered(float v) {
  int i = static_cast<int>(float_to_bits(v));
  return i ^ ((i >> 31) & 0x7fffffff);
}
DEVICE float unordered(int i) { return bits_to_float(static_cast<uint32_t>(i ^ ((i >> 31) & 0x7fffffff))); }

DEVICE Range warp_range(Range r) { return {unordered(warp_min(ordered(r.lo))), unordered(warp_max(ordered(r.hi)))}; }

struct Grid {
  float scale, zero;
  float inverse, lowest, highest;  // 1 / scale; x beyond the others has their code
  uint32_t offset;                 // zero
  bool by_inverse;                 // whether nothing on the way can overflow or lose bits at the bottom
  DEVICE Grid(Range r, const Activations& a) {
    if (a.sym) r.hi = max_or_nan(-r.lo, r.hi), r.lo = -r.hi;
    scale = divide(add(r.hi, -r.lo), static_cast<float>(a.levels));
    if (scale == 0) scale = 1;
    zero = a.sym ? static_cast<float>((a.levels + 1) / 2) : rintf(divide(-r.lo, scale));
    inverse = divide(1, scale);
    lowest = multiply(-zero, scale), highest = multiply(add(static_cast<float>(a.levels), -zero), scale);
    by_inverse = scale > 1e-27f && scale < 1e27f;
    offset = by_inverse ? static_cast<uint32_t>(zero) : 0;
  }
  DEVICE uint32_t code_by_division(float x, int levels) const {
    return static_cast<uint32_t>(fminf(fmaxf(add(rintf(divide(x, scale)), zero), 0), static_cast<float>(levels)));
  }
  // The same code, in its low byte.  A product with the reciprocal, corrected by what it leaves of x (Markstein), rounds to the code that the
  // division rounds to: for every scale and all x next to a boundary between codes that was computed, and at others no error is large enough.
  DEVICE uint32_t code_by_inverse(float x) const {
    x = fminf(fmaxf(x, lowest), highest);
    float q = multiply(x, inverse);
    q = fmaf(fmaf(-q, scale, x), inverse, q);
    return float_to_bits(add(q, 12582912.f)) + offset;  // 1.5 * 2^23: rounds to a whole number
  }
  DEVICE int zero_code(int levels) const { return static_cast<int>(fminf(fmaxf(zero, 0), static_cast<float>(levels))); }
};

template <class T>
DEVICE Range widened(Range r, const Eight<T>& x) {
  #pragma unroll
  for (int j = 0; j < 8; ++j) {
    float v = to_float(x.values[j]);
    r = {fminf(r.lo, v), max_or_nan(r.hi, v)};  // a NaN goes into hi, which is enough
  }
  return r;
}
DEVICE Range widened(Range a, Range b) { return {fminf(a.lo, b.lo), max_or_nan(a.hi, b.hi)}; }

template <class T, int WORDS>
DEVICE Range widened(Range r, const Batch<T, WORDS>& batch) {
  #pragma unroll
  for (int i = 0; i < batch.COUNT; ++i) r = widened(r, batch.eights[i]);
  return r;
}

// The range of columns begin to end of a row, as this thread sees it; the batch is left with the last columns.
template <class Row, int WORDS>
DEVICE Range thread_range(Batch<typename Row::T, WORDS>& batch, const Row& row, int begin, int end) {
  Range r;
  for (int first = begin; first < end; first += batch.columns()) {
    batch.load(row, first, end);
    r = widened(r, batch);
  }
  return r;
}

// The codes of eight elements from column i of a row on, packed; 0 from column K on.
template <class Row>
DEVICE uint2 codes8(const Eight<typename Row::T>& eight, const Row& row, int i, int K, const Grid& grid, int levels) {
  if (!grid.by_inverse) {
    uint2 w = {};
    #pragma unroll 1  // rare, and long
    for (int j = 0; j < 8 && i + j < K; ++j) {
      uint32_t code = grid.code_by_division(row.at(i + j), levels) << (8 * (j % 4));
      if (j < 4) w.x |= code;
      else w.y |= code;
    }
    return w;
  }
  uint32_t c[8];
  #pragma unroll
  for (int j = 0; j < 8; ++j) c[j] = grid.code_by_inverse(to_float(eight.values[j]));
  uint64_t keep = i + 8 <= K ? ~0ull : i < K ? ~0ull >> (8 * (i + 8 - K)) : 0;
  return make_uint2(low_bytes(c[0], c[1], c[2], c[3]) & static_cast<uint32_t>(keep),
                    low_bytes(c[4], c[5], c[6], c[7]) & static_cast<uint32_t>(keep >> 32));
}

DEVICE void store_fragments(uint8_t* codes, int M, int m, int k, uint2 w) {  // columns k to k + 7
  uint32_t* to = fragment(codes, M, m, k);
  to[0] = w.x, to[2] = w.y;
}

DEVICE int sum8(uint2 w) { return static_cast<int>(dot4(w.x, 0x01010101u, dot4(w.y, 0x01010101u, 0u))); }

// All threads of the block get the range of all of them.  memory: 2 words for each warp, at most 32 of them.
DEVICE Range block_range(Range r, int* memory) {
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32, warps = blockDim.x / 32;
  r = warp_range(r);
  if (lane == 0) memory[warp] = ordered(r.lo), memory[warps + warp] = ordered(r.hi);
  __syncthreads();
  int lo = lane < warps ? memory[lane] : 0, hi = lane < warps ? memory[warps + lane] : 0;  // ordered(0)
  return {unordered(warp_min(lo)), unordered(warp_max(hi))};
}

DEVICE int counted_rows(const Activations& a, int sequence) {
  return a.lengths ? max(0, min(a.T, a.lengths[sequence])) : a.T;
}

// First pass: ranges[units,parts], a unit being a sequence, or a token that has a range of its own.  Block (unit, part; y) sees rows
// [part * rows, (part + 1) * rows) of the unit, of them columns [y * width, (y + 1) * width).  It also clears `sums`, to which several blocks
// may add up in the second pass.
template <class Row>
__global__ void __launch_bounds__(kWideThreads)
range_kernel(Activations a, float2* ranges, int row_parts, int rows, int width, int* sums, int n_sums) {
  SHARED_MEMORY(shared);
  int unit = blockIdx.x / row_parts, unit_rows = a.per_token ? 1 : a.T, counted = a.per_token ? 1 : counted_rows(a, unit);
  int begin = blockIdx.x % row_parts * rows, end = min(begin + rows, counted);
  int block = blockIdx.x * gridDim.y + blockIdx.y, left = blockIdx.y * width, right = min(left + width, a.K);
  for (int i = block * blockDim.x + threadIdx.x; i < n_sums; i += gridDim.x * gridDim.y * blockDim.x) sums[i] = 0;
  float* of_row = reinterpret_cast<float*>(shared);
  Range r;
  Batch<typename Row::T, Row::WORDS> batch;
  for (int t = begin; t < end; ++t) r = widened(r, thread_range(batch, Row(a, unit * unit_rows + t, of_row), left, right));
  r = block_range(r, reinterpret_cast<int*>(shared + Row::BYTES));
  if (threadIdx.x == 0) ranges[block] = make_float2(r.lo, r.hi);
}

// Second pass, or the only one where a block finds the range of its row itself (parts == 0): block (row, part) quantizes `width` columns of a row, which are
// all of them in the latter case.  It also clears `tickets`.
template <class Row>
__global__ void __launch_bounds__(kWideThreads)
quantize_kernel(Activations a, const float2* ranges, int parts, int width, Codes out, uint32_t* tickets, int n_tickets) {
  SHARED_MEMORY(shared);
  using Loaded = Batch<typename Row::T, Row::WORDS>;
  int index = blockIdx.x, groups = (a.K + out.groupsize - 1) / out.groupsize;
  int begin = blockIdx.y * width, end = min(begin + width, a.Kp);
  int* sums = reinterpret_cast<int*>(shared + Row::BYTES);
  Row row(a, index, reinterpret_cast<float*>(shared));
  Loaded batch;
  Range r;
  int held = begin;  // the first column of the batch in the registers, which hold but one
  for (int first = begin, all = parts == 0 ? a.K : begin + 1; first < all; held = first, first += Loaded::columns()) {
    batch.load(row, first, min(end, a.K));
    if (parts == 0) r = widened(r, batch);
  }

  for (int i = (blockIdx.y * gridDim.x + index) * blockDim.x + threadIdx.x; i < n_tickets; i += gridDim.x * gridDim.y * blockDim.x) tickets[i] = 0;
  for (int i = threadIdx.x; i < groups; i += blockDim.x) sums[i] = 0;

  for (int i = threadIdx.x; i < parts; i += blockDim.x) {
    float2 part = ranges[static_cast<size_t>(a.per_token ? index : index / a.T) * parts + i];
    r = widened(r, Range{part.x, part.y});
  }
  Grid grid(block_range(r, sums + groups), a);  // waits for all threads, sums are cleared too
  if (threadIdx.x == 0 && begin == 0) out.scale[index] = grid.scale, out.zero[index] = grid.zero_code(a.levels);

  int total = 0;
  for (int first = begin; first < end; first += Loaded::columns()) {  // whole warps go round, as they add up together
    if (first != held) batch.load(row, first, min(end, a.K));
    held = -1;  // what comes next is another
    #pragma unroll
    for (int b = 0; b < Loaded::COUNT; ++b) {
      int i = Loaded::column(first, b), sum = 0;
      if (i < end) {
        uint2 w = codes8(batch.eights[b], row, i, a.K, grid, a.levels);
        if (out.layout == kFragments) store_fragments(out.codes, gridDim.x, index, i, w);
        else if (out.layout == kSwizzled) *swizzled(out.codes, out.pitch, index, i) = w;
        else *reinterpret_cast<uint2*>(out.codes + static_cast<size_t>(index) * a.Kp + i) = w;
        sum = sum8(w);
      }
      if (groups == 1) {
        total += sum;
      } else {
        for (int mask = 1; mask < 8; mask *= 2) sum += shuffle_xor(sum, mask);  // 64 columns are always of one group
        if (threadIdx.x % 8 == 0 && i < min(end, a.K)) atomicAdd(sums + i / out.groupsize, sum);
      }
    }
  }
  if (groups == 1) {
    total = warp_sum(total);
    if (threadIdx.x % 32 == 0) atomicAdd(sums, total);
  }
  __syncthreads();
  for (int i = threadIdx.x; i < groups; i += blockDim.x) {
    int* to = out.sums + static_cast<size_t>(i) * out.pitch + index;
    if (gridDim.y == 1) *to = sums[i];
    else if (sums[i]) atomicAdd(to, sums[i]);
  }
}
