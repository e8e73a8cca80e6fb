#pragma once
#include <cstdint>
#include <vector>

#include "common/dtype_codes.h"
#include "common/kernel.h"

// out = x + weight (k1 + k2) over n values; arrays, dtypes and numerics as in forward_step.cu. A null k2 is left out.
// Throws if the launch is refused.
void launch_step(const char* op, const void* x, const void* k1, const void* k2, void* out, double weight, int64_t n, DType x_dtype,
                 DType k_dtype, void* stream);

std::vector<Kernel> step_kernels();
