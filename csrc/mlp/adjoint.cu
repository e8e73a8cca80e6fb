// The backward pass of a residual MLP stack through a range of its depth, one launch. Of each step, from x_{n+1} and g_{n+1}:
//     y     x_{n+1} + (R_n(x_{n+1}) - x_{n+1}), or x_{n+1} - (a d1 - b d2), or the anchored state
//     y     x_{n+1} - Phi_n(y), once for each correction; not from an anchored state
//     g_n = g_{n+1} + (dPhi_n/dy)^T g_{n+1}
//     x_n = x_{n+1} - Phi_n(y), where increments are reused; y where not, or where it was anchored
// R_n is the scheme run backwards, and a Heun step is written by its middle y + h f_n(y):
//     c2 = g,  through = h/2 (df_{n+1})^T c2,  c1 = g + 2 through,  g_n = g + through + h/2 (df_n)^T c1
// A row group keeps its 16 rows of x, y, g and of the last two increments d1 and d2 in registers, fp32; u, c, a and dz,
// the operands of products, and two chunks of weights are in shared memory (layer.h). What gradients.cu needs of each
// layer call goes to scratch memory: u, the layer's input, and c, the cotangent of its output without the factor h or
// h/2. Layer calls are numbered from the range's first step on: the i-th step, from 0 on, has call i, or with Heun the
// calls 2 i of layer n and 2 i + 1 of layer n + 1.
// Must match ReverseSweep of resode_cuda/fused/reference/passes.py.
//
// State: compiled for sm_80 to sm_120 and executed on a CPU (tests/fused/test_fused_cuda.py). It has not run on a GPU yet.
#include "mlp/adjoint.h"

#include "mlp/layer.h"
#include "mlp/row_groups.h"

