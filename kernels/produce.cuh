// What is quantized: x itself, its RMSNorm, or the product of a gate's SiLU with what it lets through.  Made of x, a row at a time, in the pass that
// quantizes.  The same arithmetic as rms_norm and gated_silu in __init__.py, operation by operation.
#pragma once
#include "ptx.cuh"

enum Type { kHalf, kBfloat, kFloat };
enum Producer { kNothing, kNorm, kGate };

struct Activations {
  const void* x;       // [B,T,K], or [B,T,2K]: gate and up side by side
  const int* lengths;  // [B]: rows of a sequence that count for its range; or null: all
  const void* norm;    // [K], the norm's weight, of the type of x
  float eps;           // of the norm
  int type, B, T, K, Kp;
  int levels;  // largest code, 2^bits - 1
  int per_token;
  int sym;  // whether the range is -max|x| to max|x|
};

// Eight elements of a row, as they lie in memory.
template <class T>
struct alignas(16) Eight { T values[8]; };

// x[i], ..., x[i+7], i < end; 0 from x[end] on.  Rows of a multiple of 8 elements are aligned to 16 bytes and have nothing of another row in the eight.
template <class T>
DEVICE Eight<T> load8(const T* x, int i, int end) {
  union { uint4 words[sizeof(T) / 2]; Eight<T> eight; } u = {};
  if (end % 8 == 0) {
    #pragma unroll
    for (int j = 0; j < static_cast<int>(sizeof(T) / 2); ++j) u.words[j] = reinterpret_cast<const uint4*>(x + i)[j];
  } else {
    #pragma unroll
    for (int j = 0; j < 8; ++j)
      if (i + j < end) u.eight.values[j] = x[i + j];
  }
  return u.eight;
}

// What a thread has of a row at a time: so many eights, 8 * blockDim.x columns apart.
template <class T, int WORDS>
struct Batch {
  static constexpr int COUNT = WORDS / static_cast<int>(2 * sizeof(T));  // WORDS registers
  Eight<T> eights[COUNT];
  DEVICE static int columns() { return 8 * blockDim.x * COUNT; }  // of all threads
  DEVICE static int column(int first, int i) { return first + 8 * (threadIdx.x + i * blockDim.x); }
  template <class Row>
  DEVICE void load(const Row& row, int first, int end) {  // 0 from column `end` of the row on
    #pragma unroll
    for (int i = 0; i < COUNT; ++i) {
      int c = column(first, i);
      eights[i] = c < end ? row.eight(c) : Eight<T>{};
    }
  }
};

// A row of what is quantized: eight(i), i < K, is its columns i to i + 7, 0 from column K on; at(i) is one of them.  All threads of a block make it, as they
// may have to read all of it first; memory: kRowBytes of shared memory.
constexpr int kRowColumns = 256;                     // of a warp's eights
constexpr int kRowBytes = 65536 / kRowColumns * 4;   // a sum for each

template <class T_>
struct PlainRow {
  using T = T_;
  static constexpr int BYTES = 0, WORDS = 16;  // of memory; registers of a batch
  const T* x;
  int K;
  DEVICE PlainRow(const T* x, int K) : x(x), K(K) {}
  DEVICE PlainRow(const Activations& a, int row, float*) : x(static_cast<const T*>(a.x) + static_cast<size_t>(row) * a.K), K(a.K) {}
  DEVICE Eight<T> eight(int i) const { return load8(x, i, K); }
  DEVICE float at(int i) const { return to_float(x[i]); }
};

