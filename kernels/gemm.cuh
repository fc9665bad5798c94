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
  static constexpr int STAGES = STAGES_;    // of the pipeline
  static constexpr bool GROUPED = GROUPED_;
  static constexpr int WARPS_N = BN / WN, WARPS_M = BM / WM, THREADS = 32 * WARPS_N * WARPS_M;
  static constexpr int WEIGHT_BYTES = BN * BK / 2, X_BYTES = BM * BK;
  static constexpr int STAGE_BYTES = WEIGHT_BYTES + X_BYTES;
  static constexpr int GROUP_BYTES = GROUPED ? (3 * BN + BM) * 4 : 0;  // scale, zero, colsum; sums
  static constexpr int GROUP_SLOTS = STAGES + 1;  // a group is read when the next stage may already be loaded into its own
  static constexpr int VALUES = (WN / 16) * (WM / 8) * 4;  // per thread
  // Two blocks on an SM where registers allow: one's epilogue then overlaps the other's products.
  static constexpr int BLOCKS = !GROUPED && VALUES * THREADS <= 16384 ? 2 : 1;
  static_assert(WN % 32 == 0 && WM % 16 == 0 && BN % 128 == 0 && 128 % BM == 0, "whole fragments, rows padded to 128");

  static constexpr int PITCH = BN + 4;               // of [WM][BN] sums: a warp's fragments fall into different banks
  static constexpr int LOOP_BYTES = STAGES * STAGE_BYTES + GROUP_SLOTS * GROUP_BYTES, OUTPUT_BYTES = WM * PITCH * 4;
  static constexpr int SHARED_BYTES = OUTPUT_BYTES > LOOP_BYTES ? OUTPUT_BYTES : LOOP_BYTES;
};

// Counts blocks of columns from the beginning of a group: which group, which of `slots` is its, and whether it ends; without a division a step.
struct GroupCounter {
  int per_group, slots, group, left, slot = 0;
  DEVICE GroupCounter(int per_group, int begin, int slots) : per_group(per_group), slots(slots), group(begin / per_group), left(per_group) {}
  DEVICE bool starts() const { return left == per_group; }
  DEVICE bool ends(bool last_column) const { return left == 1 || last_column; }
  DEVICE void advance() {
    if (--left == 0) ++group, left = per_group, slot = slot == slots - 1 ? 0 : slot + 1;
  }
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

  // What this thread copies of the next stage: vectors of 16 bytes that lie a fixed distance apart, here and in shared memory.
  constexpr int kWeightRounds = Tl::WEIGHT_BYTES / 16 / Tl::THREADS, kRows = Tl::THREADS / 4, kXRounds = (Tl::BM + kRows - 1) / kRows;
  static_assert(Tl::THREADS % 64 == 0 && kRows % 8 == 0, "64 vectors of the weight for 32 rows; the swizzle repeats after 8 rows of x");
  int m = threadIdx.x / 4, rows = min(p.M - m0, Tl::BM) - m;  // beyond M nothing is read
  const uint8_t* next_weight = reinterpret_cast<const uint8_t*>(
      p.weight + static_cast<size_t>(n0 / 32 + threadIdx.x / 64) * p.Kp + 64 * k.begin + threadIdx.x % 64);
  const uint8_t* next_x = p.x.codes + static_cast<size_t>(m0 + m) * p.Kp + Tl::BK * k.begin + 16 * (threadIdx.x % 4);
  size_t weight_step = static_cast<size_t>(Tl::THREADS / 64 * 16) * p.Kp, x_step = static_cast<size_t>(kRows) * p.Kp;
  int x_to = Tl::WEIGHT_BYTES + x_offset(m, threadIdx.x % 4);
  auto load = [&](uint8_t* stage) {
    #pragma unroll
    for (int i = 0; i < kWeightRounds; ++i) cp_async_16(stage + 16 * (threadIdx.x + i * Tl::THREADS), next_weight + i * weight_step);
    #pragma unroll
    for (int i = 0; i < kXRounds; ++i)
      if (Tl::BM % kRows == 0 || m < Tl::BM) cp_async_16(stage + x_to + 64 * kRows * i, next_x + i * x_step, kRows * i < rows);
    next_weight += 2 * 512, next_x += Tl::BK;
  };
  uint8_t* groups = shared + Tl::STAGES * Tl::STAGE_BYTES;
  auto load_group = [&](int slot, int group) {
    uint8_t* to = groups + slot * Tl::GROUP_BYTES;
    share_out<(3 * Tl::BN + Tl::BM) / 4, Tl::THREADS>([&](int i) {
      int which = i / (Tl::BN / 4), j = 4 * (i % (Tl::BN / 4));
      size_t at = static_cast<size_t>(group) * p.Np + n0 + j;
      const void* from = which == 0   ? static_cast<const void*>(p.scale + at)
                         : which == 1 ? static_cast<const void*>(p.zero + at)
                         : which == 2 ? static_cast<const void*>(p.colsum + at)
                                      : static_cast<const void*>(p.x.sums + static_cast<size_t>(group) * p.x.pitch + m0 + j);
      cp_async_16(to + 16 * i, from);
    });
  };
  // The next stage to be loaded, if any is left; one group of copies in any case.
  int next = k.begin, load_at = 0;  // the latter in bytes, as all places of stages
  GroupCounter next_group(per_group, k.begin, Tl::GROUP_SLOTS);
  auto behind = [](int stage) { return stage == (Tl::STAGES - 1) * Tl::STAGE_BYTES ? 0 : stage + Tl::STAGE_BYTES; };
  auto load_next = [&]() {
    if (next < k.end) {
      load(shared + load_at);
      load_at = behind(load_at);
      if (Tl::GROUPED) {
        if (next_group.ends(next == blocks - 1)) load_group(next_group.slot, next_group.group);
        next_group.advance();
      }
      ++next;
    }
    cp_async_commit();
  };

