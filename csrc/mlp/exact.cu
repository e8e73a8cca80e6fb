// The exact adjoint of a residual MLP stack over a range of its depth, one launch: each row group goes forward from the exact state,
// as in forward.cu, and back,
//     g_n = g_{n+1} + (dPhi_n/dx_n)^T g_{n+1}
// with Heun's product as in adjoint.cu. u of each layer call, and r = 1 / RMS from its norm, wait in scratch memory for
// the way back, which adds c, the cotangent of the layer's output without the factor h or h/2, for gradients.cu. x and g
// are in registers, the operands of products and the weights in shared memory (layer.h). On the way back u of a call is read
// while the call after it is computed, and that of the last call is in shared memory from the way forward.
// Must match exact_adjoint of resode_cuda/fused/reference/passes.py.
//
// State: compiled for sm_80 to sm_120 and executed on a CPU (tests/fused/test_fused_cuda.py). It has not run on a GPU yet.
#include "mlp/exact.h"

#include "mlp/layer.h"
#include "mlp/row_groups.h"

namespace {
template <class T, int kDim>
__global__ void __launch_bounds__(MlpShape<T, kDim>::kMostThreads, 1)
    mlp_exact_kernel(const Network<T> network, const MlpExact operands) {
  using State = typename Tile<T, kDim>::State;
  DYN_SHARED(memory);
  Layers<T, kDim> layers(network, memory, true, operands.rows);
  auto& tile = layers.tile;
  const int second = network.is_heun;  // the place of a step's last layer call, from 0 on
  // Where the group's first row of a layer call is in scratch memory.
  const auto row_of_call = [&](int n, int k) {
    return ((n - operands.first) * layers_per_step(network) + k) * operands.scratch_rows + tile.first_row;
  };
  // An unsigned index: a signed one takes six registers more of float at dim 32 on sm_90, and then two groups don't fit.
  const auto h_of = [&](unsigned n) { return network.schedule[n].h; };
  layers.fetch(operands.first, 0);

  State x = tile.load(operands.x_first);
  float h_ahead = h_of(operands.first);
  for (int n = operands.first; n < operands.last; n++) {
    const float h = h_ahead, scale = network.is_heun ? 0.5f * h : h;
    if (n + 1 < operands.last) h_ahead = h_of(n + 1);
    State point = x;
    for (int k = 0; k <= second; k++) {
      State u = point;
      const auto r = tile.normalize(network.norm, network.epsilon, u);
      const int64_t at = row_of_call(n, k);
      tile.put(tile.u, u);
      tile.put(static_cast<T*>(operands.layer_inputs) + at * kDim, kDim, u);
      if (operands.inverse_rms && tile.warp == 0 && threadIdx.x % 4 == 0) {
        for (int i = 0; i < 2; i++) operands.inverse_rms[at + tile.row(2 * i)] = r.of[i];
      }
      if (n + 1 == operands.last && k == second) break;  // the last state is not needed, and the way back starts with its layer
      const State f = layers.evaluate(n + k, n + 1);
      if (k < second) {
        point = map([h](float x, float f) { return x + h * f; }, x, f);
      } else {
        x = tile.inside(map([scale](float x, float point, float f) { return x + (0.5f * (point - x) + scale * f); }, x, point, f));
      }
    }
  }

  __syncthreads();  // r is read by other threads than those that have written it
  State g = tile.load(operands.g_last);
  for (int n = operands.last - 1; n >= operands.first; n--) {
    const float h = h_ahead, scale = network.is_heun ? 0.5f * h : h;
    if (n > operands.first) h_ahead = h_of(n - 1);
    State through{};
    for (int k = second; k >= 0; k--) {
      const int64_t at = row_of_call(n, k);
      typename Tile<T, kDim>::Scales r = {0, 0};
      if (operands.inverse_rms) {
        for (int i = 0; i < 2; i++) r.of[i] = operands.inverse_rms[at + tile.row(2 * i)];
      }
      const auto c = map([](float g, float through) { return g + 2 * through; }, g, through);
      tile.put(tile.c, c);
      tile.put(static_cast<T*>(operands.cotangents) + at * kDim, kDim, c);
      State f, du;
      const int next = k > 0 ? n : n > operands.first ? n - 1 + second : kNoLayer;
      // After the first call its own again, unused: a branch would make registers of 16-bit values wait for it right here.
      const int64_t at_next = next == kNoLayer ? at : at - operands.scratch_rows;
      const auto u_ahead = tile.get_ahead(static_cast<const T*>(operands.layer_inputs) + at_next * kDim);
      layers.vjp(n + k, next, false, f, du);
      const auto through_norm = tile.norm_vjp(network.norm, r, map([scale](float du) { return scale * du; }, du));
      tile.put(tile.u, u_ahead);
      if (k > 0) {
        through = through_norm;
      } else {
        g = map([](float g, float through, float through_norm) { return g + through + through_norm; }, g, through, through_norm);
      }
    }
  }
  tile.store(operands.g_first, g);
}

const RowGroupKernel kExact = {
    "mlp_exact", true, [](auto shape) { return mlp_exact_kernel<typename decltype(shape)::Parameter, shape.kDim>; }};
}  // namespace

void launch_mlp_exact(const Network<void>& network, const MlpExact& operands, const MlpLaunch& how) {
  kExact.launch(network, operands, how);
}

std::vector<Kernel> mlp_exact_kernels() { return kExact.kernels(); }
