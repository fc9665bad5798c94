// The same product for M <= 16: a block has 32 rows of the weight, which its warps stream from memory into registers, each its own columns.
#pragma once
#include "gemm.cuh"

template <int TOKENS_, bool FUSED_, bool GROUPED_>
struct Decode {
  static constexpr int TOKENS = TOKENS_;        // 8 or 16: columns of the MMA
  static constexpr bool FUSED = FUSED_;         // quantizes x itself, in shared memory, every block all of it
  static constexpr bool GROUPED = GROUPED_;
  static constexpr int WARPS = 8, THREADS = 32 * WARPS;
  static constexpr int AHEAD = TOKENS == 16 && GROUPED ? 4 : 8;  // loads of 512 bytes that a warp has in flight, as registers allow
  static constexpr int TILES = TOKENS / 8;
  static constexpr int PITCH = 36;              // of [TOKENS][32] words: a warp's fragments fall into different banks
  static constexpr int VALUES = 32 * TOKENS;    // of a block
  static constexpr int PARTIAL_BYTES = WARPS * TOKENS * PITCH * 4;
  static constexpr int RANGE_BYTES = TOKENS * WARPS * 2 * 4;

  static constexpr int BLOCKS = TOKENS == 8 && !GROUPED ? 3 : 2;  // on a multiprocessor, as registers allow

  static int shared_bytes(int M, int Kp, int groups) {
    return PARTIAL_BYTES + (FUSED ? RANGE_BYTES + TOKENS * 8 + groups * TOKENS * 4 + M * Kp : 0);
  }
};

// x to codes, scales, zeros and sums in shared memory.
template <class D, class T>
DEVICE void quantize_block(const Activations& a, const Codes& out, int* ranges) {
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32, M = a.B * a.T;
  if (threadIdx.x < M) out.sums[threadIdx.x] = 0;
  for (int m = 0; m < M; ++m) {
    Batch<T, 16> batch;
    Range r = warp_range(thread_range(batch, PlainRow<T>(a, m, nullptr), 0, a.K));
    if (lane == 0) ranges[(m * D::WARPS + warp) * 2] = ordered(r.lo), ranges[(m * D::WARPS + warp) * 2 + 1] = ordered(r.hi);
  }
  __syncthreads();
  for (int m = 0; m < M; ++m) {
    int first = m, last = m + 1;  // rows that share the range of row m
    if (!a.per_token) first = m / a.T * a.T, last = first + counted_rows(a, m / a.T);
    int lo = 0, hi = 0;  // ordered(0)
    for (int i = first * D::WARPS + lane; i < last * D::WARPS; i += 32) lo = min(lo, ranges[2 * i]), hi = max(hi, ranges[2 * i + 1]);
    Grid grid({unordered(warp_min(lo)), unordered(warp_max(hi))}, a);
    if (threadIdx.x == 0) out.scale[m] = grid.scale, out.zero[m] = grid.zero_code(a.levels);
    PlainRow<T> row(a, m, nullptr);
    Batch<T, 8> batch;  // for more there are no registers beside the weight's
    int total = 0;
    for (int begin = 0; begin < a.Kp; begin += batch.columns()) {
      batch.load(row, begin, a.K);
      #pragma unroll
      for (int b = 0; b < batch.COUNT; ++b) {
        int i = batch.column(begin, b);
        if (i >= a.Kp) continue;
        uint2 w = codes8(batch.eights[b], row, i, a.K, grid, a.levels);
        store_fragments(out.codes, M, m, i, w);
        total += sum8(w);
      }
    }
    if (!D::GROUPED) {
      total = warp_sum(total);
      if (lane == 0) atomicAdd(out.sums + m, total);
    }
  }
  __syncthreads();
  if (!D::GROUPED) return;
  int groups = (a.K + out.groupsize - 1) / out.groupsize;
  for (int i = warp; i < groups * M; i += D::WARPS) {
    int group = i / M, m = i % M, end = min((group + 1) * out.groupsize, a.Kp);
    uint32_t sum = 0;
    for (int k = group * out.groupsize + 4 * lane; k < end; k += 128)
      sum = dot4(*fragment(out.codes, M, m, k), 0x01010101u, sum);
    int total = warp_sum(static_cast<int>(sum));
    if (lane == 0) out.sums[group * out.pitch + m] = total;
  }
  __syncthreads();
}

