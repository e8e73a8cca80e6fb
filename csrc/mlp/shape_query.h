// What Python must know of the tiles that shape.h cuts, for a padded dim and a dtype known at run time.
#pragma once
#include <cstdint>

#include "common/dtype_codes.h"

struct MlpTiles {
  int chunk;  // hidden is padded to a multiple of it
  int warps;  // of a row group
};

MlpTiles mlp_tiles(int padded_dim, DType dtype);

// How many groups of 16 rows a block is to take, on the current device. A second group halves what the multiprocessors fetch of
// the weights, but with few rows it leaves some of them without a block. Neither has been timed yet.
int mlp_groups(int64_t rows, int padded_dim, DType dtype);
