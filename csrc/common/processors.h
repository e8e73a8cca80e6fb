#pragma once
#include <atomic>

#include "common/launch.h"

// Streaming multiprocessors of the current device. Each device is asked once.
inline int processor_count() {
  constexpr int kRemembered = 64;  // devices; a later one is asked each time
  static std::atomic<int> counts[kRemembered];
  int device = 0;
  check("the current device was not found", cudaGetDevice(&device));
  int count = device < kRemembered ? counts[device].load(std::memory_order_relaxed) : 0;
  if (count == 0) {
    check("the number of multiprocessors was not found", cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device));
    if (device < kRemembered) counts[device].store(count, std::memory_order_relaxed);
  }
  return count;
}
