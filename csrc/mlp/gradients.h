#pragma once
#include <vector>

#include "common/kernel.h"
#include "mlp/network.h"

// u and c of each layer call of the steps from first to last - 1, and the sums that the layers' gradients are added to:
// dW1 and dW2 (transposed) [layers, hidden, D], db1 [layers, hidden] and db2 [layers, D], fp32; db1 and db2 null without biases.
struct MlpGradients {
  const void* layer_inputs;  // [layer calls, scratch_rows, D], the parameters' dtype
  const void* cotangents;
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
