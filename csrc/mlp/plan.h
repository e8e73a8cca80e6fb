// What Python has to know of the depth-fused kernels' tiles (mlp_shape.h).
#pragma once
#include <cstdint>

#include "common/dtype_codes.h"

struct MlpPlan {
  int chunk;  // hidden is padded to a multiple of it
  int warps;  // of a row group
};

MlpPlan plan_mlp(int padded_dim, DType dtype);

// How many groups of 16 rows a block is to take, on the current device. A second group halves what the multiprocessors fetch of
// the weights, and is in the way while there are not enough blocks for all of them. Neither has been timed yet.
int mlp_groups(int64_t rows, int padded_dim, DType dtype);
