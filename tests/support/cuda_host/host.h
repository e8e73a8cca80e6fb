// The host meaning of what csrc/common/device.h offers to kernels, so that tests execute the kernels' own source on CPU memory.
// threads.h runs the threads, runtime.h stands for the CUDA runtime, numbers.h has the 16-bit types; here are the primitives by
// which threads work together.
#pragma once
#include <cmath>

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

inline bool __any_sync(unsigned mask, bool condition) {
  host::require_whole_warp(mask);
  return host::exchange(condition, [](auto of) {
    bool any = false;
    for (int lane = 0; lane < host::kLanesOfWarp; lane++) any |= of(lane);
    return any;
  });
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

inline float fast_reciprocal(float x) { return 1 / x; }
inline float fast_rsqrt(float x) { return 1 / sqrtf(x); }
inline float fast_exp(float x) { return expf(x); }

inline uint32_t pack_bf16(float low, float high) {
  return __float2bfloat16_rn(low).bits | uint32_t{__float2bfloat16_rn(high).bits} << 16;
}

inline uint32_t pack_fp16(float low, float high) {
  return __float2half_rn(low).bits | uint32_t{__float2half_rn(high).bits} << 16;
}

namespace host {
struct Fragments {
  uint32_t a[4], b[2];
};

// Lane l = 4 r + c of the warp holds: of a, rows r and r + 8, columns 2c, 2c + 1 and those + 8 (a[0]: row r, a[1]: row r + 8, a[2]
// and a[3]: columns + 8); of b, rows 2c, 2c + 1 (b[0]) and those + 8 (b[1]) of column r; of d, columns 2c, 2c + 1 of row r (d[0],
// d[1]) and of row r + 8.
template <class Value>
void add_product(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], Value value) {
  Fragments mine;
  std::memcpy(mine.a, a, sizeof mine.a);
  std::memcpy(mine.b, b, sizeof mine.b);
  require_whole_warp(~0u);
  struct Sums {
    float values[4];
  };
  const Sums sums = exchange(mine, [value](auto of) {
    Sums result{};
    const int row = lane() / 4, column = lane() % 4 * 2;
    for (int pair = 0; pair < 4; pair++) {
      const Fragments of_row = of(row * 4 + pair), of_columns[2] = {of(column * 4 + pair), of((column + 1) * 4 + pair)};
      for (int k = 0; k < 4; k++) {  // columns 2 pair + k % 2 + k / 2 * 8 of a
        const auto half = [k](uint32_t both) { return static_cast<uint16_t>(both >> 16 * (k % 2)); };
        const float upper = value(half(of_row.a[k / 2 * 2])), lower = value(half(of_row.a[k / 2 * 2 + 1]));
        for (int j = 0; j < 2; j++) {
          const float factor = value(half(of_columns[j].b[k / 2]));
          result.values[j] += upper * factor;
          result.values[2 + j] += lower * factor;
        }
      }
    }
    return result;
  });
  for (int i = 0; i < 4; i++) d[i] += sums.values[i];
}
}  // namespace host

inline void mma_bf16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  host::add_product(d, a, b, [](uint16_t bits) { return __bfloat162float({bits}); });
}

inline void mma_fp16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  host::add_product(d, a, b, [](uint16_t bits) { return __half2float({bits}); });
}

template <bool kTransposed, int kMatrices>
void load_matrices(uint32_t (&out)[kMatrices], const void* row) {
  static_assert(kMatrices == 2 || kMatrices == 4);
  host::require_whole_warp(~0u);
  struct Matrices {
    uint32_t values[kMatrices];
  };
  const Matrices found = host::exchange(row, [](auto of) {
    Matrices result;
    const int along = host::lane() / 4, first = host::lane() % 4 * 2;
    for (int i = 0; i < kMatrices; i++) {
      const auto value = [&](int line, int column) {
        const auto* at = static_cast<const uint16_t*>(of(8 * i + line)) + column;
        require_alignment(at - column, 16);
        return uint32_t{*at};
      };
      result.values[i] = kTransposed ? value(first, along) | value(first + 1, along) << 16
                                     : value(along, first) | value(along, first + 1) << 16;
    }
    return result;
  });
  std::memcpy(out, found.values, sizeof out);
}