  uint32_t acc[Tl::VALUES] = {};
  float sums[Tl::GROUPED ? Tl::VALUES : 1] = {};
  int x_zero[Tl::GROUPED ? Tl::WM / 4 : 1] = {};
  if (Tl::GROUPED) {
    #pragma unroll  // rows beyond M are there, with anything in them
    for (int j = 0; j < Tl::WM / 4; ++j) x_zero[Tl::GROUPED ? j : 0] = p.x.zero[m0 + wm * Tl::WM + 8 * (j / 2) + 2 * t + j % 2];
  }

  // Fragments of a stage's columns 0-31 and 32-63: while one half is multiplied the other is on its way, across the barrier too.
  uint4 w[2][Tl::WN / 32];
  uint32_t x[2][Tl::WM / 8][2];
  const uint8_t* weight_from = shared + (wn * (Tl::WN / 32) * 64 + lane) * 16;
  const uint8_t* x_from[2];
  #pragma unroll
  for (int half = 0; half < 2; ++half)
    x_from[half] = shared + Tl::WEIGHT_BYTES + x_offset(wm * Tl::WM + lane / 16 * 8 + lane % 8, 2 * half + lane / 8 % 2);
  auto fetch = [&](int half, int stage) {
    #pragma unroll
    for (int i = 0; i < Tl::WN / 32; ++i) w[half][i] = *reinterpret_cast<const uint4*>(weight_from + stage + (2 * i + half) * 512);
    #pragma unroll
    for (int j = 0; j < Tl::WM / 16; ++j) {
      uint32_t r[4];  // rows 0-7, columns 0-15 and 16-31; rows 8-15
      ldmatrix_x4(r, x_from[half] + stage + 16 * 64 * j);
      x[half][2 * j][0] = r[0], x[half][2 * j][1] = r[1], x[half][2 * j + 1][0] = r[2], x[half][2 * j + 1][1] = r[3];
    }
  };
  auto multiply_half = [&](int half) {
    #pragma unroll
    for (int i = 0; i < Tl::WN / 32; ++i) {
      uint32_t low[4], high[4];
      unpack(low, high, w[half][i]);
      #pragma unroll
      for (int j = 0; j < Tl::WM / 8; ++j) {
        mma_u8(reinterpret_cast<uint32_t(&)[4]>(acc[((2 * i) * (Tl::WM / 8) + j) * 4]), low, x[half][j][0], x[half][j][1]);
        mma_u8(reinterpret_cast<uint32_t(&)[4]>(acc[((2 * i + 1) * (Tl::WM / 8) + j) * 4]), high, x[half][j][0], x[half][j][1]);
      }
    }
  };
  auto add_group = [&](int slot) {
    const uint8_t* group = groups + slot * Tl::GROUP_BYTES;
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
  };

  for (int s = 0; s < Tl::STAGES; ++s) load_next();
  cp_async_wait<Tl::STAGES - 1>();
  __syncthreads();
  if (k.begin < k.end) fetch(0, 0);
  int stage = 0;
  GroupCounter at(per_group, k.begin, Tl::GROUP_SLOTS);
  for (int kb = k.begin; kb < k.end; ++kb) {
    fetch(1, stage);
    multiply_half(0);
    cp_async_wait<Tl::STAGES - 2>();
    __syncthreads();  // the next stage is there for all warps, and all have fetched this one, which can be loaded again
    stage = behind(stage);
    fetch(0, stage);  // behind the last stage anything, which is not used
    load_next();
    multiply_half(1);
    if (Tl::GROUPED) {
      if (at.ends(kb == blocks - 1)) add_group(at.slot);
      at.advance();
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
