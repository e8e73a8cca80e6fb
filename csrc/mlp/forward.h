#pragma once
#include <vector>

#include "common/kernel.h"
#include "mlp/network.h"

// The forward pass through the whole depth. States are [rows, dim] fp32.
struct MlpForward {
  const float* x_first;
  float* x_last;          // null where only the anchored states are wanted
  void* increments;       // [saved_increments, rows, dim], the parameters' dtype, that of the last step first
  float* anchored;        // null, or [anchors, rows, dim]: the states that the schedule gives places
  int64_t rows;
  int64_t anchored_rows;  // from the start of one anchored state to that of the next
  int steps, saved_increments;
};

void launch_mlp_forward(const Network<void>& network, const MlpForward& operands, const MlpLaunch& how);

std::vector<Kernel> mlp_forward_kernels();
