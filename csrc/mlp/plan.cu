#include "mlp/plan.h"

#include "mlp/dispatch.h"
#include "common/processors.h"

MlpPlan plan_mlp(int padded_dim, DType dtype) {
  MlpPlan plan{};
  dispatch_mlp("mlp_plan", dtype, padded_dim, [&](auto shape, auto) {
    using Shape = decltype(shape);
    plan = {Shape::kChunk, Shape::kWarps};
  });
  return plan;
}

int mlp_groups(int64_t rows, int padded_dim, DType dtype) {
  int groups = 1;
  dispatch_mlp("mlp_groups", dtype, padded_dim, [&](auto shape, auto) {
    if (rows > int64_t{kGroupRows} * processor_count()) groups = decltype(shape)::kGroups;
  });
  return groups;
}
