#pragma once
#include <cstdint>
#include <vector>

#include "common/dtype_codes.h"
#include "common/kernel.h"

// out = x + weight (k1 + k2) over n values; arrays, dtypes and numerics as in forward_step.cu. A null k2 is left out.
struct StepOperands {
  const void* x;
  const void* k1;
  const void* k2;
  double weight;
  void* out;
  int64_t n;
  DType x_dtype, k_dtype;
  void* stream;
};

// Throws if the launch is refused.
void launch_step(const char* op, const StepOperands& operands);

std::vector<Kernel> step_kernels();
