#pragma once
#include <vector>

#include "common/kernel.h"
#include "mlp/network.h"

// Forward over the steps from first to last - 1, and back. States are [rows, dim] fp32.
struct MlpExact {
  const float* x_first;
  const float* g_last;
  float* g_first;
  void* layer_inputs;  // [layer calls, scratch_rows, D], the parameters' dtype, as cotangents
  float* inverse_rms;  // [layer calls, scratch_rows]; null without a norm
  void* cotangents;
  int64_t rows, scratch_rows;
  int first, last;
};

void launch_mlp_exact(const Network<void>& network, const MlpExact& operands, const MlpLaunch& how);

std::vector<Kernel> mlp_exact_kernels();
