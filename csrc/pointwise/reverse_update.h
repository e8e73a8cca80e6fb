#pragma once
#include <cstdint>
#include <vector>

#include "common/dtype_codes.h"
#include "common/kernel.h"

// g <- g_scale g + v_scale (v1 + v2) over n values, as in reverse_update.cu. v1 and v2 may be null.
struct AdjointOperands {
  void* g;
  const void* v1;
  const void* v2;
  double g_scale, v_scale;
  int64_t n;
  DType dtype;
  void* stream;
};

// A backward step over n values, as in reverse_update.cu. d is null for reverse_update_; k2, g, v1 and v2 may be null.
struct ReverseOperands {
  void* x;
  void* y;
  void* d;
  const void* k1;
  const void* k2;
  double weight, a, b;
  void* squares;  // two of double
  void* g;
  const void* v1;
  const void* v2;
  double g_scale, v_scale;
  // Null to add to the squares atomically; for sums in a fixed order, room for 2 * most_reverse_blocks() of double.
  void* partial_squares;
  int64_t n;
  DType x_dtype, k_dtype;
  void* stream;
};

// Both throw if a launch is refused.
void launch_adjoint_update(const AdjointOperands& operands);
void launch_reverse(const char* op, const ReverseOperands& operands);

// Blocks that launch_reverse starts at most on the current device.
int64_t most_reverse_blocks();

std::vector<Kernel> reverse_kernels();
