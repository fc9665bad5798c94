// The C interface: one call quantizes x and multiplies it, or does one of both, on the caller's stream, in memory that the
// caller owns.  It neither allocates nor waits, so a CUDA graph can capture it.  Called by cuda.py through ctypes.
#include <algorithm>

#include "decode.cuh"
#ifdef WGMMA  // build.py, for compute capability 9.0
#include "hopper.cuh"
#endif

struct Call {  // the same fields in the same order as Call in cuda.py
  const void* x;            // [B,T,K]; [B,T,2K] where it has a gate
  const int* lengths;       // [B], or null
  const void* norm;         // [K], the weight of a norm in front of it; or null
  const void* weight;       // of pack_w4
  const float* scale;       // [G,Np]
  const int* zero;          // [G,Np]
  const int* colsum;        // [G,Np]
  const float* bias;        // [Np]
  void* y;                  // [B,T,N]
  void* workspace;          // awrq_workspace() bytes, of any contents
  void* stream;
  int64_t workspace_bytes;
  int type;                 // of x and y: Type in quantize.cuh
  int B, T, K, N;
  int groupsize;            // K: one scale for a whole row
  int levels;               // 2^bits - 1
  int per_token;
  int sym;                  // activations: the range is -max|x| to max|x|
  int config;               // Config
  int splits;               // blocks that share the columns of a tile
  int steps;                // Steps
  int producer;             // Producer in produce.cuh
  float eps;                // of the norm
};

// The order of CONFIGS in cuda.py.
enum Config { kDecodeFused, kDecode, k128x16, k128x32, k128x64, k128x128, k256x128, kWgmma256x128, kConfigs };

//                               BN   BM   WN  WM  stages
template <bool G> using Tile16 = Tile<128, 16, 32, 16, 6, G>;
template <bool G> using Tile32 = Tile<128, 32, 32, 32, 5, G>;
template <bool G> using Tile64 = Tile<128, 64, 64, 32, 4, G>;
template <bool G> using Tile128 = Tile<128, 128, 64, G ? 32 : 64, 4, G>;  // groups have sums of their own, twice the registers
template <bool G> using Tile256 = Tile<256, 128, 64, 64, 3, G>;

constexpr int kMaxTokens = 1 << 20, kMaxRows = 1 << 20, kMaxColumns = 65536, kMaxSplits = 64;  // so tiles are counted in 31 bits
constexpr int kRangeParts = 1024;  // blocks of the first pass over x, about
constexpr int kFewRows = 256;      // of x: fewer blocks would leave multiprocessors idle
constexpr int kMinColumnParts = 5; // of a gate, which takes so long that a second pass pays where so many blocks can share a row

static int padded(int n, int multiple) { return (n + multiple - 1) / multiple * multiple; }

struct Plan {  // everything that follows from a call
  int M, Np, Kp, Mp, groups, groupsize, bn, bm, tiles, values;
  int x_columns;  // of the codes of x, padded
  bool grouped, decode, fused;
  Layout layout;
  int decode_bytes;             // shared memory of the decoding kernel
  int range_parts, range_rows;  // first pass over x; no parts: there is none, as rows have ranges of their own
  int column_parts;             // blocks that share a row in that pass
  int64_t codes, sums, x_scale, x_zero, ranges, slabs, tickets, bytes;  // offsets in the workspace

  explicit Plan(const Call& c) {
    M = c.B * c.T, Np = padded(c.N, 128), Kp = padded(c.K, 64), Mp = padded(M, 128);
    groups = (c.K + c.groupsize - 1) / c.groupsize, grouped = groups > 1, groupsize = grouped ? c.groupsize : Kp;
    fused = c.config == kDecodeFused, decode = fused || c.config == kDecode;
    layout = decode ? kFragments : c.config == kWgmma256x128 ? kSwizzled : kRows;
    x_columns = layout == kSwizzled ? padded(c.K, kSwizzledColumns) : Kp;
    bn = decode ? 32 : c.config == k256x128 || c.config == kWgmma256x128 ? 256 : 128;
    bm = decode ? (M <= 8 ? 8 : 16) : c.config == k128x16 ? 16 : c.config == k128x32 ? 32 : c.config == k128x64 ? 64 : 128;
    values = bn * bm;
    tiles = ((c.N + bn - 1) / bn) * ((M + bm - 1) / bm);
    decode_bytes = M <= 8 ? fused ? Decode<8, true, false>::shared_bytes(M, Kp, groups) : Decode<8, false, false>::shared_bytes(M, Kp, groups)
                   : fused ? Decode<16, true, false>::shared_bytes(M, Kp, groups) : Decode<16, false, false>::shared_bytes(M, Kp, groups);
    range_rows = (M + kRangeParts - 1) / kRangeParts;
    column_parts = c.producer == kGate ? std::min(kFewRows / M, x_columns / (8 * kQuantizeThreads)) : 1;
    if (column_parts < kMinColumnParts) column_parts = 1;
    bool own = c.per_token || (c.T == 1 && !c.lengths);
    range_parts = !own ? (c.T + range_rows - 1) / range_rows : column_parts > 1 ? 1 : 0;
    bytes = 0;
    auto take = [&](int64_t size) { int64_t at = bytes; bytes += (size + 255) / 256 * 256; return at; };
    codes = take(fused ? 0 : int64_t(layout == kSwizzled ? Mp : M) * x_columns);
    sums = take(fused ? 0 : int64_t(groups) * Mp * 4);
    x_scale = take(fused ? 0 : int64_t(Mp) * 4);
    x_zero = take(fused ? 0 : int64_t(Mp) * 4);
    ranges = take(fused ? 0 : int64_t(c.per_token ? M : c.B) * range_parts * column_parts * 8);
    slabs = take(c.splits > 1 ? int64_t(tiles) * c.splits * values * 4 : 0);
    tickets = take(c.splits > 1 ? int64_t(tiles) * 4 : 0);
  }
};

