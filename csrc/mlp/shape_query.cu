#include "mlp/shape_query.h"

#include "common/processors.h"
#include "mlp/dispatch_shape.h"

MlpTiles mlp_tiles(int padded_dim, DType dtype) {
  MlpTiles tiles{};
  dispatch_shape("mlp_shape", dtype, padded_dim, [&](auto shape, auto) {
    using Shape = decltype(shape);
    tiles = {Shape::kChunk, Shape::kWarps};
  });
  return tiles;
}

int mlp_groups(int64_t rows, int padded_dim, DType dtype) {
  int groups = 1;
  dispatch_shape("mlp_groups", dtype, padded_dim, [&](auto shape, auto) {
    if (rows > int64_t{kGroupRows} * processor_count()) groups = decltype(shape)::kGroups;
  });
  return groups;
}
