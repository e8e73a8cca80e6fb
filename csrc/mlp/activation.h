// a = s(z) and s'(z) of a residual MLP stack's activations, elementwise in fp32. All map 0 to 0, and are finite wherever z is.
// Must match resode_cuda/fused/activations.py.
#pragma once
#include <cmath>
#include <type_traits>

#include "common/device.h"
#include "mlp/network.h"

struct Activated {
  float value, slope;
};

__device__ __forceinline__ float sigmoid(float z) { return fast_reciprocal(1 + fast_exp(-z)); }

template <Activation kActivation>
__device__ __forceinline__ Activated activated(float z) {
  if constexpr (kActivation == Activation::kIdentity) {
    return {z, 1};
  } else if constexpr (kActivation == Activation::kRelu) {
    return {z < 0 ? 0 : z, z <= 0 ? 0.0f : 1.0f};  // NaN goes through both
  } else if constexpr (kActivation == Activation::kGelu) {
    const float probability = 0.5f + 0.5f * erff(z * 0.70710678f);
    return {z * probability, probability + z * (0.39894228f * fast_exp(-0.5f * z * z))};
  } else if constexpr (kActivation == Activation::kGeluTanh) {
    // (1 + tanh(v)) / 2 = sigmoid(2 v),  v = sqrt(2 / pi) (z + 0.044715 z^3). From |z| = 10 on it is 0 or 1 to 37 digits; a square
    // that grew further would overflow, and the slope be 0 times infinity.
    const float square = fminf(z * z, 100), p = sigmoid(1.59576912f * z * (1 + 0.044715f * square));
    return {z * p, p + z * p * (1 - p) * (1.59576912f * (1 + 0.134145f * square))};
  } else if constexpr (kActivation == Activation::kSilu) {
    const float p = sigmoid(z);
    return {z * p, p + z * p * (1 - p)};
  } else {
    static_assert(kActivation == Activation::kTanh, "an activation must have its formulas here");
    const float a = tanhf(z);
    return {a, 1 - a * a};
  }
}

// Calls visit(std::integral_constant<Activation>{}): the one place where an activation known at run time becomes a constant.
// The bindings have refused what is none of them.
template <class Visit>
__device__ __forceinline__ void dispatch_activation(Activation activation, Visit visit) {
  switch (activation) {
    case Activation::kIdentity: return visit(std::integral_constant<Activation, Activation::kIdentity>{});
    case Activation::kRelu: return visit(std::integral_constant<Activation, Activation::kRelu>{});
    case Activation::kGelu: return visit(std::integral_constant<Activation, Activation::kGelu>{});
    case Activation::kGeluTanh: return visit(std::integral_constant<Activation, Activation::kGeluTanh>{});
    case Activation::kSilu: return visit(std::integral_constant<Activation, Activation::kSilu>{});
    case Activation::kTanh: return visit(std::integral_constant<Activation, Activation::kTanh>{});
  }
}

// z <- s(z).
template <int kTiles>
__device__ __forceinline__ void activate(Activation activation, float (&z)[kTiles][4]) {
  dispatch_activation(activation, [&](auto kind) {
#pragma unroll
    for (int i = 0; i < kTiles * 4; i++) z[i / 4][i % 4] = activated<decltype(kind)::value>(z[i / 4][i % 4]).value;
  });
}

// z <- s(z), cotangent <- cotangent s'(z).
template <int kTiles>
__device__ __forceinline__ void activate(Activation activation, float (&z)[kTiles][4], float (&cotangent)[kTiles][4]) {
  dispatch_activation(activation, [&](auto kind) {
#pragma unroll
    for (int i = 0; i < kTiles * 4; i++) {
      const Activated a = activated<decltype(kind)::value>(z[i / 4][i % 4]);
      z[i / 4][i % 4] = a.value;
      cotangent[i / 4][i % 4] *= a.slope;
    }
  });
}
