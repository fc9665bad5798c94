// The same product by wgmma, for many tokens on compute capability 9.0: tiles of 256 x 128, one scale for a whole row.  The weight is the A operand
// here too, in the fragments of mma, from registers; the tensor cores read x from shared memory themselves.  Four warps multiply together, and go on
// while the tensor cores work.  Whole stages are copied to shared memory at once, x as the quantizer has laid it out.
#pragma once
#include "gemm.cuh"
#include "wgmma.cuh"

struct WarpgroupTile {
  static constexpr int BN = 256, BM = 128;  // rows of the weight and of x per block
  static constexpr int BK = kSwizzledColumns;
  static constexpr int STAGES = 6;          // of the pipeline, of BK columns
  static constexpr bool GROUPED = false;
  static constexpr int THREADS = BN, WARPS = THREADS / 32;  // a warp has 32 rows of the weight and all rows of x
  static constexpr int VALUES = BM;                         // per thread
  static constexpr int WM = 64, PITCH = BN + 4;             // of [WM][PITCH] sums on their way to y
  static constexpr int X_BYTES = BM * BK, STEP_BYTES = 32 * 32 / 2, WEIGHT_BYTES = BK / 32 * STEP_BYTES;  // of a warp: of 32 columns, of a stage
  static constexpr int STAGE_BYTES = X_BYTES + WARPS * WEIGHT_BYTES;
  static constexpr int OUTPUT_BYTES = WM * PITCH * 4, SHARED_BYTES = STAGES * (STAGE_BYTES + 8);
  static_assert(OUTPUT_BYTES <= SHARED_BYTES && SHARED_BYTES <= kMostShared && STAGE_BYTES % 1024 == 0, "stages begin where the swizzle does");
};

// The B operand of wgmma: 32 columns of rows that swizzled() has laid out, from `shared` on, which is 0, 32, 64 or 96 bytes into a stage.  Fields:
// address / 16, from bit 16 on nothing that counts with this swizzle, from bit 32 on the distance of eight rows / 16, from bit 62 on the swizzle.
DEVICE uint64_t swizzled_rows(const void* shared) {
  return uint64_t{1} << 62 | uint64_t{8 * 128 / 16} << 32 | uint64_t{1} << 16 | shared_address(shared) >> 4;
}

__global__ void __launch_bounds__(WarpgroupTile::THREADS, 1) warpgroup_kernel(Problem p) {
  using Tl = WarpgroupTile;
  SHARED_MEMORY_OF_1024(stages);
  uint64_t* full = reinterpret_cast<uint64_t*>(stages + Tl::STAGES * Tl::STAGE_BYTES);  // [STAGES]
  int lane = threadIdx.x % 32, warp = uniform(threadIdx.x / 32), g = lane / 4, t = lane % 4;
  int tiles_n = (p.N + Tl::BN - 1) / Tl::BN, tiles_m = (p.M + Tl::BM - 1) / Tl::BM;
  TilePlace place = tile_place(blockIdx.x, tiles_n, tiles_m);
  int n0 = place.n * Tl::BN, m0 = place.m * Tl::BM;
  Span k = span((p.Kp + Tl::BK - 1) / Tl::BK, 1, blockIdx.y, p.splits);

  if (threadIdx.x == 0) {
    for (int i = 0; i < Tl::STAGES; ++i) mbarrier_init(full + i, Tl::WARPS);
    mbarrier_init_fence();
  }
  __syncthreads();

  // A warp copies its own rows of the weight; the first one also x, of which M is padded to whole tiles.  The last columns of the weight may fill half
  // a stage, the rest of which is multiplied by zeros.
  const uint8_t* weight = reinterpret_cast<const uint8_t*>(p.weight + static_cast<size_t>(n0 / 32 + warp) * p.Kp);
  const uint8_t* x = p.x.codes + static_cast<size_t>(m0) * Tl::BK;
  int weight_bytes = p.Kp / 32 * Tl::STEP_BYTES, next = k.begin, load_stage = 0;
  auto load_next = [&]() {
    if (next < k.end && lane == 0) {
      uint8_t* to = stages + load_stage * Tl::STAGE_BYTES;
      int bytes = min(Tl::WEIGHT_BYTES, weight_bytes - next * Tl::WEIGHT_BYTES);
      mbarrier_arrive(full + load_stage, bytes + (warp == 0 ? Tl::X_BYTES : 0));
      bulk_copy(to + Tl::X_BYTES + warp * Tl::WEIGHT_BYTES, weight + next * Tl::WEIGHT_BYTES, bytes, full + load_stage);
      if (warp == 0) bulk_copy(to, x + static_cast<size_t>(next) * p.x.pitch * Tl::BK, Tl::X_BYTES, full + load_stage);
    }
    sync_warp();
    ++next, load_stage = load_stage == Tl::STAGES - 1 ? 0 : load_stage + 1;
  };
  for (int s = 0; s < Tl::STAGES - 2; ++s) load_next();

  uint32_t acc[Tl::VALUES] = {};  // of the warp's rows 0-15, then of 16-31
  uint32_t a[Tl::BK / 32][2][4];  // of which two may be multiplied while another is unpacked
  pin(acc);
  int stage = 0, parity = 0;
  for (int kb = k.begin; kb < k.end; ++kb) {
    __syncthreads();  // all have finished the last stage but one, which can be loaded again; the last products of the last one are still running
    load_next();
    mbarrier_wait(full + stage, parity);
    const uint8_t* here = stages + stage * Tl::STAGE_BYTES;
    const uint4* packed = reinterpret_cast<const uint4*>(here + Tl::X_BYTES + warp * Tl::WEIGHT_BYTES) + lane;
    uint64_t columns = swizzled_rows(here);
    uint4 w[Tl::BK / 32];
    #pragma unroll
    for (int i = 0; i < Tl::BK / 32; ++i) w[i] = packed[32 * i];
    #pragma unroll
    for (int i = 0; i < Tl::BK / 32; ++i) {
      uint32_t(&now)[2][4] = a[i];
      unpack(now[0], now[1], w[i]);
      wgmma_fence(now);
      wgmma_u8(acc, now[0], columns + 2 * i);
      wgmma_u8(acc + Tl::VALUES / 2, now[1], columns + 2 * i);
      wgmma_commit();
      wgmma_wait<2>();
    }
    if (++stage == Tl::STAGES) stage = 0, parity ^= 1;
  }
  wgmma_wait<0>();
  pin(acc);
  __syncthreads();  // shared memory is free

  if (p.splits > 1) {
    if (!gather<false, Tl::THREADS>(acc, p, blockIdx.x, blockIdx.y, reinterpret_cast<uint32_t*>(stages))) return;
    __syncthreads();  // all have read the ticket, which lies where the output goes
  }
  uint32_t* out = reinterpret_cast<uint32_t*>(stages);
  #pragma unroll
  for (int slice = 0; slice < Tl::BM / Tl::WM; ++slice) {
    #pragma unroll
    for (int i = 0; i < 2; ++i) {
      #pragma unroll
      for (int j = 0; j < Tl::WM / 8; ++j) {
        #pragma unroll
        for (int c = 0; c < 4; ++c) {
          uint32_t value = acc[i * (Tl::VALUES / 2) + (slice * (Tl::WM / 8) + j) * 4 + c];
          out[(8 * j + 2 * t + c % 2) * Tl::PITCH + 32 * warp + 16 * i + 8 * (c / 2) + g] = i ? value >> 4 : value;
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
