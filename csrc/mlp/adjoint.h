#pragma once
#include <vector>

#include "common/kernel.h"
#include "mlp/network.h"

// The backward pass over the steps from last - 1 down to first. States are [rows, dim] fp32.
struct MlpAdjoint {
  const float* x_last;
  const float* g_last;
  float* x_first;  // null where the last segment needs no end state
  float* g_first;
  // The increments of the two steps after the range, where the solver extrapolates. After the stack's last step they are those
  // that the forward pass has saved, in the parameters' dtype: of the last step, and of the one before it, null if there is none.
  const void* last_increment;
  const void* increment_before;
  // Between ranges of steps they are [2, rows, dim] fp32: of step last + 1, then of step last.
  const float* increments_in;
  float* increments_out;  // the same for the next range, or null
  const float* anchored;  // null, or as the forward pass leaves them
  float* squares;         // [groups' warps, steps, 2]: each warp's part of |y - x_n|^2 and |x_n|^2
  void* layer_inputs;     // null, or [layer calls, scratch_rows, D]: u and c of each layer call, the parameters' dtype
  void* cotangents;
  int64_t rows, anchored_rows, scratch_rows;
  int first, last, steps, corrections;
  bool extrapolates, reuses;
};

void launch_mlp_adjoint(const Network<void>& network, const MlpAdjoint& operands, const MlpLaunch& how);

std::vector<Kernel> mlp_adjoint_kernels();
