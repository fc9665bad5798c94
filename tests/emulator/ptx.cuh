// In place of kernels/ptx.cuh: the same names for a CPU, so that g++ compiles the kernels' own code and tests run it, every thread of it.
//
// A thread is a fiber.  What the lanes of a warp do together they do here together, as the PTX manual defines it; the order of warps and of
// blocks is a setting, the copies of cp.async land at once or as late as they may, shared memory starts as garbage and ends at a page that
// must not be touched.  So what depends on luck on a GPU fails here: a missing barrier or wait, a lane's wrong register, an index out of bounds.
#pragma once
#include <array>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <sys/mman.h>
#include <ucontext.h>
#include <unistd.h>
#include <vector>

#define DEVICE inline
#define __global__
#define __launch_bounds__(...)
#define SHARED_MEMORY(name) uint8_t* name = emulator::shared

struct alignas(8) uint2 { uint32_t x, y; };
struct alignas(16) uint4 { uint32_t x, y, z, w; };
struct alignas(8) float2 { float x, y; };
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
struct Index { int x, y; };
inline Index threadIdx, blockIdx, blockDim, gridDim;
inline int min(int a, int b) { return a < b ? a : b; }
inline int max(int a, int b) { return a > b ? a : b; }

namespace emulator {

constexpr size_t kStack = 64 * 1024;

struct Copy { void* to; const void* from; bool valid; };

struct Product { uint32_t* sums; const uint32_t* a; uint64_t b; };  // of wgmma.cuh

struct Fiber {
  ucontext_t context;
  bool done;
  std::deque<std::vector<Copy>> groups;  // committed copies
  std::vector<Copy> copies;              // those after the last commit
  std::deque<std::vector<Product>> product_groups;
  std::vector<Product> products;
  std::map<const uint32_t*, std::array<uint32_t, 4>> fenced;  // operands as they were when the last fence saw them
};

struct Barrier {
  int arrived = 0, phase = 0;
};

struct BulkCopy { void* to; const void* from; int bytes; };

struct CopyBarrier {  // of wgmma.cuh
  int arrivals, left, expected = 0, phase = 0;
  bool fenced = false;
  std::vector<BulkCopy> copies;
};

struct Warpgroup {
  Barrier barrier;
  uint64_t b[2][4];  // what each warp brings, in turns
};

struct Warp {
  Barrier barrier;
  uint32_t in[2][32][6];  // what the lanes bring, in turns: a lane may be one operation ahead of another
  const char* name[2][32];
};

inline uint8_t* shared;
inline int shared_bytes;
inline std::map<const void*, int> ready;  // bytes of shared memory that a kernel may take
inline std::vector<Fiber> fibers;
inline std::vector<uint8_t> stacks;
inline std::vector<Warp> warps;
inline std::vector<Warpgroup> warpgroups;
inline std::map<const void*, CopyBarrier> copy_barriers;
inline Barrier block;
inline ucontext_t scheduler;
inline int current, events;
inline bool reversed, eager;  // settings
inline std::function<void()> body;

[[noreturn]] inline void fail(const char* what) {
  fprintf(stderr, "emulator: %s, block %d %d, thread %d\n", what, blockIdx.x, blockIdx.y, current);
  abort();
}

// Memory that ends, but for less than `align` bytes, at a page that must not be touched.  Never freed: tests are short.
inline uint8_t* guarded(size_t bytes, size_t align) {
  size_t page = sysconf(_SC_PAGESIZE), size = (bytes + page - 1) / page * page;
  auto* start = static_cast<uint8_t*>(mmap(nullptr, size + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
  mprotect(start + size, page, PROT_NONE);
  return start + (size - bytes) / align * align;
}

inline void yield() { swapcontext(&fibers[current].context, &scheduler); }

inline void wait(Barrier& barrier, int threads) {
  int phase = barrier.phase;
  if (++barrier.arrived == threads) {
    barrier.arrived = 0, ++barrier.phase, ++events;
  } else {
    while (barrier.phase == phase) yield();
  }
}

// All lanes bring words; each then sees those of all.
template <int WORDS>
const uint32_t (&together(const char* name, const uint32_t (&words)[WORDS]))[32][6] {
  Warp& warp = warps[current / 32];
  int turn = warp.barrier.phase % 2, lane = current % 32;
  memcpy(warp.in[turn][lane], words, sizeof words);
  warp.name[turn][lane] = name;
  wait(warp.barrier, 32);
  for (const char* other : warp.name[turn])
    if (other != name) fail("lanes of a warp meet in different operations");
  return warp.in[turn];
}

inline void fiber_main() {
  body();
  if (!fibers[current].groups.empty() || !fibers[current].copies.empty()) fail("thread ends before its copies");
  if (!fibers[current].product_groups.empty() || !fibers[current].products.empty()) fail("thread ends before its products");
  fibers[current].done = true, ++events;
  yield();
}

inline void run_warp(int warp) {
  int before;
  do {
    before = events;
    for (int lane = 0; lane < 32; ++lane) {
      current = 32 * warp + lane;
      if (fibers[current].done) continue;
      threadIdx = {current, 0};
      swapcontext(&scheduler, &fibers[current].context);
    }
  } while (events != before);  // until all lanes wait for other warps
}

inline void run_block(int threads) {
  block = {};
  warps.assign(threads / 32, {});
  warpgroups.assign(threads / 128, {});
  copy_barriers.clear();
  fibers.resize(threads);
  stacks.resize(threads * kStack);
  for (int i = 0; i < threads; ++i) {
    Fiber& fiber = fibers[i];
    fiber.done = false;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = stacks.data() + i * kStack;
    fiber.context.uc_stack.ss_size = kStack;
    makecontext(&fiber.context, fiber_main, 0);
  }
  for (bool done = false; !done;) {
    int before = events;
    for (int w = 0; w < threads / 32; ++w) {
      int last = events;
      run_warp(reversed ? threads / 32 - 1 - w : w);
      if (events != last) w = -1;  // the first warps run ahead of the last as far as they can
    }
    done = true;
    for (const Fiber& fiber : fibers) done = done && fiber.done;
    if (!done && events == before) fail("threads wait for each other for ever");
  }
  for (const auto& [at, barrier] : copy_barriers)
    if (!barrier.copies.empty()) fail("block ends before its copies");
}

inline void land(const Copy& copy) { copy.valid ? memcpy(copy.to, copy.from, 16) : memset(copy.to, 0, 16); }

// As on a GPU, where the first of them are the system's.
inline uint32_t shared_address(const void* pointer) {
  return 1024 + static_cast<uint32_t>(static_cast<const uint8_t*>(pointer) - shared);
}

inline uint8_t byte(uint32_t word, int i) { return word >> (8 * i); }

}  // namespace emulator

using emulator::shared_address;
inline void __syncthreads() { emulator::wait(emulator::block, blockDim.x); }
template <class T> T atomicAdd(T* to, T v) { T old = *to; *to += v; return old; }

inline void mma_u8(uint32_t (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  using emulator::byte;
  auto& in = emulator::together("mma", {a[0], a[1], a[2], a[3], b0, b1});
  int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  for (int i = 0; i < 4; ++i) {
    int row = g + 8 * (i / 2), column = 2 * t + i % 2;
    for (int k = 0; k < 32; ++k)
      c[i] += byte(in[row % 8 * 4 + k % 16 / 4][row / 8 + k / 16 * 2], k % 4) * byte(in[column * 4 + k % 16 / 4][4 + k / 16], k % 4);
  }
}

inline void ldmatrix_x4(uint32_t (&r)[4], const void* row) {
  auto address = reinterpret_cast<uintptr_t>(row);
  if (address % 16) emulator::fail("ldmatrix of a row that is not aligned");
  auto& in = emulator::together("ldmatrix", {static_cast<uint32_t>(address), static_cast<uint32_t>(address >> 32)});
  int g = threadIdx.x % 32 / 4, t = threadIdx.x % 4;
  for (int i = 0; i < 4; ++i) {
    uintptr_t from = in[8 * i + g][0] | static_cast<uintptr_t>(in[8 * i + g][1]) << 32;
    memcpy(&r[i], reinterpret_cast<const uint8_t*>(from) + 4 * t, 4);
  }
}

inline void cp_async_16(void* to, const void* from, bool valid = true) {
  if (reinterpret_cast<uintptr_t>(to) % 16 || reinterpret_cast<uintptr_t>(from) % 16) emulator::fail("cp.async that is not aligned");
  if (emulator::eager) emulator::land({to, from, valid});
  else memset(to, 0xcd, 16), emulator::fibers[emulator::current].copies.push_back({to, from, valid});
}
inline void cp_async_commit() {
  auto& fiber = emulator::fibers[emulator::current];
  fiber.groups.push_back(std::move(fiber.copies));
  fiber.copies.clear();
}
template <int PENDING>
void cp_async_wait() {
  auto& groups = emulator::fibers[emulator::current].groups;
  for (; groups.size() > PENDING; groups.pop_front())
    for (const auto& copy : groups.front()) emulator::land(copy);
}

inline uint4 load_once(const uint4* from) { return *from; }
inline uint32_t load_shared_by_blocks(const uint32_t* from) { return *from; }
inline uint32_t take_ticket(uint32_t* counter, int all) {
  uint32_t before = *counter;
  *counter = before >= static_cast<uint32_t>(all - 1) ? 0 : before + 1;
  return before;
}

template <class F>
int warp_reduce(const char* name, int v, F f) {
  auto& in = emulator::together(name, {static_cast<uint32_t>(v)});
  int result = in[0][0];
  for (int lane = 1; lane < 32; ++lane) result = f(result, static_cast<int>(in[lane][0]));
  return result;
}
inline int warp_min(int v) { return warp_reduce("min", v, min); }
inline int warp_max(int v) { return warp_reduce("max", v, max); }
inline int warp_sum(int v) { return warp_reduce("sum", v, [](int a, int b) { return a + b; }); }
inline int shuffle_xor(int v, int mask) { return emulator::together("shuffle", {static_cast<uint32_t>(v)})[threadIdx.x % 32 ^ mask][0]; }
inline uint32_t low_bytes(uint32_t a, uint32_t b, uint32_t c, uint32_t d) { return (a & 255) | (b & 255) << 8 | (c & 255) << 16 | d << 24; }
inline uint32_t dot4(uint32_t a, uint32_t b, uint32_t c) {
  for (int i = 0; i < 4; ++i) c += emulator::byte(a, i) * emulator::byte(b, i);
  return c;
}

inline float max_or_nan(float a, float b) { return std::isnan(a) || std::isnan(b) ? NAN : fmaxf(a, b); }
inline float add(float a, float b) { return a + b; }  // g++ -ffp-contract=off
inline float multiply(float a, float b) { return a * b; }
inline float divide(float a, float b) { return a / b; }
inline float square_root(float v) { return sqrtf(v); }
inline float bits_to_float(uint32_t v) { float f; memcpy(&f, &v, 4); return f; }
inline uint32_t float_to_bits(float f) { uint32_t v; memcpy(&v, &f, 4); return v; }

using half_t = _Float16;
struct bfloat_t { uint16_t bits; };
inline float to_float(half_t v) { return v; }
inline float to_float(bfloat_t v) { return bits_to_float(v.bits << 16); }
inline float to_float(float v) { return v; }
inline void from_float(half_t& to, float v) { to = static_cast<half_t>(v); }
inline void from_float(bfloat_t& to, float v) {
  uint32_t bits = float_to_bits(v);
  to.bits = std::isnan(v) ? 0x7fff : (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
}
inline void from_float(float& to, float v) { to = v; }

constexpr int kMaxShared = 99 * 1024;

template <class... Parameters>
int make_ready(void (*kernel)(Parameters...), bool, int shared_bytes = kMaxShared) {
  emulator::ready[reinterpret_cast<const void*>(kernel)] = shared_bytes;
  return 0;
}

template <class... Parameters, class... Arguments>
int launch(void (*kernel)(Parameters...), int grid_x, int grid_y, int threads, int bytes, void* stream, Arguments... args) {
  auto ready = emulator::ready.find(reinterpret_cast<const void*>(kernel));
  if (bytes > (ready == emulator::ready.end() ? 48 * 1024 : ready->second)) return 1;
  emulator::shared = emulator::guarded(bytes, 128);
  emulator::shared_bytes = bytes;
  emulator::body = [=] { kernel(args...); };
  blockDim = {threads, 1}, gridDim = {grid_x, grid_y};
  for (int i = 0; i < grid_x * grid_y; ++i) {
    int at = emulator::reversed ? grid_x * grid_y - 1 - i : i;
    blockIdx = {at % grid_x, at / grid_x};
    memset(emulator::shared, 0xab, bytes);
    emulator::run_block(threads);
  }
  return 0;
}
inline const char* launch_error(int) { return "too much shared memory"; }

extern "C" {
inline __attribute__((used)) void* emulator_memory(size_t bytes, size_t align) { return emulator::guarded(bytes, align); }
inline __attribute__((used)) void emulator_settings(int reversed, int eager) { emulator::reversed = reversed, emulator::eager = eager; }
}
