// Consecutive values that one access moves, and how the threads of a grid share them.
#pragma once
#include <cstdint>
#include <type_traits>

#include "common/device.h"

template <class T, int kValues>
struct alignas(sizeof(T) * kValues) Pack {
  T values[kValues];
};

// at: aligned to the pack.
template <int kValues, class T>
__device__ __forceinline__ Pack<T, kValues> load(const T* at) {
  require_alignment(at, sizeof(Pack<T, kValues>));
  return *reinterpret_cast<const Pack<T, kValues>*>(at);
}

// Zeros where the operand is absent, which all threads then skip alike.
template <int kValues, class T>
__device__ __forceinline__ Pack<T, kValues> load_if_there(const T* operand, int64_t at) {
  return operand ? load<kValues>(operand + at) : Pack<T, kValues>{};
}

template <int kValues, class T>
__device__ __forceinline__ void store(T* at, const Pack<T, kValues>& pack) {
  require_alignment(at, sizeof(Pack<T, kValues>));
  *reinterpret_cast<Pack<T, kValues>*>(at) = pack;
}

// Calls visit(std::integral_constant<int, values>{}, first value) for this thread's share of n values: of the packs, then of the
// values after them.
template <int kValues, class Visit>
__device__ __forceinline__ void for_each_pack(int64_t packs, int64_t n, Visit visit) {
  const int64_t thread = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  const int64_t threads = int64_t{gridDim.x} * blockDim.x;
  for (int64_t pack = thread; pack < packs; pack += threads) visit(std::integral_constant<int, kValues>{}, pack * kValues);
  for (int64_t at = packs * kValues + thread; at < n; at += threads) visit(std::integral_constant<int, 1>{}, at);
}
