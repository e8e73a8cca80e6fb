#pragma once
#include <vector>

#include "common/kernel.h"
#include "mlp/network.h"

// What the layers of the steps from first to last - 1 have left of their uses, and the sums that their gradients are added to:
// dW1 and dW2 (transposed) [layers, hidden, D], db1 [layers, hidden] and db2 [layers, D], fp32; db1 and db2 null without biases.
struct MlpGradients {
  const void* us;  // [uses, scratch_rows, D], the parameters' dtype
  const void* cs;
  float* dw1;
  float* db1;
  float* dw2;
  float* db2;
  int64_t rows, scratch_rows;
  int first, last;
  bool is_deterministic;  // one order of the sums, whatever the device
};

void launch_mlp_gradients(const Network<void>& network, const MlpGradients& operands, const MlpLaunch& how);

std::vector<Kernel> mlp_gradients_kernels();
