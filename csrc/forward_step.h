#pragma once
#include <cstdint>

#include "dtype_codes.h"

// out = x + h f over n values; arrays, dtypes and numerics as in forward_step.cu. Throws if the launch is refused.
void launch_forward_step(const void* x, const void* f, void* out, double h, int64_t n, DType x_dtype, DType f_dtype, void* stream);