// kMultiply takes the codes that an earlier call, the same otherwise, left in the workspace.
enum Steps { kQuantize = 1, kMultiply = 2, kBoth = 3 };

#define REFUSALS(X) \
  X(kNoX, "x is null or not aligned to 16 bytes") \
  X(kNoPacked, "packed is null or not aligned to 16 bytes") \
  X(kNoScale, "scale is null or not aligned to 16 bytes") \
  X(kNoZero, "zero is null or not aligned to 16 bytes") \
  X(kNoColsum, "colsum is null or not aligned to 16 bytes") \
  X(kNoBias, "bias is null or not aligned to 16 bytes") \
  X(kNoY, "y is null or not aligned to 16 bytes") \
  X(kBadLengths, "lengths is not aligned to 4 bytes") \
  X(kBadType, "x must be float16, bfloat16 or float32") \
  X(kBadRows, "B and T must be at least 1, and B * T at most 1048576 tokens") \
  X(kBadColumns, "K must be 1 to 65536 and N 1 to 1048576") \
  X(kBadGroup, "groupsize must be a multiple of 64, at most 1024, or K") \
  X(kBadLevels, "act_bits must be 2 to 8") \
  X(kBadConfig, "no such kernel configuration") \
  X(kNoWgmma, "this configuration needs a GPU of compute capability 9.0") \
  X(kDecodeRows, "this configuration takes at most 16 tokens") \
  X(kFusedBytes, "this configuration keeps all codes of x in shared memory, 99 KiB at most") \
  X(kFusedSplits, "this configuration does not split the columns") \
  X(kFusedProducer, "this configuration quantizes x as it is, without a norm or a gate") \
  X(kBadProducer, "there is no such producer") \
  X(kNoNorm, "norm is null or not aligned to 16 bytes") \
  X(kBadTile, "this configuration needs padded rows that are a multiple of 256, and one scale for a whole row") \
  X(kBadSplits, "splits must be 1 to 64, and at most the groups of a row") \
  X(kBadSteps, "steps must be 1 to 3, and 3 where a configuration quantizes as it multiplies") \
  X(kBadWorkspace, "the workspace is null, too small or not aligned to 16 bytes")

enum Refusal {
#define NAME(name, text) name,
  REFUSALS(NAME)
#undef NAME
};

