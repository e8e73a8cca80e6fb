// The forward pass of a residual MLP stack through its whole depth, one launch:
//     x_{n+1} = x_n + Phi_n(x_n),  Euler: Phi = h f_n(x);  Heun: Phi = (middle - x) / 2 + h/2 f_{n+1}(middle), middle = x + h f_n(x)
// States [rows, dim] fp32; increments in the parameters' dtype. A row group keeps its 16 rows of x in registers; u and a, the
// operands of products, and two chunks of weights are in shared memory (layer.h). Device memory is read for x_0 and for
// weights alone, and written for x_N, the last increments and the anchored states.
// Must match forward of resode_cuda/fused/reference/passes.py.
//
// State: compiled for sm_80 to sm_120 and executed on a CPU (tests/fused/test_fused_cuda.py). It has not run on a GPU yet.
#include "mlp/forward.h"

#include "mlp/layer.h"
#include "mlp/row_groups.h"

namespace {
template <class T, int kDim>
__global__ void __launch_bounds__(MlpShape<T, kDim>::kMostThreads, 1)
    mlp_forward_kernel(const Network<T> network, const MlpForward operands) {
  DYN_SHARED(memory);
  Layers<T, kDim> layers(network, memory, false, operands.rows);
  auto& tile = layers.tile;
  layers.fetch(0, 0);
  auto x = tile.load(operands.x_first);
  ScheduledStep ahead = network.schedule[0];
  for (int n = 0; n < operands.steps; n++) {
    const float h = ahead.h, anchor = ahead.anchor;
    if (operands.anchored && same_for_warp(anchor >= 0))
      tile.store(operands.anchored + static_cast<int64_t>(anchor) * operands.anchored_rows * network.dim, x);
    if (n + 1 < operands.steps) ahead = network.schedule[n + 1];
    auto point = x, increment = x;
    for (int k = 0; k < layers_per_step(network); k++) {
      auto u = point;
      tile.normalize(network.norm, network.epsilon, u);
      tile.put(tile.u, u);
      const bool is_last = n + 1 == operands.steps && k + 1 == layers_per_step(network);
      const auto f = layers.evaluate(n + k, is_last ? kNoLayer : n + 1);
      if (k + 1 < layers_per_step(network)) {
        point = map([h](float x, float f) { return x + h * f; }, x, f);
      } else {
        const float scale = network.is_heun ? 0.5f * h : h;
        increment = map([scale](float x, float point, float f) { return 0.5f * (point - x) + scale * f; }, x, point, f);
      }
    }
    x = map([](float x, float increment) { return x + increment; }, x, increment);
    const int steps_after = operands.steps - 1 - n;
    if (steps_after < operands.saved_increments)
      tile.store(static_cast<T*>(operands.increments) + steps_after * operands.rows * network.dim, increment);
    x = tile.inside(x);
  }
  if (operands.x_last) tile.store(operands.x_last, x);
}

const RowGroupKernel kForward = {
    "mlp_forward", false, [](auto shape) { return mlp_forward_kernel<typename decltype(shape)::Parameter, shape.kDim>; }};
}  // namespace

void launch_mlp_forward(const Network<void>& network, const MlpForward& operands, const MlpLaunch& how) {
  kForward.launch(network, operands, how);
}

std::vector<Kernel> mlp_forward_kernels() { return kForward.kernels(); }
