// y[M,N] = x_scale[M] * sum_g scale[g,N] * (codes @ weight.T - zero * sums - x_zero * colsum)[g,M,N] + bias[N], for any M; tiles of BN x BM.
// The weight is the A operand of the MMA, so a tile of y is computed transposed: its fragments' rows are rows n of the weight, columns are m.
#pragma once
#include "quantize.cuh"

struct Problem {
  const uint4* weight;  // [Np/32,Kp/32,32] of pack_w4
  const float* scale;   // [G,Np]
  const int* zero;      // [G,Np]
  const int* colsum;    // [G,Np]
  const float* bias;    // [Np]
  Codes x;
  void* y;  // [M,N]
  int type, M, N, Np, Kp;
  int splits;         // blocks that share the columns of one tile
  uint32_t* slabs;    // what they computed: [tiles,splits,values of a tile]
  uint32_t* tickets;  // [tiles]: how many of them are done; 0 again when all are, so the product can run again on the same codes
};

// The blocks of columns that part i of `parts` works on: whole groups of `per_group` of them, so that no group's sum is divided.
struct Span { int begin, end; };
DEVICE Span span(int blocks, int per_group, int i, int parts) {
  int groups = (blocks + per_group - 1) / per_group;
  return {min(blocks, groups * i / parts * per_group), min(blocks, groups * (i + 1) / parts * per_group)};
}

// Rows 0-15 and 16-31 of a block of the weight; the latter's codes stand in the high nibble, so its sums are 16 times too large.
DEVICE void unpack(uint32_t (&low)[4], uint32_t (&high)[4], uint4 w) {
  constexpr uint32_t kLow = 0x0f0f0f0fu, kHigh = 0xf0f0f0f0u;
  low[0] = w.x & kLow, low[1] = w.y & kLow, low[2] = w.z & kLow, low[3] = w.w & kLow;
  high[0] = w.x & kHigh, high[1] = w.y & kHigh, high[2] = w.z & kHigh, high[3] = w.w & kHigh;
}

// sum (qx - x_zero) (qw - zero), from the sum of qx qw; unsigned, as overflow on the way is harmless.
DEVICE int centred(uint32_t sum, int zero, int x_sum, int x_zero, int colsum) {
  return static_cast<int>(sum - static_cast<uint32_t>(zero) * static_cast<uint32_t>(x_sum) -
                          static_cast<uint32_t>(x_zero) * static_cast<uint32_t>(colsum));
}

// float(v) for |v| < 2^22, by two additions: the conversion instruction has a fraction of their rate.
DEVICE float small_to_float(int v) { return bits_to_float(static_cast<uint32_t>(v) + 0x4b400000u) - 12582912.f; }
constexpr int kMaxGroup = 1024;  // columns, 1024 * 255 * 15 < 2^22

// Split-K.  True for the last block of a tile to arrive, which then has the sum over all splits of values[COUNT], in order of the splits
// whichever came last: the same bits every time.
template <bool FLOATS, int THREADS, int COUNT>
DEVICE bool gather(uint32_t (&values)[COUNT], const Problem& p, int tile, int split, uint32_t* shared_word) {
  uint32_t* slabs = p.slabs + static_cast<size_t>(tile) * p.splits * COUNT * THREADS + threadIdx.x;
  uint32_t* slab = slabs + static_cast<size_t>(split) * COUNT * THREADS;
  #pragma unroll
  for (int i = 0; i < COUNT; ++i) slab[i * THREADS] = values[i];
  __syncthreads();  // the whole block has written its slab
  if (threadIdx.x == 0) *shared_word = take_ticket(p.tickets + tile, p.splits);
  __syncthreads();
  if (*shared_word != static_cast<uint32_t>(p.splits - 1)) return false;
  #pragma unroll
  for (int i = 0; i < COUNT; ++i) values[i] = 0;
  for (int s = 0; s < p.splits; ++s, slabs += COUNT * THREADS) {
    #pragma unroll
    for (int i = 0; i < COUNT; ++i) {
      uint32_t part = load_shared_by_blocks(slabs + i * THREADS);
      values[i] = FLOATS ? float_to_bits(add(bits_to_float(values[i]), bits_to_float(part))) : values[i] + part;
    }
  }
  return true;
}

template <class T>
DEVICE T output(float value, float x_scale, float bias) {
  T y;
  from_float(y, add(multiply(value, x_scale), bias));
  return y;
}

// ---------------------------------------------------------------------------
// Tiles

