// What the tensor cores of compute capability 9.0 take from four warps at once, a warpgroup, and only code for sm_90a has.
// tests/emulator/wgmma.cuh has the same names for a CPU.
#pragma once
#include "ptx.cuh"

#define SHARED_MEMORY_OF_1024(name) extern __shared__ __align__(1024) uint8_t name[]  // begins where a swizzle's pattern does

// d[64,128] += a[64,32] @ b[128,32].T, some time between now and the end of wgmma_wait: neither d nor a nor b may be touched before.  Warp w of
// the warpgroup has rows 16 w to 16 w + 15 of a and d.  Lane l, g = l / 4, t = l % 4: byte j of a[r] is row g + 8 (r % 2), column
// 16 (r / 2) + 4 t + j; d[i] is row g + 8 (i / 2 % 2), column 8 (i / 4) + 2 t + i % 2.  b: see swizzled_rows in hopper.cuh.
DEVICE void wgmma_u8(uint32_t* d, const uint32_t (&a)[4], uint64_t b) {
  asm volatile(
      "wgmma.mma_async.sync.aligned.m64n128k32.s32.u8.u8 {"
      "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, "
      "%24, %25, %26, %27, %28, %29, %30, %31, %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, "
      "%46, %47, %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63}, {%64, %65, %66, "
      "%67}, %68, 1; "
      : "+r"(d[0]), "+r"(d[1]), "+r"(d[2]), "+r"(d[3]), "+r"(d[4]), "+r"(d[5]), "+r"(d[6]), "+r"(d[7]), "+r"(d[8]), "+r"(d[9]),
        "+r"(d[10]), "+r"(d[11]), "+r"(d[12]), "+r"(d[13]), "+r"(d[14]), "+r"(d[15]), "+r"(d[16]), "+r"(d[17]), "+r"(d[18]),
        "+r"(d[19]), "+r"(d[20]), "+r"(d[21]), "+r"(d[22]), "+r"(d[23]), "+r"(d[24]), "+r"(d[25]), "+r"(d[26]), "+r"(d[27]),
        "+r"(d[28]), "+r"(d[29]), "+r"(d[30]), "+r"(d[31]), "+r"(d[32]), "+r"(d[33]), "+r"(d[34]), "+r"(d[35]), "+r"(d[36]),
        "+r"(d[37]), "+r"(d[38]), "+r"(d[39]), "+r"(d[40]), "+r"(d[41]), "+r"(d[42]), "+r"(d[43]), "+r"(d[44]), "+r"(d[45]),
        "+r"(d[46]), "+r"(d[47]), "+r"(d[48]), "+r"(d[49]), "+r"(d[50]), "+r"(d[51]), "+r"(d[52]), "+r"(d[53]), "+r"(d[54]),
        "+r"(d[55]), "+r"(d[56]), "+r"(d[57]), "+r"(d[58]), "+r"(d[59]), "+r"(d[60]), "+r"(d[61]), "+r"(d[62]), "+r"(d[63])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b)
      : "memory");
}

// In front of products: what has been written to their operands a, and to sums, comes first.
DEVICE void wgmma_fence(uint32_t (&a)[2][4]) {
  asm volatile("wgmma.fence.sync.aligned;"
               : "+r"(a[0][0]), "+r"(a[0][1]), "+r"(a[0][2]), "+r"(a[0][3]), "+r"(a[1][0]), "+r"(a[1][1]), "+r"(a[1][2]), "+r"(a[1][3])
               :
               : "memory");
}
DEVICE void wgmma_commit() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int PENDING>
DEVICE void wgmma_wait() { asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(PENDING) : "memory"); }

// The compiler, which does not know that products run on, moves no access to `values` across this.
template <int COUNT>
DEVICE void pin(uint32_t (&values)[COUNT]) {
  #pragma unroll
  for (int i = 0; i < COUNT; ++i) asm volatile("" : "+r"(values[i])::"memory");
}

// Barriers in shared memory, each for one stage: a phase ends when `arrivals` threads have arrived and the bytes that they expect have landed.
DEVICE void mbarrier_init(uint64_t* barrier, int arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)), "r"(arrivals) : "memory");
}
// Behind mbarrier_init, in the same thread and in front of __syncthreads: the copies of other threads find the barriers.
DEVICE void mbarrier_init_fence() { asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory"); }
DEVICE void mbarrier_arrive(uint64_t* barrier, int expected_bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)), "r"(expected_bytes) : "memory");
}
// Until the phase with this parity, 0 for the first, has ended: what its copies have brought is then there, for products too.
DEVICE void mbarrier_wait(uint64_t* barrier, int parity) {
  uint32_t done;
  do {
    asm volatile(
        "{ .reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p; }"
        : "=r"(done)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
  } while (!done);
}

// From global to shared memory, by one thread; the barrier counts the bytes as they land.  Addresses and size are multiples of 16 bytes.
DEVICE void bulk_copy(void* to, const void* from, int bytes, uint64_t* barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(shared_address(to)), "l"(from),
               "r"(bytes), "r"(shared_address(barrier))
               : "memory");
}

DEVICE void sync_warp() { __syncwarp(); }
DEVICE int uniform(int v) { return __shfl_sync(0xffffffffu, v, 0); }  // what all lanes have alike, which the compiler then knows

// What a block can have on compute capability 9.0.
constexpr int kMostShared = 227 * 1024;
