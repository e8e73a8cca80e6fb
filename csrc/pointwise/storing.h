#pragma once
#include <cstdint>
#include <vector>

#include "common/dtype_codes.h"
#include "common/kernel.h"

// x_next = x + weight (k1 + k2), and what storing.cu stores of x_next - companion; without a k1, of x - companion.
// values: of a sample; groups: of a sample, and all_groups of all, fewer than 2^31; largest: of companions, in units.
struct StoreOperands {
  const void* x;
  const void* k1;
  const void* k2;
  double weight;
  const void* companion;
  const void* unit;
  double largest;
  int64_t values, groups, all_groups;
  int bits;
  void* x_next;
  void* companion_next;
  uint8_t* packed;  // aligned to 4 bytes
  uint8_t* scales;
  DType x_dtype, k_dtype;
  void* stream;
};

// out = companion - what is packed.
struct StoredStepOperands {
  const void* companion;
  const uint8_t* packed;
  const uint8_t* scales;
  const void* unit;
  int64_t values, groups, all_groups;
  int bits;
  void* out;
  DType dtype;
  void* stream;
};

// Throw if the launch is refused.
void launch_store(const char* op, const StoreOperands& operands);
void launch_stored_step(const StoredStepOperands& operands);

std::vector<Kernel> storing_kernels();