template <int BN_, int BM_, int WN_, int WM_, int STAGES_, bool GROUPED_>
struct Tile {
  static constexpr int BN = BN_, BM = BM_;  // rows of the weight and of x per block
  static constexpr int WN = WN_, WM = WM_;  // ... and per warp
  static constexpr int BK = 64;             // columns per stage
  static constexpr int STAGES = STAGES_;    // of the pipeline, all but one being loaded
  static constexpr bool GROUPED = GROUPED_;
  static constexpr int WARPS_N = BN / WN, WARPS_M = BM / WM, THREADS = 32 * WARPS_N * WARPS_M;
  static constexpr int WEIGHT_BYTES = BN * BK / 2, X_BYTES = BM * BK;
  static constexpr int GROUP_BYTES = GROUPED ? (3 * BN + BM) * 4 : 0;  // scale, zero, colsum; sums
  static constexpr int STAGE_BYTES = WEIGHT_BYTES + X_BYTES + GROUP_BYTES;
  static constexpr int VALUES = (WN / 16) * (WM / 8) * 4;  // per thread
  // Two blocks on an SM where registers allow: one's epilogue then overlaps the other's products.
  static constexpr int BLOCKS = !GROUPED && VALUES <= 64 && THREADS <= 256 ? 2 : 1;
  static_assert(WN % 32 == 0 && WM % 8 == 0 && BN % 128 == 0 && 128 % BM == 0, "whole fragments, rows padded to 128");

  static constexpr int PITCH = BN + 4;               // of [WM][BN] sums: a warp's fragments fall into different banks
  static constexpr int OUTPUT_BYTES = WM * PITCH * 4;
  static constexpr int SHARED_BYTES = OUTPUT_BYTES > STAGES * STAGE_BYTES ? OUTPUT_BYTES : STAGES * STAGE_BYTES;
};

// f(0), ..., f(COUNT - 1), by the threads of a block, unrolled.
template <int COUNT, int THREADS, class F>
DEVICE void share_out(F f) {
  #pragma unroll
  for (int round = 0; round < (COUNT + THREADS - 1) / THREADS; ++round) {
    int i = round * THREADS + static_cast<int>(threadIdx.x);
    if (COUNT % THREADS == 0 || i < COUNT) f(i);
  }
}

// A stage of x: 64-byte rows in chunks of 16.  Eight rows at one chunk, as ldmatrix reads them, shall lie in different banks.
DEVICE int x_offset(int m, int chunk) { return m * 64 + ((chunk ^ ((m >> 1) & 3)) << 4); }

// Where a block finds its work: eight tiles of rows of x at a time, so that the weight's tiles are read from L2 by all but the first of them.
struct TilePlace { int n, m; };
DEVICE TilePlace tile_place(int tile, int tiles_n, int tiles_m) {
  constexpr int kRaster = 8;
  int before = tile / (kRaster * tiles_n) * kRaster, high = min(kRaster, tiles_m - before);
  int rest = tile - before * tiles_n;
  return {rest / high, before + rest % high};
}

// Sums of rows m0.. of x, [WM][PITCH] in shared memory, to y: four elements a thread, masked at the true M and N.
template <class Tl, class T>
DEVICE void finish_rows(const Problem& p, const uint32_t* sums, int n0, int m0) {
  constexpr int kVector = 4, kVectors = Tl::BN / kVector;
  struct alignas(kVector * sizeof(T)) Vector { T values[kVector]; } y;
  static_assert(Tl::THREADS % kVectors == 0, "a thread keeps to its rows of the weight");
  int n = threadIdx.x % kVectors * kVector;
  float scale[kVector], bias[kVector];
  int zero[kVector], colsum[kVector];
  #pragma unroll
  for (int j = 0; j < kVector; ++j) {
    bias[j] = p.bias[n0 + n + j];
    if (!Tl::GROUPED) scale[j] = p.scale[n0 + n + j], zero[j] = p.zero[n0 + n + j], colsum[j] = p.colsum[n0 + n + j];
  }
  for (int m = threadIdx.x / kVectors; m < Tl::WM && m0 + m < p.M; m += Tl::THREADS / kVectors) {
    int row = m0 + m, x_sum = Tl::GROUPED ? 0 : p.x.sums[row], x_zero = Tl::GROUPED ? 0 : p.x.zero[row];
    float x_scale = p.x.scale[row];
    #pragma unroll
    for (int j = 0; j < kVector; ++j) {
      uint32_t sum = sums[m * Tl::PITCH + n + j];
      float v = Tl::GROUPED ? bits_to_float(sum) : multiply(static_cast<float>(centred(sum, zero[j], x_sum, x_zero, colsum[j])), scale[j]);
      y.values[j] = output<T>(v, x_scale, bias[j]);
    }
    T* to = static_cast<T*>(p.y) + static_cast<size_t>(row) * p.N + n0 + n;
    if (p.N % kVector == 0) {
      if (n0 + n < p.N) *reinterpret_cast<Vector*>(to) = y;
    } else {
      #pragma unroll
      for (int j = 0; j < kVector; ++j)
        if (n0 + n + j < p.N) to[j] = y.values[j];
    }
  }
}

