#pragma once
#include <vector>

#include "common/kernel.h"
#include "mlp/network.h"

// The backward pass over the steps from last - 1 down to first. States are [rows, dim] fp32.
struct MlpAdjoint {
  const float* x_last;
  const float* g_last;
  float* x_first;  // null where nobody wants it
  float* g_first;
  // The increments of the two steps behind the last one: newest_kept in the parameters' dtype, with kept_before, the one of the
  // step before it, or null if there is none; or, between ranges of steps, carried [2, rows, dim] fp32: that of the step two
  // behind, and that of the one behind.
  const void* kept_newest;
  const void* kept_before;
  const float* carried;
  float* carries;         // the same for the next range, or null
  const float* anchored;  // null, or as the forward pass leaves them
  float* norms;           // [groups' warps, steps, 2]: each warp's part of |y - x_n|^2 and |x_n|^2
  void* us;               // null, or [uses, scratch_rows, D]: u and c of each layer's use, the parameters' dtype
  void* cs;
  int64_t rows, anchored_rows, scratch_rows;
  int first, last, steps, anchors, corrections;
  bool extrapolates, reuses;
};

void launch_mlp_adjoint(const Network<void>& network, const MlpAdjoint& states, const MlpLaunch& how);

std::vector<Kernel> mlp_adjoint_kernels();