namespace {
template <class T, int kDim>
__global__ void __launch_bounds__(MlpShape<T, kDim>::kMostThreads, 1)
    mlp_adjoint_kernel(const Network<T> network, const MlpAdjoint operands) {
  using Shape = MlpShape<T, kDim>;
  using State = Values<Shape::kTiles>;
  DYN_SHARED(memory);
  Layers<T, kDim> layers(network, memory, true, operands.rows);
  auto& tile = layers.tile;
  const bool is_heun = network.is_heun;
  const int corrections = operands.corrections;
  const int second = is_heun;  // the place of a step's last layer call, from 0 on
  // The layer that a backward step evaluates first.
  const auto entry = [&](int n, float anchor) {
    return !is_heun || operands.extrapolates || same_for_warp(anchor >= 0) ? n : n + 1;
  };
  ScheduledStep ahead = network.schedule[operands.last - 1];
  layers.fetch(entry(operands.last - 1, ahead.anchor), 0);

  State x = tile.load(operands.x_last), g = tile.load(operands.g_last), d1{}, d2{};
  if (operands.increments_in) {
    d2 = tile.load(operands.increments_in);
    d1 = tile.load(operands.increments_in + operands.rows * network.dim);
  } else if (operands.extrapolates) {
    d2 = tile.load(static_cast<const T*>(operands.last_increment));
    if (operands.increment_before) d1 = tile.load(static_cast<const T*>(operands.increment_before));
  }
  for (int n = operands.last - 1; n >= operands.first; n--) {
    const float h = ahead.h, a = ahead.a, b = ahead.b, anchor = ahead.anchor;
    const bool is_anchored = same_for_warp(anchor >= 0);
    if (n > operands.first) ahead = network.schedule[n - 1];
    State y = x, point, f;
    if (is_anchored) {
      y = tile.load(operands.anchored + static_cast<int64_t>(anchor) * operands.anchored_rows * network.dim);
    } else if (operands.extrapolates) {
      y = tile.inside(map([=](float x, float d1, float d2) { return x - (a * d1 - b * d2); }, x, d1, d2));
    }

    // Evaluations: 0 predicts by the scheme run backwards, 1 to `corrections` correct, and one more takes Heun to its middle.
    const int evaluations = corrections + 1 + second;
    for (int e = is_anchored ? corrections + 1 : operands.extrapolates; e < evaluations; e++) {
      const bool predicts = e == 0, is_middle = e > corrections;
      const float step = predicts ? -h : h, sign = predicts ? 1 : -1;
      point = y;
      for (int k = 0; k <= (is_middle ? 0 : second); k++) {
        auto u = point;
        tile.normalize(network.norm, network.epsilon, u);
        tile.put(tile.u, u);
        const bool is_upper = is_heun && predicts == (k == 0), is_last = k == second || is_middle;
        // After a step's last evaluation comes the product, which starts with its last layer.
        const int next = !is_last ? n + !is_upper : e + 1 < evaluations ? n : n + second;
        f = layers.evaluate(n + is_upper, next);
        if (k < second) {
          point = map([=](float y, float f) { return y + step * f; }, y, f);
        } else {
          const float scale = is_heun ? 0.5f * step : step;
          y = tile.inside(
              map([=](float x, float y, float point, float f) { return x + sign * (0.5f * (point - y) + scale * f); }, x, y, point,
                  f));
        }
      }
    }

    const float scale = is_heun ? 0.5f * h : h;
    State p{}, through{};
    for (int k = second; k >= 0; k--) {
      State u = k ? point : y, du;
      const auto r = tile.normalize(network.norm, network.epsilon, u);
      const auto c = map([](float g, float through) { return g + 2 * through; }, g, through);
      tile.put(tile.u, u);
      tile.put(tile.c, c);
      if (operands.layer_inputs) {
        const int64_t layer_call = (n - operands.first) * layers_per_step(network) + k;
        const int64_t at = (layer_call * operands.scratch_rows + tile.first_row) * kDim;
        tile.put(static_cast<T*>(operands.layer_inputs) + at, kDim, u);
        tile.put(static_cast<T*>(operands.cotangents) + at, kDim, c);
      }
      const bool wants_f = operands.reuses && k == second;
      const int next = k > 0 ? n : n > operands.first ? entry(n - 1, ahead.anchor) : kNoLayer;
      if (k > 0) p = map([](float point, float y) { return 0.5f * (point - y); }, point, y);
      layers.vjp(n + k, next, wants_f, f, du);
      if (wants_f) p = map([scale](float p, float f) { return p + scale * f; }, p, f);
      const auto through_norm = tile.norm_vjp(network.norm, r, map([scale](float du) { return scale * du; }, du));
      if (k > 0) {
        through = through_norm;
      } else {
        g = map([](float g, float through, float through_norm) { return g + through + through_norm; }, g, through, through_norm);
      }
    }

    const bool rebuilds = operands.reuses && !is_anchored;
    x = rebuilds ? tile.inside(map([](float x, float p) { return x - p; }, x, p)) : y;
    if (operands.extrapolates) {
      d2 = d1;
      d1 = p;
    }
    float defect = 0, size = 0;
#pragma unroll
    for (int i = 0; i < Shape::kTiles * 4; i++) {
      const float value = x.of[i / 4][i % 4], off = y.of[i / 4][i % 4] - value;
      defect = multiply_add(off, off, defect);
      size = multiply_add(value, value, size);
    }
    defect = sum_over_lanes(defect);
    size = sum_over_lanes(size);
    if (threadIdx.x % 32 == 0) {
      const int64_t of_warp = tile.first_row / kGroupRows * Shape::kWarps + tile.warp;
      float* squares = operands.squares + (of_warp * operands.steps + n) * 2;
      squares[0] = rebuilds ? defect : 0;
      squares[1] = is_anchored ? 0 : size;
    }
  }
  tile.store(operands.g_first, g);
  if (operands.x_first) tile.store(operands.x_first, x);
  if (operands.increments_out) {
    tile.store(operands.increments_out, d2);
    tile.store(operands.increments_out + operands.rows * network.dim, d1);
  }
}

const RowGroupKernel kAdjoint = {
    "mlp_adjoint", true, [](auto shape) { return mlp_adjoint_kernel<typename decltype(shape)::Parameter, shape.kDim>; }};
}  // namespace

void launch_mlp_adjoint(const Network<void>& network, const MlpAdjoint& operands, const MlpLaunch& how) {
  kAdjoint.launch(network, operands, how);
}

std::vector<Kernel> mlp_adjoint_kernels() { return kAdjoint.kernels(); }
