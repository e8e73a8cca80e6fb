// The host meaning of what csrc/device.h offers to kernels, so that tests execute the kernels' own source on CPU memory.
// threads.h runs the threads, runtime.h stands for the CUDA runtime, numbers.h has the 16-bit types; here are the primitives by
// which threads work together.
#pragma once
#include "numbers.h"
#include "runtime.h"
#include "threads.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __restrict__ __restrict
#define __launch_bounds__(...)
struct alignas(16) float4 {
  float x, y, z, w;
};

#define DYN_SHARED(name) unsigned char* const name = host::shared

inline void require_alignment(const void* pointer, size_t bytes) {
  if (reinterpret_cast<uintptr_t>(pointer) % bytes) throw std::runtime_error("misaligned address");
}

inline void __syncthreads() { host::arrive(0); }

namespace host {
inline void require_whole_warp(unsigned mask) {
  if (mask != ~0u || barriers[1 + warp()].threads != kLanesOfWarp)
    throw std::runtime_error("a shuffle or warp barrier must name all 32 threads of a whole warp");
}

// Shows the lanes of the warp `mine` and returns what `read` makes of all of theirs.
template <class T, class Read>
auto exchange(const T& mine, Read read) {
  static_assert(sizeof(T) <= sizeof exchanged[0][0]);
  auto* const of_warp = exchanged[warp()];
  std::memcpy(of_warp[lane()], &mine, sizeof mine);
  arrive(1 + warp());
  const auto result = read([of_warp](int lane) {
    T theirs;
    std::memcpy(&theirs, of_warp[lane], sizeof theirs);
    return theirs;
  });
  arrive(1 + warp());  // all have read before anyone shows something else
  return result;
}
}  // namespace host

inline void __syncwarp(unsigned mask = ~0u) {
  host::require_whole_warp(mask);
  host::arrive(1 + host::warp());
}

template <class T>
T __shfl_sync(unsigned mask, T value, int from) {
  host::require_whole_warp(mask);
  return host::exchange(value, [=](auto of) { return of(from & 31); });
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int distance) {
  return __shfl_sync(mask, value, host::lane() ^ distance);
}

template <class T>
T __shfl_down_sync(unsigned mask, T value, int distance) {
  return __shfl_sync(mask, value, host::lane() + distance < 32 ? host::lane() + distance : host::lane());
}

// Fibers change places at barriers only, so this is atomic.
template <class T>
T atomicAdd(T* at, T value) {
  require_alignment(at, sizeof(T));
  const T before = *at;
  *at += value;
  return before;
}

inline void copy_async16(void* shared, const void* global) {
  require_alignment(shared, 16);
  require_alignment(global, 16);
  host::Fiber& fiber = host::fibers[host::current];
  if (host::copies_late) {
    fiber.copies.push_back({shared, global, fiber.copy_group});
  } else {
    std::memcpy(shared, global, 16);
  }
}

inline void copy_commit() { host::fibers[host::current].copy_group++; }

template <int kGroups>
void copy_wait() {
  host::Fiber& fiber = host::fibers[host::current];
  std::vector<host::Copy> under_way;
  for (const host::Copy& copy : fiber.copies) {
    if (copy.group < fiber.copy_group - kGroups) {
      std::memcpy(copy.to, copy.from, 16);
    } else {
      under_way.push_back(copy);
    }
  }
  fiber.copies.swap(under_way);
}

inline uint32_t pack_bf16(float low, float high) {
  return __float2bfloat16_rn(low).bits | uint32_t{__float2bfloat16_rn(high).bits} << 16;
}

// Lane l = 4 r + c of the warp holds: of a, rows r and r + 8, columns 2c, 2c + 1 and those + 8 (a[0]: row r, a[1]: row r + 8, a[2]
// and a[3]: columns + 8); of b, rows 2c, 2c + 1 (b[0]) and those + 8 (b[1]) of column r; of d, columns 2c, 2c + 1 of row r (d[0],
// d[1]) and of row r + 8.
inline void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  struct Fragments {
    uint32_t a[4], b[2];
  };
  struct Sums {
    float values[4];
  };
  Fragments mine;
  std::memcpy(mine.a, a, sizeof mine.a);
  std::memcpy(mine.b, b, sizeof mine.b);
  host::require_whole_warp(~0u);
  const Sums sums = host::exchange(mine, [](auto of) {
    const auto value = [](uint32_t pair, int k) {
      return __bfloat162float({static_cast<uint16_t>(pair >> 16 * (k % 2))});
    };
    Sums result{};
    for (int i = 0; i < 4; i++) {
      const int row = host::lane() / 4 + i / 2 * 8, column = host::lane() % 4 * 2 + i % 2;
      for (int k = 0; k < 16; k++) {
        const int pair = k % 8 / 2;
        const Fragments of_row = of(row % 8 * 4 + pair), of_column = of(column * 4 + pair);
        result.values[i] += value(of_row.a[row / 8 + k / 8 * 2], k) * value(of_column.b[k / 8], k);
      }
    }
    return result;
  });
  for (int i = 0; i < 4; i++) d[i] += sums.values[i];
}
