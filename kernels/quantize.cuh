// codes[M,Kp] = quant(x[M,K]): u8, min-max, the range includes 0 or is symmetric about it; per row (token) or per T rows (sequence).  Any K; Kp % 64 == 0.
// The same arithmetic as act_codes in __init__.py, operation by operation.
#pragma once
#include "ptx.cuh"

enum Type { kHalf, kBfloat, kFloat };

struct Activations {
  const void* x;       // [B,T,K]
  const int* lengths;  // [B]: rows of a sequence that count for its range; or null: all
  int type, B, T, K, Kp;
  int levels;  // largest code, 2^bits - 1
  int per_token;
  int sym;  // whether the range is -max|x| to max|x|
};

struct Codes {
  uint8_t* codes;  // [M,Kp]
  float* scale;    // [M]
  int* zero;       // [M]
  int* sums;       // [G,pitch]: sum of the codes of each group of columns
  int pitch, groupsize;
};

constexpr int kQuantizeThreads = 256;

struct Range { float lo = 0, hi = 0; };  // 0 is always in

// Order of floats as order of ints, -0 below +0; NaN of positive sign above all.
DEVICE int ordered(float v) {
  int i = static_cast<int>(float_to_bits(v));
  return i ^ ((i >> 31) & 0x7fffffff);
}
DEVICE float unordered(int i) { return bits_to_float(static_cast<uint32_t>(i ^ ((i >> 31) & 0x7fffffff))); }

DEVICE Range widened(Range r, float v) { return {fminf(r.lo, v), max_or_nan(r.hi, v)}; }  // a NaN goes into hi, which is enough
DEVICE Range warp_range(Range r) { return {unordered(warp_min(ordered(r.lo))), unordered(warp_max(ordered(r.hi)))}; }

struct Grid {
  float scale, zero;
  DEVICE Grid(Range r, const Activations& a) {
    if (a.sym) r.hi = max_or_nan(-r.lo, r.hi), r.lo = -r.hi;
    scale = divide(add(r.hi, -r.lo), static_cast<float>(a.levels));
    if (scale == 0) scale = 1;
    zero = a.sym ? static_cast<float>((a.levels + 1) / 2) : rintf(divide(-r.lo, scale));
  }
  DEVICE uint32_t code(float x, int levels) const {
    return static_cast<uint32_t>(fminf(fmaxf(add(rintf(divide(x, scale)), zero), 0), static_cast<float>(levels)));
  }
  DEVICE int zero_code(int levels) const { return static_cast<int>(fminf(fmaxf(zero, 0), static_cast<float>(levels))); }
};

// x[i], ..., x[i+7]; 0 from x[end] on.  Rows of a multiple of 8 elements are aligned to 16 bytes and have nothing of another row in the eight.
template <class T>
DEVICE void load8(float (&v)[8], const T* x, int i, int end, bool aligned) {
  if (aligned) {
    union { uint4 words[sizeof(T) / 2]; T values[8]; } u = {};
    #pragma unroll
    for (int j = 0; j < static_cast<int>(sizeof(T) / 2); ++j) u.words[j] = reinterpret_cast<const uint4*>(x + i)[j];
    #pragma unroll
    for (int j = 0; j < 8; ++j) v[j] = to_float(u.values[j]);
  } else {
    #pragma unroll
    for (int j = 0; j < 8; ++j) v[j] = i + j < end ? to_float(x[i + j]) : 0.f;
  }
}

// The range of x[0..end) as `threads` threads see it; each sees a part.
template <class T>
DEVICE Range thread_range(const T* x, int end, bool aligned, int thread, int threads) {
  Range r;
  for (int i = 8 * thread; i < end; i += 8 * threads) {
    float v[8];
    load8(v, x, i, end, aligned);
    #pragma unroll
    for (int j = 0; j < 8; ++j) r = widened(r, v[j]);
  }
  return r;
}

// The eight codes of x[i..i+8), packed, 0 from x[K] on.
template <class T>
DEVICE uint2 codes8(const T* x, int i, int K, bool aligned, const Grid& grid, int levels) {
  uint32_t w[2] = {};
  if (i < K) {
    float v[8];
    load8(v, x, i, K, aligned);
    #pragma unroll
    for (int j = 0; j < 8; ++j)
      if (i + j < K) w[j / 4] |= grid.code(v[j], levels) << (8 * (j % 4));
  }
  return make_uint2(w[0], w[1]);
}

