#pragma once
#include <cstddef>
#include <cstdint>

enum class Fault : int { kNone, kReadsTooEarly, kOverwritesTooEarly, kDivergentBarrier, kForgetsToWait };

// The kernels of harness.cu, which says what they compute.
void launch_sum(Fault fault, const void* in, void* out, int64_t blocks, int rounds);
void launch_copy(Fault fault, const void* in, void* out);
void launch_product(const void* a, const void* b, void* d);
void launch_nothing(int64_t blocks, int threads, size_t shared);