// In this order: the squares of eight columns, one after the other; then those sums in pairs, the pairs in pairs, and so on.
template <class T>
DEVICE float sum_of_squares(const PlainRow<T>& row, float* memory) {
  int lane = threadIdx.x % 32;
  auto in_pairs = [](float sum) {
    #pragma unroll
    for (int mask = 1; mask < 32; mask *= 2) sum = add(sum, bits_to_float(shuffle_xor(float_to_bits(sum), mask)));
    return sum;
  };
  __syncthreads();  // all have read the sums of a row before
  Batch<T, 16> batch;
  for (int first = 0; first < row.K; first += batch.columns()) {
    batch.load(row, first, row.K);
    #pragma unroll
    for (int b = 0; b < batch.COUNT; ++b) {
      int of_warp = batch.column(first, b) - 8 * lane;
      if (of_warp >= row.K) continue;
      float sum = 0;
      #pragma unroll
      for (int j = 0; j < 8; ++j) {
        float v = to_float(batch.eights[b].values[j]);
        sum = add(sum, multiply(v, v));
      }
      sum = in_pairs(sum);
      if (lane == 0) memory[of_warp / kRowColumns] = sum;
    }
  }
  __syncthreads();
  int sums = (row.K + kRowColumns - 1) / kRowColumns;
  float parts[8];
  #pragma unroll
  for (int j = 0; j < 8; ++j) parts[j] = 8 * lane + j < sums ? memory[8 * lane + j] : 0;
  #pragma unroll
  for (int n = 4; n > 0; n /= 2) {
    #pragma unroll
    for (int j = 0; j < n; ++j) parts[j] = add(parts[2 * j], parts[2 * j + 1]);
  }
  return in_pairs(parts[0]);
}

template <class T_>
struct NormedRow {
  using T = T_;
  static constexpr int BYTES = kRowBytes, WORDS = 8;  // the weight takes as many
  PlainRow<T> x, weight;
  float factor;  // 1 / sqrt(mean square + eps)
  DEVICE NormedRow(const Activations& a, int row, float* memory) : x(a, row, memory), weight(static_cast<const T*>(a.norm), a.K) {
    float mean = divide(sum_of_squares(x, memory), static_cast<float>(a.K));
    factor = divide(1, square_root(add(mean, a.eps)));
  }
  DEVICE T normed(T v, T w) const {
    from_float(v, multiply(to_float(v), factor));
    from_float(v, multiply(to_float(w), to_float(v)));
    return v;
  }
  DEVICE Eight<T> eight(int i) const {
    Eight<T> v = x.eight(i), w = weight.eight(i);
    #pragma unroll
    for (int j = 0; j < 8; ++j) v.values[j] = normed(v.values[j], w.values[j]);
    return v;
  }
  DEVICE float at(int i) const { return to_float(normed(x.x[i], weight.x[i])); }
};

// e^t, -32 <= t <= 88, within 3 units of its last place.
DEVICE float exponential(float t) {
  float biased = add(multiply(t, 1.44269504f), 12582912.f);  // 1.5 * 2^23: rounds to a whole number; e^t = 2^n e^r
  float n = add(biased, -12582912.f);
  float r = add(add(t, multiply(n, -0.693359375f)), multiply(n, 2.12194440e-4f));
  float p = static_cast<float>(1. / 720);
  constexpr float kFactors[] = {1. / 120, 1. / 24, 1. / 6, 1. / 2, 1, 1};
  #pragma unroll
  for (int i = 0; i < 6; ++i) p = add(multiply(p, r), kFactors[i]);
  return multiply(p, bits_to_float((float_to_bits(biased) + 127) << 23));
}

template <class T_>
struct GatedRow {
  using T = T_;
  static constexpr int BYTES = 0, WORDS = 16;
  PlainRow<T> gate, up;
  DEVICE GatedRow(const Activations& a, int row, float*)
      : gate(static_cast<const T*>(a.x) + static_cast<size_t>(row) * 2 * a.K, a.K), up(gate.x + a.K, a.K) {}
  DEVICE static T gated(T gate, T up) {
    float v = to_float(gate);
    from_float(gate, divide(v, add(exponential(fminf(fmaxf(-v, -32), 88)), 1)));
    from_float(gate, multiply(to_float(gate), to_float(up)));
    return gate;
  }
  DEVICE Eight<T> eight(int i) const {
    Eight<T> v = gate.eight(i), u = up.eight(i);
    #pragma unroll
    for (int j = 0; j < 8; ++j) v.values[j] = gated(v.values[j], u.values[j]);
    return v;
  }
  DEVICE float at(int i) const { return to_float(gated(gate.x[i], up.x[i])); }
};