DEVICE int sum8(uint2 w) { return static_cast<int>(dot4(w.x, 0x01010101u, dot4(w.y, 0x01010101u, 0u))); }

// All threads of the block get the range of all of them.  memory: 2 words for each warp.
DEVICE Range block_range(Range r, int* memory) {
  int warp = threadIdx.x / 32, warps = blockDim.x / 32;
  r = warp_range(r);
  if (threadIdx.x % 32 == 0) memory[warp] = ordered(r.lo), memory[warps + warp] = ordered(r.hi);
  __syncthreads();
  int lo = memory[0], hi = memory[warps];
  for (int i = 1; i < warps; ++i) lo = min(lo, memory[i]), hi = max(hi, memory[warps + i]);
  return {unordered(lo), unordered(hi)};
}

DEVICE int counted_rows(const Activations& a, int sequence) {
  return a.lengths ? max(0, min(a.T, a.lengths[sequence])) : a.T;
}

// First pass, per sequence: ranges[B,parts], block (sequence, part) sees rows [part * rows, (part + 1) * rows).
template <class T>
__global__ void __launch_bounds__(kQuantizeThreads) range_kernel(Activations a, float2* ranges, int parts, int rows) {
  SHARED_MEMORY(shared);
  int sequence = blockIdx.x / parts, part = blockIdx.x % parts;
  int begin = part * rows, end = min(begin + rows, counted_rows(a, sequence));
  Range r;
  for (int t = begin; t < end; ++t) {
    const T* x = static_cast<const T*>(a.x) + (static_cast<size_t>(sequence) * a.T + t) * a.K;
    Range row = thread_range(x, a.K, a.K % 8 == 0, threadIdx.x, blockDim.x);
    r = {fminf(r.lo, row.lo), max_or_nan(r.hi, row.hi)};
  }
  r = block_range(r, reinterpret_cast<int*>(shared));
  if (threadIdx.x == 0) ranges[blockIdx.x] = make_float2(r.lo, r.hi);
}

// Second pass, or the only one where a row has a range of its own (parts == 0): one block quantizes one row.  It also clears `tickets`.
template <class T>
__global__ void __launch_bounds__(kQuantizeThreads)
quantize_kernel(Activations a, const float2* ranges, int parts, Codes out, uint32_t* tickets, int n_tickets) {
  SHARED_MEMORY(shared);
  int row = blockIdx.x, groups = (a.K + out.groupsize - 1) / out.groupsize;
  bool aligned = a.K % 8 == 0;
  int* sums = reinterpret_cast<int*>(shared);
  const T* x = static_cast<const T*>(a.x) + static_cast<size_t>(row) * a.K;

  for (int i = row * blockDim.x + threadIdx.x; i < n_tickets; i += gridDim.x * blockDim.x) tickets[i] = 0;
  for (int i = threadIdx.x; i < groups; i += blockDim.x) sums[i] = 0;

  Range r;
  if (parts == 0) {
    r = thread_range(x, a.K, aligned, threadIdx.x, blockDim.x);
  } else {
    for (int i = threadIdx.x; i < parts; i += blockDim.x) {
      float2 part = ranges[static_cast<size_t>(row / a.T) * parts + i];
      r = {fminf(r.lo, part.x), max_or_nan(r.hi, part.y)};
    }
  }
  Grid grid(block_range(r, sums + groups), a);  // waits for all threads, sums are cleared too
  if (threadIdx.x == 0) out.scale[row] = grid.scale, out.zero[row] = grid.zero_code(a.levels);

  for (int first = 0; first < a.Kp; first += 8 * blockDim.x) {  // whole warps go round, as they add up together
    int i = first + 8 * threadIdx.x;
    int sum = 0;
    if (i < a.Kp) {
      uint2 w = codes8(x, i, a.K, aligned, grid, a.levels);
      *reinterpret_cast<uint2*>(out.codes + static_cast<size_t>(row) * a.Kp + i) = w;
      sum = sum8(w);
    }
    for (int mask = 1; mask < 8; mask *= 2) sum += shuffle_xor(sum, mask);  // 64 columns are always of one group
    if (threadIdx.x % 8 == 0 && i < a.K) atomicAdd(sums + i / out.groupsize, sum);
  }
  __syncthreads();
  for (int i = threadIdx.x; i < groups; i += blockDim.x) out.sums[static_cast<size_t>(i) * out.pitch + row] = sums[i];
}
