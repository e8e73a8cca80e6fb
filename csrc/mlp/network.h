// A residual MLP stack as the depth-fused kernels take it:
//     f_n(x) = W2_n s(W1_n norm(x) + b1_n) + b2_n,  x_{n+1} = x_n + Phi_n(x_n)
// The parameters are contiguous, aligned to 16 bytes, and padded with zeros: W1 [layers, hidden, D], b1 [layers, hidden],
// W2 [layers, D, hidden], b2 [layers, D], D being the padded dim and hidden a multiple of the chunk. Without biases b1 or b2 is null.
// schedule: of each step h, a and b, where y = x - (a d1 - b d2) extrapolates the increments d1 and d2 of the two steps after it,
// and its anchor. The last two steps, predicted by the increments that the forward pass has saved, have a = 0 and b = -1.
// Must match resode_cuda/fused/network.py and schedule.py; the norms are those of norms.py.
// Plain C++: the bindings include this.
#pragma once
#include <cstdint>

#include "common/dtype_codes.h"

enum class Activation : int { kIdentity, kRelu, kGelu, kGeluTanh, kSilu, kTanh };
constexpr const char* kActivationNames[] = {"identity", "relu", "gelu", "gelu_tanh", "silu", "tanh"};  // by their codes

enum class Norm : int { kNone, kRms, kLayer };
constexpr const char* kNormNames[] = {nullptr, "rms", "layer"};  // by their codes

// One 16-byte access. Kernels read it a step before it is needed, or each step would wait.
struct alignas(16) ScheduledStep {
  float h, a, b;
  float anchor;  // place of the step's starting state among the anchored ones, exact in fp32; -1 where it is not one
};

// T: dtype of the parameters; void at the Python boundary.
template <class T>
struct Network {
  const T* w1;
  const T* b1;
  const T* w2;
  const T* b2;
  const ScheduledStep* schedule;  // [steps]
  int hidden;  // padded
  int dim;     // of states in memory, which are not padded
  bool is_heun;
  Activation activation;
  Norm norm;
  float epsilon;  // of the norm
};

// How a kernel on a network is started.
struct MlpLaunch {
  int padded_dim;  // 16, 32, 64 or 128
  DType dtype;     // of the parameters
  int groups;      // of a block: 1 or 2, at most as many as mlp_groups tells
  void* stream;
};

template <class T>
Network<T> typed(const Network<void>& network) {
  const auto& [w1, b1, w2, b2, schedule, hidden, dim, is_heun, activation, norm, epsilon] = network;
  return {static_cast<const T*>(w1), static_cast<const T*>(b1), static_cast<const T*>(w2), static_cast<const T*>(b2),
          schedule, hidden, dim, is_heun, activation, norm, epsilon};
}