static bool aligned(const void* pointer, uintptr_t bytes) { return pointer && reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

// -1 - Refusal, or 0.  Pointers are looked at, nothing behind them is.
static int check_shape(const Call& c) {
  auto refuse = [](Refusal r) { return -1 - r; };
  if (c.type < kHalf || c.type > kFloat) return refuse(kBadType);
  if (c.B < 1 || c.T < 1 || int64_t(c.B) * c.T > kMaxTokens) return refuse(kBadRows);
  if (c.K < 1 || c.K > kMaxColumns || c.N < 1 || c.N > kMaxRows) return refuse(kBadColumns);
  if (c.groupsize < 1 || c.groupsize > c.K || (c.groupsize < c.K && (c.groupsize % 64 || c.groupsize > kMaxGroup))) return refuse(kBadGroup);
  if (c.levels != 3 && c.levels != 7 && c.levels != 15 && c.levels != 31 && c.levels != 63 && c.levels != 127 && c.levels != 255) return refuse(kBadLevels);
  if (c.config < 0 || c.config >= kConfigs) return refuse(kBadConfig);
#ifndef WGMMA
  if (c.config == kWgmma256x128) return refuse(kNoWgmma);
#endif
  if (c.steps < kQuantize || c.steps > kBoth) return refuse(kBadSteps);
  Plan p(c);
  if (p.fused && c.steps != kBoth) return refuse(kBadSteps);
  if (p.decode && p.M > 16) return refuse(kDecodeRows);
  if (p.decode && p.decode_bytes > kMaxShared) return refuse(kFusedBytes);
  if (p.fused && c.splits != 1) return refuse(kFusedSplits);
  if (c.producer < kNothing || c.producer > kGate) return refuse(kBadProducer);
  if (p.fused && c.producer != kNothing) return refuse(kFusedProducer);
  if (p.bn == 256 && (p.Np % 256 || p.grouped)) return refuse(kBadTile);
  if (c.splits < 1 || c.splits > kMaxSplits || c.splits > (p.grouped ? p.groups : p.Kp / 64)) return refuse(kBadSplits);
  return 0;
}

static int check_pointers(const Call& c, const Plan& p) {
  auto refuse = [](Refusal r) { return -1 - r; };
  if (!aligned(c.x, 16)) return refuse(kNoX);
  if (!aligned(c.weight, 16)) return refuse(kNoPacked);
  if (!aligned(c.scale, 16)) return refuse(kNoScale);
  if (!aligned(c.zero, 16)) return refuse(kNoZero);
  if (!aligned(c.colsum, 16)) return refuse(kNoColsum);
  if (!aligned(c.bias, 16)) return refuse(kNoBias);
  if (!aligned(c.y, 16)) return refuse(kNoY);
  if (c.lengths && !aligned(c.lengths, 4)) return refuse(kBadLengths);
  if (c.producer == kNorm && !aligned(c.norm, 16)) return refuse(kNoNorm);
  if (p.bytes && (!aligned(c.workspace, 16) || c.workspace_bytes < p.bytes)) return refuse(kBadWorkspace);
  return 0;
}

template <class Row>
static int quantize(const Call& c, const Plan& p, const Activations& a, const Codes& codes, float2* ranges, uint32_t* tickets) {
  // With few rows a block is as wide as a row needs, and several share a row whose range is known.
  bool few = p.M <= kFewRows;
  int parts = p.range_parts && few ? std::max(1, std::min(kFewRows / p.M, p.x_columns / (8 * kQuantizeThreads))) : 1;
  int width = padded((p.x_columns + parts - 1) / parts, 64);
  parts = (p.x_columns + width - 1) / width;
  auto threads = [&](int columns) {
    if (few) return std::min(kWideThreads, padded((columns + 7) / 8, 32));
    if (c.producer == kNothing) return kQuantizeThreads;
    int eight = 8 * Batch<typename Row::T, Row::WORDS>::COUNT;  // of a thread, so that it makes them once
    return std::clamp(padded((columns + eight - 1) / eight, 32), kQuantizeThreads, kWideThreads);
  };
  auto memory = [&](int columns) { return Row::BYTES + threads(columns) / 32 * 2 * 4; };
  if (p.range_parts) {
    int units = c.per_token ? p.M : c.B, of_range = padded((p.x_columns + p.column_parts - 1) / p.column_parts, 64);
    int error = launch(range_kernel<Row>, units * p.range_parts, p.column_parts, threads(of_range), memory(of_range), c.stream, a, ranges,
                       p.range_parts, p.range_rows, of_range, codes.sums, parts > 1 ? p.groups * p.Mp : 0);
    if (error) return error;
  }
  return launch(quantize_kernel<Row>, p.M, parts, threads(width), p.groups * 4 + memory(width), c.stream, a, static_cast<const float2*>(ranges),
                p.range_parts * p.column_parts, width, codes, tickets, c.splits > 1 ? p.tiles : 0);
}

template <class T, class... Arguments>
static int quantize_of_type(const Call& c, Arguments... arguments) {
  return c.producer == kNorm   ? quantize<NormedRow<T>>(c, arguments...)
         : c.producer == kGate ? quantize<GatedRow<T>>(c, arguments...)
                               : quantize<PlainRow<T>>(c, arguments...);
}

template <class Tl>
static int tile(const Call& c, const Plan& p, const Problem& problem) {
  return launch(tile_kernel<Tl>, p.tiles, c.splits, Tl::THREADS, Tl::SHARED_BYTES, c.stream, problem);
}

template <class D>
static int decode(const Call& c, const Plan& p, const Problem& problem, const Activations& a) {
  return launch(decode_kernel<D>, p.tiles, c.splits, D::THREADS, p.decode_bytes, c.stream, problem, a);
}

template <bool GROUPED>
static int multiply(const Call& c, const Plan& p, const Problem& problem, const Activations& a) {
  bool small = p.M <= 8;
  switch (c.config) {
    case kDecodeFused: return small ? decode<Decode<8, true, GROUPED>>(c, p, problem, a) : decode<Decode<16, true, GROUPED>>(c, p, problem, a);
    case kDecode: return small ? decode<Decode<8, false, GROUPED>>(c, p, problem, a) : decode<Decode<16, false, GROUPED>>(c, p, problem, a);
    case k128x16: return tile<Tile16<GROUPED>>(c, p, problem);
    case k128x32: return tile<Tile32<GROUPED>>(c, p, problem);
    case k128x64: return tile<Tile64<GROUPED>>(c, p, problem);
    case k128x128: return tile<Tile128<GROUPED>>(c, p, problem);
#ifdef WGMMA
    case kWgmma256x128:
      return launch(warpgroup_kernel, p.tiles, c.splits, WarpgroupTile::THREADS, WarpgroupTile::SHARED_BYTES, c.stream, problem);
#endif
    default: return tile<Tile256<false>>(c, p, problem);  // check_shape refuses groups
  }
}

// The first error of making kernels ready, or 0.
template <class... Kernels>
static int all_ready(bool most_shared, Kernels... kernels) {
  int first = 0;
  for (int code : {make_ready(kernels, most_shared)...}) first = first ? first : code;
  return first;
}

template <bool G>
static int products_ready() {  // codes that decoding blocks share come from L1
  int error = all_ready(false, decode_kernel<Decode<8, true, G>>, decode_kernel<Decode<16, true, G>>, decode_kernel<Decode<8, false, G>>,
                        decode_kernel<Decode<16, false, G>>);
  return error ? error : all_ready(true, tile_kernel<Tile16<G>>, tile_kernel<Tile32<G>>, tile_kernel<Tile64<G>>, tile_kernel<Tile128<G>>,
                                   tile_kernel<Tile256<false>>);
}

extern "C" {

int awrq_call_bytes() { return sizeof(Call); }

// Makes the kernels ready on the current device, once, before any call there: 0, or what awrq_error explains.
int awrq_ready() {
#ifdef WGMMA
  if (int error = make_ready(warpgroup_kernel, true, WarpgroupTile::SHARED_BYTES)) return error;
#endif
  if (int error = products_ready<false>()) return error;
  return products_ready<true>();
}

// What a code of awrq_workspace or awrq_linear means: < 0 refused, > 0 an error of CUDA.
const char* awrq_error(int code) {
  static const char* const texts[] = {
#define TEXT(name, text) text,
      REFUSALS(TEXT)
#undef TEXT
  };
  return code < 0 ? texts[-1 - code] : launch_error(code);
}

// Bytes that a call needs, by its numbers alone; or < 0.
int64_t awrq_workspace(const Call* c) {
  int refused = check_shape(*c);
  return refused ? refused : Plan(*c).bytes;
}

// 0, or what awrq_error explains.
int awrq_linear(const Call* call) {
  const Call& c = *call;
  if (int refused = check_shape(c)) return refused;
  Plan p(c);
  if (int refused = check_pointers(c, p)) return refused;
  uint8_t* memory = static_cast<uint8_t*>(c.workspace);
  Activations a{c.x, c.lengths, c.norm, c.eps, c.type, c.B, c.T, c.K, p.x_columns, c.levels, c.per_token, c.sym};
  Codes codes{memory + p.codes, reinterpret_cast<float*>(memory + p.x_scale), reinterpret_cast<int*>(memory + p.x_zero),
              reinterpret_cast<int*>(memory + p.sums), p.Mp, p.groupsize, p.layout};
  uint32_t* tickets = reinterpret_cast<uint32_t*>(memory + p.tickets);
  Problem problem{static_cast<const uint4*>(c.weight), c.scale, c.zero, c.colsum, c.bias, codes, c.y, c.type, p.M, c.N, p.Np, p.Kp,
                  c.splits, reinterpret_cast<uint32_t*>(memory + p.slabs), tickets};
  if (!p.fused && c.steps & kQuantize) {
    float2* ranges = reinterpret_cast<float2*>(memory + p.ranges);
    int error = c.type == kHalf     ? quantize_of_type<half_t>(c, p, a, codes, ranges, tickets)
                : c.type == kBfloat ? quantize_of_type<bfloat_t>(c, p, a, codes, ranges, tickets)
                                    : quantize_of_type<float>(c, p, a, codes, ranges, tickets);
    if (error || c.steps == kQuantize) return error;
  }
  return p.grouped ? multiply<true>(c, p, problem, a) : multiply<false>(c, p, problem, a);
}

}  // extern "C"