template <class D>
__global__ void __launch_bounds__(D::THREADS, D::BLOCKS) decode_kernel(Problem p, Activations a) {
  SHARED_MEMORY(shared);
  int lane = threadIdx.x % 32, warp = threadIdx.x / 32, g = lane / 4, t = lane % 4;
  int n0 = blockIdx.x * 32, blocks = p.Kp / 32, per_group = D::GROUPED ? p.x.groupsize / 32 : 1;
  Span k = span(blocks, per_group, blockIdx.y * D::WARPS + warp, p.splits * D::WARPS);
  const uint4* weight = p.weight + static_cast<size_t>(blockIdx.x) * blocks * 32 + lane;

  uint4 w[D::AHEAD];
  #pragma unroll
  for (int u = 0; u < D::AHEAD; ++u)  // on their way while x is quantized
    if (k.begin + u < k.end) w[u] = load_once(weight + static_cast<size_t>(k.begin + u) * 32);

  Codes x = p.x;
  if constexpr (D::FUSED) {
    uint8_t* next = shared + D::PARTIAL_BYTES;
    auto take = [&](int bytes) { uint8_t* taken = next; next += bytes; return taken; };
    int* ranges = reinterpret_cast<int*>(take(D::RANGE_BYTES));
    x.scale = reinterpret_cast<float*>(take(D::TOKENS * 4));
    x.zero = reinterpret_cast<int*>(take(D::TOKENS * 4));
    x.pitch = D::TOKENS;
    x.sums = reinterpret_cast<int*>(take((a.K + x.groupsize - 1) / x.groupsize * D::TOKENS * 4));
    x.codes = next;
    if (a.type == kHalf) quantize_block<D, half_t>(a, x, ranges);
    else if (a.type == kBfloat) quantize_block<D, bfloat_t>(a, x, ranges);
    else quantize_block<D, float>(a, x, ranges);
  }

  const uint8_t* codes[D::TILES];  // this lane's row of x; the last rows again beyond M, whose products nobody reads
  #pragma unroll
  for (int j = 0; j < D::TILES; ++j) codes[j] = x.codes + 32 * min(8 * j + g, p.M - 1) + 8 * t;

  uint32_t ahead[D::FUSED ? 1 : D::AHEAD][D::TILES][2];  // codes on their way too, if they are not in shared memory
  auto load_codes = [&](uint32_t (&b)[D::TILES][2], int kb) {
    #pragma unroll
    for (int j = 0; j < D::TILES; ++j) {
      uint2 both = *reinterpret_cast<const uint2*>(codes[j] + 32 * p.M * kb);
      b[j][0] = both.x, b[j][1] = both.y;
    }
  };
  if (!D::FUSED) {
    #pragma unroll
    for (int u = 0; u < D::AHEAD; ++u)
      if (k.begin + u < k.end) load_codes(ahead[D::FUSED ? 0 : u], k.begin + u);
  }

  uint32_t acc[2][D::TILES][4] = {};
  float sums[D::GROUPED ? 2 : 1][D::TILES][4] = {};
  int x_zero[D::TILES][2] = {};
  float scale[2][2] = {};
  int zero[2][2] = {}, colsum[2][2] = {};
  if (D::GROUPED) {
    #pragma unroll
    for (int j = 0; j < D::TILES; ++j)
      x_zero[j][0] = x.zero[min(8 * j + 2 * t, p.M - 1)], x_zero[j][1] = x.zero[min(8 * j + 2 * t + 1, p.M - 1)];
  }

  GroupCounter group(per_group, k.begin, 1);
  for (int kb = k.begin; kb < k.end; kb += D::AHEAD) {
    #pragma unroll
    for (int u = 0; u < D::AHEAD; ++u) {
      int now = kb + u, later = now + D::AHEAD;
      if (now >= k.end) break;
      if (D::GROUPED && group.starts()) {  // needed when the group ends
        #pragma unroll
        for (int i = 0; i < 4; ++i) {
          size_t at = static_cast<size_t>(group.group) * p.Np + n0 + 8 * i + g;
          scale[i / 2][i % 2] = p.scale[at], zero[i / 2][i % 2] = p.zero[at], colsum[i / 2][i % 2] = p.colsum[at];
        }
      }
      uint32_t low[4], high[4], b[D::TILES][2];
      unpack(low, high, w[u]);
      if (D::FUSED) load_codes(b, now);
      #pragma unroll
      for (int j = 0; j < D::TILES; ++j) {
        if (!D::FUSED) b[j][0] = ahead[D::FUSED ? 0 : u][j][0], b[j][1] = ahead[D::FUSED ? 0 : u][j][1];
        mma_u8(acc[0][j], low, b[j][0], b[j][1]);
        mma_u8(acc[1][j], high, b[j][0], b[j][1]);
      }
      if (later < k.end) {
        w[u] = load_once(weight + static_cast<size_t>(later) * 32);
        if (!D::FUSED) load_codes(ahead[D::FUSED ? 0 : u], later);
      }
      if (D::GROUPED && group.ends(now == blocks - 1)) {
        const int* x_sum = x.sums + static_cast<size_t>(group.group) * x.pitch;
        #pragma unroll
        for (int j = 0; j < D::TILES; ++j) {
          #pragma unroll
          for (int c = 0; c < 4; ++c) {
            int sum = x_sum[min(8 * j + 2 * t + c % 2, p.M - 1)];
            #pragma unroll
            for (int h = 0; h < 2; ++h) {
              int v = centred(h ? acc[h][j][c] >> 4 : acc[h][j][c], zero[h][c / 2], sum, x_zero[j][c % 2], colsum[h][c / 2]);
              float& total = sums[D::GROUPED ? h : 0][j][c];
              total = fmaf(small_to_float(v), scale[h][c / 2], total);
              acc[h][j][c] = 0;
            }
          }
        }
      }
      if (D::GROUPED) group.advance();
    }
  }

  // The warps' sums meet in shared memory, the splits' in global memory.
  uint32_t* partial = reinterpret_cast<uint32_t*>(shared);
  #pragma unroll
  for (int h = 0; h < 2; ++h) {
    #pragma unroll
    for (int j = 0; j < D::TILES; ++j) {
      #pragma unroll
      for (int c = 0; c < 4; ++c) {
        int m = 8 * j + 2 * t + c % 2, n = 16 * h + 8 * (c / 2) + g;
        partial[(warp * D::TOKENS + m) * D::PITCH + n] =
            D::GROUPED ? float_to_bits(sums[D::GROUPED ? h : 0][j][c]) : h ? acc[h][j][c] >> 4 : acc[h][j][c];
      }
    }
  }
  __syncthreads();
  uint32_t values[D::VALUES / D::THREADS];  // thread i: elements i, i + THREADS of [TOKENS][32]
  #pragma unroll
  for (int i = 0; i < D::VALUES / D::THREADS; ++i) {
    int e = threadIdx.x + i * D::THREADS;
    uint32_t sum = 0;
    #pragma unroll
    for (int v = 0; v < D::WARPS; ++v) {
      uint32_t part = partial[(v * D::TOKENS + e / 32) * D::PITCH + e % 32];
      sum = D::GROUPED ? float_to_bits(add(bits_to_float(sum), bits_to_float(part))) : sum + part;
    }
    values[i] = sum;
  }
  if (p.splits > 1) {
    __syncthreads();  // all have read their parts, where the ticket goes
    if (!gather<D::GROUPED, D::THREADS>(values, p, blockIdx.x, blockIdx.y, partial)) return;
  }
  #pragma unroll
  for (int i = 0; i < D::VALUES / D::THREADS; ++i) {
    int e = threadIdx.x + i * D::THREADS, m = e / 32, n = n0 + e % 32;
    if (m >= p.M || n >= p.N) continue;
    float v = bits_to_float(values[i]);
    if (!D::GROUPED) v = multiply(static_cast<float>(centred(values[i], p.zero[n], x.sums[m], x.zero[m], p.colsum[n])), p.scale[n]);
    size_t at = static_cast<size_t>(m) * p.N + n;
    if (p.type == kHalf) static_cast<half_t*>(p.y)[at] = output<half_t>(v, x.scale[m], p.bias[n]);
    else if (p.type == kBfloat) static_cast<bfloat_t*>(p.y)[at] = output<bfloat_t>(v, x.scale[m], p.bias[n]);
    else static_cast<float*>(p.y)[at] = output<float>(v, x.scale[m], p.bias[n]);
  }
}
