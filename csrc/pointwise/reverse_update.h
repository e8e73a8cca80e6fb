#pragma once
#include <cstdint>
#include <vector>

#include "common/dtype_codes.h"
#include "common/kernel.h"

// The operands of a backward step, as in reverse_update.cu. Null: y and d for adjoint_update_, d for reverse_update_, and k2, g,
// v1, v2 as in reference.py.
struct ReverseOperands {
  void* x;
  void* y;
  void* d;
  const void* k1;
  const void* k2;
  void* g;
  const void* v1;
  const void* v2;
  double weight, a, b, g_scale, v_scale;
};

// partial_norms: null to add to the norms atomically; for sums in a fixed order, room for 2 * most_reverse_blocks() values of
// the norms' dtype. All throw if a launch is refused.
void launch_reverse(const char* op, const ReverseOperands& operands, void* norms, void* partial_norms, int64_t n, DType x_dtype,
                    DType k_dtype, void* stream);

// g, v1, v2, g_scale and v_scale alone.
void launch_adjoint_update(const ReverseOperands& operands, int64_t n, DType dtype, void* stream);

// Blocks that launch_reverse starts at most on the current device.
int64_t most_reverse_blocks();

std::vector<Kernel> reverse_kernels();
