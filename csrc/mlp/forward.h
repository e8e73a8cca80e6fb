#pragma once
#include <vector>

#include "common/kernel.h"
#include "mlp/network.h"

struct MlpForward {
  const float* x_first;
  float* x_last;     // null where nobody goes on from there
  void* increments;  // [kept, rows, dim], the parameters' dtype, newest first
  float* anchored;   // null, or [ceil(steps / anchors), rows, dim]
  int64_t rows;
  int64_t anchored_rows;  // that one anchored state is behind the one before
  int steps, kept, anchors;
};

void launch_mlp_forward(const Network<void>& network, const MlpForward& states, const MlpLaunch& how);

std::vector<Kernel> mlp_forward_kernels();
