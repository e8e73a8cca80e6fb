// How a pointwise kernel is spread over threads: packs of 16 bytes first, then the values after them one at a time.
// Plain C++, which the tests call on the host.
#pragma once
#include <algorithm>
#include <cstdint>
#include <initializer_list>

constexpr int kThreads = 256;      // of a block
constexpr int kAccessBytes = 16;   // the widest access of a thread

struct GridPlan {
  int64_t packs;  // the first packs * values_per_pack values are accessed in packs, the others alone
  int64_t blocks;
};

// A pack fills one access of the stream; the narrower stages of a mixed pair come in accesses of 8 or 4 bytes, as closely packed.
template <class Stream>
constexpr int kValuesPerPack = kAccessBytes / sizeof(Stream);

// Whether all operands can be accessed in packs of so many bytes at most. Those that are absent are null, which is aligned.
inline bool aligned_for_packs(std::initializer_list<const void*> operands, size_t bytes = kAccessBytes) {
  return std::all_of(operands.begin(), operands.end(),
                     [bytes](const void* operand) { return reinterpret_cast<uintptr_t>(operand) % bytes == 0; });
}

// n: at least 1. Threads stride over the packs, so few blocks serve any n, and no block starts without work.
inline GridPlan plan_grid(int64_t n, int values_per_pack, bool aligned, int64_t most_blocks) {
  const int64_t packs = aligned ? n / values_per_pack : 0;
  const int64_t accesses = std::max(packs, n - packs * values_per_pack);
  return {packs, std::min(most_blocks, (accesses - 1) / kThreads + 1)};
}
