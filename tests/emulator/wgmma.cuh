// In place of kernels/wgmma.cuh, see ptx.cuh.  Products and copies are done at once or as late as they may; so what is touched too early is wrong
// here: an operand in registers that changes before the wait, a stage that is loaded again, a sum that is read.
#pragma once
#include "ptx.cuh"

#define SHARED_MEMORY_OF_1024(name) SHARED_MEMORY(name)

namespace emulator {

// Byte k of row n of a B operand, where its descriptor says: rows of 128 bytes, eight of them and then the next eight, bits 4 to 6 of the address
// exchanged by bits 7 to 9.
inline uint8_t operand(uint64_t descriptor, int n, int k) {
  if (descriptor >> 62 != 1 || descriptor >> 49 & 7) fail("a descriptor of another swizzle");
  uint32_t start = (descriptor & 0x3fff) << 4, eight_rows = (descriptor >> 32 & 0x3fff) << 4;
  uint32_t address = start + n / 8 * eight_rows + n % 8 * 128 + k;
  address ^= (address >> 7 & 7) << 4;
  return shared[address - 1024];
}

// The products of one group, by this lane.  The other lanes of its warp have theirs at the same place.
template <class Find>
void multiply(size_t count, Find find) {
  int lane = current % 32, first = current - lane, g = lane / 4, t = lane % 4;
  for (size_t which = 0; which < count; ++which) {
    const Product& mine = find(fibers[current], which);
    uint8_t a[2][32];
    for (int row = 0; row < 2; ++row)
      for (int k = 0; k < 32; ++k) a[row][k] = byte(find(fibers[first + 4 * g + k % 16 / 4], which).a[row + k / 16 * 2], k % 4);
    for (int n = 0; n < 128; ++n) {
      if (n % 8 / 2 != t) continue;
      uint8_t b[32];
      for (int k = 0; k < 32; ++k) b[k] = operand(mine.b, n, k);
      for (int row = 0; row < 2; ++row) {
        uint32_t& sum = mine.sums[n / 8 * 4 + 2 * row + n % 2];
        for (int k = 0; k < 32; ++k) sum += a[row][k] * b[k];
      }
    }
  }
}

}  // namespace emulator

inline void wgmma_u8(uint32_t* d, const uint32_t (&a)[4], uint64_t b) {
  auto& fiber = emulator::fibers[emulator::current];
  auto fenced = fiber.fenced.find(a);
  if (fenced == fiber.fenced.end() || memcmp(a, fenced->second.data(), 16)) emulator::fail("wgmma of registers without a fence");
  auto& group = emulator::warpgroups[emulator::current / 128];
  int turn = group.barrier.phase % 2;
  for (const auto& lane : emulator::together("wgmma", {static_cast<uint32_t>(b), static_cast<uint32_t>(b >> 32)}))
    if ((lane[0] | static_cast<uint64_t>(lane[1]) << 32) != b) emulator::fail("lanes of a warp bring different descriptors");
  group.b[turn][emulator::current % 128 / 32] = b;
  fiber.products.push_back({d, a, b});
  emulator::wait(group.barrier, 128);
  for (uint64_t other : group.b[turn])
    if (other != b) emulator::fail("warps of a warpgroup bring different descriptors");
  if (emulator::eager) {
    emulator::multiply(1, [](const emulator::Fiber& f, size_t) -> const emulator::Product& { return f.products.back(); });
    emulator::together("wgmma", {0});
  }
}
inline void wgmma_fence(uint32_t (&a)[2][4]) {
  auto& fenced = emulator::fibers[emulator::current].fenced;
  emulator::together("wgmma.fence", {0});
  for (auto& part : a) fenced[part] = {part[0], part[1], part[2], part[3]};
}
inline void wgmma_commit() {
  auto& fiber = emulator::fibers[emulator::current];
  emulator::together("wgmma.commit_group", {0});
  fiber.product_groups.push_back(std::move(fiber.products));
  fiber.products.clear();
  fiber.fenced.clear();
}
template <int PENDING>
void wgmma_wait() {
  auto& fiber = emulator::fibers[emulator::current];
  emulator::together("wgmma.wait_group", {static_cast<uint32_t>(fiber.product_groups.size())});
  while (fiber.product_groups.size() > PENDING) {
    if (!emulator::eager)
      emulator::multiply(fiber.product_groups.front().size(), [](const emulator::Fiber& f, size_t i) -> const emulator::Product& {
        return f.product_groups.front()[i];
      });
    emulator::together("wgmma.wait_group", {0});  // all lanes have seen the group
    fiber.product_groups.pop_front();
    emulator::together("wgmma.wait_group", {0});
  }
}
template <int COUNT>
void pin(uint32_t (&)[COUNT]) {}

inline void mbarrier_init(uint64_t* barrier, int arrivals) { emulator::copy_barriers[barrier] = {arrivals, arrivals, 0, 0, false, {}}; }
inline void mbarrier_init_fence() {
  for (auto& [at, barrier] : emulator::copy_barriers) barrier.fenced = true;
}

namespace emulator {

inline CopyBarrier& copy_barrier(uint64_t* at) {
  auto found = copy_barriers.find(at);
  if (found == copy_barriers.end() || !found->second.fenced) fail("a barrier that is not there yet");
  return found->second;
}
inline void land(CopyBarrier& barrier) {
  for (const BulkCopy& copy : barrier.copies) memcpy(copy.to, copy.from, copy.bytes), barrier.expected -= copy.bytes;
  barrier.copies.clear();
}
inline void end_phase(CopyBarrier& barrier) {
  if (barrier.left == 0 && barrier.expected == 0) barrier.left = barrier.arrivals, ++barrier.phase, ++events;
}

}  // namespace emulator

inline void mbarrier_arrive(uint64_t* at, int expected_bytes) {
  auto& barrier = emulator::copy_barrier(at);
  if (barrier.left == 0) emulator::fail("more arrivals than the barrier counts");
  --barrier.left, barrier.expected += expected_bytes, ++emulator::events;
  emulator::end_phase(barrier);
}
inline void bulk_copy(void* to, const void* from, int bytes, uint64_t* at) {
  auto& barrier = emulator::copy_barrier(at);
  if (reinterpret_cast<uintptr_t>(from) % 16 || shared_address(to) % 16 || bytes % 16 || bytes <= 0) emulator::fail("a copy that is not aligned");
  if (shared_address(to) + bytes > 1024u + emulator::shared_bytes) emulator::fail("a copy past shared memory");
  memset(to, 0xcd, bytes);
  barrier.copies.push_back({to, from, bytes});
  if (emulator::eager) emulator::land(barrier), emulator::end_phase(barrier);
}
inline void mbarrier_wait(uint64_t* at, int parity) {
  auto& barrier = emulator::copy_barrier(at);
  while (barrier.phase % 2 == parity) {
    if (barrier.left == 0) emulator::land(barrier), emulator::end_phase(barrier);
    if (barrier.phase % 2 == parity) emulator::yield();
  }
}

inline void sync_warp() { emulator::together("syncwarp", {0}); }
inline int uniform(int v) {
  for (const auto& lane : emulator::together("uniform", {static_cast<uint32_t>(v)}))
    if (lane[0] != static_cast<uint32_t>(v)) emulator::fail("lanes of a warp have different values");
  return v;
}

constexpr int kMostShared = 227 * 1024;
