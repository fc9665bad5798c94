// Instructions without a C++ name, kernel launches, and the three types of activations.  Compute capability 8.0 or newer.
// tests/emulator/ptx.cuh has the same names for a CPU, so that the kernels themselves can be tested without a GPU.
#pragma once
#include <cstdint>
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#define DEVICE __device__ __forceinline__
#define SHARED_MEMORY(name) extern __shared__ __align__(128) uint8_t name[]

// c[16,8] += a[16,32] @ b[32,8].  Lane l, g = l / 4, t = l % 4: byte j of a[r] is row g + 8 (r % 2), column 16 (r / 2) + 4 t + j; byte j of
// b0, b1 is row 4 t + j, + 16, column g; c[i] is row g + 8 (i / 2), column 2 t + i % 2.
DEVICE void mma_u8(uint32_t (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.u8.u8.s32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
               : "+r"(c[0]), "+r"(c[1]), "+r"(c[2]), "+r"(c[3])
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

DEVICE uint32_t shared_address(const void* pointer) { return static_cast<uint32_t>(__cvta_generic_to_shared(pointer)); }

// Four 8x8 matrices of 2-byte elements: lane 8 i + j gives the address of row j of matrix i, 16 bytes; r[i] is its elements 2 t, 2 t + 1 of row g.
DEVICE void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// 16 bytes from global to shared memory, past L1 and the registers; zeros, and nothing is read, where not `valid`.
DEVICE void cp_async_16(void* to, const void* from, bool valid = true) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(valid ? 16 : 0) : "memory");
}
DEVICE void cp_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int PENDING>
DEVICE void cp_async_wait() { asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory"); }

// 16 bytes that are read once: they may be evicted at once and shall not push anything out of L1.
DEVICE uint4 load_once(const uint4* from) {
  uint4 v;
  asm volatile("ld.global.nc.L1::no_allocate.L2::256B.v4.u32 {%0,%1,%2,%3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(from));
  return v;
}

// What other blocks have written: from L2, as L1 may hold something older.
DEVICE uint32_t load_shared_by_blocks(const uint32_t* from) { return __ldcg(from); }

// How many of `all` blocks came before this one; back to 0 with the last.  The thread releases what its block wrote before the barrier in front
// of this, and acquires for its block what the earlier ones released, up to the barrier behind.
DEVICE uint32_t take_ticket(uint32_t* counter, int all) {
  uint32_t before;
  asm volatile("atom.acq_rel.gpu.global.inc.u32 %0, [%1], %2;" : "=r"(before) : "l"(counter), "r"(all - 1) : "memory");
  return before;
}

DEVICE int warp_min(int v) { return __reduce_min_sync(0xffffffffu, v); }
DEVICE int warp_max(int v) { return __reduce_max_sync(0xffffffffu, v); }
DEVICE int warp_sum(int v) { return __reduce_add_sync(0xffffffffu, v); }
DEVICE int shuffle_xor(int v, int mask) { return __shfl_xor_sync(0xffffffffu, v, mask); }
DEVICE uint32_t low_bytes(uint32_t a, uint32_t b, uint32_t c, uint32_t d) {  // of each, a's in the lowest byte
  return __byte_perm(__byte_perm(a, b, 0x0040), __byte_perm(c, d, 0x0040), 0x5410);
}
DEVICE uint32_t dot4(uint32_t a, uint32_t b, uint32_t c) { return __dp4a(a, b, c); }

// The larger one, NaN if one is NaN (fmaxf drops it).
DEVICE float max_or_nan(float a, float b) {
  float c;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(c) : "f"(a), "f"(b));
  return c;
}

// Rounded to nearest, one by one: nvcc must neither fuse nor approximate them, so that a CPU gets the same bits.
DEVICE float add(float a, float b) { return __fadd_rn(a, b); }
DEVICE float multiply(float a, float b) { return __fmul_rn(a, b); }
DEVICE float divide(float a, float b) { return __fdiv_rn(a, b); }
DEVICE float square_root(float v) { return __fsqrt_rn(v); }
DEVICE float bits_to_float(uint32_t v) { return __uint_as_float(v); }
DEVICE uint32_t float_to_bits(float v) { return __float_as_uint(v); }

using half_t = __half;
using bfloat_t = __nv_bfloat16;
DEVICE float to_float(half_t v) { return __half2float(v); }
DEVICE float to_float(bfloat_t v) { return __bfloat162float(v); }
DEVICE float to_float(float v) { return v; }
DEVICE void from_float(half_t& to, float v) { to = __float2half_rn(v); }
DEVICE void from_float(bfloat_t& to, float v) { to = __float2bfloat16_rn(v); }
DEVICE void from_float(float& to, float v) { to = v; }

constexpr int kMaxShared = 99 * 1024;  // bytes that a block has on every GPU of compute capability 8.0 or newer

// Makes a kernel ready on the current device, for which the driver must know this runtime and the library this GPU; cudaError_t.  It may take
// shared_bytes of shared memory.  most_shared: the multiprocessor gives what it has to shared memory, not to L1, so that as many blocks
// fit as can.
template <class... Parameters>
int make_ready(void (*kernel)(Parameters...), bool most_shared, int shared_bytes = kMaxShared) {
  cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, shared_bytes);
  if (most_shared) cudaFuncSetAttribute(kernel, cudaFuncAttributePreferredSharedMemoryCarveout, cudaSharedmemCarveoutMaxShared);
  return cudaGetLastError();
}

// kernel<<<grid, threads, shared, stream>>>(args...); cudaError_t, which no later call finds again.
template <class... Parameters, class... Arguments>
int launch(void (*kernel)(Parameters...), int grid_x, int grid_y, int threads, int shared, void* stream, Arguments... args) {
  kernel<<<dim3(grid_x, grid_y), threads, shared, static_cast<cudaStream_t>(stream)>>>(args...);
  return cudaGetLastError();
}
inline const char* launch_error(int code) { return cudaGetErrorString(static_cast<cudaError_t>(code)); }
