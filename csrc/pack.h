// Consecutive values moved together, 16 bytes per access.
#pragma once
#include <cstdint>

#include "device.h"

constexpr int kAccessBytes = 16;

template <class T, int kValues>
struct alignas(sizeof(T) * kValues < kAccessBytes ? sizeof(T) * kValues : kAccessBytes) Pack {
  T values[kValues];
};

// at: aligned to the pack; more than 16 bytes become several accesses.
template <int kValues, class T>
__device__ __forceinline__ Pack<T, kValues> load(const T* at) {
  require_alignment(at, alignof(Pack<T, kValues>));
  return *reinterpret_cast<const Pack<T, kValues>*>(at);
}

template <int kValues, class T>
__device__ __forceinline__ void store(T* at, const Pack<T, kValues>& pack) {
  require_alignment(at, alignof(Pack<T, kValues>));
  *reinterpret_cast<Pack<T, kValues>*>(at) = pack;
}

template <class... Pointers>
bool aligned_for_packs(Pointers... pointers) {
  return (reinterpret_cast<uintptr_t>(pointers) | ...) % kAccessBytes == 0;
}