template <class Tl>
__global__ void __launch_bounds__(Tl::THREADS, Tl::BLOCKS) tile_kernel(Problem p) {
  SHARED_MEMORY(shared);
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  int wn = warp % Tl::WARPS_N, wm = warp / Tl::WARPS_N;
  int tiles_n = (p.N + Tl::BN - 1) / Tl::BN, tiles_m = (p.M + Tl::BM - 1) / Tl::BM;
  TilePlace place = tile_place(blockIdx.x, tiles_n, tiles_m);
  int n0 = place.n * Tl::BN, m0 = place.m * Tl::BM;
  int blocks = p.Kp / Tl::BK, per_group = Tl::GROUPED ? p.x.groupsize / Tl::BK : 1;
  Span k = span(blocks, per_group, blockIdx.y, p.splits);

  const uint4* weight = p.weight + static_cast<size_t>(n0) * (p.Kp / 32);
  const uint8_t* codes = p.x.codes + static_cast<size_t>(m0) * p.Kp;
  int rows = min(p.M - m0, Tl::BM);
  auto ends_group = [&](int kb) { return kb % per_group == per_group - 1 || kb == blocks - 1; };
  auto load = [&](int stage, int kb) {
    uint8_t* to = shared + stage * Tl::STAGE_BYTES;
    share_out<Tl::WEIGHT_BYTES / 16, Tl::THREADS>([&](int i) {  // 64 vectors for 32 rows
      cp_async_16(to + 16 * i, weight + (i / 64 * p.Kp + 64 * kb + i % 64));
    });
    to += Tl::WEIGHT_BYTES;
    share_out<Tl::X_BYTES / 16, Tl::THREADS>([&](int i) {
      int m = i / 4, chunk = i % 4;
      cp_async_16(to + x_offset(m, chunk), codes + (min(m, rows - 1) * p.Kp + kb * Tl::BK + 16 * chunk), m < rows);
    });
    to += Tl::X_BYTES;
    if (Tl::GROUPED && ends_group(kb)) {
      size_t group = kb / per_group;
      share_out<(3 * Tl::BN + Tl::BM) / 4, Tl::THREADS>([&](int i) {
        int which = i / (Tl::BN / 4), j = 4 * (i % (Tl::BN / 4));
        const void* from = which == 0   ? static_cast<const void*>(p.scale + group * p.Np + n0 + j)
                           : which == 1 ? static_cast<const void*>(p.zero + group * p.Np + n0 + j)
                           : which == 2 ? static_cast<const void*>(p.colsum + group * p.Np + n0 + j)
                                        : static_cast<const void*>(p.x.sums + group * p.x.pitch + m0 + j);
        cp_async_16(to + 16 * i, from);
      });
    }
  };

  uint32_t acc[Tl::VALUES] = {};
  float sums[Tl::GROUPED ? Tl::VALUES : 1] = {};
  int x_zero[Tl::GROUPED ? Tl::WM / 4 : 1] = {};
  if (Tl::GROUPED) {
    #pragma unroll  // rows beyond M are there, with anything in them
    for (int j = 0; j < Tl::WM / 4; ++j) x_zero[Tl::GROUPED ? j : 0] = p.x.zero[m0 + wm * Tl::WM + 8 * (j / 2) + 2 * t + j % 2];
  }

  #pragma unroll
  for (int s = 0; s < Tl::STAGES - 1; ++s) {
    if (k.begin + s < k.end) load(s, k.begin + s);
    cp_async_commit();
  }
  int now = 0, free = Tl::STAGES - 1;  // stages
  for (int kb = k.begin; kb < k.end; ++kb) {
    cp_async_wait<Tl::STAGES - 2>();
    __syncthreads();  // stage kb is there for all warps, and all have finished with stage kb - 1, which is the next to be loaded
    if (kb + Tl::STAGES - 1 < k.end) load(free, kb + Tl::STAGES - 1);
    cp_async_commit();

    const uint8_t* stage = shared + now * Tl::STAGE_BYTES;
    free = now;
    now = now == Tl::STAGES - 1 ? 0 : now + 1;
    const uint8_t* x_stage = stage + Tl::WEIGHT_BYTES;
    uint32_t x[Tl::WM / 8][4];
    #pragma unroll
    for (int j = 0; j < Tl::WM / 8; ++j) ldmatrix_x4(x[j], x_stage + x_offset(wm * Tl::WM + 8 * j + lane % 8, lane / 8));
    #pragma unroll
    for (int half = 0; half < 2; ++half) {
      #pragma unroll
      for (int i = 0; i < Tl::WN / 32; ++i) {
        uint32_t low[4], high[4];
        unpack(low, high, reinterpret_cast<const uint4*>(stage)[((wn * (Tl::WN / 32) + i) * 2 + half) * 32 + lane]);
        #pragma unroll
        for (int j = 0; j < Tl::WM / 8; ++j) {
          mma_u8(reinterpret_cast<uint32_t(&)[4]>(acc[((2 * i) * (Tl::WM / 8) + j) * 4]), low, x[j][2 * half], x[j][2 * half + 1]);
          mma_u8(reinterpret_cast<uint32_t(&)[4]>(acc[((2 * i + 1) * (Tl::WM / 8) + j) * 4]), high, x[j][2 * half], x[j][2 * half + 1]);
        }
      }
    }
    if (Tl::GROUPED && ends_group(kb)) {
      const uint8_t* group = x_stage + Tl::X_BYTES;
      const float* scale = reinterpret_cast<const float*>(group) + wn * Tl::WN;
      const int* zero = reinterpret_cast<const int*>(group) + Tl::BN + wn * Tl::WN;
      const int* colsum = zero + Tl::BN;
      const int* x_sum = reinterpret_cast<const int*>(group) + 3 * Tl::BN + wm * Tl::WM;
      #pragma unroll
      for (int i = 0; i < Tl::WN / 16; ++i) {
        #pragma unroll
        for (int r = 0; r < 2; ++r) {
          int n = 16 * i + 8 * r + g;
          #pragma unroll
          for (int j = 0; j < Tl::WM / 8; ++j) {
            #pragma unroll
            for (int c = 0; c < 2; ++c) {
              int at = (i * (Tl::WM / 8) + j) * 4 + 2 * r + c;
              uint32_t sum = i % 2 ? acc[at] >> 4 : acc[at];
              int v = centred(sum, zero[n], x_sum[8 * j + 2 * t + c], x_zero[Tl::GROUPED ? 2 * j + c : 0], colsum[n]);
              sums[Tl::GROUPED ? at : 0] = fmaf(small_to_float(v), scale[n], sums[Tl::GROUPED ? at : 0]);
              acc[at] = 0;
            }
          }
        }
      }
    }
  }
  cp_async_wait<0>();
  __syncthreads();  // shared memory is free

  if (Tl::GROUPED) {
    #pragma unroll
    for (int i = 0; i < Tl::VALUES; ++i) acc[i] = float_to_bits(sums[Tl::GROUPED ? i : 0]);
  }
  if (p.splits > 1) {
    if (!gather<Tl::GROUPED, Tl::THREADS>(acc, p, blockIdx.x, blockIdx.y, reinterpret_cast<uint32_t*>(shared))) return;
    __syncthreads();  // all have read the ticket, which lies where the output goes
  }
  // Through shared memory to y, as many rows of x at a time as a warp has.
  uint32_t* out = reinterpret_cast<uint32_t*>(shared);
  for (int slice = 0; slice < Tl::WARPS_M; ++slice) {
    if (wm == slice) {
      #pragma unroll
      for (int i = 0; i < Tl::WN / 16; ++i) {
        #pragma unroll
        for (int j = 0; j < Tl::WM / 8; ++j) {
          #pragma unroll
          for (int c = 0; c < 4; ++c) {
            uint32_t value = acc[(i * (Tl::WM / 8) + j) * 4 + c];
            out[(8 * j + 2 * t + c % 2) * Tl::PITCH + wn * Tl::WN + 16 * i + 8 * (c / 2) + g] = !Tl::GROUPED && i % 2 ? value >> 4 : value;
          }
        }
      }
    }
    __syncthreads();
    if (p.type == kHalf) finish_rows<Tl, half_t>(p, out, n0, m0 + slice * Tl::WM);
    else if (p.type == kBfloat) finish_rows<Tl, bfloat_t>(p, out, n0, m0 + slice * Tl::WM);
    else finish_rows<Tl, float>(p, out, n0, m0 + slice * Tl::WM);
    __syncthreads();
  }
}
